"""Statements that hold for every corpus and every query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scoremachine as sm
from conftest import SMALL, noised, random_images, small
from scoremachine.core.fold import Fold

shapes = st.tuples(
    st.integers(1, 12), st.sampled_from([1, 3]), st.integers(3, 8), st.integers(3, 8)
)
seeds = st.integers(0, 2**31)
sigmas = st.floats(-6, 4.5).map(lambda e: float(np.exp(e)))
sizes = st.sampled_from([1, 3])
names = st.sampled_from(list(SMALL))
# a corpus alone decides the windows of these: one that is permuted or doubled has the same,
# but rounding may put a pixel on the other side of a threshold
steady = st.sampled_from([name for name in SMALL if name not in ("pspc-flex", "pca")])

EXTRAPOLATING = "gaussian", "composite"  # whose D may be brighter than any image


def make(name, images, P=3, **settings):
    if "patch_size" in SMALL[name]:
        settings["patch_size"] = P
    return small(name, images, kernel="numba", **settings)


@given(seeds, shapes, sigmas, sizes, steady)
def test_permuting_the_corpus_changes_nothing(seed, shape, sigma, P, name):
    images = random_images(seed, *shape)
    order = np.random.default_rng(seed).permutation(len(images))
    y, level = noised(sm.Corpus(images), sigma, seed)
    D = make(name, images, P).denoise(y, level)
    assert (D - make(name, images[order], P).denoise(y, level)).abs().max() < 2e-5


@given(
    seeds,
    shapes,
    sigmas,
    sizes,
    st.sampled_from(["ideal", "ls", "pspc", "pspc-flex", "pca", "smoothed", "gaussian"]),
)
def test_one_image_is_given_back(seed, shape, sigma, P, name):
    images = random_images(seed, *shape)[:1]
    y, level = noised(sm.Corpus(images), sigma, seed)
    x = torch.from_numpy(images / 127.5 - 1).float()
    assert (make(name, images, P).denoise(y, level) - x).abs().max() < 1e-5


@given(seeds, shapes, sigmas, sizes, steady)
def test_doubling_the_corpus_changes_nothing(seed, shape, sigma, P, name):
    """Ties share the weight."""
    images = random_images(seed, *shape)
    y, level = noised(sm.Corpus(images), sigma, seed)
    D = make(name, images, P).denoise(y, level)
    doubled = make(name, np.concatenate([images, images]), P).denoise(y, level)
    assert (D - doubled).abs().max() < 2e-5


@given(seeds, shapes, sigmas, sizes, st.integers(0, 7), st.integers(0, 7))
def test_shifting_the_query_shifts_circular_els(seed, shape, sigma, P, dy, dx):
    images = random_images(seed, *shape)
    y, level = noised(sm.Corpus(images), sigma, seed)
    machine = make("els", images, P, boundary="circular")
    D = machine.denoise(y, level)
    shifted = machine.denoise(torch.roll(y, (dy, dx), (2, 3)), level)
    assert (torch.roll(D, (dy, dx), (2, 3)) - shifted).abs().max() < 2e-5


@given(
    seeds, shapes, sizes, st.sampled_from(["ideal", "es", "ls", "els", "pspc", "pspc-flex", "pca"])
)
def test_vanishing_noise_gives_the_nearest_source(seed, shape, P, name):
    """A corpus image with next to no noise is its own nearest source, everywhere."""
    images = random_images(seed, *shape)
    x = torch.from_numpy(images[-1:] / 127.5 - 1).float()
    D = make(name, images, P).denoise(x, 1e-6)
    assert (D - x).abs().max() < 1e-5


@given(seeds, shapes, names, st.sampled_from(["numba", "torch"]))
def test_next_to_no_noise_makes_no_nan(seed, shape, name, kernel):
    """Whatever is asked about: at sigma = 1e-9 logits are beyond what float64 can tell apart."""
    images = random_images(seed, *shape)
    y = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(seed))
    D = small(name, images, kernel=kernel).denoise(y.double(), 1e-9)
    assert torch.isfinite(D).all()
    assert name in EXTRAPOLATING or D.abs().max() <= 1 + 1e-3


@given(
    seeds, shapes, sizes, st.sampled_from(["ideal", "ls", "pspc", "pspc-flex", "pca", "gaussian"])
)
def test_endless_noise_gives_the_mean(seed, shape, P, name):
    images = random_images(seed, *shape)
    y = 1e6 * torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(seed))
    D = make(name, images, P).denoise(y, 1e6)
    mean = torch.from_numpy((images / 127.5 - 1).mean(0)).float()
    assert torch.isfinite(D).all()
    assert (D - mean).abs().max() < 1e-3


@given(seeds, shapes, sigmas, sizes, names)
def test_the_answer_stays_within_the_range_of_the_sources(seed, shape, sigma, P, name):
    images = random_images(seed, *shape)
    y, level = noised(sm.Corpus(images), sigma, seed)
    D = make(name, images, P).denoise(3 * y, level)
    assert torch.isfinite(D).all()
    if name not in EXTRAPOLATING:
        assert D.abs().max() <= 1 + 1e-5


@given(seeds, shapes, st.sampled_from([0.01, 0.3, 5.0]))
def test_machines_meet_where_the_theory_says(seed, shape, sigma):
    """A box that is the whole image: PSPC is ideal; one that reaches every border: ELS is LS."""
    N, C, H, _ = shape
    side = H + (H % 2 == 0)
    images = random_images(seed, N, C, side, side)
    y, level = noised(sm.Corpus(images), sigma, seed)
    ideal = make("ideal", images).denoise(y, level)
    assert (make("pspc", images, side).denoise(y, level) - ideal).abs().max() < 2e-5
    els, ls = (make(name, images, side).denoise(y, level) for name in ("els", "ls"))
    assert (els - ls).abs().max() < 2e-5


@given(seeds, shapes, sizes, names)
def test_a_picture_does_not_depend_on_its_batch(seed, shape, P, name):
    """Bit for bit, though the members' noise differs by five orders of magnitude."""
    images = random_images(seed, *shape)
    y, levels = noised(sm.Corpus(images), [0.002, 0.5, 90.0], seed)
    machine = make(name, images, P)
    together = machine.denoise(y, levels)
    for p in range(3):
        alone = machine.denoise(y[p : p + 1], levels[p])
        if name == "gaussian":  # a matrix product of another shape rounds differently
            assert (alone[0] - together[p]).abs().max() < 1e-5
        else:
            assert torch.equal(alone[0], together[p])


