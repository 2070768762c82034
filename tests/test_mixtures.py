"""Mixtures in place of images: their posteriors, their limits, their sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import scoremachine as sm
from conftest import SMALL, noised, random_corpus, small
from scoremachine.calibration.heldout import held_out_pictures, split
from scoremachine.core.collection import Collection
from scoremachine.core.windows import Box
from scoremachine.lab.sizes import sizes
from scoremachine.sources import compression
from scoremachine.sources import mixture as mixtures
from scoremachine.sources.compression import budget_of, compress
from scoremachine.sources.mixture import Clusters, Mixture
from test_machines import smooth_corpus

SIGMAS = [0.05, 0.4, 3.0]


def some_clusters(K, shape, rank, seed=0, diagonal=True):
    g = torch.Generator().manual_seed(seed)
    D = int(np.prod(shape))
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.1
    d = torch.rand(K, D, generator=g) * 0.05 if diagonal else torch.zeros(K, 0)
    means, V = torch.randn(K, D, generator=g) * 0.4, torch.randn(K, D, rank, generator=g) * 0.2
    return Clusters(weights / weights.sum(), means, V, d, shape)


def covariance(c, k):
    V = c.V[k].double().numpy()
    d = c.d[k].double().numpy() if c.d.shape[1] else np.zeros(len(V))
    return V @ V.T + np.diag(d)


def definition(c, q, sigma, d=slice(None)):
    """E[x | q] of some of the numbers d, by the formulas of Gaussians, float64."""
    logs, means = [], []
    for k in range(len(c)):
        mu, C = c.means[k].double().numpy()[d], covariance(c, k)[d][:, d]
        seen = C + sigma**2 * np.eye(len(C))
        logs.append(np.log(float(c.weights[k])) + multivariate_normal.logpdf(q, mu, seen))
        means.append(mu + C @ np.linalg.solve(seen, q - mu))
    w = np.exp(np.array(logs) - logsumexp(logs))
    return w @ np.array(means)


def window(i, j, P, H, W):
    rows = range(max(0, i - P // 2), min(H, i + P // 2 + 1))
    columns = range(max(0, j - P // 2), min(W, j + P // 2 + 1))
    return rows, columns


# ---------------------------------------------------------------- posteriors


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("room", [2**26, 60])
def test_the_mean_is_that_of_gaussians(rank, diagonal, room, monkeypatch):
    monkeypatch.setattr(mixtures, "ROOM", room)
    c = some_clusters(5, (1, 2, 4), rank, diagonal=diagonal)
    q = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sigma in SIGMAS:
        D = c.mean(q, sigma)
        expected = np.stack([definition(c, row, sigma) for row in q.numpy()])
        np.testing.assert_allclose(D.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 2, 5, 8, 20])  # a box has 18 numbers
@pytest.mark.parametrize("room", [2**26, 500])
def test_ls_answers_by_the_marginals_of_boxes(rank, room, monkeypatch):
    monkeypatch.setattr(mixtures, "ROOM", room)
    c = some_clusters(4, (2, 4, 5), rank)
    m = Mixture(some_clusters(4, (1, 4, 5), rank))
    m.whole = c  # two channels, which no corpus has
    y = torch.randn(5, 2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = Collection((4, 5), Box((3, 3)), "pixels", "pixel")
    at = np.arange(40).reshape(2, 4, 5)
    for sigma in SIGMAS:
        answers = m.posterior(y, torch.full((5,), sigma, dtype=torch.float64), row).numpy()
        for picture, D in zip(y.numpy(), answers, strict=True):
            for i in range(4):
                for j in range(5):
                    rows, columns = window(i, j, 3, 4, 5)
                    d = at[:, rows][:, :, columns].ravel()
                    found = definition(c, picture.ravel()[d], sigma, d)
                    places = [int(np.flatnonzero(d == k)[0]) for k in at[:, i, j]]
                    np.testing.assert_allclose(D[:, i, j], found[places], atol=1e-6)


@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_els_answers_by_the_marginals_of_patches(boundary):
    patches = some_clusters(6, (1, 3, 3), 2)
    m = Mixture(some_clusters(2, (1, 5, 6), 0), {3: patches})
    y = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    machine = sm.build("els", m, patch_size=3, boundary=boundary)
    for sigma in SIGMAS:
        D = machine.denoise(y, sigma)[0, 0].numpy()
        for i in range(5):
            for j in range(6):
                if boundary == "circular":
                    rows, columns = np.arange(i - 1, i + 2) % 5, np.arange(j - 1, j + 2) % 6
                    d = np.arange(9)
                else:
                    rows, columns = map(list, window(i, j, 3, 5, 6))
                    down, across = np.array(rows) - i + 1, np.array(columns) - j + 1
                    d = (3 * down[:, None] + across).ravel()
                q = y[0, 0].numpy()[np.ix_(rows, columns)].ravel()
                found = definition(patches, q, sigma, d)[list(d).index(4)]
                assert D[i, j] == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(
    "row",
    [
        Collection.of_images((4, 5)),
        Collection((4, 5), Box((3, 3)), "pixels", "pixel"),
        Collection((4, 5), Box((3, 3)), "pixels", "pixel", "every"),
        Collection((4, 5), Box((3, 3)), "pixels", "pixel", "every", boundary="circular"),
    ],
    ids=["ideal", "ls", "els", "els-circular"],
)
@pytest.mark.parametrize("rank", [2, 8, 12])  # a box has 9 numbers
def test_a_picture_is_the_same_among_others_of_its_noise_level_and_of_others(row, rank):
    m = Mixture(some_clusters(4, (1, 4, 5), rank), {3: some_clusters(6, (1, 3, 3), 2, seed=1)})
    y = torch.randn(6, 1, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.tensor(SIGMAS * 2, dtype=torch.float64)
    together = m.posterior(y, sigma, row)
    for b in range(6):
        alone = m.posterior(y[b : b + 1], sigma[b : b + 1], row)[0]
        torch.testing.assert_close(together[b], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 8, 12])
def test_derivatives_are_those_of_autograd(rank):
    m = Mixture(some_clusters(3, (1, 3, 4), rank), {3: some_clusters(3, (1, 3, 3), 2)})
    y = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    for name, settings in (("ideal", {}), ("ls", {"patch_size": 3}), ("els", {"patch_size": 3})):
        machine = sm.build(name, m, **settings)
        assert torch.autograd.gradcheck(lambda y, f=machine: f.denoise(y, 0.7), y)


# ---------------------------------------------------------------- the two ends


def test_as_many_clusters_as_images_are_the_images():
    corpus = random_corpus(N=12, C=3)
    m = compress(corpus, 12, patch_size=3)
    assert m.whole.nbytes == corpus.images.nbytes + 12 * 4
    y, sigma = noised(corpus, SIGMAS)
    for name in ("ideal", "ls"):
        D = small(name, m, kernel="auto").denoise(y, sigma)
        assert (D - small(name, corpus, kernel="reference").denoise(y, sigma)).abs().max() < 1e-5


def test_all_patches_are_els_itself():
    corpus = random_corpus(N=3)
    whole = sm.Corpus(compression._patches(corpus, 3, 0))  # every patch, as if it were an image
    patches = compress(whole, len(whole)).whole
    m = Mixture(compress(corpus, 3).whole, {3: patches})
    y, sigma = noised(corpus, SIGMAS)
    settings = {"boundary": "circular", "patch_size": 3}
    D = sm.build("els", m, **settings).denoise(y, sigma)
    expected = sm.build("els", corpus, kernel="reference", **settings).denoise(y, sigma)
    assert (D - expected).abs().max() < 1e-5


@pytest.mark.parametrize("N", [20, 60])  # fewer images than numbers, and more
def test_one_cluster_is_the_gaussian_machine(N):
    corpus = smooth_corpus(N=N, C=1, H=6, W=6)
    m = compress(corpus, 1)
    y, sigma = noised(corpus, SIGMAS)
    D = sm.build("ideal", m).denoise(y, sigma)
    assert (D - sm.build("gaussian", corpus).denoise(y, sigma)).abs().max() < 1e-4


def test_a_budget_for_all_covariance_may_be_spent_on_it(monkeypatch):
    """Where there are no other ways, that is the only one."""
    monkeypatch.setattr(compression, "RANKS", ())
    corpus = smooth_corpus(N=200, C=1, H=6, W=6)
    takes = 4 * 36 * 37
    m = compress(corpus, f"{takes}B")
    y, sigma = noised(corpus, SIGMAS)
    D = sm.build("ideal", m).denoise(y, sigma)
    assert (D - sm.build("gaussian", corpus).denoise(y, sigma)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="a cluster of 36 numbers takes"):
        compress(corpus, f"{takes - 1}B")


# ---------------------------------------------------------------- sizes


def test_more_clusters_denoise_better():
    corpus = sm.Corpus.open("digits")
    held, rest = corpus.subset(np.arange(64)), corpus.subset(np.arange(64, 1797))
    x = torch.from_numpy(np.array(held.images)).double() / 127.5 - 1
    y = x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    errors = [
        float(((sm.build("ideal", compress(rest, K, rank=2)).denoise(y, 0.4) - x) ** 2).mean())
        for K in (2, 30)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("most", [1000, 1700, 2400])
def test_what_clusters_leave_of_a_budget_is_spent_on_rank(most):
    m = compress(sm.Corpus.open("digits", limit=400), f"{most}B")
    assert most - 2 * 64 * len(m) < m.nbytes <= most  # one more rank takes two bytes a number


@pytest.mark.parametrize("size", ["10%", "5%", "4kB"])
def test_a_budget_is_kept(size, tmp_path):
    corpus = sm.Corpus.open("digits", limit=400)
    m = compress(corpus, size, patch_size=[3, 5])
    most = budget_of(size, corpus.images.nbytes)
    assert 0.3 * most < m.nbytes <= most * 1.01
    m.save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).nbytes for key in file.keys()) == m.nbytes  # noqa: SIM118
    again = Mixture.load(tmp_path / "m.safetensors")
    y, sigma = noised(corpus, SIGMAS)
    for name in ("ideal", "ls", "els"):
        D = small(name, m).denoise(y, sigma)
        assert (D - small(name, again).denoise(y, sigma)).abs().max() < 1e-5
    assert again.name == m.name
    assert again.key == Mixture.load(tmp_path / "m.safetensors").key


def test_the_same_seed_is_the_same_mixture():
    corpus = sm.Corpus.open("digits")
    assert compress(corpus, 7, seed=1).key == compress(corpus, 7, seed=1).key
    assert compress(corpus, 7, seed=1).key != compress(corpus, 7, seed=2).key


def test_mixtures_generate():
    m = compress(sm.Corpus.open("digits"), 50, patch_size=3)
    for name in ("ideal", "ls", "els"):
        x = sm.generate(small(name, m), 2, 4)
        assert x.shape == (2, 1, 8, 8)
        assert torch.isfinite(x).all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("size", "settings", "says"),
    [
        (0, {}, "size is 0; expected a positive whole number"),
        (10, {}, "size is 10 clusters, and 'array' has 9 images"),
        ("1", {}, "expected a number of clusters, or a budget"),
        ("-1%", {}, "expected a number of clusters, or a budget"),
        ("many MB", {}, "expected a number of clusters, or a budget"),
        ("10B", {}, "a cluster of 36 numbers takes 112 bytes, and there are 10"),
        (3, {"patch_size": 4}, "patch_size is 4; expected an odd side of at most 6"),
        (3, {"patch_size": 7}, "patch_size is 7"),
        (3, {"rank": -1}, "rank is -1"),
        (3, {"seed": -1}, "seed is -1"),
    ],
)
def test_senseless_sizes_are_refused(size, settings, says):
    with pytest.raises(ValueError, match=says):
        compress(random_corpus(), size, **settings)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"ideal", "ls", "els", "composite"}))
def test_other_machines_need_the_images(name):
    with pytest.raises(ValueError, match="a mixture is the source of ideal, ls and els only"):
        small(name, compress(random_corpus(), 3))


def test_what_a_mixture_cannot_do(tmp_path):
    m = compress(random_corpus(), 3)
    with pytest.raises(ValueError, match="patch_size cannot be 'auto'"):
        sm.build("ls", m)
    with pytest.raises(ValueError, match="no clusters of 3 x 3 patches; there are sides none"):
        small("els", m).denoise(torch.zeros(1, 1, 6, 6), 1.0)
    with pytest.raises(ValueError, match="ls and els with plain boxes"):
        small("ls", m, window="gaussian").denoise(torch.zeros(1, 1, 6, 6), 1.0)
    with pytest.raises(ValueError, match="supports no other forward process"):
        sm.generate(small("ls", m), 1, 2, process="heat")
    with pytest.raises(ValueError, match="density is not implemented"):
        small("ideal", m).log_density(torch.zeros(1, 1, 6, 6), 1.0)
    with pytest.raises(ValueError, match="a mixture is not searched"):
        small("els", m).denoise_bounded(torch.zeros(1, 1, 6, 6), 1.0)
    (tmp_path / "m.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no mixture"):
        Mixture.load(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="there is no"):
        Mixture.load(tmp_path / "none.safetensors")


# ---------------------------------------------------------------- how small can it be?


def test_sizes_are_errors_of_the_exact_machine_and_of_mixtures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path))
    corpus = sm.Corpus.open("digits", limit=300)
    found = sizes(corpus, "ls", ["10%", 20, "0.001%"], [0.2, 2.0], held_out=8, patch_size=5)
    assert "leaving out 0.001%: one cluster takes" in capsys.readouterr().err
    assert found.sizes == ["exact", "10%", "20"]
    assert found.errors.shape == (3, 2, 8)
    assert found.clusters[0] == 300 - 9
    assert found.clusters[2] == 20
    _, source, _, reporting = split(corpus, 1, 0, test=8)
    parts = corpus, source, reporting, reporting[:0]
    x, eps = held_out_pictures(parts, 0)[0]
    m = small("ls", compress(corpus.subset(source), 20), patch_size=5)
    D = m.denoise(x + 0.2 * eps, 0.2)
    np.testing.assert_allclose(((D - x) ** 2).mean((1, 2, 3)), found.errors[2, 1], rtol=1e-5)
    for k, s in enumerate(found.smallest()):
        assert found.ratios[s, k] <= 1.05
        assert all(found.ratios[o, k] > 1.05 for o in range(3) if found.nbytes[o] < found.nbytes[s])
    monkeypatch.setattr("scoremachine.lab.sizes.compress", None)  # all is known
    again = sizes(corpus, "ls", ["10%", 20, "0.001%"], [0.2, 2.0], held_out=8, patch_size=5)
    assert np.array_equal(again.errors, found.errors)


def test_sizes_of_els_and_of_others(tmp_path):
    corpus = sm.Corpus.open("digits", limit=60)
    found = sizes(corpus, "els", [10], [0.5], held_out=4, patch_size=3, boundary="circular")
    assert found.nbytes[1] > 0
    with pytest.raises(ValueError, match="source of ideal, ls and els, not of pspc"):
        sizes(corpus, "pspc", [10], [0.5])
    with pytest.raises(ValueError, match="held_out is 0"):
        sizes(corpus, "ls", [10], held_out=0)
    with pytest.raises(ValueError, match="expected a number of clusters, or a budget"):
        sizes(corpus, "ls", ["ten"], [0.5], patch_size=3)


def test_a_mixture_is_no_corpus(tmp_path):
    compress(sm.Corpus.open("digits"), "2%").save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"open it with Mixture\.load"):
        sm.Corpus.open(tmp_path / "m.safetensors")
    mixture = Mixture.load(tmp_path / "m.safetensors")
    assert mixture.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="has no classes, so none is 3"):
        mixture.indices(3)
    with pytest.raises(ValueError, match="start begins with training images, and a mixture"):
        sm.generate(sm.build("ideal", mixture), 1, 2, start=0.5)
