"""Every machine equals its definition, summed by brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import scoremachine as sm
from conftest import compared, noised, random_corpus
from scoremachine.core import posterior as fold_module
from scoremachine.core.collection import Collection
from scoremachine.core.windows import Box, Masks, Soft, Variant
from scoremachine.engines import choose

SIGMAS = [0.002, 0.02, 0.2, 1.0, 10.0, 80.0]  # one batch: its members differ wildly
SHAPES = [(1, 7, 7), (3, 8, 11), (4, 9, 5), (3, 8, 8)]
TOLERANCE = 1e-4


def full_size(name: str, H: int, W: int, boundary: str) -> int:
    side = min(H, W) if boundary == "circular" else max(H, W)
    return side if name in ("pspc", "epc") else side - (side % 2 == 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("P", [1, 3, 7, "full"])
@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("ls", "broken"), ("els", "broken"), ("els", "circular"), ("pspc", "broken"),
        ("epc", "broken"), ("epc", "circular"),
    ],
)  # fmt: skip
def test_box_machines_equal_their_definition(name, boundary, P, shape, kernel):
    C, H, W = shape
    corpus = random_corpus(seed=1, N=11, C=C, H=H, W=W)
    size = full_size(name, H, W, boundary) if P == "full" else P
    if size > full_size(name, H, W, boundary):
        pytest.skip("no such window fits")
    extra = {"boundary": boundary} if name in ("els", "epc") else {}
    y, sigma = noised(corpus, SIGMAS)
    fast = sm.build(name, corpus, patch_size=size, kernel=kernel, **extra)
    slow = sm.build(name, corpus, patch_size=size, kernel="reference", **extra)
    D = fast.denoise(y, sigma)
    assert D.dtype == torch.float32
    assert (D - slow.denoise(y, sigma)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ideal_equals_its_formula(shape, kernel):
    corpus = random_corpus(seed=2, N=13, C=shape[0], H=shape[1], W=shape[2])
    y, _ = noised(corpus, SIGMAS)
    x = corpus.images.reshape(13, -1) / 127.5 - 1
    for p, level in enumerate(SIGMAS):
        l = -((y[p].numpy().astype(np.float64).ravel() - x) ** 2).sum(1) / (2 * level**2)
        D = np.exp(l - logsumexp(l)) @ x
        got = sm.build("ideal", corpus, kernel=kernel).denoise(y[p : p + 1], level)
        assert np.abs(got.numpy().ravel() - D).max() <= TOLERANCE


@pytest.mark.parametrize("N", [1, 5, 40])
def test_gaussian_equals_its_formula(N):
    """Fewer images than pixels, and more."""
    corpus = random_corpus(seed=3, N=N, C=1, H=4, W=5)
    x = corpus.images.reshape(N, -1) / 127.5 - 1
    mean, C = x.mean(0), np.cov(x.T, bias=True)
    y, sigma = noised(corpus, SIGMAS)
    D = sm.build("gaussian", corpus).denoise(y, sigma).numpy().reshape(len(SIGMAS), -1)
    for p, level in enumerate(SIGMAS):
        offset = y[p].numpy().astype(np.float64).ravel() - mean
        expected = mean + C @ np.linalg.solve(C + level**2 * np.eye(20), offset)
        assert np.abs(D[p] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("h", [0.0, 0.3])
def test_log_densities_equal_scipy(h):
    corpus = random_corpus(seed=4, N=30, C=1, H=3, W=4)
    x = corpus.images.reshape(30, -1) / 127.5 - 1
    y, sigma = noised(corpus, [0.05, 0.5, 5.0])
    ideal = sm.build("ideal", corpus, bandwidth=h).log_density(y, sigma)
    gaussian = sm.build("gaussian", corpus, bandwidth=h).log_density(y, sigma)
    assert ideal.shape == gaussian.shape == (3,)
    C = np.cov(x.T, bias=True)
    for p, level in enumerate(sigma.tolist()):
        q = y[p].numpy().astype(np.float64).ravel()
        spread = (level**2 + h**2) * np.eye(12)
        mixture = [multivariate_normal.logpdf(q, mean=s, cov=spread) for s in x]
        assert ideal[p].item() == pytest.approx(logsumexp(mixture) - np.log(30), rel=1e-6)
        expected = multivariate_normal.logpdf(q, mean=x.mean(0), cov=C + spread)
        assert gaussian[p].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("h", [0.1, 0.7])
def test_bandwidth_reads_every_source_as_a_gaussian(h):
    """E[x | y] when x = s + h eta: the mean of each source's own posterior N(s, h^2 I)."""
    corpus = random_corpus(seed=5, N=8, C=1, H=3, W=3)
    x = corpus.images.reshape(8, -1) / 127.5 - 1
    y, sigma = noised(corpus, [0.05, 0.5, 5.0])
    D = sm.build("ideal", corpus, bandwidth=h).denoise(y, sigma).numpy().reshape(3, -1)
    G = sm.build("gaussian", corpus, bandwidth=h).denoise(y, sigma).numpy().reshape(3, -1)
    for p, level in enumerate(sigma.tolist()):
        q = y[p].numpy().astype(np.float64).ravel()
        l = -((q - x) ** 2).sum(1) / (2 * (level**2 + h**2))
        each = x + h**2 / (h**2 + level**2) * (q - x)
        assert np.abs(D[p] - np.exp(l - logsumexp(l)) @ each).max() <= TOLERANCE
        C = np.cov(x.T, bias=True) + h**2 * np.eye(9)
        offset = np.linalg.solve(C + level**2 * np.eye(9), q - x.mean(0))
        assert np.abs(G[p] - (x.mean(0) + C @ offset)).max() <= TOLERANCE