@given(seeds, shapes, sigmas)
def test_the_score_is_the_gradient_of_the_log_density(seed, shape, sigma):
    images = random_images(seed, *shape)
    for name in ("ideal", "gaussian", "es"):
        machine = make(name, images)
        y, level = noised(sm.Corpus(images), sigma, seed)
        y = y.double()
        step = torch.zeros_like(y)
        step[0, 0, 1, 1] = 1e-4 * sigma
        up, down = (machine.log_density(y + s, level) for s in (step, -step))
        slope = ((up - down) / (2e-4 * sigma)).item()
        score = machine.score(y, level)[0, 0, 1, 1].item()
        assert slope == pytest.approx(score, rel=1e-3, abs=1e-3 / sigma)


@given(seeds, st.integers(1, 30), st.integers(1, 29))
def test_folding_in_pieces_is_folding_at_once(seed, n, cut):
    """The triple (m, Z, S) is a monoid: any split merges to the whole."""
    rng = np.random.default_rng(seed)
    l, v = rng.normal(0, 50, n), rng.normal(size=n)

    def fold(part: slice) -> Fold:
        logits, values = torch.from_numpy(l[part]), torch.from_numpy(v[part])
        if len(logits) == 0:
            empty = torch.zeros(1, 1, 1, dtype=torch.float64)
            nothing = torch.full((1, 1, 1, 1), -1e300, dtype=torch.float64)
            return Fold(
                empty - 1e300, empty, empty, empty[:, None], nothing, torch.tensor([[[[-1]]]])
            )
        m = logits.max()
        w = torch.exp(logits - m)
        best = int(logits.argmax())
        return Fold(
            m.reshape(1, 1, 1),
            w.sum().reshape(1, 1, 1),
            (w**2).sum().reshape(1, 1, 1),
            (w * values).sum().reshape(1, 1, 1, 1),
            logits[best].reshape(1, 1, 1, 1),
            torch.tensor([[[[best + (part.start or 0)]]]]),
        )

    merged, whole = fold(slice(0, cut)).merge(fold(slice(cut, n))), fold(slice(0, n))
    for a, b in zip(vars(merged).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(a, b)
