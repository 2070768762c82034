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
from scoremachine.core.posterior import ScanRequest, posterior
from scoremachine.engines.search import bounded as bounded_module
from scoremachine.engines.search import index as index_module
from scoremachine.engines.search import readahead as readahead_module
from scoremachine.engines.search import sampling as sampling_module
from scoremachine.engines.search.certified import Budget
from scoremachine.engines.search.certified import Search as CertifiedSearch
from scoremachine.engines.search.embedding import Embedding
from scoremachine.engines.search.floats import LANES, exp2, load, store
from scoremachine.engines.search.index import Index, Patches, Source, build, classes
from scoremachine.engines.search.queries import queries
from scoremachine.engines.search.sampling import Moments, Stratum, Targets
from scoremachine.machines.machine import Batch
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
    rng = np.random.default_rng(seed)
    corpus = sm.Corpus(rng.integers(0, 256, (5, C, 8, 9), np.uint8))
    source = Source.of(corpus, corpus.indices())
    patches = Patches((h, w), (1, 8 - h), (0, 10 - w))
    windows = np.lib.stride_tricks.sliding_window_view(source.pixels, (h, w), (1, 2))
    s = windows[:, 1:].transpose(0, 1, 2, 4, 5, 3).reshape(5 * patches.per_image, -1) / 127.5 - 1
    e = Embedding.of(s, kept)
    places = rng.integers(0, len(s), 21).astype(np.uint32)
    E, squares = e.of_patches(source.windows(patches), places)
    expected, norms = e(np.ascontiguousarray(s[places] - e.mean))
    assert np.linalg.norm(e.V, 2) <= 1
    np.testing.assert_allclose(e.V.T @ e.V, np.eye(e.V.shape[1]), atol=1e-3)
    np.testing.assert_allclose(squares, norms, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(E, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_leaders_density_and_confidence_are_the_exact_ones(boundary):
    images = random_images(3, 40, 3, 8, 8)[3:]
    machine, exact = searching(images, 3, 1e-6, boundary)
    y, _ = noised(sm.Corpus(images), 0.3, 0)
    index, sigma = np.arange(len(images)), torch.full((len(y),), 0.3, dtype=torch.float64)
    a, b = (
        m.evidence(Batch(y.double(), sigma, sigma, index), m.windows(0.3, index), leaders=3).fold
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
    levels = torch.full((len(y),), 0.2, dtype=torch.float64)
    batch = Batch(y.double(), levels, levels, index)
    fold = machine.evidence(batch, machine.windows(0.2, index), leaders=2).fold
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
        torch.set_num_threads(3 - min(threads, 2))  # another number than before
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
    assert (off <= answer.error + 1e-9).double().mean() >= answer.level
    assert off.square().mean().sqrt() < 1e-3


def smooth_images(seed, N, side, coarse=6, noise=8):
    """Pictures whose patches lie near few dimensions, as those of photographs do."""
    rng = np.random.default_rng(seed)
    colours = torch.from_numpy(rng.integers(0, 256, (N, 3, coarse, coarse)).astype(np.float64))
    smooth = torch.nn.functional.interpolate(colours, size=(side, side), mode="bilinear").numpy()
    return np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


# samples


def targets_of(machine, y, sigma):
    """The search for the pixels of y (1, C, H, W) that see a whole window, what is sampled for it,
    the class of these pixels."""
    index, level = np.arange(len(machine.corpus.images)), torch.tensor([sigma], dtype=torch.float64)
    collection, engine = machine.windows(sigma, index), machine.source.bounded
    engine.prepare(index, collection)
    source = engine.source(index)
    of = max(classes(collection), key=lambda c: c.patches.per_image)
    opened = Index.open(source.folder / of.patches.name, source.identity(of.patches))
    request = ScanRequest(
        machine.corpus.images, index, y.double(), level, collection, torch.zeros(1)
    )
    q, centred = queries(request, opened, of, "deterministic")
    w = source.windows(of.patches, of.middle)
    search = CertifiedSearch.begin(opened, w, q, of, 0)
    surrogate = Moments.of(opened).surrogate(sigma**2)
    return search, Targets(opened, w, surrogate, q, centred, search.best), of


def patches_of(x):
    """Every 3 x 3 patch of pictures (N, C, H, W), float64 (count, 9, C)."""
    w = torch.nn.functional.unfold(x, 3)
    return (
        w.reshape(len(x), -1, 9, w.shape[2]).permute(0, 3, 2, 1).reshape(-1, 9, x.shape[1]).numpy()
    )


@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize(("P", "sigma", "error"), [(5, 1.0, 0.05), (5, 30.0, 0.02), (11, 5.0, 0.1)])
def test_a_flat_posterior_is_estimated_from_samples(small_pilot, boundary, P, sigma, error):
    """Errors are within the estimate as often as its level says, and that within what was asked."""
    images = smooth_images(0, 600, 18)
    machine, exact = searching(images[4:], P, error, boundary, bound="auto")
    y = torch.from_numpy(images[:4] / 127.5 - 1)
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    answer = machine.denoise_bounded(y, sigma)
    off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
    assert small_pilot
    assert answer.kind == "statistical"
    assert answer.level == bounded_module.LEVEL
    assert (answer.error <= error).all()
    assert (off <= answer.error + 1e-6).double().mean() >= answer.level
    assert off.max() > 1e-4


@pytest.fixture
def small_pilot(monkeypatch):
    """So small samples that small corpora leave most to chance; lists how many were drawn."""
    monkeypatch.setattr(sampling_module, "PILOT", np.array([100.0, 200.0]))
    drawn, whole = [], sampling_module.estimate

    def watched(x, members, size, start, stratum):
        result = whole(x, members, size, start, stratum)
        drawn.append(result[1].sum())
        return result

    monkeypatch.setattr(sampling_module, "estimate", watched)
    return drawn


def test_a_sample_of_everything_is_exact():
    """Where every leaf and patch is taken for certain, nothing is left to chance."""
    images = smooth_images(1, 80, 12)
    images[40:] = images[:40]  # copies count
    machine, exact = searching(images, 5, bound="auto")
    y, _ = noised(sm.Corpus(images), 1.0, 0)
    search, x, of = targets_of(machine, y[:1], 1.0)
    members = sampling_module.grouped(search.queries.E.reshape(len(x.best), -1)[:, :4])
    result, _ = sampling_module.estimate(x, members, np.full((len(members), 2), 1e20), 0.5, None)
    D = exact.denoise(y[:1].double(), 1.0)[0, :, of.rows, of.columns].reshape(3, -1).T.numpy()
    assert np.abs(result.S / result.Z[:, None] - D[members.reshape(-1)]).max() < 1e-5
    assert (result.error == 0).all()


@pytest.mark.parametrize("nats", [None, 0.5, 3.0])
@pytest.mark.parametrize(("C", "sigma"), [(1, 0.5), (3, 1.0), (3, 20.0)])
def test_estimates_are_right_on_average(C, sigma, nats):
    """The mean over many samples is the exact sum, with an enumerated stratum and without."""
    images = smooth_images(3, 40, 12)[:, :C]
    corpus = sm.Corpus(images)
    machine, _ = searching(images, 3, bound="auto")
    y, _ = noised(corpus, sigma, 3)
    search, x, _ = targets_of(machine, y[:1], sigma)
    Q, stratum = len(x.best), None
    if nats is not None:
        fold = search.enumerate(np.arange(Q), np.full(Q, nats), Budget(np.inf))
        stratum = Stratum.of(fold, x.best, x.queries.half, np.full(Q, nats))
    members = sampling_module.grouped(search.queries.E.reshape(Q, -1)[:, :4])
    size = np.full((len(members), 2), 40.0)
    starts = np.random.default_rng(0).random(60)
    results = [sampling_module.estimate(x, members, size, u, stratum)[0] for u in starts]
    found = np.stack([np.concatenate([r.Z[:, None], r.S], 1) for r in results])
    s, q = patches_of(torch.from_numpy(images / 127.5 - 1)), patches_of(y[:1].double())
    d2 = np.square(q[:, None] - s[None]).sum((2, 3))
    w = np.exp((x.best[:, None] - d2) * x.queries.half[:, None])
    truth = np.concatenate([w.sum(1)[:, None], w @ s[:, 4]], 1)[members.reshape(-1)]
    scale = truth[:, :1]
    off, spread = (found.mean(0) - truth) / scale, found.std(0) / scale / np.sqrt(len(found))
    assert (np.abs(off) <= 6 * spread + 1e-3).mean() > 0.97


@given(st.sampled_from(KINDS), seeds, shapes, sigmas, st.floats(-3, 8))
def test_a_stratum_has_all_patches_within_a_radius_and_no_others(kind, seed, shape, sigma, nats):
    """Those that weigh at least e^-nats as much as one that is known, by brute force."""
    images = adversarial(kind, seed, *shape)
    y, _ = noised(sm.Corpus(images), sigma, seed)
    search, _, _ = targets_of(searching(images, 3)[0], y[:1], sigma)
    s, windows = patches_of(torch.from_numpy(images / 127.5 - 1)), patches_of(y[:1].double())
    d2, half = np.square(windows[:, None] - s[None]).sum((2, 3)), search.queries.half
    search.best[:] = best = np.quantile(d2, 0.1, axis=1, method="lower")
    reach = best + nats / half
    # rounding decides about those that are exactly as far
    reach = np.where(np.abs(d2 - reach[:, None]).min(1) < 1e-9 * reach, reach * (1 + 1e-6), reach)
    asked = np.arange(len(best)), (reach - best) * half
    found = search.enumerate(*asked, Budget(np.inf))
    nearest = d2.min(1)
    w = np.exp(-(d2 - nearest[:, None]) * half[:, None]) * (d2 <= reach[:, None])
    some = nearest <= reach
    np.testing.assert_allclose(found.m.numpy()[some], -(nearest * half)[some], rtol=1e-9)
    truth = w.sum(1), (w**2).sum(1), w @ s[:, 4]
    for a, b in zip((found.Z, found.Z2, found.S), truth, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=1e-6)
    assert search.enumerate(*asked, Budget(-1.0)) is None  # even where nothing is to be done


def test_a_stratum_without_the_nearest_patch_known_has_no_sums():
    images = smooth_images(6, 60, 12)
    machine, _ = searching(images, 5, bound="auto")
    y, _ = noised(sm.Corpus(images), 0.5, 1)
    search, x, _ = targets_of(machine, y[:1], 0.5)
    at, nats = np.arange(len(x.best)), np.full(len(x.best), 4.0)
    for step, finite in ((0.0, True), (1e-3, False)):
        best = x.best - step  # of a patch that is there, or would be
        search.best[:] = best
        fold = search.enumerate(at, nats, Budget(np.inf))
        assert (np.isfinite(Stratum.of(fold, best, x.queries.half, nats).Z) == finite).all()
        search.best[:] = x.best + step


@given(st.sampled_from(KINDS), seeds, shapes, sigmas)
def test_an_initial_guess_is_of_patches_that_are_there(kind, seed, shape, sigma):
    """And has no more mass than there is, by brute force."""
    images = adversarial(kind, seed, *shape)
    y, _ = noised(sm.Corpus(images), sigma, seed)
    search, _, _ = targets_of(searching(images, 3)[0], y[:1], sigma)
    s, windows = patches_of(torch.from_numpy(images / 127.5 - 1)), patches_of(y[:1].double())
    d2 = np.square(windows[:, None] - s[None]).sum((2, 3))
    assert (np.abs(d2 - search.best[:, None]).min(1) <= 1e-9 * (1 + search.best)).all()
    mass = np.exp((search.best[:, None] - d2) * search.queries.half[:, None]).sum(1)
    assert (search.log_mass <= np.log(mass) + 1e-6).all()


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.4])
def test_narrow_posteriors_are_within_the_estimate_too(small_pilot, sigma):
    """Where few patches matter, a sample may lack the heaviest, and is not trusted."""
    images = smooth_images(2, 600, 18)
    machine, exact = searching(images[3:], 7, bound="auto")
    y = torch.from_numpy(images[:3] / 127.5 - 1)
    y = y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    answer = machine.denoise_bounded(y, sigma)
    off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
    assert (off <= answer.error + 1e-6).double().mean() >= answer.level


def test_a_deterministic_bound_leaves_nothing_to_chance(small_pilot):
    images = smooth_images(0, 60, 12)
    machine, exact = searching(images, 3, 0.1, bound="deterministic")
    y, level = noised(sm.Corpus(images), 3.0, 0)
    answer = machine.denoise_bounded(y.double(), level)
    assert answer.kind == "deterministic"
    assert answer.level == 1
    assert not small_pilot
    off = (answer.D - exact.denoise(y.double(), level)).abs().amax(1)
    assert (off <= answer.error + 1e-9).all()


def test_queries_that_cost_too_much_are_left_out():
    images = smooth_images(3, 100, 14)
    machine, exact = searching(images[1:], 5)
    y = torch.from_numpy(images[:1] / 127.5 - 1)
    for limit, some in ((np.inf, True), (0.0, False)):
        search, x, of = targets_of(machine, y, 0.3)
        done = search.certify(np.arange(len(x.best)), 1e-3, Budget(np.inf), limit)
        assert (len(done) == len(x.best)) == some
    search, x, of = targets_of(machine, y, 0.3)
    search.certify(np.arange(len(x.best)), 1e-3, Budget(np.inf))
    D = (search.found.S / search.found.Z[:, None]).T
    truth = exact.denoise(y, 0.3)[0, :, of.rows, of.columns].reshape(3, -1)
    assert (D - truth).abs().max() < 1e-3


def test_a_fold_builds_no_index():
    machine, _ = searching(random_images(0, 20, 1, 8, 8), 3)
    index = machine.corpus.indices()
    y, sigma = noised(machine.corpus, [0.3])
    arguments = y.double(), torch.tensor([0.3]).double(), machine.windows(0.3, index)
    with pytest.raises(RuntimeError, match="call prepare"):
        posterior(machine.source.bounded, machine.corpus.images, index, *arguments)
    machine.source.bounded.prepare(index, arguments[-1])
    _, D = posterior(machine.source.bounded, machine.corpus.images, index, *arguments)
    assert (D - machine.denoise(y, sigma)).abs().max() < 1e-6


def test_powers_of_two():
    x = np.linspace(-125, 125, 64 * LANES).astype(np.float32)
    out = np.zeros_like(x)

    @njit
    def powers(x, out):
        for k in range(0, len(x), LANES):
            store(out, k, exp2(load(x, k)))

    powers(x, out)
    np.testing.assert_allclose(out, 2.0 ** x.astype(np.float64), rtol=1e-5)


def test_the_next_indexes_are_read_ahead(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda f, *_: asked.append(os.fstat(f).st_size), False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, False)
    monkeypatch.setattr(readahead_module, "Thread", NoThread)
    groups = [[tmp_path / f"{k}"] for k in (1, 2, 3)]
    ahead = readahead_module.Readahead()
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


@pytest.mark.parametrize("told", [True, False])
def test_flat_posteriors_are_compared_with_everything(monkeypatch, capsys, told):
    """A search that would cost more than the exact scan is given up; says so if that is long."""
    monkeypatch.setattr(bounded_module, "REPORTED", 0.0 if told else 1.0)
    images = random_images(0, 300, 1, 12, 12)
    corpus = sm.Corpus(images)
    search = Search("bounded", patience=1e-3)
    machine = sm.EquivariantLocalScore(corpus, patch_size=3, search=search)
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
    engine = machine.source.engine_for(machine.windows(1.0, index), index)
    assert (engine is machine.source.bounded) is bounded


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
    monkeypatch.setattr(index_module, "MEMORY", 2**17)


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
from scoremachine.engines.search import index
index.BUCKET, index.MEMORY = 300, 2**17
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
    engine = machine.source.engine_for(machine.windows(1.0, corpus.indices()), corpus.indices())
    assert engine is machine.source.engine
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
