"""What is particular to one machine: its formula from the paper, its properties, its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from azula.guidance import DPSSampler, MMPSDenoiser, PGDMSampler
from azula.noise import VPSchedule
from azula.sample import DDIMSampler

import scoremachine as sm
from conftest import SMALL, noised, random_corpus, random_images, small
from scoremachine.core.windows import Augment
from scoremachine.data import moments as moments_module
from scoremachine.data.moments import leading_moments_of, moments, moments_of
from scoremachine.engines import choose
from scoremachine.machines.patch_composite import holding
from scoremachine.machines.windowed import stationary
from scoremachine.sampling.schedules import EDMSchedule, time_of
from scoremachine.sources.images import ImageSource

SIGMAS = [0.02, 0.3, 2.0, 20.0]


def softmax_mean(l, values):
    """sum_s softmax(l)_s values_s, float64, l (S,), values (S, ...)."""
    w = np.exp(l - l.max())
    return np.tensordot(w / w.sum(), values, axes=1)


def wiener(x, sigma):
    """W = C (C + sigma^2 I)^-1 of images x (N, D)."""
    C = np.cov(x.T, bias=True)
    return C @ np.linalg.inv(C + sigma**2 * np.eye(len(C)))


def smooth_corpus(N=40, C=1, H=6, W=6, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(N, C, H + 2, W + 2))
    smooth = sum(noise[..., a : a + H, b : b + W] for a in range(3) for b in range(3)) / 3
    return sm.Corpus(np.clip(127.5 + 60 * smooth, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- es


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 4, 4)])
def test_es_is_the_ideal_machine_of_all_translations(shape, kernel):
    images = random_images(0, 7, *shape)
    H, W = shape[1:]
    rolled = np.concatenate(
        [np.roll(images, (dy, dx), (2, 3)) for dy in range(H) for dx in range(W)]
    )
    y, sigma = noised(sm.Corpus(images), SIGMAS)
    D = small("es", images, kernel=kernel).denoise(y, sigma)
    assert (D - small("ideal", rolled, kernel="reference").denoise(y, sigma)).abs().max() <= 1e-5
    log_p = small("es", images).log_density(y, sigma)
    torch.testing.assert_close(log_p, small("ideal", rolled).log_density(y, sigma))


def test_es_follows_translations_of_the_query():
    m = small("es", random_corpus(N=6))
    y, sigma = noised(m.corpus, SIGMAS)
    D = m.denoise(y, sigma)
    moved = m.denoise(torch.roll(y, (2, 5), (2, 3)), sigma)
    assert (torch.roll(D, (2, 5), (2, 3)) - moved).abs().max() < 1e-5


# ---------------------------------------------------------------- smoothed


def test_smoothed_is_the_mean_of_ideal_answers_to_perturbed_queries(kernel):
    corpus = random_corpus(N=12)
    m = small("smoothed", corpus, delta=0.7, M=3, kernel=kernel)
    ideal = small("ideal", corpus, kernel="reference")
    y, _ = noised(corpus, SIGMAS)
    eps = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for p, level in enumerate(SIGMAS):
        queries = y[p : p + 1].double() + 0.7 * (1 + level) * eps
        expected = ideal.denoise(queries, level).mean(0)
        assert (m.denoise(y[p : p + 1], level)[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("extra", [{}, {"neighbours": 12}, {"neighbours": 4, "uniform": 8}])
def test_without_perturbations_smoothed_is_ideal(extra):
    """Also with the estimator, where every image is a neighbour or drawn."""
    corpus = random_corpus(N=12)
    y, sigma = noised(corpus, SIGMAS)
    D = small("smoothed", corpus, delta=0.0, **extra).denoise(y, sigma)
    assert (D - small("ideal", corpus).denoise(y, sigma)).abs().max() <= 1e-5


def test_the_end_of_the_flow_is_a_mean_of_m_images():
    images = random_images(3, 30, 1, 6, 6)[3:]
    m = small("smoothed", images, delta=2.0, M=2, schedule=EDMSchedule())
    x = sm.generate(m, count=6, steps=12).double()
    s = torch.from_numpy(images / 127.5 - 1)
    pairs = (s[:, None] + s[None]) / 2
    distances = (x[:, None, None] - pairs).abs().amax((3, 4, 5))
    assert distances.flatten(1).min(1).values.max() < 1e-5
    nearest = distances.flatten(1).argmin(1)
    assert ((nearest // len(s)) != (nearest % len(s))).any()  # and not all of them images


@pytest.mark.parametrize("perturbations", ["fixed", "fresh"])
def test_perturbations_last_a_trajectory_or_a_step(perturbations):
    m = small("smoothed", random_corpus(N=12), delta=1.0, perturbations=perturbations)
    y, _ = noised(m.corpus, [0.5])
    assert torch.equal(m.denoise(y, 0.5), m.denoise(y, 0.5)) == (perturbations == "fixed")
    a, b = (sm.generate(m, count=2, steps=5, seed=s) for s in (0, 0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("perturbations", ["fixed", "fresh"])
def test_the_estimator_depends_on_no_batch(perturbations):
    settings = {"neighbours": 3, "uniform": 5, "perturbations": perturbations}
    m = small("smoothed", random_corpus(N=12), **settings)
    together = sm.generate(m, count=3, steps=4, batch=3)
    assert torch.equal(together, sm.generate(m, count=3, steps=4, batch=1))
    if perturbations == "fixed":
        y, sigma = noised(m.corpus, SIGMAS)
        assert torch.equal(m.denoise(y, sigma)[1], m.denoise(y[1:2], sigma[1])[0])


def test_the_estimator_weighs_what_it_draws():
    """K nearest with their exact weights, L others with (N - K) / L each, above and below."""
    corpus = random_corpus(N=30)
    m = small("smoothed", corpus, delta=0.0, M=1, neighbours=5, uniform=7)
    y, _ = noised(corpus, [1.5])
    s = corpus.images.reshape(30, -1) / 127.5 - 1
    q = y.double().numpy().ravel()
    order = np.argsort(((s - q) ** 2).sum(1), kind="stable")
    near, rest = order[:5], np.setdiff1d(np.arange(30), order[:5])
    keys = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))[0].numpy()
    drawn = rest[np.argsort(keys[rest])[:7]]
    l = -((s - q) ** 2).sum(1) / (2 * 1.5**2)
    weights = np.concatenate([l[near], l[drawn] + np.log(25 / 7)])
    expected = softmax_mean(weights, s[np.concatenate([near, drawn])])
    assert np.abs(m.denoise(y, 1.5).numpy().ravel() - expected).max() <= 1e-5


def test_the_estimators_error_is_small_and_falls():
    """The stated error: with the 10% nearest and as many drawn, below a tenth of [-1, 1]."""
    corpus = smooth_corpus(N=200)
    y, sigma = noised(corpus, [0.3, 1.0, 3.0], seed=1)
    exact = small("ideal", corpus).denoise(y, sigma)
    errors = []
    for K in (5, 20, 80):
        m = small("smoothed", corpus, delta=0.0, M=1, neighbours=K, uniform=K)
        errors.append(((m.denoise(y, sigma) - exact) ** 2).mean().sqrt().item())
    assert errors[1] < 0.1
    assert errors[0] > errors[2]


# ---------------------------------------------------------------- pspc-flex


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_pspc_flex_equals_its_formula(share, kernel):
    corpus = smooth_corpus(C=3, H=5, W=4)
    C, HW = 3, 20
    x = corpus.images.reshape(40, -1) / 127.5 - 1
    y, sigma = noised(corpus, SIGMAS)
    D = small("pspc-flex", corpus, share=share, kernel=kernel).denoise(y, sigma)
    for p, level in enumerate(SIGMAS):
        heat = (wiener(x, level).reshape(C, HW, C, HW) ** 2).sum((0, 2))
        s, q = x.reshape(40, C, HW), y[p].double().numpy().reshape(C, HW)
        total, count = np.zeros((C, HW)), np.zeros(HW)
        for i in range(HW):
            order = sorted(range(HW), key=lambda d, i=i: -heat[i, d])
            held = np.cumsum(heat[i, order])
            n = next((n for n in range(1, HW) if held[n - 1] >= share * held[-1]), HW)
            d = order[:n]
            l = -((s[:, :, d] - q[:, d]) ** 2).sum((1, 2)) / (2 * level**2)
            total[:, d] += softmax_mean(l, s[:, :, d])
            count[d] += 1
        expected = (total / count).reshape(C, 5, 4)
        assert np.abs(D[p].numpy() - expected).max() <= 1e-4


def test_masks_hold_the_share_and_no_pixel_more():
    maps = np.random.default_rng(0).random((9, 9)) ** 3
    for share in (0.1, 0.5, 0.9):
        q = holding(maps, share)
        for row, mask in zip(maps, q, strict=True):
            held = row[mask]
            assert held.sum() >= share * row.sum() or mask.sum() == 1
            if mask.sum() > 1 and held.min() < row[~mask].max(initial=0):
                continue  # a pixel that nobody else holds was added
            assert mask.sum() == 1 or held.sum() - held.min() < share * row.sum()
    assert holding(maps, 1.0).all()
    assert (holding(np.zeros((4, 4)), 0.5) == np.eye(4, dtype=bool)).all()
    lonely = np.zeros((3, 3))
    lonely[:, 0] = 1.0
    assert holding(lonely, 0.5).any(axis=0).all()  # every pixel is answered for


def test_heat_maps_of_a_linear_denoiser_are_its_matrix(tmp_path):
    """The Gaussian machine is linear: its squared gradients are the Wiener filter's heat maps."""
    corpus = smooth_corpus(C=3, H=4, W=5)
    maps = sm.HeatMaps.of(small("gaussian", corpus), corpus, times=[0.3, 0.8], count=2)
    schedule = VPSchedule()
    for t, level, found in zip([0.3, 0.8], maps.sigmas, maps.maps, strict=True):
        alpha, sigma = schedule(torch.tensor(t))
        assert level == pytest.approx(float(sigma / alpha))
        expected = moments(corpus, np.arange(40)).heat_maps(level, corpus.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    maps.save(tmp_path / "maps.npz")
    again = small("pspc-flex", corpus, heat_maps=tmp_path / "maps.npz")
    assert again.settings()["heat_maps"] == maps.key
    y, _ = noised(corpus, [maps.sigmas[0]])
    wanted = small("pspc-flex", corpus).denoise(y, maps.sigmas[0])
    assert (again.denoise(y, maps.sigmas[0]) - wanted).abs().max() < 1e-3


# ---------------------------------------------------------------- pca


def pca_by_definition(x, y, sigma, tau, batch=None):
    """D of images x (N, D) at y (D,); normalized per `batch` images and averaged, if given."""
    W = wiener(x, sigma)
    diagonal = np.diag(W).copy()
    ratio = np.abs(W) / np.maximum(diagonal, 1e-30)[:, None]
    q = ratio >= tau * ratio.max()
    q[~q.any(1), ~q.any(1)] = True
    D = np.zeros(len(y))
    for i in range(len(y)):
        l = -((x[:, q[i]] - y[q[i]]) ** 2).sum(1) / (2 * sigma**2)
        if batch is None:
            D[i] = softmax_mean(l, x[:, i])
        else:
            starts = range(0, len(x), batch)
            D[i] = np.mean([softmax_mean(l[b : b + batch], x[b : b + batch, i]) for b in starts])
    return D


@pytest.mark.parametrize("tau", [0.02, 0.3])
def test_pca_locality_equals_its_formula(tau, kernel):
    corpus = smooth_corpus(C=3, H=5, W=4)
    x = corpus.images.reshape(40, -1) / 127.5 - 1
    y, sigma = noised(corpus, SIGMAS)
    D = small("pca", corpus, threshold=tau, kernel=kernel).denoise(y, sigma)
    for p, level in enumerate(SIGMAS):
        expected = pca_by_definition(x, y[p].double().numpy().ravel(), level, tau)
        assert np.abs(D[p].numpy().ravel() - expected).max() <= 1e-4


def test_a_softmax_per_batch_of_data_would_give_another_answer():
    corpus = smooth_corpus(N=40)
    x = corpus.images.reshape(40, -1) / 127.5 - 1
    y, _ = noised(corpus, [0.3])
    q = y.double().numpy().ravel()
    ours = small("pca", corpus).denoise(y, 0.3).numpy().ravel()
    assert np.abs(ours - pca_by_definition(x, q, 0.3, 0.1)).max() <= 1e-4
    per_batch = [pca_by_definition(x, q, 0.3, 0.1, batch) for batch in (10, 20)]
    assert min(np.abs(ours - D).max() for D in per_batch) > 0.05
    assert np.abs(per_batch[0] - per_batch[1]).max() > 0.05  # nor do they agree


def test_a_pixel_with_no_variance_sees_itself():
    images = np.array(smooth_corpus().images)
    images[:, 0, 0, 0] = 77
    black = images.copy()
    black[:, 0, 0, 0] = 0
    y, _ = noised(sm.Corpus(images), [0.3])
    D = small("pca", images).denoise(y, 0.3)
    assert torch.isfinite(D).all()
    assert D[0, 0, 0, 0].item() == pytest.approx(77 / 127.5 - 1, abs=1e-5)
    index = np.arange(40)
    before, after = (small("pca", u).windows(0.3, index).window for u in (black, images))
    assert (after.terms != before.terms).nnz == 0
    assert after.row(0).sum() == 1
    assert np.mean([after.row(i).sum() for i in range(36)]) > 4
    alike = np.full((4, 1, 3, 3), 200, dtype=np.uint8)
    D = small("pca", alike).denoise(torch.zeros(1, 1, 3, 3), 0.5)
    assert (D - (200 / 127.5 - 1)).abs().max() < 1e-5


def test_leading_moments_are_those_of_the_whole_covariance(monkeypatch):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(200, 6)) * [30, 25, 20, 15, 10, 5]
    u = 127 + factors @ np.linalg.qr(rng.normal(size=(48, 6)))[0].T
    images = np.clip(u, 0, 255).astype(np.uint8).reshape(200, 3, 4, 4)
    index = np.arange(200)
    exact, low = moments_of(images, index), leading_moments_of(images, index, rank=6)
    torch.testing.assert_close(low.eigenvalues, exact.eigenvalues[-6:], rtol=1e-3, atol=0)
    leading = exact.V[:, -6:]
    torch.testing.assert_close(low.V @ low.V.T, leading @ leading.T, rtol=0, atol=1e-3)
    # the machine works where the whole eigenproblem would be too large
    monkeypatch.setattr(moments_module, "LARGEST", 40)
    monkeypatch.setattr(moments_module, "RANK", 30)
    corpus = sm.Corpus(images)
    y, sigma = noised(corpus, [0.5])
    D = small("pca", corpus).denoise(y, sigma)
    monkeypatch.setattr(moments_module, "LARGEST", 8192)
    moments_module._known.clear()
    exact_D = small("pca", sm.Corpus(images)).denoise(y, sigma)
    assert (D - exact_D).abs().mean() < 0.02
    monkeypatch.setattr(moments_module, "LARGEST", 40)
    moments_module._known.clear()
    with pytest.raises(ValueError, match="eigenproblem of side 48"):
        small("gaussian", corpus).denoise(*noised(corpus, [0.5]))