IMAGE = (6, 7)
MASKS = Masks.of([np.random.default_rng(0).random((42, 42)) > 0.7], IMAGE)
FLIPS = (Variant(), Variant(mirror_columns=True), Variant(True, False, 0.8, 0.1))
COLLECTIONS = {
    "ls": Collection(IMAGE, Box((3, 3)), "pixels", "pixel"),
    "ls-soft": Collection(IMAGE, Soft.gaussian(5, 5), "pixels", "pixel"),
    "ls-reach": Collection(IMAGE, Box((3, 3)), "pixels", "pixel", reach=2, variants=FLIPS),
    "ls-any": Collection(IMAGE, Soft.of(np.arange(1.0, 16).reshape(3, 5)), "pixels", "pixel"),
    "els": Collection(IMAGE, Box((3, 3)), "pixels", "pixel", "every"),
    "els-soft": Collection(IMAGE, Soft.gaussian(3, 3), "pixels", "pixel", "every", variants=FLIPS),
    "els-circular": Collection(IMAGE, Box((3, 3)), "pixels", "pixel", "every", boundary="circular"),
    "els-circular-soft": Collection(
        IMAGE, Soft.gaussian(3, 3), "pixels", "pixel", "every", boundary="circular"
    ),
    "pspc": Collection(IMAGE, Box((4, 4)), "boxes", "window"),
    "pspc-soft": Collection(IMAGE, Soft.gaussian(4, 4), "boxes", "window"),
    "pspc-reach": Collection(IMAGE, Box((4, 4)), "boxes", "window", reach=1, variants=FLIPS),
    "epc": Collection(IMAGE, Box((3, 3)), "boxes", "window", "every"),
    "epc-soft": Collection(IMAGE, Soft.gaussian(4, 4), "boxes", "window", "every", variants=FLIPS),
    "epc-circular": Collection(
        IMAGE, Box((4, 4)), "pixels", "window", "every", boundary="circular", variants=FLIPS
    ),
    "masks": Collection(IMAGE, MASKS, "pixels", "window"),
    "masks-pixel": Collection(IMAGE, MASKS, "pixels", "pixel", variants=FLIPS),
    "whole": Collection(IMAGE, Box(IMAGE), "boxes", "window"),
    "whole-flips": Collection(IMAGE, Box(IMAGE), "boxes", "window", variants=FLIPS),
    "rolled": Collection(IMAGE, Box(IMAGE), "boxes", "window", "rolled"),
}


