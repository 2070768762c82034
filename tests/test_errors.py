"""Held-out denoising errors of several machines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scoremachine as sm
from conftest import SMALL, random_corpus
from scoremachine.calibration.heldout import denoising_error, held_out_pictures, split
from scoremachine.core.schedules import WeightSchedule
from scoremachine.lab import denoising_error as errors_module
from scoremachine.lab.denoising_error import Errors, denoising_errors, ties
from test_calibration import stripes


def errors(rows):
    sigmas, nothing = [1.0] * len(rows[0]), [0.0] * len(rows[0])
    return [Errors("ls", "", 9, sigmas, np.array(row), [], nothing) for row in rows]


def test_the_best_and_its_ties():
    rng = np.random.default_rng(0)
    base = rng.random((1, 40))
    least, near, far = errors([base, base + 0.01 * rng.normal(size=(1, 40)), base + 0.5])
    tied = ties([far, near, least])
    assert tied[:, 0].tolist() == [False, True, True]


def test_intervals_hold_the_mean():
    (e,) = errors([np.random.default_rng(0).random((3, 30))])
    low, high = e.interval()
    assert (low < e.mean).all()
    assert (e.mean < high).all()
    spread = e.errors.std(1, ddof=1) / 30**0.5
    np.testing.assert_allclose((high - low) / (2 * 1.96), spread, rtol=0.2)


def test_errors_are_those_of_each_machine_on_the_same_held_out_pictures():
    corpus = stripes(60, 6)
    found = denoising_errors(
        corpus, ["ideal", "ls"], [0.3], validation=4, test=8, published=[("ls", 5)]
    )
    assert [e.choice for e in found] == ["", "h", "calibrated", "calibrated, h", "published: 5"]
    _, source, choosing, reporting = split(corpus, 4, seed=0, test=8)
    assert [e.images for e in found] == [len(source)] * 5
    generator = torch.Generator().manual_seed(0)
    for index in (choosing, reporting):
        x = torch.from_numpy(corpus.images[index]).double() / 127.5 - 1
        eps = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    for e in found:
        settings = {} if e.machine == "ideal" else {"patch_size": e.values[0]}
        alone = sm.build(
            e.machine,
            corpus.subset(source),
            bandwidth=e.bandwidths[0],
            kernel="reference",
            **settings,
        )
        D = alone.denoise(x + 0.3 * eps, 0.3)
        expected = ((D - x) ** 2).mean((1, 2, 3)).numpy()
        np.testing.assert_allclose(e.errors[0], expected, rtol=1e-4)


def test_a_composite_that_is_one_machine_has_its_errors(monkeypatch):
    """On the same pictures, with the same noise, of a source without the images that weigh."""
    weighed = []

    def one_of(name, corpus, **settings):
        return sm.build(name, corpus, **({"of": "ls"} if name == "composite" else {}), **settings)

    def stack(machine, sigmas, parts, seed):
        weighed.append(parts)
        return SimpleNamespace(schedule=WeightSchedule([1.0], [[1.0]]))

    monkeypatch.setattr(errors_module, "build", one_of)
    monkeypatch.setattr(errors_module, "stack", stack)
    corpus = stripes(80, 6)
    levels = [2.0, 0.02]
    ls, _, mixed = denoising_errors(corpus, ["ls", "composite"], levels, 4, test=8)
    _, source, choosers, reporters = split(corpus, 4, 0, test=8)
    assert ls.images == len(source)  # as without a composite
    _, rest, weighing, _ = weighed[0]
    assert len(weighing) == 16
    assert set(choosers) <= set(weighing)
    assert set(weighing) - set(choosers) == set(source) - set(rest)
    assert mixed.images == len(rest)
    _, pictures = held_out_pictures((corpus, rest, choosers, reporters), 0)
    for k, level in enumerate(levels):
        alone = sm.build("ls", corpus, patch_size=ls.values[k])
        expected = denoising_error(alone, rest, pictures, level)
        np.testing.assert_array_equal(mixed.errors[k], expected)


def test_els_takes_fewer_images_and_the_same_held_out_ones(monkeypatch, capsys):
    monkeypatch.setattr(errors_module, "ELS_IMAGES", 20)
    corpus = stripes(60, 5)
    ls, _, els, _ = denoising_errors(corpus, ["ls", "els"], [1.0], validation=4, test=4)
    assert (ls.images, els.images) == (52, 20)
    assert "els compares all positions, so it uses 20 of 52" in capsys.readouterr().err


def test_every_machine_can_be_measured():
    found = denoising_errors(stripes(30, 5), sigmas=[0.5], validation=2, test=2)
    assert {e.machine for e in found} == set(SMALL)
    assert all(np.isfinite(e.errors).all() for e in found)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="validation is 0"):
        denoising_errors(random_corpus(), validation=0)
    with pytest.raises(ValueError, match="no machine is called 'lss'"):
        denoising_errors(random_corpus(), ["lss"])
    with pytest.raises(ValueError, match="at least 3 images"):
        denoising_errors(random_corpus(N=2), ["ls"])
    with pytest.raises(ValueError, match="not among the machines"):
        denoising_errors(stripes(20, 5), ["ls"], [1.0], 2, 2, published=[("els", 3)])
    with pytest.raises(ValueError, match="has no locality"):
        denoising_errors(stripes(20, 5), ["ideal"], [1.0], 2, 2, published=[("ideal", 3)])
    with pytest.raises(ValueError, match="has no locality to choose"):
        sm.calibrate(random_corpus(), "ideal", values=[3])
    with pytest.raises(ValueError, match="no published schedule"):
        denoising_errors(stripes(20, 5), ["ls"], [1.0], 2, 2, published=[("ls", "nobody")])
