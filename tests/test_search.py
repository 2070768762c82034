"""The search of an index: what it leaves out, how it is built, and what breaks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

import scoremachine as sm
from conftest import noised, random_images
from scoremachine.app.cli import main
from scoremachine.core.posterior import ScanRequest
from scoremachine.engines.chunks import fill
from scoremachine.engines.search import ahead as ahead_module
from scoremachine.engines.search import bounded as bounded_module
from scoremachine.engines.search import draw as draw_module
from scoremachine.engines.search import drawn as drawn_module
from scoremachine.engines.search import index as index_module
from scoremachine.engines.search import rounds as rounds_module
from scoremachine.engines.search.bounded import Bounded
from scoremachine.engines.search.embedding import Embedding
from scoremachine.engines.search.floats import (
    LANES,
    add_totals,
    hmax,
    inverse,
    load,
    logs,
    running,
    store,
)
from scoremachine.engines.search.guess import BESIDE, beside, guess
from scoremachine.engines.search.index import Index, Patches, Source, build, classes
from scoremachine.engines.search.rounds import Purse, blank, queries
from scoremachine.sources.searched import Search

seeds = st.integers(0, 2**31)
sigmas = st.floats(-3, 2).map(lambda e: 10.0**e)
errors = st.sampled_from([0.3, 1e-3, 1e-7])
boundaries = st.sampled_from(["broken", "circular"])


def searching(images, P, error=1e-3, boundary="broken", bound="deterministic"):
    """A machine that never falls back to the exact scan, and one that always does."""
    corpus = sm.Corpus(images)
    search = Search("bounded", error, bound, patience=np.inf)
    machine = sm.EquivariantLocalScore(corpus, patch_size=P, boundary=boundary, search=search)
    return machine, machine.clone_with(corpus, search="exact")


def assert_within(images, P, y, sigma, error=1e-3, boundary="broken", rounding=0.0):
    """The error is within the bound that is told, and that within what was asked for."""
    machine, exact = searching(images, P, error, boundary)
    D, mass, kind = answer = machine.denoise_bounded(y, sigma)
    off = (D - exact.denoise(y, sigma)).abs().amax(1)
    assert kind == "deterministic"
    assert mass.shape == off.shape
    assert torch.isfinite(D).all()
    assert (mass >= 0).all()
    assert (off <= answer.error + 1e-9 + rounding).all()
    assert (answer.error <= error).all()


def flat(value, N, C, H, W):
    return np.full((N, C, H, W), value, dtype=np.uint8)


def adversarial(kind, seed, N, C, H, W):
    """Corpora that clusters, boxes and codes are worst at."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return random_images(seed, N, C, H, W)
    if kind == "duplicates":
        return np.repeat(random_images(seed, 2, C, H, W), N, 0)
    if kind == "constant images":
        return np.broadcast_to(
            rng.integers(0, 256, (N, C, 1, 1), dtype=np.uint8), (N, C, H, W)
        ).copy()
    if kind == "one patch":
        return flat(rng.integers(0, 256), N, C, H, W)
    if kind == "equidistant":  # lone pixels, at most one to a patch
        images = flat(0, N, C, H, W)
        images[
            np.arange(N), rng.integers(0, C, N), rng.integers(0, H, N), rng.integers(0, W, N)
        ] = 255
        return images
    assert kind == "almost one patch"
    images = flat(128, N, C, H, W)
    images[rng.integers(0, N), :, 0, 0] += 1
    return images


KINDS = ["random", "duplicates", "constant images", "one patch", "equidistant", "almost one patch"]
shapes = st.tuples(
    st.integers(1, 30), st.sampled_from([1, 3]), st.integers(5, 9), st.integers(5, 9)
)


@given(
    st.sampled_from(KINDS), seeds, shapes, sigmas, st.sampled_from([1, 3, 5]), errors, boundaries
)
def test_a_search_is_within_its_bound(kind, seed, shape, sigma, P, error, boundary):
    images = adversarial(kind, seed, *shape)
    y, level = noised(sm.Corpus(images), sigma, seed)
    assert_within(images, P, y.double(), level, error, boundary)


@given(st.sampled_from(KINDS), seeds, shapes, sigmas, st.sampled_from([1, 3, 5]), errors)
def test_comparing_bytes_first_leaves_out_nothing_that_matters(kind, seed, shape, sigma, P, error):
    images = adversarial(kind, seed, *shape)
    y, level = noised(sm.Corpus(images), sigma, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds_module, "WORTHWHILE", 1)  # for patches of any size
        assert_within(images, P, y.double(), level, error)


@given(st.sampled_from(KINDS), seeds, shapes, sigmas, boundaries)
def test_training_images_are_within_the_bound(kind, seed, shape, sigma, boundary):
    images = adversarial(kind, seed, *shape)
    y = torch.from_numpy(images[:2] / 127.5 - 1)
    assert_within(images, 3, y, sigma, 1e-3, boundary)


@given(seeds, st.floats(-2, 4).map(lambda e: 10.0**e), sigmas)
def test_pictures_far_from_every_image_are_within_the_bound(seed, scale, sigma):
    images = random_images(seed, 20, 1, 7, 7)
    noise = torch.Generator().manual_seed(seed)
    y = scale * torch.randn(1, 1, 7, 7, dtype=torch.float64, generator=noise)
    # a squared distance has 16 digits, however far away a picture is
    assert_within(images, 3, y, sigma, rounding=1e-14 * (scale / sigma) ** 2)


@pytest.mark.parametrize("P", [7, 9])
@pytest.mark.parametrize("sigma", [1e-3, 0.03, 0.2, 1.0, 30.0])
def test_a_search_over_many_nodes_is_within_its_bound(sigma, P):
    """Smooth pictures, as many patches as make a tree of several levels."""
    images = smooth_images(0, 400, 16, coarse=4)
    y = torch.from_numpy(images[:1] / 127.5 - 1) + sigma * torch.randn(
        1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert_within(images[1:], P, y, sigma)


def test_most_patches_are_left_out():
    """What makes it a search: at little noise next to nothing is compared, and it says so."""
    images = random_images(0, 200, 3, 16, 16)
    machine, _ = searching(images, 5)
    y = torch.from_numpy(images[:1] / 127.5 - 1) + 0.05
    mass = machine.denoise_bounded(y, 0.05).omitted_mass
    assert 0 < mass.max() <= 5e-4


@given(seeds, st.sampled_from([2, 3]))
def test_an_embedding_never_makes_a_distance_longer(seed, P):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(60, P * P * 3)) * rng.uniform(0, 2, P * P * 3)
    embedding = Embedding.of(patches, int(rng.integers(1, P * P * 3 + 1)))
    s, q = patches - embedding.mean, 3 * rng.normal(size=(60, P * P * 3))
    difference = embedding(s)[0].astype(np.float64) - embedding(q)[0]
    first = embedding.first
    everything = difference
    if embedding.m > first:
        everything = np.delete(difference, first - 1, 1)  # the norm of what follows
    for part in (difference[:, :first], everything):
        near = np.linalg.norm(part, axis=1)
        assert (near <= np.linalg.norm(s - q, axis=1) * (1 + 1e-5) + 1e-5).all()


