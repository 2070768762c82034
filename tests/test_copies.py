"""Copies of held-out images are in no source, wherever images are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scoremachine as sm
from conftest import random_corpus
from scoremachine.calibration.copies import NEAR, copies, single, without_copies
from scoremachine.calibration.heldout import parts_for, split, unseen_parts
from scoremachine.lab.ablation import ablation
from scoremachine.lab.comparison.parts import held_out_and_source
from scoremachine.lab.denoising_error import denoising_errors
from scoremachine.lab.networks import Network
from scoremachine.lab.sizes import sizes


def distinct(N: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (N, 1, side, side), dtype=np.uint8)


def doubled(N: int, jitter: int = 0, seed: int = 0) -> sm.Corpus:
    """Every image twice, the second time with noise of so many gray levels."""
    u = distinct(N, seed=seed)
    noise = np.random.default_rng(seed + 1).integers(-jitter, jitter + 1, u.shape)
    return sm.Corpus(np.concatenate([u, np.clip(u + noise, 0, 255).astype(np.uint8)]))


def originals(positions: np.ndarray, N: int) -> set[int]:
    return {int(i) % N for i in positions}


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 1000))
def test_copies_are_found_exactly(N, held, seed):
    rng = np.random.default_rng(seed)
    u = distinct(N, 4, seed)[rng.integers(0, N, N)]
    positions = rng.permutation(N)[:held]
    found = copies(u, positions, np.arange(N))
    x = u.reshape(N, -1).astype(float)
    far = np.sqrt(((x[positions][:, None] - x) ** 2).mean(2))
    different = positions[:, None] != np.arange(N)
    near = far < NEAR * np.median(far[different])
    assert (found == (different & ((far == 0) | near))).all()


@pytest.mark.parametrize("jitter", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_part_holds_a_copy_of_another_parts_image(jitter, seed):
    corpus = doubled(40, jitter)
    _, *parts = split(corpus, 8, seed)
    source, choosing, reporting = (originals(part, 40) for part in parts)
    assert not source & (choosing | reporting)
    assert not choosing & reporting
    assert sum(map(len, parts)) < 80


def test_images_that_are_no_copies_all_stay(capsys):
    corpus = sm.Corpus.open("digits", limit=300)
    _, *parts = split(corpus, 16, seed=0)
    assert sum(map(len, parts)) == 300
    assert capsys.readouterr().err == ""


def test_how_many_copies_were_left_out_is_said_in_one_line(capsys):
    corpus = doubled(40)
    _, *parts = split(corpus, 8, seed=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{80 - sum(map(len, parts))} of 80 images are left out of the source too" in line


def test_doubled_images_choose_the_patch_sizes_that_they_choose_once():
    once = sm.Corpus.open("digits", limit=200)
    twice = sm.Corpus(np.concatenate([once.images, once.images]))
    chosen = sm.calibrate(twice, "ls", sigmas=[0.5, 0.1, 0.05]).chosen
    assert max(chosen) < 7  # and not the whole images, which would find the copies
    machine = sm.build("ls", twice)
    assert machine.patch_size == "auto"


def test_identical_images_are_held_out_of_nothing():
    corpus = sm.Corpus(np.repeat(distinct(1), 12, axis=0))
    with pytest.raises(ValueError, match="copies of each other: give patch_size a number"):
        sm.calibrate(corpus, "ls")
    import torch

    D = sm.build("ls", corpus).denoise(torch.zeros(1, 1, 6, 6), 0.5)  # which gives the image back
    assert (D - (torch.from_numpy(corpus.images[:1]).float() / 127.5 - 1)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("machine", "what"),
    [("ls", "patch_size"), ("pspc-flex", "share"), ("pca", "threshold"), ("smoothed", "delta")],
)
def test_too_few_images_name_the_machines_own_setting(machine, what):
    with pytest.raises(ValueError, match=f"at least 3.*give {what} a number"):
        sm.calibrate(random_corpus(N=2), machine)


def test_too_few_images_for_a_machine_that_has_no_locality():
    with pytest.raises(ValueError, match="'ideal' with a number as bandwidth"):
        sm.calibrate(random_corpus(N=2), "ideal")


def network_of(corpus: sm.Corpus, unseen: list[int]) -> Network:
    network = Network(sm.build("gaussian", corpus), corpus.shape, "wiener")
    network.card = {"training": {"corpus_digest": corpus.digest, "held_out": unseen}}
    return network


def test_unseen_images_with_a_copy_are_passed_over(capsys):
    u = distinct(30)
    u[3] = u[20]  # 3 is not trained on, and 20 is
    corpus = sm.Corpus(u)
    network = network_of(corpus, [1, 3, 5, 7, 9, 11])
    held, source = held_out_and_source([network], corpus, 4, seed=0)
    assert held.tolist() == [1, 5, 7, 9]
    assert len(source) == 24
    assert "1 images that the network has not seen are skipped" in capsys.readouterr().err
    _, _, choosing, reporting = parts_for(sm.build("ls", corpus), 2, 0, network)
    assert [*choosing, *reporting] == [1, 5, 7, 9]
    assert single(corpus, np.array([3, 1]), 2).tolist() == [1]
    joined, _, first, last = unseen_parts(network, source, corpus, 2)
    assert not any((joined.images[i] == u[3]).all() for i in [*first, *last])


def test_a_network_trained_on_copies_of_all_it_left_out(capsys):
    corpus = doubled(20)
    held, source = held_out_and_source([network_of(corpus, [1, 3, 5])], corpus, 4, seed=0)
    assert "was trained on copies" in capsys.readouterr().err
    kept = {image.tobytes() for image in source.images}
    assert not kept & {corpus.images[i].tobytes() for i in held}


def test_measurements_use_sources_without_copies():
    """ideal finds a copy of a held-out image at once, where the source has one."""
    corpus = doubled(40)
    (found, _) = denoising_errors(corpus, ["ideal"], [0.05], 4, 4)
    assert found.errors.min() > 0.1
    (trial,) = ablation([corpus], ["ls"], [5], [0.05], held_out=4)
    assert trial.errors.min() > 0.01
    assert sizes(corpus, "ideal", [4], [0.05], held_out=4).errors[0].min() > 0.1


def test_nothing_is_held_out_of_a_mixture():
    mixture = sm.compress(sm.Corpus.open("digits", limit=60), 4)
    with pytest.raises(ValueError, match=r"clusters contain what .* give bandwidth a number"):
        sm.build("ideal", mixture, bandwidth="auto").prepare()
    with pytest.raises(ValueError, match="clusters contain what"):
        sm.calibrate(mixture, "ideal")
    with pytest.raises(ValueError, match="give the images"):
        held_out_and_source([], mixture, 2, 0)


def test_crops_that_repeat_are_no_source():
    tile = distinct(1, 16)[0, 0]
    picture = sm.Corpus(np.tile(tile, (3, 8))[None, None])  # 48 x 128, of which crops recur
    with pytest.raises(ValueError, match="is a copy of one that would be held out"):
        split(picture, 4, 0, equivariant=True)
    mixed = np.array(picture.images)
    mixed[:, :, :, :64] = distinct(1, 64)[0, :, :48]
    crops, source, choosing, reporting = split(sm.Corpus(mixed), 4, 0, equivariant=True)
    held = {crops.images[i].tobytes() for i in [*choosing, *reporting]}
    assert not held & {crops.images[i].tobytes() for i in source}


def test_without_copies_keeps_order():
    u = distinct(6)
    u[4] = u[0]
    assert without_copies(sm.Corpus(u), np.array([0]), np.array([5, 4, 3])).tolist() == [5, 3]
