"""Patch sizes and composition: every trial is what the machine says by itself."""

from __future__ import annotations

import numpy as np
import pytest

import scoremachine as sm
from conftest import random_corpus
from scoremachine.calibration.heldout import held_out_pictures, split
from scoremachine.lab.ablation import ablation
from test_calibration import stripes


def test_trials_are_what_machines_say_by_themselves():
    corpora = stripes(40, 7), random_corpus(N=12, C=3)
    trials = ablation(corpora, ["ls", "pspc+gaussian"], [3, 5, 7], [0.5, 2.0], held_out=4)
    assert len(trials) == 2 * 2 * (3 + 2)
    for trial in trials:
        corpus = corpora[trial.shape[0] == 3]
        _, index, _, reporting = split(corpus, 1, 0, test=4)
        (x, eps), _ = held_out_pictures((corpus, index, reporting, reporting[:0]), 0)
        name, _, window = trial.machine.partition("+")
        m = sm.build(
            name, corpus.subset(index), patch_size=trial.patch_size, window=window or "box",
            kernel="reference",
        )  # fmt: skip
        D = m.denoise(x + trial.sigma * eps, trial.sigma)
        np.testing.assert_allclose(((D - x) ** 2).mean((1, 2, 3)), trial.errors, rtol=1e-4)
        assert trial.images == len(index)
        assert 1 <= trial.effective <= len(index)


def test_larger_patches_have_fewer_effective_sources():
    trials = ablation([stripes(60, 9)], ["ls"], [3, 5, 9], [1.0], held_out=4)
    assert [t.effective for t in trials] == sorted((t.effective for t in trials), reverse=True)


def test_what_is_finished_is_kept(monkeypatch):
    corpus, asked = stripes(40, 7), ([3, 7], [0.5, 2.0], 4)
    whole = ablation([corpus], ["ls"], *asked, seed=1)
    machine, calls = type(sm.build("ls", corpus)), []
    evidence = machine.evidence

    def counted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evidence(self, *given)

    monkeypatch.setattr(machine, "evidence", counted)
    with pytest.raises(KeyboardInterrupt):
        ablation([corpus], ["ls"], *asked, seed=2)  # at its second noise level
    found = ablation([corpus], ["ls"], *asked, seed=2)
    assert len(calls) == 3 + 2
    again = ablation([corpus], ["ls"], *asked, seed=2)
    assert len(calls) == 3 + 2
    for a, b, other in zip(found, again, whole, strict=True):
        assert (a.patch_size, a.sigma, a.effective) == (b.patch_size, b.sigma, b.effective)
        assert np.array_equal(a.errors, b.errors)
        assert not np.array_equal(a.errors, other.errors)


def test_machines_without_boxes_are_refused():
    with pytest.raises(ValueError, match="pca has no boxes"):
        ablation([stripes(20, 7)], ["pca"])
    with pytest.raises(ValueError, match="held_out is 0"):
        ablation([stripes(20, 7)], held_out=0)


def test_crops_tile_a_picture():
    corpus = random_corpus(N=2, C=3, H=7, W=10)
    crops = corpus.crops(3)
    assert crops.images.shape == (2 * 2 * 3, 3, 3, 3)
    assert np.array_equal(crops.images[4], corpus.images[0, :, 3:6, 3:6])
    assert np.array_equal(crops.images[6], corpus.images[1, :, :3, :3])
    with pytest.raises(ValueError, match="no 8 x 8 crop fits into 7 x 10 images"):
        corpus.crops(8)
