"""Held-out calibration."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import scoremachine as sm
from conftest import random_corpus
from scoremachine.calibration import heldout as calibration
from scoremachine.calibration.heldout import Exchange, parts_for, split
from scoremachine.lab.comparison.parts import built_machines
from scoremachine.lab.networks import Network


def stripes(N: int, side: int, seed: int = 0) -> sm.Corpus:
    """Rows of smooth random bands: distant pixels are independent, near ones are not."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(N, side + 2, side + 2))
    smooth = sum(noise[:, a : a + side, b : b + side] for a in range(3) for b in range(3)) / 3
    return sm.Corpus(np.clip(127.5 + 60 * smooth, 0, 255).astype(np.uint8)[:, None])


def test_held_out_images_are_in_no_source():
    corpus, source, choosing, reporting = split(random_corpus(N=40), 8, seed=0)
    assert len(source) + len(choosing) + len(reporting) == len(corpus) - 2  # and not their copies
    assert not set(source) & (set(choosing) | set(reporting))
    assert not set(choosing) & set(reporting)


def test_held_out_crops_keep_a_crop_away_from_the_source():
    u = np.random.default_rng(0).integers(0, 256, (1, 1, 40, 60), dtype=np.uint8)
    crops, source, choosing, reporting = split(sm.Corpus(u), 4, seed=0, equivariant=True)
    side = crops.shape[1]
    columns = {u[0, 0, 0, b : b + side].tobytes(): b for b in range(60 - side + 1)}
    starts = [columns.get(crops.images[i, 0, 0].tobytes()) for i in source]
    assert max(b for b in starts if b is not None) + 2 * side <= 60 - side
    assert not set(source) & (set(choosing) | set(reporting))


def test_the_chosen_size_is_the_best_of_its_curve():
    found = sm.calibrate(stripes(300, 9), "ls", sigmas=[0.05, 0.5, 5.0], held_out=12)
    assert found.sigmas == [5.0, 0.5, 0.05]
    assert np.array(found.value_errors).shape == (3, len(found.values))
    for row, size in zip(found.value_errors, found.chosen, strict=True):
        assert min(row) == row[found.values.index(size)]
    for row, h in zip(found.bandwidth_errors, found.chosen_bandwidths, strict=True):
        assert min(row) == row[found.bandwidths.index(h)]
    assert found.values == [3, 5, 7, 9]


def test_errors_are_what_the_machine_makes_on_held_out_images():
    corpus = stripes(60, 6)
    found = sm.calibrate(corpus, "ls", sigmas=[0.3], held_out=4, values=[3], bandwidths=[0.0])
    _, source, choosing, _ = split(corpus, 4, seed=0)
    x = torch.from_numpy(corpus.images[choosing]).double() / 127.5 - 1
    eps = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = sm.build("ls", sm.Corpus(corpus.images[source]), patch_size=3, kernel="reference")
    D = alone.denoise(x + 0.3 * eps, 0.3)
    assert found.value_errors[0][0] == pytest.approx(((D - x) ** 2).mean().item(), rel=1e-4)


def test_locality_grows_with_the_noise():
    found = sm.calibrate(stripes(400, 11), "ls", sigmas=[0.05, 2.0], held_out=16)
    assert found.chosen[0] > found.chosen[1]


def test_bandwidth_helps_where_the_noise_is_small():
    found = sm.calibrate(stripes(100, 8), "ls", sigmas=[0.05], held_out=8, values=[3])
    assert found.chosen_bandwidths[0] > 0
    assert np.mean(found.errors[0]) < np.mean(found.plain_errors[0])


def test_a_calibration_is_kept_beside_the_corpus(monkeypatch):
    corpus = stripes(50, 6, seed=5)
    first = sm.calibrate(corpus, "ls", sigmas=[0.5], held_out=4)
    monkeypatch.setattr("scoremachine.calibration.heldout._measure", None)
    assert sm.calibrate(corpus, "ls", sigmas=[0.5], held_out=4) == first