@given(seeds, st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 7), st.integers(1, 40))
def test_numbers_of_patches_are_those_of_their_windows(seed, C, h, w, kept):
    """Bytes times bytes: sums of integers, and so nothing is lost by that."""
    rng = np.random.default_rng(seed)
    corpus = sm.Corpus(rng.integers(0, 256, (5, C, 8, 9), np.uint8))
    source = Source.of(corpus, corpus.indices())
    patches = Patches((h, w), (1, 8 - h), (0, 10 - w))
    windows = np.lib.stride_tricks.sliding_window_view(source.pixels, (h, w), (1, 2))
    s = windows[:, 1:].transpose(0, 1, 2, 4, 5, 3).reshape(5 * patches.per_image, -1) / 127.5 - 1
    e = Embedding.of(s, kept)
    places = rng.integers(0, len(s), 21).astype(np.uint32)
    E, squares = e.of_patches(source.windows(patches), places, e.columns((h, w)))
    expected, norms = e(np.ascontiguousarray(s[places] - e.mean))
    assert np.linalg.norm(e.V, 2) <= 1
    np.testing.assert_allclose(e.V.T @ e.V, np.eye(e.V.shape[1]), atol=1e-3)
    np.testing.assert_allclose(squares, norms, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(E, expected, rtol=1e-6, atol=2e-6)


def test_numbers_of_huge_patches_do_not_overflow():
    """300,000 of the largest products are more than 32 bits hold."""
    D = 300_000
    corpus = sm.Corpus(np.full((2, 3, 1, D // 3), 255, np.uint8))
    source = Source.of(corpus, corpus.indices())
    patches = Patches((1, D // 3), (0, 1), (0, 1))
    e = Embedding(np.full(D, -1.0), np.full((D, 1), D**-0.5), 1)
    E, squares = e.of_patches(source.windows(patches), np.arange(2), e.columns(patches.size))
    np.testing.assert_allclose(squares, 4 * D, rtol=1e-12)
    np.testing.assert_allclose(E[:, 0], 2 * D**0.5, rtol=1e-6)


@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_leaders_density_and_confidence_are_the_exact_ones(boundary):
    images = random_images(3, 40, 3, 8, 8)[3:]
    machine, exact = searching(images, 3, 1e-6, boundary)
    y, _ = noised(sm.Corpus(images), 0.3, 0)
    index, sigma = np.arange(len(images)), torch.full((len(y),), 0.3, dtype=torch.float64)
    a, b = (
        m.evidence(y.double(), sigma, index, m.windows(0.3, index), leaders=3).fold
        for m in (machine, exact)
    )
    torch.testing.assert_close(a.log_partition, b.log_partition, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.effective_sources, b.effective_sources, atol=0, rtol=1e-5)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-8, rtol=0)
    assert torch.equal(a.places, b.places)


def test_a_class_is_searched_by_itself():
    images, labels = random_images(0, 60, 1, 8, 8), np.arange(60) % 3
    corpus = sm.Corpus(images, labels)
    machine = sm.EquivariantLocalScore(corpus, patch_size=3, search="bounded")
    y, level = noised(corpus, 0.2, 0)
    alone = sm.EquivariantLocalScore(sm.Corpus(images[labels == 1]), patch_size=3, search="exact")
    D = machine.denoise(y.double(), level, label=1)
    assert (D - alone.denoise(y.double(), level)).abs().max() < 1e-3
    index = corpus.indices(1)
    fold = machine.evidence(
        y.double(), torch.full((len(y),), 0.2, dtype=torch.float64), index,
        machine.windows(0.2, index), leaders=2,
    ).fold  # fmt: skip
    assert set((fold.places // 64).unique().tolist()) <= set(index.tolist())


def test_pictures_and_threads_change_no_bit(monkeypatch):
    images = random_images(1, 100, 3, 12, 12)
    machine, _ = searching(images, 5)
    y, _ = noised(sm.Corpus(images), 0.2, 0)
    level = torch.tensor([0.05, 0.2, 1.0])[: len(y)]
    together = machine.denoise(y.double(), level)
    alone = torch.cat(
        [machine.denoise(y[b : b + 1].double(), level[b : b + 1]) for b in range(len(y))]
    )
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(machine.denoise(y.double(), level), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_a_statistical_search_is_as_good_as_its_level(sigma):
    """Patches of many numbers: most of what noise adds to a distance is known to be noise."""
    images = smooth_images(0, 300, 18)
    machine, exact = searching(images[4:], 11, bound="statistical")
    y = torch.from_numpy(images[:4] / 127.5 - 1) + sigma * torch.randn(
        4, 3, 18, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    answer = machine.denoise_bounded(y, sigma)
    off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
    assert answer.kind == "statistical"
    assert (off > answer.error + 1e-9).double().mean() <= bounded_module.LEVEL
    assert off.square().mean().sqrt() < 1e-3


def smooth_images(seed, N, side, coarse=6, noise=8):
    """Pictures whose patches lie near few dimensions, as those of photographs do."""
    rng = np.random.default_rng(seed)
    colours = torch.from_numpy(rng.integers(0, 256, (N, 3, coarse, coarse)).astype(np.float64))
    smooth = torch.nn.functional.interpolate(colours, size=(side, side), mode="bilinear").numpy()
    return np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def few_lots(monkeypatch):
    """So few lots that small corpora leave most to chance; says for how many pixels they were."""
    monkeypatch.setattr(drawn_module, "FIRST", np.array([30.0, 60.0, 60.0]))
    monkeypatch.setattr(drawn_module, "FEWEST", 20.0)
    pixels, lots = [], drawn_module._lots

    def watched(asked, p):
        pixels.append(len(p.top))
        return lots(asked, p)

    monkeypatch.setattr(drawn_module, "_lots", watched)
    return pixels


@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize(("P", "sigma", "error"), [(5, 1.0, 0.05), (5, 30.0, 0.02), (11, 5.0, 0.1)])
def test_lots_stand_for_a_flat_posterior(few_lots, boundary, P, sigma, error):
    """Errors are within what is told, which is within what was asked for."""
    images = smooth_images(0, 600, 18)
    machine, exact = searching(images[4:], P, error, boundary, bound="auto")
    y = torch.from_numpy(images[:4] / 127.5 - 1)
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    answer = machine.denoise_bounded(y, sigma)
    off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
    assert sum(few_lots) > 0.9 * off.numel()
    assert answer.kind == "statistical"
    assert (answer.error <= error).all()
    assert (off > answer.error + 1e-6).double().mean() <= bounded_module.LEVEL
    assert off.max() > 1e-4


@pytest.mark.parametrize("C", [1, 3])
def test_lots_settle_patches_of_few_numbers_too(C, few_lots, monkeypatch):
    """Of 9 numbers all components lead, and there is no second look at the others."""
    told = []
    whole = bounded_module.drawn

    def watched(asked, error, *others, **more):
        lots = whole(asked, error, *others, **more)
        told.append(float((lots.error <= error).mean()))
        return lots

    monkeypatch.setattr(bounded_module, "drawn", watched)
    images = random_images(0, 80, C, 16, 16)
    machine, exact = searching(images[4:], 3, 0.05, bound="auto")
    y, sigma = noised(sm.Corpus(images[:4]), [20.0])
    D = machine.denoise_bounded(y, sigma)
    assert told[0] > 0.9
    assert (D.D - exact.denoise(y, sigma)).abs().max() <= 0.05


def test_lots_for_everything_are_exact(monkeypatch):
    """Where every node, leaf and patch is drawn, nothing is left to chance."""
    monkeypatch.setattr(drawn_module, "FIRST", np.full(3, 1e20))
    monkeypatch.setattr(drawn_module, "FLAT", 1e-9)
    images = smooth_images(1, 80, 12)
    images[40:] = images[:40]  # copies count
    machine, exact = searching(images, 5, 1e-3, bound="auto")
    y, level = noised(sm.Corpus(images), 1.0, 0)
    answer = machine.denoise_bounded(y.double(), level)
    assert answer.kind == "statistical"
    assert (answer.D - exact.denoise(y.double(), level)).abs().max() < 1e-5
    assert answer.error.max() < 1e-6


def opened_for(machine, sigma, index):
    """The windows of a machine, its source, the class of whole windows, and their index."""
    collection, kernel = machine.windows(sigma, index), machine._bounded
    kernel.prepare(index, collection)
    source = kernel.source(index)
    of = max(classes(collection), key=lambda c: c.patches.per_image)
    return collection, source, of, kernel._opened(source, of.patches)


def patches_of(x):
    """Every 3 x 3 patch of pictures (N, C, H, W), float64 (count, 9, C)."""
    w = torch.nn.functional.unfold(x, 3)
    return (
        w.reshape(len(x), -1, 9, w.shape[2]).permute(0, 3, 2, 1).reshape(-1, 9, x.shape[1]).numpy()
    )


def asking(machine, y, sigma, index):
    """The nodes of an index, and what is asked of those who draw for the pixels that see a whole
    window of y, (C, H, W)."""
    _, source, of, opened = opened_for(machine, sigma, index)
    (h, w), C = of.patches.size, len(y)
    windows = torch.nn.functional.unfold(y[None].double(), (h, w))[0].T.reshape(-1, C, h, w)
    windows = windows.permute(0, 2, 3, 1).reshape(len(windows), -1).numpy()
    nodes = drawn_module.Nodes.of(source, opened, of)
    return nodes, drawn_module.Asked(
        windows - opened.embedding.mean, 1 / (2 * sigma**2), np.zeros(len(windows)),
        source, opened, of, nodes.known, nodes.gaussians(sigma**2),
    )  # fmt: skip


@given(seeds, st.sampled_from([1, 3]))
def test_gaussians_have_the_moments_of_their_nodes(seed, C):
    """Means and variances of the leading numbers, and the |.|^2 of the rest, from every patch."""
    images = smooth_images(seed, 60, 12)[:, :C]
    machine, _ = searching(images, 5, 1e-3, bound="auto")
    nodes, asked = asking(machine, torch.zeros(C, 12, 12), 1.0, np.arange(60))
    t = asked.opened.tree
    N, leading = len(t.radii), asked.opened.embedding.leading
    codes = t.codes.reshape(N, 16, t.m // 4, 16, 4).transpose(0, 1, 3, 2, 4).reshape(N, 256, t.m)
    low, step = t.frames.reshape(N, 2, 1, t.m).transpose(1, 0, 2, 3).astype(np.float64)
    s, times = low + step * codes, t.times.reshape(N, 256, 1).astype(np.float64)
    mean = (times * s).sum(1) / times.sum(1)
    squares = (times * s**2).sum(1) / times.sum(1)

    def of_nodes(a):
        return a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:N]

    np.testing.assert_allclose(of_nodes(nodes.mean), mean[:, :leading], atol=1e-4)
    variance = (squares - mean**2)[:, :leading]
    np.testing.assert_allclose(of_nodes(nodes.variance), variance, rtol=1e-3, atol=1e-4)
    others = squares[:, leading : t.first].sum(1)
    np.testing.assert_allclose(nodes.others.reshape(-1)[:N], others, rtol=1e-3, atol=1e-4)


@given(seeds, st.sampled_from([1, 3]))
def test_what_stands_in_for_leaves_is_rounded_once(seed, C):
    """Means and deviations of codes and of answers are within half a step, from every patch."""
    images = smooth_images(seed, 60, 12)[:, :C]
    machine, _ = searching(images, 5, 1e-3, bound="auto")
    _, asked = asking(machine, torch.zeros(C, 12, 12), 1.0, np.arange(60))
    t, known = asked.opened.tree, asked.known
    N, first = len(t.radii), t.first
    times = t.times.reshape(N, 16, 1, 16).astype(np.float64)
    n = np.maximum(times.sum(3), 1)

    def off(a, mean, deviation):  # a: (N, 16, k, 16)
        m = (times * a).sum(3) / n
        s = np.sqrt(np.maximum((times * a.astype(np.float64) ** 2).sum(3) / n - m**2, 0))
        if deviation.shape[2] == 1:
            s = np.sqrt((s**2).sum(2, keepdims=True))
        return max(np.abs(m - mean).max(), np.abs(s - deviation).max())

    codes = t.codes.reshape(N, 16, t.m // 4, 16, 4).transpose(0, 1, 2, 4, 3)
    of_codes = known.moments.reshape(N, 2, first, 16).transpose(1, 0, 3, 2)
    codes = codes.reshape(N, 16, t.m, 16)
    assert off(codes[:, :, :first], *of_codes) < 0.501
    centres = known.centres.reshape(N, (t.m - first) // 4, 16, 4).transpose(0, 2, 1, 3)
    centres = centres.reshape(N, 16, t.m - first)
    assert np.abs((times * codes[:, :, first:]).sum(3) / n - centres).max(initial=0) < 0.501
    means = known.means.reshape(N, C + 1, 16).transpose(0, 2, 1)
    assert off(known.values.reshape(N, 16, C, 16), means[..., :C], means[..., C:]) < 0.501
    assert (t.leaf_counts.reshape(-1, 16)[:N] == times.sum((2, 3))).all()


@given(seeds, st.floats(-3, 1).map(lambda e: 10.0**e))
def test_lots_are_drawn_at_even_distances(seed, scale):
    """As many as the shares come to, whatever part of them is looked at; all of a whole share."""
    portions = (scale * np.random.default_rng(seed).random((200, LANES))).astype(np.float32)
    lots, shares = np.array([0.25, 7.0]), np.zeros(LANES, np.float32)
    bits = np.zeros(len(portions), np.int64)
    draw_in_turn(portions.reshape(-1), shares, lots, bits)
    drawn = bits[:, None] >> np.arange(LANES) & 1
    at_most = np.minimum(portions, 1)
    assert drawn[portions >= 1].all()
    assert np.abs(0.25 + at_most.sum(1).cumsum() - drawn.sum(1).cumsum() - 0.5).max() <= 0.501
    assert 0 <= lots[0] <= 1
    assert lots[1] == 7


@njit
def draw_in_turn(portions, shares, lots, bits):
    for k in range(len(bits)):
        bits[k] = draw_module._drawn(load(portions, k * LANES), shares, lots, 0)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_chance_is_blamed_on_the_stage_that_leaves_it(stage):
    """Where all but one of nodes, leaves and patches are drawn for sure, that one adds it all."""
    images = smooth_images(5, 400, 16)
    machine, _ = searching(images, 7, 1e-3, bound="auto")
    y, sigma = torch.from_numpy(images[7] / 127.5 - 1), 1.0
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    _, asked = asking(machine, y, sigma, np.arange(400))
    p = drawn_module._pixels(asked)
    amounts = np.full(3, 1e20)
    amounts[stage] = 40.0
    p.amounts[:] = amounts
    *_, by_stage, _, _ = drawn_module._lots(asked, p)
    assert (by_stage[:, stage] > 0).all()
    others = np.arange(3) != stage
    assert (by_stage[:, others] <= 1e-9 * by_stage[:, [stage]]).all()


def nearest_of_all(asked, images, count):
    """The nearest `count` patches of every query, by brute force; best is 0 in `asked`."""
    s = patches_of(torch.from_numpy(images / 127.5 - 1))
    q = asked.windows + asked.opened.embedding.mean
    d2 = np.square(q[:, None] - s.reshape(1, len(s), -1)).sum(2)
    order = np.argsort(d2, 1)[:, : count + 1]
    near = np.take_along_axis(d2, order, 1)
    Z = np.exp(-near[:, :count] * asked.half)
    middle = s[:, 4][order[:, :count]]
    reach = (near[:, max(count - 1, 0)] + near[:, count]) / 2 if count else near[:, 0] - 1
    return drawn_module.Near(reach, Z.sum(1), (Z**2).sum(1), (Z[..., None] * middle).sum(1))


@given(seeds, st.sampled_from([1, 3]), st.floats(-1, 3).map(lambda e: 10.0**e))
@pytest.mark.parametrize("known", [0, 1, 100])
def test_lots_are_right_on_average(known, seed, C, sigma):
    """The mean over many beginnings is the exact answer, within its own standard error.

    Whether some patches need no lots, since they are known, or not.
    """
    images = smooth_images(seed, 40, 12)[:, :C]
    corpus = sm.Corpus(images)
    machine, exact = searching(images, 3, 1e-3, bound="auto")
    y, _ = noised(corpus, sigma, seed)
    index = np.arange(len(images))
    collection = machine.windows(sigma, index)
    found = []
    lots = drawn_module._pixels

    def begun(asked, near):
        p = lots(asked, near)
        return p._replace(
            start=np.random.default_rng(len(found)).random(len(p.start)),
            amounts=np.full((len(p.start), 3), 12.0),
        )

    _, asked = asking(machine, y[0], sigma, index)
    near = nearest_of_all(asked, images, known)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawn_module, "_pixels", begun)
        patched.setattr(drawn_module, "ROUNDS", 0)
        for _ in range(60):
            fold = drawn_module.drawn(asked, 1e-9, Purse(np.inf), near)
            found.append(np.concatenate([fold.Z[:, None], fold.S], 1))
    found = np.stack(found)
    log = exact.evidence(
        y[:1].double(), torch.full((1,), sigma, dtype=torch.float64), index, collection
    ).fold
    D = exact.denoise(y[:1].double(), sigma)[0, :, 1:-1, 1:-1].reshape(C, -1).T.numpy()
    Z = np.exp(log.log_partition[0, 1:-1, 1:-1].reshape(-1).numpy())
    truth = np.concatenate([Z[:, None], Z[:, None] * D], 1)
    off = (found.mean(0) - truth) / Z[:, None]
    spread = found.std(0) / Z[:, None] / np.sqrt(len(found))
    assert len(truth) == len(asked.windows)
    assert (np.abs(off) <= 6 * spread + 1e-3).mean() > 0.97


def test_patches_that_are_known_make_no_levels_unlike():
    """Codes and bytes are compared of the others alone; where there are none, nothing is unlike."""
    images = smooth_images(6, 400, 16)
    machine, _ = searching(images, 7, 1e-3, bound="auto")
    y, sigma = torch.from_numpy(images[7] / 127.5 - 1), 1.0
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    _, asked = asking(machine, y, sigma, np.arange(400))
    Q = len(asked.windows)
    everything = drawn_module.Near(np.full(Q, 1e6), np.ones(Q), np.ones(Q), np.ones((Q, 3)))
    for near in (None, everything):
        p = drawn_module._pixels(asked, near)
        p.amounts[:] = 1e20
        unlike, spent = drawn_module._lots(asked, p)[-2:]
        assert (spent[:, 2] > 0).all()
        assert (unlike[:, 2] == 1).all() == (near is everything)


def test_lots_that_have_missed_the_nearest_patch_known_tell_nothing():
    images = smooth_images(6, 400, 16)
    machine, _ = searching(images, 7, bound="auto")
    y, sigma = torch.from_numpy(images[7] / 127.5 - 1), 3.0
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    _, asked = asking(machine, y, sigma, np.arange(400))
    asked.best[:], _ = rounds_module.guessed(*asking_a_search(machine, y[None].double(), sigma))
    told = drawn_module.drawn(asked, 0.02, Purse(np.inf))
    some = (told.error <= 0.02) & (told.Z**2 > 200 * told.Z2)  # many matter
    assert some.sum() > 10
    # as if one were known whose square is twice that of all others together
    nearer = asked.best - np.log(2 * told.Z2) / (2 * asked.half)
    closer = asked._replace(best=np.where(some, nearer, asked.best))
    assert (drawn_module.drawn(closer, 0.02, Purse(np.inf)).error[some] == np.inf).all()


def test_near_patches_without_the_nearest_known_tell_nothing():
    images = smooth_images(6, 400, 16)
    machine, _ = searching(images, 7, bound="auto")
    y, sigma = torch.from_numpy(images[7] / 127.5 - 1).double(), 0.5
    q, opened, windows, of = asking_a_search(machine, y[None], sigma)
    _, asked = asking(machine, y, sigma, np.arange(400))
    asked.best[:], _ = rounds_module.guessed(q, opened, windows, of)
    at, nats = np.arange(len(asked.windows)), np.full(len(asked.windows), 9.0)
    for step, finite in ((0.0, True), (1e-3, False)):
        best = asked.best - step  # of one that is there, or would be
        fold = rounds_module.nearby(q, opened, windows, at, best.copy(), nats, Purse(np.inf))
        near = drawn_module.Near.of(fold, asked._replace(best=best), nats)
        assert (np.isfinite(near.Z) == finite).all()
        told = drawn_module.drawn(asked._replace(best=best), 0.5, Purse(np.inf), near)
        assert np.isfinite(told.error).any() == finite


def test_where_lots_do_for_none_of_a_sample_no_more_are_drawn(monkeypatch):
    asked, whole = [], bounded_module.drawn

    def watched(some, *others, **more):
        asked.append(len(some.windows))
        return whole(some, *others, **more)

    monkeypatch.setattr(bounded_module, "drawn", watched)
    images = smooth_images(2, 300, 14)
    y, sigma = noised(sm.Corpus(images[:1]), [0.5])
    y = y.double()
    machine, exact = searching(images, 5, 1e-9, bound="auto")
    D = machine.denoise_bounded(y, sigma).D
    assert (D - exact.denoise(y, sigma)).abs().max() <= 1e-8
    first = -(-100 // bounded_module.SAMPLED)  # of the 10 x 10 that see whole windows
    assert asked[0] == first
    assert 100 - first not in asked
    asked.clear()
    searching(images, 5, 0.5, bound="auto")[0].denoise(*noised(sm.Corpus(images[:1]), [20.0]))
    assert asked[:2] == [first, 100 - first]


def asking_a_search(machine, y, sigma):
    """The pixels of y that see a whole window; the index, its windows, and their class."""
    index, level = np.arange(len(machine.corpus.images)), torch.tensor([sigma], dtype=torch.float64)
    collection, source, of, opened = opened_for(machine, sigma, index)
    request = ScanRequest(machine.corpus.images, index, y, level, collection, torch.zeros(1))
    q, _ = queries(request, opened, of, "deterministic")
    return q, opened, source.windows(of.patches, of.middle), of


@given(st.sampled_from(KINDS), seeds, shapes, sigmas, st.floats(-3, 8), st.booleans())
def test_near_patches_are_all_found_and_no_others(kind, seed, shape, sigma, nats, in_bytes):
    """Those that weigh at least e^-nats as much as one that is known, by brute force."""
    images = adversarial(kind, seed, *shape)
    y, _ = noised(sm.Corpus(images), sigma, seed)
    y = y[:1].double()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds_module, "WORTHWHILE", 1 if in_bytes else 10**6)
        q, opened, windows, _ = asking_a_search(searching(images, 3)[0], y, sigma)
    s, asked = patches_of(torch.from_numpy(images / 127.5 - 1)), patches_of(y)
    d2 = np.square(asked[:, None] - s[None]).sum((2, 3))
    best = np.quantile(d2, 0.1, axis=1, method="lower")  # of one that is known
    reach = best + nats / q.half
    # rounding decides about those that are exactly as far
    reach = np.where(np.abs(d2 - reach[:, None]).min(1) < 1e-9 * reach, reach * (1 + 1e-6), reach)
    asked_for = q, opened, windows, np.arange(len(best)), best, (reach - best) * q.half
    found = rounds_module.nearby(*asked_for, Purse(np.inf))
    nearest = d2.min(1)
    w = np.exp(-(d2 - nearest[:, None]) * q.half[:, None]) * (d2 <= reach[:, None])
    some = nearest <= reach
    np.testing.assert_allclose(found.m.numpy()[some], -(nearest * q.half)[some], rtol=1e-9)
    truth = w.sum(1), (w**2).sum(1), w @ s[:, 4]
    for a, b in zip((found.Z, found.Z2, found.S), truth, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=1e-6)
    assert rounds_module.nearby(*asked_for, Purse(-1.0)) is None  # even where nothing is to be done


@given(st.sampled_from(KINDS), seeds, shapes, sigmas)
def test_what_is_near_the_windows_beside_one_is_compared_with_it(kind, seed, shape, sigma):
    """A guess is of a patch that is there, and of no more weight than there is, by brute force."""
    images = adversarial(kind, seed, *shape)
    (H, W), y = images.shape[2:], noised(sm.Corpus(images), sigma, seed)[0][:1].double()
    q, opened, w, of = asking_a_search(searching(images, 3)[0], y, sigma)
    Q, rows, columns = len(q.half), H - 2, W - 2
    s, asked = patches_of(torch.from_numpy(images / 127.5 - 1)), patches_of(y)
    d2 = np.square(asked[:, None] - s[None]).sum((2, 3))

    best, known, places = np.zeros(Q), np.zeros(Q), np.zeros(Q, np.int64)
    fill(guess, (opened.tree, w, q, best, known, places))
    np.testing.assert_allclose(best, d2[np.arange(Q), places], rtol=1e-9)
    nearer, there = best.copy(), places.copy()
    fill(beside, (w, q, columns, best, places, nearer, there))
    expected = best.copy()
    for i, j in np.ndindex(rows, columns):
        for k, l in np.ndindex(rows, columns):
            image, row, column = np.unravel_index(places[k * columns + l], (len(s), rows, columns))
            row, column = row + i - k, column + j - l
            inside = 0 <= row < rows and 0 <= column < columns
            if inside and max(abs(i - k), abs(j - l)) <= BESIDE:
                moved = np.ravel_multi_index((image, row, column), (len(s), rows, columns))
                at = i * columns + j
                expected[at] = min(expected[at], d2[at, moved])
    np.testing.assert_allclose(nearer, expected, rtol=1e-9)
    np.testing.assert_allclose(nearer, d2[np.arange(Q), there], rtol=1e-9)

    best, least = rounds_module.guessed(q, opened, w, of)
    assert (best <= nearer).all()
    assert (best >= d2.min(1) * (1 - 1e-9)).all()
    mass = np.exp((best[:, None] - d2) * q.half[:, None]).sum(1)
    assert (least <= np.log(mass) + 1e-6).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_pixel_that_is_too_dear_is_left_to_others(monkeypatch, share):
    """Those that cost no more than they may are searched, and are right; the others are named."""
    images = smooth_images(3, 300, 18)
    machine, exact = searching(images[1:], 5, bound="deterministic")
    y = torch.from_numpy(images[:1] / 127.5 - 1).double()
    sigma = 0.3
    q, opened, windows, of = asking_a_search(machine, y, sigma)
    Q, spent, parts = len(q.half), [], rounds_module.fill

    def watched(compiled, args, filled):
        parts(compiled, args, filled)
        spent.append(filled[-2].sum(0))

    monkeypatch.setattr(rounds_module, "fill", watched)

    def searched(apiece):
        found, best = blank(Q, 3, 0, ()), np.full(Q, 1e3)
        done = rounds_module.sought(
            q, opened, windows, np.arange(Q), found, best, np.zeros(Q), 1e-3,
            Purse(np.inf), apiece,
        )  # fmt: skip
        return done, found.S / found.Z[:, None]

    everyone, _ = searched(np.inf)
    assert everyone.all()
    # `FOR_A_PART` of what a pixel may cost is what it may cost while it is surveyed
    apiece = 1e-9 * np.quantile(sum(spent), share) / rounds_module.FOR_A_PART * (share > 0)
    done, D = searched(apiece)
    assert done.any() == (share > 0)
    assert done.all() == (share == 1)
    truth = exact.denoise(y, sigma)[0, :, of.rows, of.columns].reshape(3, -1).T
    assert (D - truth).abs()[done].max() < 1e-3 if done.any() else share == 0


PRODUCTS = """
import numpy as np
from numba import njit
from scoremachine.search.floats import *

@njit
def sums(codes, w, halves, out):
    for j in range(0, len(w), LANES):
        store_halves(halves, j, len(w) + j, nearest(load(w, j)))
    for i in range(0, len(codes), len(w) * LANES):
        high, low = none(), none()
        for j in range(0, len(w), 4):
            high = add_products(high, codes, i + j * LANES, halves, j)
            low = add_products(low, codes, i + j * LANES, halves, len(w) + j)
        store(out, i // len(w), joined(high, low))

@njit
def four_sums(codes, halves, wide, at, out):
    for i in range(0, len(codes), wide * LANES):
        high, low = no_fours(), no_fours()
        for j in range(0, wide, 4):
            a, b, c, d = at[0] + j, at[1] + j, at[2] + j, at[3] + j
            high = add_fours(high, codes, i + j * LANES, halves, (a, b, c, d))
            p = a + wide, b + wide, c + wide, d + wide
            low = add_fours(low, codes, i + j * LANES, halves, p)
        store(out[0], i // wide, joined(high[0], low[0]))
        store(out[1], i // wide, joined(high[1], low[1]))
        store(out[2], i // wide, joined(high[2], low[2]))
        store(out[3], i // wide, joined(high[3], low[3]))

rng = np.random.default_rng(0)
for w in (rng.uniform(-32512, 32512, 64), np.full(64, -32512), np.full(64, 32512), np.zeros(64)):
    codes = rng.integers(0, 256, (20, 16, LANES, 4)).astype(np.uint8)
    codes[0], codes[1] = 255, 0
    out = np.zeros(20 * LANES, np.float32)
    sums(codes.reshape(-1), w.astype(np.float32), np.zeros(128, np.int8), out)
    exact = np.einsum("ijlk,jk->il", codes.astype(int), np.rint(w).astype(int).reshape(16, 4))
    assert (out == exact.reshape(-1).astype(np.float32)).all()

rows = np.rint(rng.uniform(-32512, 32512, (5, 64)))
bytes_ = np.concatenate(halves(rows), 1).reshape(-1)
outs = tuple(np.zeros(20 * LANES, np.float32) for _ in range(4))
four_sums(codes.reshape(-1), bytes_, 64, (128 * 3, 0, 128 * 4, 128), outs)
for out, k in zip(outs, (3, 0, 4, 1)):
    exact = np.einsum("ijlk,jk->il", codes.astype(int), rows[k].astype(int).reshape(16, 4))
    assert (out == exact.reshape(-1).astype(np.float32)).all()
"""


@pytest.mark.parametrize("cpu", [None, "generic"])
def test_products_of_bytes_are_exact_on_every_processor(cpu):
    named = {} if cpu is None else {"NUMBA_CPU_NAME": cpu}
    subprocess.run([sys.executable, "-c", PRODUCTS], env=os.environ | named, check=True)


def test_sums_of_four_vectors_at_once():
    rows = np.random.default_rng(0).normal(size=(9, LANES)).astype(np.float32)
    sums = np.arange(10.0)
    njit(lambda s, r: add_totals(s, 3, r, 2 * LANES, 0.5))(sums, rows.reshape(-1))
    expected = np.arange(10.0)
    expected[3:7] += 0.5 * rows[2:6].sum(1)
    assert np.allclose(sums, expected, rtol=1e-6)


def test_running_sums_and_logarithms():
    x = np.random.default_rng(0).random(LANES).astype(np.float32) * 1e3
    out = np.zeros(3 * LANES, np.float32)

    @njit
    def fill(x, out):
        store(out, 0, running(load(x, 0)))
        store(out, LANES, logs(load(x, 0)))
        store(out, 2 * LANES, inverse(load(x, 0)))
        return hmax(load(x, 0))

    assert fill(x, out) == x.max()
    sums, logarithms, inverses = out.reshape(3, LANES)
    assert np.allclose(sums, x.cumsum(), rtol=1e-6)
    assert (logarithms <= np.log2(x) + 1e-5).all()
    assert (logarithms >= np.log2(x) - 0.09).all()
    assert np.allclose(inverses, 1 / x, rtol=1e-6)


def test_the_next_indexes_are_read_ahead(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda f, *_: asked.append(os.fstat(f).st_size), False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, False)
    monkeypatch.setattr(ahead_module, "Thread", NoThread)
    groups = [[tmp_path / f"{k}"] for k in (1, 2, 3)]
    ahead = ahead_module.Ahead()
    for k, folders in enumerate(groups):
        folders[0].mkdir()
        (folders[0] / "codes").write_bytes(bytes(10 + k))
        ahead.expect(folders)
    ahead.reached(groups[0])
    ahead.reached(groups[0])
    assert asked == [10, 11]
    ahead.reached(groups[2])
    ahead.reached([tmp_path / "nowhere"])  # a hint: nothing goes wrong
    assert asked == [10, 11, 12]


class NoThread:
    """A thread that is done when it has begun."""

    def __init__(self, target, args, daemon):
        self.start = lambda: target(*args)


def test_lots_are_not_drawn_where_few_patches_matter(few_lots):
    """One picture again and again among noise: nothing else matters near it."""
    images = random_images(5, 60, 3, 16, 16)
    machine, exact = searching(images, 11, bound="auto")
    y = torch.from_numpy(images[7:8] / 127.5 - 1)
    assert (machine.denoise(y, 0.3) - exact.denoise(y, 0.3)).abs().max() < 1e-3
    assert not few_lots


def test_nothing_stands_in_for_patches_where_there_is_hardly_any_noise(few_lots):
    """Weights in a node are too unlike: the patches are looked up at once."""
    images = smooth_images(2, 600, 18)
    machine, exact = searching(images, 7, bound="auto")
    nodes, _ = asking(machine, torch.from_numpy(images[0] / 127.5 - 1), 1.0, np.arange(600))
    assert nodes.gaussians(1.0) is not None
    assert nodes.gaussians(1e-6) is None
    y = torch.from_numpy(images[:2] / 127.5 - 1)
    assert (machine.denoise(y, 1e-3) - exact.denoise(y, 1e-3)).abs().max() < 1e-3
    assert not few_lots


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.4])
def test_lots_that_would_miss_something_are_not_trusted(few_lots, sigma):
    """Where posteriors are narrow, levels are unlike, and what is drawn may lack the heaviest."""
    images = smooth_images(2, 600, 18)
    machine, exact = searching(images[3:], 7, bound="auto")
    y = torch.from_numpy(images[:3] / 127.5 - 1)
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    answer = machine.denoise_bounded(y, sigma)
    off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
    assert (off > answer.error + 1e-6).double().mean() <= bounded_module.LEVEL


def test_a_guaranteed_bound_leaves_nothing_to_chance(few_lots):
    images = smooth_images(0, 60, 12)
    machine, exact = searching(images, 3, 0.1, bound="deterministic")
    y, level = noised(sm.Corpus(images), 3.0, 0)
    answer = machine.denoise_bounded(y.double(), level)
    assert answer.kind == "deterministic"
    assert not few_lots
    off = (answer.D - exact.denoise(y.double(), level)).abs().amax(1)
    assert (off <= answer.error + 1e-9).all()


@pytest.mark.parametrize("told", [True, False])
def test_flat_posteriors_are_compared_with_everything(monkeypatch, capsys, told):
    """A search that would cost more than the exact scan is given up; says so if that is long."""
    monkeypatch.setattr(bounded_module, "TOLD", 0.0 if told else 1.0)
    images = random_images(0, 300, 1, 12, 12)
    corpus = sm.Corpus(images)
    machine = sm.EquivariantLocalScore(corpus, patch_size=3, search="bounded")
    machine.__dict__["_bounded"] = Bounded(corpus, machine.kernel, 1e-3, patience=1e-3)
    y, level = noised(corpus, 3.0, 0)
    answer = machine.denoise_bounded(y.double(), level)
    assert torch.equal(
        answer.D, machine.clone_with(corpus, search="exact").denoise(y.double(), level)
    )
    assert (answer.omitted_mass == 0).all()
    sentence = "all 144 pixels of a picture are compared with everything"
    assert (sentence in capsys.readouterr().err) is told


def test_several_pictures_have_their_own_derivatives():
    machine, exact = searching(random_images(3, 30, 1, 7, 7), 3, 1e-9)
    y, sigma = noised(machine.corpus, [0.4, 0.4, 0.3, 0.2])
    slopes = []
    for m in (machine, exact):
        x = y.double().requires_grad_()
        slopes.append(torch.autograd.grad(m.denoise(x, sigma).square().sum(), x)[0])
    assert (slopes[0] - slopes[1]).abs().max() < 1e-6


def test_derivatives_are_the_exact_ones():
    images = random_images(2, 30, 1, 7, 7)
    machine, exact = searching(images, 3, 1e-7)
    y, level = noised(sm.Corpus(images), 0.4, 0)
    u = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = []
    for m in (machine, exact):
        x = y.double().requires_grad_()
        (u * m.denoise(x, level)).sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


def test_what_kind_of_bound_it_is_is_told():
    corpus = sm.Corpus(random_images(0, 3, 3, 16, 16))
    y, level = noised(corpus, 0.02, 0)
    kinds = [
        sm.EquivariantLocalScore(corpus, patch_size=P, search=search, bound=bound)
        .denoise_bounded(y, level)
        .kind
        for P, search, bound in [
            (3, "exact", "auto"),
            (3, "bounded", "auto"),
            (11, "bounded", "auto"),
            (11, "bounded", "deterministic"),
            (3, "bounded", "statistical"),
        ]
    ]
    assert [kind[0] for kind in kinds] == ["d", "d", "s", "d", "s"]


@pytest.mark.parametrize(
    ("N", "P", "bounded"),
    [(100, 3, False), (1_000, 3, True), (1_000, 7, False), (3_000, 7, True), (3_000, 9, False),
     (6_000, 15, True)],
)  # fmt: skip
def test_auto_searches_large_sources_alone(N, P, bounded):
    corpus = sm.Corpus(random_images(0, N, 1, 32, 32))
    machine = sm.EquivariantLocalScore(corpus, patch_size=P)
    index = corpus.indices()
    kernel = machine.engine_for(machine.windows(1.0, index), index)
    assert isinstance(kernel, Bounded) is bounded


def test_a_search_that_has_spent_its_share_spends_no_more(monkeypatch):
    images = random_images(0, 300, 1, 16, 16)
    machine, exact = searching(images[4:], 5, 1e-3, bound="auto")
    machine.__dict__["_bounded"].patience = 1e-6  # the first lots cost more
    left = []

    def watched(name):
        attempt = getattr(bounded_module, name)

        def attempted(*args):
            answer = attempt(*args)
            left.extend(a.left for a in args if isinstance(a, Purse))
            return answer

        monkeypatch.setattr(bounded_module, name, attempted)

    for name in ("sought", "drawn"):
        watched(name)
    y, sigma = noised(sm.Corpus(images), 0.8)
    assert torch.equal(machine.denoise(y, sigma), exact.denoise(y, sigma))
    assert left[0] < 0
    assert set(left) == {left[0]}


@pytest.mark.parametrize(("H", "W", "P"), [(8, 8, 3), (8, 6, 5), (5, 9, 5), (7, 7, 7), (4, 9, 9)])
@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_classes_are_every_site_once(H, W, P, boundary):
    if boundary == "circular" and min(H, W) < P:
        pytest.skip("no such window fits")
    machine = sm.EquivariantLocalScore(
        sm.Corpus(random_images(0, 2, 1, H, W)), patch_size=P, boundary=boundary
    )
    sites = np.zeros((H, W), int)
    for each in classes(machine.windows(1.0, np.arange(2))):
        sites[each.rows, each.columns] += 1
    assert (sites == 1).all()


# indexes on disk


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pieces(monkeypatch):
    """Many small pieces, so that there is something to interrupt."""
    monkeypatch.setattr(index_module, "BUCKET", 300)
    monkeypatch.setattr(index_module, "ROOM", 2**17)


PATCHES = Patches((3, 3), (0, 14), (0, 14))


def a_source(seed=0):
    corpus = sm.Corpus(random_images(seed, 60, 3, 16, 16))
    return Source.of(corpus, corpus.indices())


def break_off(source, folder, monkeypatch):
    """Builds the first four pieces of an index."""
    encoded, count = index_module._encoded, iter(range(100))

    def failing(*arguments):
        if next(count) == 4:
            raise KeyboardInterrupt
        return encoded(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_encoded", failing)
        with pytest.raises(KeyboardInterrupt):
            build(source, PATCHES, folder)


def test_an_index_numbers_every_patch_once(tmp_path, pieces):
    source = a_source()
    build(source, PATCHES, tmp_path / "index")
    index = Index.open(tmp_path / "index", source.identity(PATCHES))
    assert index.tree.times.sum() == index.total == 60 * 14 * 14
    places = index.tree.ids[index.tree.times > 0]
    assert len(np.unique(places)) == len(places)


BUILD = """
import sys, time
import numpy as np
import scoremachine as sm
from scoremachine.search import index
index.BUCKET, index.ROOM = 300, 2**17
encoded = index._encoded
def slowly(*arguments):
    time.sleep(0.05)
    return encoded(*arguments)
index._encoded = slowly
corpus = sm.Corpus(np.load(sys.argv[1]))
source = index.Source.of(corpus, corpus.indices())
from pathlib import Path
index.build(source, index.Patches((3, 3), (0, 14), (0, 14)), Path(sys.argv[2]))
"""


def test_a_killed_build_goes_on_where_it_was(tmp_path, pieces, monkeypatch):
    source = a_source()
    images = random_images(0, 60, 3, 16, 16)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "images.npy"), str(tmp_path / "index")]
    journal = tmp_path / "index.part" / "journal"
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_text().count("\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = json.loads(journal.read_text().splitlines()[2])[0]
    assert not (tmp_path / "index").exists()
    encoded, begun = index_module._encoded, []

    def watched(*arguments):
        begun.append(arguments)
        return encoded(*arguments)

    monkeypatch.setattr(index_module, "_encoded", watched)
    build(source, PATCHES, tmp_path / "index")
    resumed = len(begun)
    build(source, PATCHES, tmp_path / "whole")
    assert done >= 3
    assert 0 < resumed <= len(begun) - resumed - 3
    assert everything(tmp_path / "index") == everything(tmp_path / "whole")
    assert not (tmp_path / "index.part").exists()


def test_what_was_cut_short_behind_the_journal_is_written_again(tmp_path, pieces, monkeypatch):
    """A build that died while it wrote: half a piece, half a line."""
    source = a_source()
    build(source, PATCHES, tmp_path / "whole")
    break_off(source, tmp_path / "index", monkeypatch)
    for name in ("codes", "ids", "journal"):
        with open(tmp_path / "index.part" / name, "ab") as file:
            file.write(b"[9")
    build(source, PATCHES, tmp_path / "index")
    assert everything(tmp_path / "index") == everything(tmp_path / "whole")


@pytest.mark.parametrize("what", ["another plan", "plan.npz", "order", "codes", "no ids"])
def test_a_damaged_unfinished_index_is_begun_again(tmp_path, pieces, monkeypatch, what):
    source = a_source()
    build(source, PATCHES, tmp_path / "whole")
    begun = source if what != "another plan" else a_source(1)
    break_off(begun, tmp_path / "index", monkeypatch)
    if what == "no ids":
        (tmp_path / "index.part" / "ids").unlink()
    elif what != "another plan":
        path = tmp_path / "index.part" / what
        path.write_bytes(path.read_bytes()[:100])
    build(source, PATCHES, tmp_path / "index")
    assert everything(tmp_path / "index") == everything(tmp_path / "whole")


@pytest.mark.parametrize("what", ["version", "images", "codes", "meta.json", "embedding.npz"])
def test_another_or_a_damaged_index_is_refused_and_built_again(what):
    corpus = sm.Corpus(random_images(7, 30, 1, 8, 8))
    machine = sm.EquivariantLocalScore(corpus, patch_size=3, search="bounded")
    y, level = noised(corpus, 0.2, 0)
    D = machine.denoise(y, level)
    source = Source.of(corpus, corpus.indices())
    folder = next(source.folder.glob("3x3-*/"))
    if what in ("version", "images"):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {what: "another"}))
    else:
        content = (folder / what).read_bytes()
        (folder / what).write_bytes(content[: len(content) // 2])
    patches = Patches((3, 3), (0, 6), (0, 6))
    with pytest.raises(ValueError, match="the index in "):
        Index.open(folder, source.identity(patches))
    again = machine.clone_with(corpus)
    with pytest.warns(UserWarning, match="it will be built again"):
        assert torch.equal(again.denoise(y, level), D)
    Index.open(folder, source.identity(patches))


def test_the_command_builds_indexes_once(capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "images.npy", random_images(9, 40, 3, 10, 10))
    command = ["scoremachine", "index", "--data", str(tmp_path / "images.npy"), "--patch-size"]
    monkeypatch.setattr(sys, "argv", [*command, "3,5"])
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        out = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in out] == ["3 x 3", "5 x 5"]
        assert all(" MB in " in line for line in out)
    made = Path(out[0].split(" MB in ")[1])
    assert len(list(made.glob("3x3-*/meta.json"))) == 1
    assert len(list(made.glob("*/meta.json"))) == 1 + 4 + 1 + 8
    monkeypatch.setattr(sys, "argv", [*command, "4"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "patch_size 4 is even" in capsys.readouterr().err


def test_auto_compares_everything_where_there_is_no_room(monkeypatch, capsys):
    corpus = sm.Corpus(random_images(8, 26_000, 1, 32, 32))
    machine = sm.EquivariantLocalScore(corpus, patch_size=7)
    usage = bounded_module.shutil.disk_usage("/")
    monkeypatch.setattr(bounded_module.shutil, "disk_usage", lambda path: usage._replace(free=10))
    kernel = machine.engine_for(machine.windows(1.0, corpus.indices()), corpus.indices())
    assert kernel is machine.kernel
    assert "every patch is compared" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch, tmp_path):
    corpus = sm.Corpus(random_images(8, 30, 1, 8, 8))
    machine = sm.EquivariantLocalScore(corpus, patch_size=3, search="bounded")
    usage = bounded_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bounded_module.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match=r"needs about .* GB, and .* has 0.0 GB left"):
        machine.denoise(*noised(corpus, 0.2, 0))


def test_more_patches_than_can_be_numbered_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(index_module, "LARGEST", 1000)
    with pytest.raises(ValueError, match="an index holds at most 1,000 patches"):
        build(a_source(), PATCHES, tmp_path / "index")