# ---------------------------------------------------------------- windows and sources of boxes


@pytest.mark.parametrize("window", ["gaussian", "wiener"])
@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
def test_tapered_windows_equal_their_definition(name, window, kernel):
    corpus = smooth_corpus(N=12, C=3, H=6, W=7)
    y, sigma = noised(corpus, SIGMAS)
    D = small(name, corpus, window=window, kernel=kernel, patch_size=5).denoise(y, sigma)
    slow = small(name, corpus, window=window, kernel="reference", patch_size=5)
    assert (D - slow.denoise(y, sigma)).abs().max() <= 1e-4
    assert (D - small(name, corpus, patch_size=5).denoise(y, sigma)).abs().max() > 1e-3


def test_gaussian_windows_weigh_as_they_say():
    """LS at an inner pixel, by hand."""
    corpus = smooth_corpus(N=12, H=7, W=7)
    y, _ = noised(corpus, [0.5])
    D = small("ls", corpus, window="gaussian", patch_size=5).denoise(y, 0.5)
    s, q = corpus.images[:, 0] / 127.5 - 1, y[0, 0].double().numpy()
    d = np.arange(-2, 3)
    weights = np.exp(-(d[:, None] ** 2 + d**2) / (2 * (5 / 4) ** 2))
    l = -(weights * (s[:, 1:6, 1:6] - q[1:6, 1:6]) ** 2).sum((1, 2)) / (2 * 0.5**2)
    assert D[0, 0, 3, 3].item() == pytest.approx(softmax_mean(l, s[:, 3, 3]), abs=1e-5)