def test_an_interrupted_calibration_goes_on_at_the_level_it_was_at(monkeypatch):
    corpus = stripes(60, 6)
    settings = {"sigmas": [3.0, 1.0, 0.3], "held_out": 4, "seed": 5}
    measure, asked = calibration.denoising_error, []

    def stopped(machine, source, pictures, sigma, target):
        asked.append(sigma)
        if sigma < 1:
            raise KeyboardInterrupt
        return measure(machine, source, pictures, sigma, target)

    monkeypatch.setattr(calibration, "denoising_error", stopped)
    with pytest.raises(KeyboardInterrupt):
        sm.calibrate(corpus, "ls", **settings)
    assert set(asked) == {3.0, 1.0, 0.3}
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        sm.calibrate(corpus, "ls", **settings)
    assert asked == [0.3]
    monkeypatch.undo()
    found = sm.calibrate(corpus, "ls", **settings)
    assert found == sm.calibrate(corpus, "ls", **settings)
    assert not list(corpus.entry("records").folder.glob("*unfinished*"))
    for path in corpus.entry("records").folder.glob("calibration-ls-*"):
        path.unlink()
    assert found == sm.calibrate(corpus, "ls", **settings)  # without interruption


def test_a_damaged_calibration_is_made_again():
    corpus = stripes(50, 6, seed=6)
    first = sm.calibrate(corpus, "ls", sigmas=[0.5], held_out=4)
    (path,) = corpus.entry("records").folder.glob("calibration-ls-*.json")
    path.write_text(path.read_text()[:40])
    assert sm.calibrate(corpus, "ls", sigmas=[0.5], held_out=4) == first


@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
def test_auto_is_the_default_and_chooses_sizes(name, capsys):
    machine = sm.build(name, stripes(60, 7, seed=7))
    assert machine.patch_size == "auto"
    D = machine.denoise(torch.zeros(1, 1, 7, 7), 0.5)
    assert torch.isfinite(D).all()
    assert machine.patch_size == "auto"  # a machine does not change
    assert isinstance(machine.resolved().patch_size, sm.PatchSchedule)
    said = re.findall(r"'auto': choosing (\w+ \w+)", capsys.readouterr().err)
    assert said == ["patch sizes"]


@pytest.mark.parametrize("name", ["ideal", "gaussian", "ls", "pspc"])
def test_auto_bandwidth_denoises_better(name):
    corpus = stripes(60, 7, seed=8)
    kept = sm.Corpus(corpus.images[:50])
    settings = {} if name in ("ideal", "gaussian") else {"patch_size": 3}
    x = torch.from_numpy(corpus.images[50:]).float() / 127.5 - 1
    y = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    errors = [
        ((sm.build(name, kept, bandwidth=h, **settings).denoise(y, 0.05) - x) ** 2).mean()
        for h in (0.0, "auto")
    ]
    assert errors[1] <= errors[0]


def test_sizes_are_chosen_before_bandwidths(capsys):
    machine = sm.build("ls", stripes(60, 7, seed=9), bandwidth="auto")
    machine.denoise(torch.zeros(1, 1, 7, 7), 0.5)
    said = re.findall(r"'auto': choosing (\w+)", capsys.readouterr().err)  # bars may be there too
    assert said == ["patch", "bandwidths"]


@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
def test_auto_on_one_picture(name):
    """Nothing can be held out for LS and PSPC, which give the picture back; ELS uses crops."""
    u = np.random.default_rng(0).integers(0, 256, (1, 1, 12, 30), dtype=np.uint8)
    machine = sm.build(name, sm.Corpus(u))
    D = machine.denoise(torch.zeros(1, 1, 12, 30), 0.5)
    if name == "els":
        assert torch.isfinite(D).all()
    else:
        assert (D - (torch.from_numpy(u).float() / 127.5 - 1)).abs().max() < 1e-5