@pytest.mark.parametrize("c", COLLECTIONS.values(), ids=COLLECTIONS)
def test_one_pass_gives_density_confidence_and_leaders(c, kernel):
    corpus = random_corpus(seed=6, N=20, C=3, H=6, W=7)
    y, sigma = noised(corpus, [0.1, 1.0, 10.0])
    index = np.arange(2, 20)  # without the duplicates: leaders are then unique
    asked = corpus.images, index, compared(y.double(), kernel, c), sigma, c, 4
    fold, D = fold_module.posterior(choose(kernel), *asked)
    slow, D_slow = fold_module.posterior(choose("reference"), *asked)
    assert (D - D_slow).abs().max() <= TOLERANCE / 10
    torch.testing.assert_close(fold.log_partition, slow.log_partition, rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(fold.effective_sources, slow.effective_sources, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fold.logits, slow.logits, rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(fold.leader_weights, slow.leader_weights, rtol=0, atol=1e-5)
    assert torch.equal(fold.places[:, 0], slow.places[:, 0])


@pytest.mark.parametrize("c", COLLECTIONS.values(), ids=COLLECTIONS)
def test_derivatives_equal_their_definition_and_finite_differences(c, kernel):
    """u^T dD/dy, every entry; and along a direction v, by central differences."""
    corpus = random_corpus(seed=6, N=20, C=3, H=6, W=7)
    y, sigma = noised(corpus, [0.02, 0.5, 2.0, 10.0])
    y = compared(y.double(), kernel, c)
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, *y.shape, dtype=torch.float64, generator=generator)

    def mean(name, y):
        asked = corpus.images, np.arange(2, 20), y, sigma, c
        return fold_module.posterior(choose(name), *asked)[1]

    def pulled_back(name):
        x = y.clone().requires_grad_()
        return torch.autograd.grad(mean(name, x), x, u)[0]

    g, slow = pulled_back(kernel), pulled_back("reference")
    torch.testing.assert_close(g, slow, rtol=1e-5, atol=1e-6)
    assert g[2:].abs().amax((1, 2, 3)).min() > 1e-4
    step = 1e-4 * sigma[:, None, None, None]
    slope = (mean("reference", y + step * v) - mean("reference", y - step * v)) / (2 * step)
    expected, got = (slope * u).sum((1, 2, 3)), (slow * v).sum((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("c", [c for c in COLLECTIONS.values() if c.source != "rolled"], ids=str)
def test_what_is_seen_of_a_source_may_not_be_what_it_answers_with(c, kernel):
    """Logits by some images, means of others, and the derivative by what is seen."""
    corpus = random_corpus(seed=6, N=20, C=3, H=6, W=7)
    seen = random_corpus(seed=9, N=20, C=3, H=6, W=7).images / 100.0 - 1.1
    seen = (0.4 * seen).astype(np.float32)
    y, sigma = noised(corpus, [0.5, 1.0, 10.0])
    y = 0.4 * y.double()
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, *y.shape, dtype=torch.float64, generator=generator)

    def mean(name, y):
        asked = seen, np.arange(2, 20), y, sigma, c, 2, corpus.images
        return fold_module.posterior(choose(name), *asked)

    x = y.clone().requires_grad_()
    (fold, D), (slow, D_slow) = mean(kernel, x), mean("reference", x)
    assert (D - D_slow).abs().max() <= TOLERANCE / 10
    torch.testing.assert_close(fold.log_partition, slow.log_partition, rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(fold.logits, slow.logits, rtol=1e-7, atol=1e-5)
    g, g_slow = (torch.autograd.grad(each, x, u)[0] for each in (D, D_slow))
    torch.testing.assert_close(g, g_slow, rtol=1e-5, atol=1e-6)
    step = 1e-4 * sigma[:, None, None, None]
    ahead, behind = (mean("reference", y + sign * step * v)[1] for sign in (1, -1))
    expected = ((ahead - behind) / (2 * step) * u).sum((1, 2, 3))
    torch.testing.assert_close((g_slow * v).sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-3)
    if c.whole:  # the definition itself
        s = seen[2:].reshape(18, -1).astype(np.float64)
        l = -((y[0].numpy().ravel() - s) ** 2).sum(1) / (2 * 0.5**2)
        w = np.exp(l - logsumexp(l))
        told = w @ (corpus.images[2:].reshape(18, -1) / 127.5 - 1)
        assert np.abs(D[0].detach().numpy().ravel() - told).max() <= TOLERANCE


@pytest.mark.parametrize("c", COLLECTIONS.values(), ids=COLLECTIONS)
def test_tiles_change_nothing(c, kernel, monkeypatch):
    """Cut into many tiles of the corpus and of the displacements: the same answer."""
    corpus = random_corpus(seed=7, N=50, C=1, H=6, W=7)
    y, sigma = noised(corpus, [0.1, 1.0, 10.0])
    asked = choose(kernel), corpus.images, np.arange(50), y.double(), sigma, c, 2
    whole, D = fold_module.posterior(*asked)
    monkeypatch.setattr(fold_module, "TILE", 2000)
    monkeypatch.setattr("scoremachine.engines.cpu.TILE", 2000)
    monkeypatch.setattr("scoremachine.engines.pytorch._room", lambda device: 3000)
    pieces, D_pieces = fold_module.posterior(*asked)
    assert (D - D_pieces).abs().max() < 2e-5
    torch.testing.assert_close(pieces.logits, whole.logits)


def test_an_irregular_source_is_read_by_its_index(kernel):
    """A class, or a corpus with images held out: any positions, in any number."""
    corpus = random_corpus(seed=8, N=40, C=3, H=5, W=5)
    index = np.array([3, 5, 6, 11, 17, 18, 19, 30, 31, 38, 39])
    y, sigma = noised(corpus, [0.2, 2.0])
    for name in ("ls", "els", "pspc", "ideal"):
        extra = {} if name == "ideal" else {"patch_size": 3}
        machine = sm.build(name, corpus, kernel=kernel, **extra)
        alone = sm.build(name, sm.Corpus(corpus.images[index]), kernel="reference", **extra)
        D = machine.denoise_from(y.double(), sigma, index)
        assert (D - alone.denoise(y.double(), sigma)).abs().max() <= 1e-5