def test_wiener_windows_are_the_filter_averaged_over_positions():
    corpus = smooth_corpus(N=60, H=5, W=5)
    x = corpus.images.reshape(60, -1) / 127.5 - 1
    heat = (wiener(x, 0.5) ** 2).reshape(5, 5, 5, 5)
    q = stationary(heat.reshape(25, 25), (1, 5, 5), (3, 3))
    assert q[1, 1] == 1
    right = np.sqrt(np.mean([heat[i, j, i, j + 1] for i in range(5) for j in range(4)]))
    middle = np.sqrt(np.mean([heat[i, j, i, j] for i in range(5) for j in range(5)]))
    assert q[1, 2] == pytest.approx(right / middle)


def test_wiener_windows_answer_for_every_pixel():
    images = np.zeros((10, 1, 6, 6), dtype=np.uint8)
    images[:, 0, 3, 3] = 20 * np.arange(10)
    D = small("pspc", images, window="wiener").denoise(torch.zeros(1, 1, 6, 6), 0.3)
    assert torch.isfinite(D).all()


@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
def test_augmented_sources_are_augmented_corpora(name, kernel):
    """Flips, brightness and contrast: as if the copies had been made."""
    images = random_images(1, 6, 1, 5, 6)
    x = torch.from_numpy(images / 127.5 - 1)
    copies = [
        contrast * image + brightness
        for image in (x, x.flip(3))
        for contrast in (1.0, 0.5, 1.5)
        for brightness in (0.0, -0.2, 0.2)
    ]
    s = torch.cat(copies).numpy()
    y, sigma = noised(sm.Corpus(images), SIGMAS)
    m = small(name, images, augment="flips,brightness=0.2,contrast=0.5", kernel=kernel)
    D = m.denoise(y, sigma)
    for p, level in enumerate(SIGMAS):
        q = y[p].double().numpy()
        i, j = 2, 3  # an inner pixel
        if name == "els":
            windows = [s[:, :, a : a + 3, b : b + 3] for a in range(3) for b in range(4)]
        elif name == "ls":
            windows = [s[:, :, 1:4, 2:5]]
        else:
            continue
        windows = np.concatenate(windows)
        l = -((windows - q[:, 1:4, 2:5]) ** 2).sum((1, 2, 3)) / (2 * level**2)
        expected = softmax_mean(l, windows[:, 0, 1, 1])
        assert D[p, 0, i, j].item() == pytest.approx(expected, abs=1e-5)
    slow = small(name, images, augment=m.augment, kernel="reference")
    assert (D - slow.denoise(y, sigma)).abs().max() <= 1e-4