def test_calibration_needs_three_images():
    with pytest.raises(ValueError, match="at least 3 images"):
        sm.calibrate(random_corpus(N=2), "ls")
    with pytest.raises(ValueError, match="expected positive"):
        sm.calibrate(random_corpus(), "ls", sigmas=[0.0])
    with pytest.raises(ValueError, match="held_out is 0"):
        sm.calibrate(random_corpus(), "ls", held_out=0)


def test_towards_a_network_that_is_a_machine_it_finds_its_size():
    corpus = stripes(120, 9)
    network = Network(sm.build("ls", corpus, patch_size=5), corpus.shape)
    unseen = list(range(0, 120, 6))
    network.card = {"training": {"corpus_digest": corpus.digest, "held_out": unseen}}
    sigmas = [0.1, 0.7, 3.0]
    parts = parts_for(sm.build("ls", corpus), 8, 0, network)
    assert set(parts[2]) | set(parts[3]) <= set(unseen)
    assert not set(parts[1]) & set(unseen)
    source = corpus.subset(parts[1])
    network.denoiser = sm.build("ls", source, patch_size=5)  # which has seen none of them
    found = sm.calibrate(corpus, "ls", sigmas, held_out=8, network=network)
    assert found.chosen == [5, 5, 5]
    assert np.allclose(found.plain_errors, 0, atol=1e-12)
    assert sm.calibrate(corpus, "ls", sigmas, held_out=8).chosen != [5, 5, 5]
    truth = calibration.calibrate(sm.build("ls", corpus), sigmas, 8, parts=parts)
    exchange = Exchange.of(truth, found)
    assert exchange.by_network == [5, 5, 5]
    for k in range(3):
        errors, place = truth.value_errors[k], truth.values.index(5)
        assert exchange.to_truth[k] == errors[place] / min(errors) >= 1


def test_a_size_chosen_towards_a_network_for_a_comparison(tmp_path, monkeypatch):
    """Of a network that is a machine, by the last of the images that it has not seen."""
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path))
    corpus = stripes(160, 9)
    unseen = list(range(0, 160, 5))
    source = corpus.subset(np.setdiff1d(np.arange(160), unseen))
    made = sm.build("ls", source, patch_size=5, bandwidth=0.04)
    network = Network(made, corpus.shape, "five")
    network.card = {"training": {"corpus_digest": corpus.digest, "held_out": unseen}}
    sizes, h = calibration.towards(network, sm.build("ls", source), corpus)
    assert set(sizes.values) == {5}
    assert set(h.values) == {0}
    sizes, h = calibration.towards(network, sm.build("ls", source), corpus, bandwidth=True)
    assert set(sizes.values) == {5}
    assert h(0.4) == 0.04  # told apart where the weights are not all on one image, nor flat
    compared = sm.compare(network, ["ls:network+h", "ls"], corpus, pictures=4, count=2, steps=4)
    for part in compared.parts:
        if part.label == "ls:network+h":
            assert np.allclose(part.measures["R2"], 1, atol=1e-9)
    assert compared.settings["machines"]["ls:network+h"]["patch_size"]["name"] == "network"
    # and nothing of the choice rests on the images that judge it
    assert not set(compared.settings["held_out"]) & set(unseen[-16:])


def test_a_machine_chosen_towards_no_network():
    with pytest.raises(
        ValueError, match="chosen by agreement with a network, which only compare and study"
    ):
        built_machines(["ls:network"], random_corpus(), 10)


def test_calibrate_towards_a_network_prints_what_either_costs(tmp_path):
    from scoremachine.app.runs.machines import CalibrationOptions, calibrate_corpus

    corpus = sm.Corpus.open("digits", limit=80)
    network = Network(sm.build("gaussian", corpus), corpus.shape, "wiener")
    options = CalibrationOptions(held_out=4, steps=3, network=network)
    calibrate_corpus(corpus, "ls", tmp_path, {}, options)
    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert len(kept["exchange"]["to_network"]) == len(kept["sigmas"])
    assert min(kept["exchange"]["to_network"]) >= 1
