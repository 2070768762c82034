"""Forward processes per frequency: their maps, and every machine under each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from azula.noise import CosineSchedule, VPSchedule
from azula.sample import DDIMSampler

import scoremachine as sm
from conftest import SMALL, random_corpus, random_images, small
from scoremachine.core.processes import (
    PROCESSES,
    HeatDissipation,
    Process,
    Pyramid,
    haar,
    process_of,
)
from scoremachine.sampling.process_denoiser import ProcessDenoiser
from scoremachine.sampling.schedules import EDMSchedule
from test_machines import smooth_corpus

SHAPE = (4, 8)
ALL = [Process(SHAPE), HeatDissipation(SHAPE, blur=3.0), Pyramid(SHAPE)]
IDS = [process.name for process in ALL]
TIMES = [0.15, 0.5, 0.9]


def matrix(process, t):
    """A_t as it acts on a flattened picture, column by column, float64 (H W, H W)."""
    H, W = process.shape
    units = torch.eye(H * W, dtype=torch.float64).reshape(-1, H, W)
    return process.apply(units, t).flatten(1).T.numpy()


def noised_through(process, t, corpus, seed=0):
    """Two images of a corpus as the process shows them, with its noise; and sigma_t."""
    _, sigma = process(torch.tensor(t, dtype=torch.float64))
    x = torch.from_numpy(np.array(corpus.images[-2:])).double() / 127.5 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return process.apply(x, t) + sigma * eps, float(sigma)


def softmax(l):
    w = np.exp(l - l.max())
    return w / w.sum()


# ---------------------------------------------------------------- the maps


@pytest.mark.parametrize("process", ALL, ids=IDS)
def test_bases_are_orthonormal_and_gains_have_a_floor(process):
    for basis in process.bases:
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    x = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(process.picture(process.coefficients(x)), x)
    before = torch.full(SHAPE, 2.0)
    for t in np.linspace(0, 1, 11):
        gains, sigma = process(torch.tensor(t))
        assert gains.shape == SHAPE
        assert gains.min() >= 1e-3
        assert (gains <= before + 1e-12).all()
        before = gains
    assert gains.max() <= 2e-3 < 0.5 < sigma  # close to pure noise


def test_the_ordinary_one_is_ordinary():
    schedule = CosineSchedule()
    x = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    alpha, _ = schedule(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(Process(SHAPE, schedule).apply(x, 0.3), alpha * x)


def test_heat_solves_the_heat_equation():
    """A cosine of the Neumann Laplacian decays at its own rate, and the mean not at all."""
    process = HeatDissipation((8, 8), blur=4.0)
    i, j = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    wave = np.cos(np.pi * 2 * (i + 0.5) / 8) * np.cos(np.pi * (j + 0.5) / 8)
    alpha, _ = process.base(torch.tensor(0.4, dtype=torch.float64))
    tau = (4.0 * np.sin(np.pi * 0.2) ** 2) ** 2 / 2
    rate = np.pi**2 * ((2 / 8) ** 2 + (1 / 8) ** 2)
    got = process.apply(torch.from_numpy(0.7 + wave)[None], 0.4)[0].numpy()
    np.testing.assert_allclose(got, float(alpha) * (0.7 + np.exp(-rate * tau) * wave), atol=1e-12)


def test_a_pyramid_is_one_of_block_means():
    process = Pyramid((8, 8), levels=2)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    means = x.reshape(1, 1, 2, 4, 2, 4).mean((3, 5))
    blocks = means.repeat_interleave(4, 2).repeat_interleave(4, 3)
    z = process.coefficients(x)
    assert process.bands[:2, :2].max() == 0
    torch.testing.assert_close(process.picture(z * (process.bands == 0)), blocks)
    means = x.reshape(1, 1, 4, 2, 4, 2).mean((3, 5))
    blocks = means.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(process.picture(z * (process.bands <= 1)), blocks)
    torch.testing.assert_close(haar(8, 0), torch.eye(8, dtype=torch.float64))


def test_finer_bands_are_noise_sooner():
    process = Pyramid((8, 8), levels=2)
    assert [process.last(k) for k in range(3)] == [1, 2 / 3, 1 / 3]
    gains, _ = process(torch.tensor(0.4))
    assert gains[process.bands == 2].max() == pytest.approx(1e-3)
    assert gains[process.bands == 1].min() > 0.05
    assert [process.coarse(t) for t in (0.2, 0.4, 0.7, 1.0)] == [0, 1, 2, 2]


@pytest.mark.parametrize("t", [0.4, 0.8])
def test_halved_pyramids_are_the_same_process_of_block_means(t):
    process = Pyramid((8, 8), levels=2)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    small = x.reshape(1, 1, 4, 2, 4, 2).mean((3, 5))
    shown = process.apply(x, t).reshape(1, 1, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(process.halved(1).apply(small, t), shown)
    assert float(process.halved(1)(torch.tensor(t))[1]) == float(process(torch.tensor(t))[1]) / 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: process_of("blur", SHAPE), "no process is called 'blur'"),
        (lambda: process_of(Process((5, 5)), SHAPE), "of 5 x 5 pictures; expected 4 x 8"),
        (lambda: Process((0, 4)), "height is 0"),
        (lambda: HeatDissipation(SHAPE, blur=0), "blur is 0; expected a number of pixels above 0"),
        (lambda: Pyramid((6, 8)), "a pyramid of 2 levels halves the sides of 6 x 8"),
        (lambda: Pyramid(SHAPE, levels=0), "levels is 0"),
        (lambda: Pyramid(SHAPE, EDMSchedule()), "alpha is 1 at t = 1"),
    ],
)
def test_senseless_processes_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# ---------------------------------------------------------------- machines under them


@pytest.fixture(scope="module")
def corpus():
    return smooth_corpus(N=24, C=1, H=4, W=8)


def flat(corpus):
    return corpus.images.reshape(len(corpus), -1) / 127.5 - 1


@pytest.mark.parametrize("process", ALL, ids=IDS)
@pytest.mark.parametrize("t", TIMES)
def test_ideal_and_gaussian_equal_their_definitions(process, t, corpus, kernel):
    x, A = flat(corpus), matrix(process, t)
    x_t, sigma = noised_through(process, t, corpus)
    D = small("ideal", corpus, kernel=kernel).denoise_through(process, x_t, t)
    G = small("gaussian", corpus).denoise_through(process, x_t, t)
    C, mean = np.cov(x.T, bias=True), x.mean(0)
    filtered = C @ A.T @ np.linalg.inv(A @ C @ A.T + sigma**2 * np.eye(len(A)))
    for p, q in enumerate(x_t.flatten(1).numpy()):
        w = softmax(-((q - x @ A.T) ** 2).sum(1) / (2 * sigma**2))
        assert np.abs(D[p].numpy().ravel() - w @ x).max() < 1e-5
        expected = mean + filtered @ (q - A @ mean)
        assert np.abs(G[p].numpy().ravel() - expected).max() < 1e-5


@pytest.mark.parametrize("process", ALL, ids=IDS)
@pytest.mark.parametrize("t", TIMES)
def test_ls_els_and_pspc_equal_their_definitions(process, t, corpus, kernel):
    """Windows compare x_t with A_t s; what they answer with is s."""
    H, W = SHAPE
    s = corpus.images[:, 0] / 127.5 - 1
    seen = np.stack([(matrix(process, t) @ each.ravel()).reshape(H, W) for each in s])
    x_t, sigma = noised_through(process, t, corpus)
    found = {
        name: small(name, corpus, kernel=kernel, **settings).denoise_through(process, x_t, t)
        for name, settings in (("ls", {}), ("els", {"boundary": "circular"}), ("pspc", {}))
    }
    for p, q in enumerate(x_t[:, 0].numpy()):
        total, count = np.zeros(SHAPE), np.zeros(SHAPE)
        for i in range(H):
            for j in range(W):
                box = np.s_[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
                l = -((seen[(slice(None), *box)] - q[box]) ** 2).sum((1, 2)) / (2 * sigma**2)
                assert abs(found["ls"][p, 0, i, j] - softmax(l) @ s[:, i, j]) < 1e-5
                rows, columns = np.arange(i - 1, i + 2) % H, np.arange(j - 1, j + 2) % W
                query, logits, values = q[rows][:, columns], [], []
                for a in range(H - 2):
                    for b in range(W - 2):
                        patch = seen[:, a : a + 3, b : b + 3]
                        logits.append(-((patch - query) ** 2).sum((1, 2)) / (2 * sigma**2))
                        values.append(s[:, a + 1, b + 1])
                expected = softmax(np.concatenate(logits)) @ np.concatenate(values)
                assert abs(found["els"][p, 0, i, j] - expected) < 1e-5
                if i <= H - 3 and j <= W - 3:
                    box = np.s_[i : i + 3, j : j + 3]
                    l = -((seen[(slice(None), *box)] - q[box]) ** 2).sum((1, 2)) / (2 * sigma**2)
                    total[box] += np.tensordot(softmax(l), s[(slice(None), *box)], 1)
                    count[box] += 1
        assert np.abs(found["pspc"][p, 0].numpy() - total / count).max() < 1e-5


@pytest.mark.parametrize("process", ALL, ids=IDS)
@pytest.mark.parametrize("t", TIMES)
def test_windows_of_pca_and_flex_are_those_of_what_is_seen(process, t, corpus, kernel):
    x, A = flat(corpus), matrix(process, t)
    x_t, sigma = noised_through(process, t, corpus)
    C = A @ np.cov(x.T, bias=True) @ A.T
    F = C @ np.linalg.inv(C + sigma**2 * np.eye(len(A)))
    ratios = np.abs(F / np.diag(F)[:, None])
    D = small("pca", corpus, kernel=kernel).denoise_through(process, x_t, t)
    for p, q in enumerate(x_t.flatten(1).numpy()):
        for i in range(len(A)):
            d = ratios[i] >= 0.1 * ratios.max()
            l = -(((x @ A.T)[:, d] - q[d]) ** 2).sum(1) / (2 * sigma**2)
            assert abs(D[p].flatten()[i] - softmax(l) @ x[:, i]) < 1e-4
    if process.name == "pyramid" and t > process.last(2):
        return  # then the pixels of a block tie, and rounding says which of them belong to a window
    flex = small("pspc-flex", corpus, kernel=kernel)
    D = flex.denoise_through(process, x_t, t)
    heat, total, count = F**2, np.zeros((2, len(A))), np.zeros(len(A))
    for i in range(len(A)):
        order = np.argsort(-heat[i], kind="stable")
        held = np.cumsum(heat[i, order])
        d = order[: np.searchsorted(held, 0.6 * held[-1]) + 1]
        count[d] += 1
        for p, q in enumerate(x_t.flatten(1).numpy()):
            l = -(((x @ A.T)[:, d] - q[d]) ** 2).sum(1) / (2 * sigma**2)
            total[p, d] += softmax(l) @ x[:, d]
    assert (count > 0).all()
    assert np.abs(D.flatten(1).numpy() - total / count).max() < 1e-4


@pytest.mark.parametrize("process", ALL, ids=IDS)
def test_es_smoothed_and_composite_equal_their_definitions(process, corpus):
    t = 0.4
    x_t, sigma = noised_through(process, t, corpus)
    some = sm.Corpus(corpus.images[:5])
    rolled = np.concatenate(
        [np.roll(some.images, (dy, dx), (2, 3)) for dy in range(4) for dx in range(8)]
    )
    D = small("es", some).denoise_through(process, x_t, t)
    expected = small("ideal", rolled, kernel="reference").denoise_through(process, x_t, t)
    assert (D - expected).abs().max() < 1e-5
    gains, _ = process(torch.tensor(t))
    eps = torch.randn(4, 1, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    queries = x_t[:1] + 0.3 * (float(gains.max()) + sigma) * eps
    ideal = small("ideal", corpus, kernel="reference")
    expected = ideal.denoise_through(process, queries, t).mean(0)
    D = small("smoothed", corpus).denoise_through(process, x_t[:1], t)[0]
    assert (D - expected).abs().max() < 1e-5
    D = small("composite", corpus).denoise_through(process, x_t, t)
    parts = [small(name, corpus).denoise_through(process, x_t, t) for name in ("gaussian", "ls")]
    expected = 0.4 * parts[0] + 0.5 * parts[1] + 0.1 * x_t / float(gains.max())
    assert (D - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule()])
def test_under_the_ordinary_process_machines_are_what_they_were(name, schedule):
    corpus = random_corpus(N=12)
    m = small(name, corpus, schedule=schedule)
    process = Process((6, 6), schedule)
    for t in TIMES:
        x_t = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
        D = m.denoise_through(process, x_t, t)
        alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
        assert (D - m.denoise(x_t / alpha, float(sigma / alpha))).abs().max() < 2e-5


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"es"}))
def test_derivatives_under_a_process(name, corpus):
    m = small(name, sm.Corpus(corpus.images[:8]))
    x_t, _ = noised_through(ALL[1], 0.5, corpus)
    y = x_t[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: m.denoise_through(ALL[1], y, 0.5), y, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("process", PROCESSES)
def test_everybody_generates_under_everything(name, process):
    m = small(name, smooth_corpus(N=8, H=4, W=4))
    x = sm.generate(m, count=2, steps=4, process=process)
    assert x.shape == (2, 1, 4, 4)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert (sm.generate(m, count=1, steps=4, process=process, batch=1) - x[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun"])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_ideal_machine_ends_at_its_images_whatever_the_process(process, sampler):
    corpus = smooth_corpus(N=8, H=8, W=8)
    x = sm.generate(small("ideal", corpus), 3, steps=24, process=process, sampler=sampler)
    s = torch.from_numpy(corpus.images.copy()).float() / 127.5 - 1
    assert (x[:, None] - s[None]).abs().amax((2, 3, 4)).min(1).values.max() < 1e-3


def test_azulas_samplers_take_it_as_it_is():
    corpus = smooth_corpus(N=8, H=8, W=8)
    through = ProcessDenoiser(small("ls", corpus), HeatDissipation((8, 8)))
    sampler = DDIMSampler(through, steps=8, silent=True)
    z = sampler(torch.randn(2, 1, 8, 8))
    assert torch.isfinite(through.schedule.picture(z)).all()


def test_a_pyramid_begins_with_small_pictures():
    corpus = smooth_corpus(N=12, H=8, W=8)
    process = Pyramid((8, 8))
    through = ProcessDenoiser(small("ideal", corpus), process)
    z_t = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    D = process.picture(through(z_t, torch.tensor(0.5)).mean)
    means = corpus.block_means(2)
    x_t = process.picture(z_t).reshape(2, 1, 4, 2, 4, 2).mean((3, 5))
    small_D = small("ideal", means).denoise_through(process.halved(1), x_t, 0.5)
    torch.testing.assert_close(D.reshape(2, 1, 4, 2, 4, 2).mean((3, 5)), small_D)
    assert through.coarse(1).machine.corpus.shape == (1, 4, 4)


def test_block_means():
    images = random_images(0, 3, 3, 4, 6)
    means = sm.Corpus(images, labels=[0, 1, 1]).block_means(2)
    expected = np.round(images.reshape(3, 3, 2, 2, 3, 2).mean((3, 5)))
    assert np.abs(means.images.astype(int) - expected).max() <= 1
    assert means.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="blocks of 4 x 4 pixels do not fill 4 x 6 images"):
        sm.Corpus(images).block_means(4)


def test_what_a_process_does_not_go_with():
    m = small("ls", random_corpus(), bandwidth=0.2)
    with pytest.raises(ValueError, match=r"bandwidth is 0\.2"):
        m.denoise_through(Process((6, 6)), torch.zeros(1, 1, 6, 6), 0.5)
    m = small("ls", random_corpus())
    with pytest.raises(ValueError, match="of 4 x 8 pictures; expected 6 x 6"):
        m.denoise_through(ALL[0], torch.zeros(1, 1, 6, 6), 0.5)
    with pytest.raises(ValueError, match="pictures begin as noise"):
        sm.generate(m, count=1, process="heat", start=0.5)
    with pytest.raises(ValueError, match="a pyramid of 2 levels halves the sides of 6 x 6"):
        sm.generate(m, count=1, process="pyramid")
    with pytest.raises(ValueError, match="no process is called 'blur'"):
        sm.generate(m, count=1, process="blur")
    es = small("es", random_corpus())
    with pytest.raises(ValueError, match="es has no derivative under a forward process"):
        es.denoise_through(Process((6, 6)), torch.zeros(1, 1, 6, 6, requires_grad=True), 0.5)