def test_shifts_bring_ls_to_els():
    corpus = random_corpus(N=6)
    y, sigma = noised(corpus, SIGMAS)
    els = small("els", corpus).denoise(y, sigma)
    far = small("ls", corpus, augment=Augment(shifts=5)).denoise(y, sigma)
    assert (far - els).abs().max() < 1e-6
    near = small("ls", corpus, augment="shifts=1").denoise(y, sigma)
    assert (near - els).abs().max() > 1e-3
    assert torch.equal(small("els", corpus, augment="shifts=2").denoise(y, sigma), els)


def test_a_wider_source_costs_no_copy(kernel):
    """Whatever the augmentation, a kernel is handed the corpus's own images."""
    m = small("ls", random_corpus(N=6), augment="flips,shifts=1,contrast=0.2", kernel=kernel)
    handed = []

    class Recording(ImageSource):
        """A source whose engine remembers what it is handed."""

        class engine:  # noqa: N801
            accumulate_response = staticmethod(choose(kernel).accumulate_response)
            tiles = staticmethod(choose(kernel).tiles)
            batch = staticmethod(choose(kernel).batch)

            @staticmethod
            def fold(request, *rest):
                handed.append(request.keys)
                return choose(kernel).fold(request, *rest)

    m = m.with_source(Recording(m.corpus, kernel))
    m.denoise(torch.zeros(1, 1, 6, 6), 1.0)
    assert handed
    assert all(np.shares_memory(images, m.corpus.images) for images in handed)


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("h", [0.0, 0.2])
@pytest.mark.parametrize("name", SMALL)
def test_every_machine_is_differentiable(name, h, kernel):
    """u^T dD/dy against central differences in float64, through everything that denoise does."""
    corpus = smooth_corpus(N=30, C=3, H=5, W=6)
    extra = {"neighbours": 6, "uniform": 9} if name == "smoothed" and h else {}
    m = small(name, corpus, bandwidth=h, kernel=kernel, **extra)
    y, sigma = noised(corpus, [0.3, 1.0, 8.0], seed=2)
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(2, *y.shape, dtype=torch.float64, generator=generator)
    x = y.double().requires_grad_()
    g = torch.autograd.grad(m.denoise(x, sigma), x, u)[0]
    step = 1e-4 * sigma[:, None, None, None]
    with torch.no_grad():
        slope = (m.denoise(x + step * v, sigma) - m.denoise(x - step * v, sigma)) / (2 * step)
    expected, got = (slope * u).sum((1, 2, 3)), (g * v).sum((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_the_jacobian_is_the_posterior_covariance():
    """sigma^2 q_p[d] Cov_p(s_p, s_d) / (sigma^2 + h^2)^2 + [p = d] h^2 / (sigma^2 + h^2)."""
    corpus, sigma, h = smooth_corpus(N=20, H=4, W=5), 0.6, 0.3
    y = noised(corpus, [sigma])[0].double()
    s = (corpus.images / 127.5 - 1).reshape(20, 20)
    variance = sigma**2 + h**2

    def jacobian(name):
        m = small(name, corpus, bandwidth=h)
        J = torch.autograd.functional.jacobian(lambda x: m.denoise(x, sigma), y)
        return J.reshape(20, 20).numpy()

    for name in ("ls", "ideal"):
        J = jacobian(name)
        for p in range(20):
            i, j = divmod(p, 5)
            q = np.zeros((4, 5))
            if name == "ls":
                q[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2] = 1
            else:
                q[:] = 1
            q = q.ravel()
            l = -(q * (s - y.numpy().ravel()) ** 2).sum(1) / (2 * variance)
            w = np.exp(l - l.max())
            w /= w.sum()
            mean = w @ s
            covariance = (w * (s[:, p] - mean[p])) @ (s - mean)
            expected = sigma**2 * q * covariance / variance**2
            expected[p] += h**2 / variance
            np.testing.assert_allclose(J[p], expected, atol=1e-6)
        assert np.allclose(J, J.T, atol=1e-6) == (name == "ideal")


def test_azulas_guidance_runs_on_machines():
    """Half of four pictures is given: what is generated agrees with it better than by chance."""
    images = np.array(smooth_corpus(N=40).images)
    m = small("ls", images)
    x = torch.from_numpy(images[:4] / 127.5 - 1).float()

    def half(x):
        return x[..., :3]

    def back(half):
        return torch.nn.functional.pad(half, (0, 3))

    torch.manual_seed(0)
    samplers = [
        DPSSampler(m, half(x), half, zeta=1.0, steps=30, silent=True),
        PGDMSampler(m, half(x), half, back, steps=30, silent=True),
        DDIMSampler(MMPSDenoiser(m, half(x), half, lambda v: 1e-4 * v), steps=30, silent=True),
    ]
    errors = []
    for sampler in [DDIMSampler(m, steps=30, silent=True), *samplers]:
        restored = sampler(sampler.init((4, 1, 6, 6)))
        errors.append(((half(restored) - half(x)) ** 2).mean().item())
    assert max(errors[1:]) < errors[0] / 2


# ---------------------------------------------------------------- starting later


def test_a_late_start_begins_with_noised_training_images():
    m = small("ideal", random_corpus(N=12), schedule=EDMSchedule())
    x = sm.generate(m, count=4, steps=3, start=0.9)
    _, distance = m.nearest(x)
    assert distance.max() < 1e-4
    assert not torch.equal(x, sm.generate(m, count=4, steps=3, start=0.9, seed=1))
    assert torch.equal(x[:2], sm.generate(m, count=2, steps=3, start=0.9))
    alpha, sigma = VPSchedule()(torch.tensor(time_of(VPSchedule(), 0.25), dtype=torch.float64))
    assert float(sigma / alpha) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="start is 1"):
        sm.generate(m, start=1.0)


def test_of_equal_images_the_first_is_the_nearest():
    """Whatever part of the images a thread compares."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 6, 6)).astype(np.uint8)
    m = sm.build("ideal", sm.Corpus(np.concatenate([images] * 40)))
    places, _ = m.nearest(torch.from_numpy(images / 127.5 - 1))
    assert places.tolist() == list(range(40))


def test_the_nearest_image_is_found():
    corpus = random_corpus(N=12, C=3)
    m = small("ideal", corpus)
    x = torch.from_numpy(corpus.images[[7, 4]] / 127.5 - 1).float()
    places, distance = m.nearest(x + 0.01)
    assert places.tolist() == [7, 4]
    torch.testing.assert_close(distance, torch.full((2,), 0.01).double(), rtol=1e-3, atol=1e-6)
