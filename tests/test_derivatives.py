"""Every derivative is exact, or an error with a sentence: never a silent zero."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from azula.noise import VPSchedule
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import functional

import scoremachine as sm
from conftest import SMALL, noised, random_corpus, small
from scoremachine.calibration.heldout import BandwidthSchedule
from scoremachine.core.derivatives import mapped, refused, tracked, values, with_slope
from scoremachine.core.posterior import posterior
from scoremachine.core.processes import HeatDissipation
from scoremachine.engines import choose
from scoremachine.lab.networks.network import Network
from scoremachine.sampling.process_denoiser import Through
from scoremachine.sources.compression import compress
from test_exactness import COLLECTIONS

SMOOTH = ("ideal", "gaussian")  # in sigma
LEVELS = [0.3, 1.0, 8.0]
REFUSED = (ValueError, NotImplementedError)


def blurred(seed: int = 0, N: int = 20, C: int = 1, H: int = 5, W: int = 6) -> sm.Corpus:
    """Images with little noise, so that several matter to a picture."""
    u = np.random.default_rng(seed).integers(0, 256, (N, C, H + 2, W + 2))
    windows = [u[..., a : a + H, b : b + W] for a in range(3) for b in range(3)]
    return sm.Corpus(np.mean(windows, axis=0).astype(np.uint8), labels=np.arange(N) % 2)


def question(corpus: sm.Corpus, levels: Any = LEVELS, seed: int = 2) -> tuple[Tensor, ...]:
    """Pictures y, their noise levels, and two directions u and v."""
    y, sigma = noised(corpus, levels, seed)
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(2, *y.shape, dtype=torch.float64, generator=generator)
    return y.double(), sigma, u, v


def difference(f: Any, x: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative of f along v, by differences of fourth order."""
    near, far = (f(x + k * step * v) - f(x - k * step * v) for k in (1, 2))
    return (8 * near - far) / (12 * step)


def sources(corpus: sm.Corpus) -> Tensor:
    return torch.from_numpy(np.array(corpus.images)).flatten(1).double() / 127.5 - 1


def brute_density(corpus: sm.Corpus, h: float, y: Tensor, sigma: Tensor) -> Tensor:
    """log p(y) of `ideal` by its formula, which autograd differentiates as often as asked."""
    variance = (sigma**2 + h**2).expand(len(y))[:, None]
    squares = ((y.flatten(1)[:, None] - sources(corpus)) ** 2).sum(2)
    l = -squares / (2 * variance) - math.log(len(corpus))
    return torch.logsumexp(l, 1) - 0.5 * y[0].numel() * torch.log(2 * math.pi * variance[:, 0])


def brute_mean(name: str, corpus: sm.Corpus, h: float, y: Tensor, sigma: Tensor) -> Tensor:
    """D of `ideal` and `gaussian` by their formulas."""
    x, q = sources(corpus), y.flatten(1)
    sigma = sigma.expand(len(y))[:, None]
    variance = sigma**2 + h**2
    if name == "ideal":
        w = torch.softmax(-((q[:, None] - x) ** 2).sum(2) / (2 * variance), 1)
        return ((sigma**2 * (w @ x) + h**2 * q) / variance).reshape(y.shape)
    C = torch.cov(x.T, correction=0) + h**2 * torch.eye(x.shape[1], dtype=torch.float64)
    spread = C + sigma[..., None] ** 2 * torch.eye(x.shape[1], dtype=torch.float64)
    offset = torch.linalg.solve(spread, (q - x.mean(0))[..., None])
    return (x.mean(0) + (C @ offset)[..., 0]).reshape(y.shape)


# ---------------------------------------------------------------- by y, once


@pytest.mark.parametrize("c", COLLECTIONS.values(), ids=COLLECTIONS)
def test_forward_mode_equals_its_definition_and_is_the_adjoint_of_reverse_mode(c, kernel):
    corpus = random_corpus(seed=6, N=20, C=3, H=6, W=7)
    y, sigma, u, v = question(corpus, [0.02, 0.5, 2.0, 10.0])

    def mean(name):
        return lambda y: posterior(choose(name), corpus.images, np.arange(2, 20), y, sigma, c)[1]

    _, along = torch.func.jvp(mean(kernel), (y,), (v,))
    _, slow = torch.func.jvp(mean("reference"), (y,), (v,))
    torch.testing.assert_close(along, slow, rtol=1e-5, atol=1e-6)
    x = y.clone().requires_grad_()
    g = torch.autograd.grad(mean(kernel)(x), x, u)[0]
    torch.testing.assert_close((u * along).sum(), (g * v).sum(), rtol=1e-6, atol=1e-6)
    step = 1e-4 * sigma[:, None, None, None]
    expected = difference(mean("reference"), y, step * v, 1.0) / step
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("h", [0.0, 0.2])
@pytest.mark.parametrize("name", SMALL)
def test_torch_func_gives_what_autograd_gives(name, h):
    corpus = blurred()
    m, (y, sigma, u, v) = small(name, corpus, bandwidth=h), question(corpus)
    x = y.clone().requires_grad_()
    g = torch.autograd.grad(m.denoise(x, sigma), x, u)[0]

    def f(x):
        return (u * m.denoise(x, sigma)).sum()

    assert torch.equal(torch.func.grad(f)(y), g)
    D, pull = torch.func.vjp(lambda x: m.denoise(x, sigma), y)
    assert torch.equal(pull(u)[0], g)
    assert torch.equal(D, m.denoise(x, sigma).detach())
    D_v, along = torch.func.jvp(lambda x: m.denoise(x, sigma), (y,), (v,))
    assert torch.equal(D_v, D)
    expected = difference(lambda x: m.denoise(x, sigma), y, v, 1e-4)
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((u * along).sum(), (g * v).sum(), rtol=1e-8, atol=1e-8)
    _, twice = functional.jvp(lambda x: m.denoise(x, sigma), y, v)  # by double backward
    torch.testing.assert_close(twice, along, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_vmap_over_pictures_is_a_loop(name):
    corpus = blurred()
    m, (y, _, u, v) = small(name, corpus), question(corpus, [1.0, 1.0, 1.0])

    def mean(x):
        return m.denoise(x[None], 1.0)[0]

    def pulled(x, u):
        return torch.func.vjp(mean, x)[1](u)[0]

    def pushed(x, v):
        return torch.func.jvp(mean, (x,), (v,))[1]

    for f, asked in ((mean, (y,)), (pulled, (y, u)), (pushed, (y, v))):
        together = torch.func.vmap(f)(*asked)
        torch.testing.assert_close(
            together, torch.stack([f(*each) for each in zip(*asked, strict=True)])
        )
    last = torch.func.vmap(mean, in_dims=3, out_dims=3)(y.movedim(0, 3))
    torch.testing.assert_close(last, m.denoise(y, 1.0).movedim(0, 3))
    inside = torch.func.grad(lambda y: (u * torch.func.vmap(mean)(y)).sum())(y)
    torch.testing.assert_close(inside, torch.func.vmap(pulled)(y, u))


@pytest.mark.parametrize("name", SMALL)
def test_whole_jacobians(name):
    corpus = blurred(H=3, W=4)
    m, (y, sigma, _, _) = small(name, corpus), question(corpus, [0.5])
    J = functional.jacobian(lambda y: m.denoise(y, sigma), y)
    for way in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(way(lambda y: m.denoise(y, sigma))(y), J, rtol=1e-8, atol=1e-8)


@given(
    name=st.sampled_from(sorted(SMALL)),
    seed=st.integers(0, 5),
    C=st.sampled_from([1, 3]),
    level=st.floats(0.05, 20.0),
    h=st.sampled_from([0.0, 0.1, 1.0]),
    kernel=st.sampled_from(["numba", "torch"]),
)
def test_forward_and_reverse_mode_are_adjoint(name, seed, C, level, h, kernel):
    corpus = blurred(seed, N=9, C=C, H=4, W=5)
    m = small(name, corpus, bandwidth=h, kernel=kernel)
    y, sigma, u, v = question(corpus, [level, 0.5], seed)
    _, along = torch.func.jvp(lambda x: m.denoise(x, sigma), (y,), (v,))
    back = torch.func.grad(lambda x: (u * m.denoise(x, sigma)).sum())(y)
    torch.testing.assert_close((u * along).sum(), (back * v).sum(), rtol=1e-6, atol=1e-6)


def test_classes_have_derivatives_of_their_own():
    corpus, labels = blurred(), [1, 0, 1]
    y, sigma, _, v = question(corpus)
    for name in ("ideal", "ls", "gaussian"):
        m = small(name, corpus)
        _, along = torch.func.jvp(lambda x, m=m: m.denoise(x, sigma, labels), (y,), (v,))
        for p, label in enumerate(labels):

            def alone(x, m=m, p=p, label=label):
                return m.denoise(x, sigma[p], label)

            _, expected = torch.func.jvp(alone, (y[p : p + 1],), (v[p : p + 1],))
            torch.testing.assert_close(along[p : p + 1], expected)


def test_more_pictures_than_a_batch():
    corpus = blurred(H=3, W=3)
    m = small("ls", corpus)
    y = torch.randn(70, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, along = torch.func.jvp(lambda x: m.denoise(x, 1.0), (y,), (y,))
    expected = difference(lambda x: m.denoise(x, 1.0), y, y, 1e-4)
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-6)
    mapped_over = torch.func.vmap(lambda x: m.denoise(x, 1.0))(y.reshape(2, 35, 1, 3, 3))
    assert torch.equal(mapped_over.flatten(0, 1), m.denoise(y, 1.0))


@pytest.mark.parametrize("name", ["ls", "pca", "ideal", "pspc", "gaussian"])
def test_under_a_forward_process_too_or_refused(name):
    corpus = blurred()
    m, process, (y, _, u, v) = small(name, corpus), HeatDissipation((5, 6)), question(corpus)

    def mean(x):
        return m.denoise_through(process, x, 0.4)

    expected = difference(mean, y, v, 1e-4)
    x = y.clone().requires_grad_()
    g = torch.autograd.grad(mean(x), x, u)[0]
    torch.testing.assert_close((g * v).sum(), (u * expected).sum(), rtol=1e-5, atol=1e-6)
    if name in ("ideal", "pspc"):
        with pytest.raises(NotImplementedError, match=r"use reverse mode, as torch\.func\.vjp"):
            torch.func.jvp(mean, (y,), (v,))
    else:
        _, along = torch.func.jvp(mean, (y,), (v,))
        torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6)
    t = torch.tensor(0.4, requires_grad=True)
    for refuses in (lambda: m.denoise_through(process, y, t), lambda: Through(m, process)(y, t)):
        with pytest.raises(NotImplementedError, match="no derivative by t here"):
            refuses()


def test_the_estimator_of_smoothed():
    corpus = blurred()
    m = small("smoothed", corpus, neighbours=6, uniform=9)
    y, sigma, u, v = question(corpus)
    x = y.clone().requires_grad_()
    g = torch.autograd.grad(m.denoise(x, sigma), x, u)[0]
    assert torch.equal(torch.func.grad(lambda x: (u * m.denoise(x, sigma)).sum())(y), g)
    _, along = torch.func.jvp(lambda x: m.denoise(x, sigma), (y,), (v,))
    expected = difference(lambda x: m.denoise(x, sigma), y, v, 1e-4)
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="neighbours of every picture"):
        torch.func.vmap(lambda x: m.denoise(x[None], 1.0)[0])(y)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ideal", {}), ("ls", {"patch_size": 3}), ("els", {"patch_size": 3})],
)
def test_mixtures_differentiate_fully(name, settings):
    corpus = blurred(N=30, H=4, W=5)
    m = sm.build(name, compress(corpus, 6, rank=2, patch_size=3), **settings)
    y, sigma, u, v = question(corpus, [0.4, 2.0, 0.4])

    def mean(x):
        return m.denoise(x, sigma)

    _, along = torch.func.jvp(mean, (y,), (v,))
    torch.testing.assert_close(along, difference(mean, y, v, 1e-4), rtol=1e-6, atol=1e-6)

    def g(x):
        return torch.func.grad(lambda x: (u * mean(x)).sum())(x)

    _, second = torch.func.jvp(g, (y,), (v,))
    torch.testing.assert_close(second, difference(g, y, v, 1e-4), rtol=1e-5, atol=1e-6)
    together = torch.func.vmap(lambda x: m.denoise(x[None], 0.4)[0])(y)
    torch.testing.assert_close(together, m.denoise(y, 0.4))
    with pytest.raises(NotImplementedError, match="no derivative by sigma here"):
        m.denoise(y, sigma.clone().requires_grad_())


# ---------------------------------------------------------------- by y, twice


@pytest.mark.parametrize("name", [n for n in SMALL if n != "gaussian"])
def test_second_derivatives_of_means_are_refused(name):
    corpus = blurred()
    m, (y, sigma, u, v) = small(name, corpus), question(corpus)

    def loss(x):
        return (u * m.denoise(x, sigma) ** 2).sum()

    x = y.clone().requires_grad_()
    g = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative of D"):
        torch.autograd.grad((g * v).sum(), x)
    for ask in (
        lambda: functional.hvp(loss, y, v),
        lambda: torch.func.jvp(torch.func.grad(loss), (y,), (v,)),
        lambda: torch.func.grad(lambda x: (v * torch.func.grad(loss)(x)).sum())(y),
        lambda: torch.func.jvp(
            lambda x: torch.func.jvp(lambda x: m.denoise(x, sigma), (x,), (v,))[1], (y,), (v,)
        ),
    ):
        with pytest.raises(NotImplementedError, match="no second derivative of D"):
            ask()


def test_second_derivatives_of_gaussian_vanish():
    corpus = blurred()
    m, (y, sigma, u, v) = small("gaussian", corpus, bandwidth=0.2), question(corpus)
    H = functional.hvp(lambda x: (u * m.denoise(x, sigma) ** 2).sum(), y, v)[1]
    expected = difference(torch.func.grad(lambda x: (u * m.denoise(x, sigma) ** 2).sum()), y, v)
    torch.testing.assert_close(H, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("h", [0.0, 0.3])
@pytest.mark.parametrize("name", ["ideal", "es", "gaussian"])
def test_hessians_of_log_density(name, h):
    corpus = blurred(N=7)
    m, (y, sigma, _, v) = small(name, corpus, bandwidth=h), question(corpus)

    def log_p(x):
        return m.log_density(x, sigma).sum()

    slope = torch.func.grad(log_p)
    expected = difference(slope, y, v, 1e-4)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    x = y.clone().requires_grad_()
    g = torch.autograd.grad(log_p(x), x, create_graph=True)[0]
    if h == 0:  # a score that nobody differentiates leaves more out
        torch.testing.assert_close(g, m.score(y, sigma), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((g * v).sum(), x)[0], expected, **tolerance)
    for H in (
        functional.hvp(log_p, y, v)[1],
        functional.vhp(log_p, y, v)[1],
        torch.func.jvp(slope, (y,), (v,))[1],
        torch.func.grad(lambda x: (v * slope(x)).sum())(y),
    ):
        torch.testing.assert_close(H, expected, **tolerance)

    def along(x):
        return torch.func.jvp(log_p, (x,), (v,))[1]

    torch.testing.assert_close(along(y), (v * slope(y)).sum())
    torch.testing.assert_close(torch.func.grad(along)(y), expected, **tolerance)
    if name == "gaussian":
        twice = torch.func.jvp(along, (y,), (v,))[1]
        torch.testing.assert_close(twice, (v * expected).sum(), **tolerance)
    else:  # forward mode takes the tangent of D along, needed or not
        with pytest.raises(NotImplementedError, match="or double backward take them"):
            torch.func.jvp(along, (y,), (v,))
    if name == "ideal":
        true = functional.hvp(lambda x: brute_density(corpus, h, x, sigma).sum(), y, v)[1]
        torch.testing.assert_close(expected, true, **tolerance)
        for way in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
            H = way(lambda x: m.log_density(x[None], 1.0)[0])(y[1])
            true = functional.hessian(
                lambda x: brute_density(corpus, h, x[None], torch.tensor(1.0))[0], y[1]
            )
            torch.testing.assert_close(H, true, rtol=1e-6, atol=1e-8)


def test_hessians_of_log_density_off_the_span_of_few_images():
    """Fewer images than pixels: what lies outside their span is noise alone, at any y."""
    corpus = blurred(N=3)
    m = small("gaussian", corpus)
    mean = sources(corpus).mean(0).reshape(1, 1, 5, 6)
    H = torch.func.hessian(lambda y: m.log_density(y, 0.5)[0])(mean).reshape(30, 30)
    C = torch.cov(sources(corpus).T, correction=0) + 0.25 * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(H, -torch.linalg.inv(C))


def test_third_derivatives_of_log_density_are_refused():
    corpus = blurred()
    m, (y, sigma, _, v) = small("ideal", corpus), question(corpus)

    def curvature(x):
        slope = torch.func.grad(lambda x: m.log_density(x, sigma).sum())
        return (v * torch.func.jvp(slope, (x,), (v,))[1]).sum()

    for ask in (
        lambda: torch.func.grad(curvature)(y),
        lambda: torch.func.jvp(curvature, (y,), (v,)),
    ):
        with pytest.raises(NotImplementedError, match="no second derivative of D"):
            ask()


# ---------------------------------------------------------------- by sigma and by t


@pytest.mark.parametrize("h", [0.0, 0.3])
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_by_sigma(name, h):
    """Of D, score and log-density; each picture by its own level, and all by one."""
    corpus = blurred()
    m, (y, sigma, u, _) = small(name, corpus, bandwidth=h), question(corpus, [0.05, 0.5, 2.0])
    one = torch.tensor(0.5, dtype=torch.float64)

    def mean(s):
        return m.denoise(y, s)

    for s in (sigma, one):
        along = torch.ones_like(s)
        brute = torch.func.jvp(lambda s: brute_mean(name, corpus, h, y, s), (s,), (along,))[1]
        _, forward = torch.func.jvp(mean, (s,), (along,))
        torch.testing.assert_close(forward, brute, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(forward, difference(mean, s, along), rtol=1e-5, atol=1e-6)
        for f, form in (
            (lambda s: (u * mean(s)).sum(), None),
            (lambda s: (u * m.score(y, s)).sum(), None),
            (lambda s: m.log_density(y, s).sum(), brute_density if name == "ideal" else None),
        ):
            x = s.clone().requires_grad_()
            g = torch.autograd.grad(f(x), x)[0]
            assert g.shape == s.shape
            assert torch.equal(torch.func.grad(f)(s), g)
            expected = difference(f, s, along)
            torch.testing.assert_close(g.sum(), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.func.jvp(f, (s,), (along,))[1], g.sum())
            if form is not None:
                g_true = torch.func.grad(lambda s, form=form: form(corpus, h, y, s).sum())(s)
                torch.testing.assert_close(g, g_true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("h", [0.0, 0.3])
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_by_time(name, h):
    """azula's form: both y = x_t / alpha_t and sigma = sigma_t / alpha_t depend on t."""
    corpus = blurred()
    m, (x, _, u, v) = small(name, corpus, bandwidth=h), question(corpus)
    schedule = VPSchedule()
    for t in (torch.tensor(0.4).double(), torch.tensor([0.2, 0.4, 0.9]).double()):

        def brute(x, t):
            alpha, sigma = schedule(t)
            return brute_mean(name, corpus, h, x / alpha.reshape(-1, 1, 1, 1), sigma / alpha)

        def q(x, t):
            return m(x, t).mean

        torch.testing.assert_close(q(x, t), brute(x, t))
        directions = v, torch.ones_like(t)
        along, expected = (torch.func.jvp(f, (x, t), directions)[1] for f in (q, brute))
        torch.testing.assert_close(along, expected, rtol=1e-7, atol=1e-8)
        got, true = (
            torch.func.grad(lambda x, t, f=f: (u * f(x, t)).sum(), argnums=(0, 1))(x, t)
            for f in (q, brute)
        )
        torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-8)
        x_t, time = (each.clone().requires_grad_() for each in (x, t))
        (u * q(x_t, time)).sum().backward()
        torch.testing.assert_close((x_t.grad, time.grad), true, rtol=1e-7, atol=1e-8)


def test_derivatives_by_sigma_at_little_noise():
    """Two images half a pixel level apart, at a noise level where both matter."""
    images = np.full((3, 1, 4, 4), 100, np.uint8)
    images[1, 0, 0, 0], images[2] = 101, 200
    corpus = sm.Corpus(images)
    y = sources(corpus)[:1].reshape(1, 1, 4, 4) + 0.3 / 127.5
    for s in (0.002, 0.004, 0.05):
        sigma = torch.tensor(s, dtype=torch.float64)
        got, true = (
            torch.func.jvp(f, (sigma,), (torch.ones_like(sigma),))[1]
            for f in (
                lambda s: small("ideal", corpus).denoise(y, s),
                lambda s: brute_mean("ideal", corpus, 0.0, y, s),
            )
        )
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)


def test_a_source_read_in_chunks(monkeypatch):
    corpus = blurred()
    m, (y, sigma, _, _) = small("ideal", corpus), question(corpus)
    once = torch.func.jacfwd(lambda s: m.denoise(y, s))(sigma)
    monkeypatch.setattr("scoremachine.core.posterior.CHUNK", 200)
    torch.testing.assert_close(torch.func.jacfwd(lambda s: m.denoise(y, s))(sigma), once)
    torch.testing.assert_close(torch.func.jacrev(lambda s: m.denoise(y, s))(sigma), once)


@pytest.mark.parametrize("name", [n for n in SMALL if n not in SMOOTH])
def test_by_sigma_others_refuse(name):
    corpus = blurred()
    refusing(small(name, corpus), corpus)


@pytest.mark.parametrize("name", SMOOTH)
def test_by_sigma_bandwidth_schedules_refuse(name):
    corpus = blurred()
    m = small(name, corpus, bandwidth=BandwidthSchedule([0.1, 10.0], [0.1, 0.3]))
    refusing(m, corpus)
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no derivative by sigma here"):
        m.log_density(question(corpus)[0], sigma)


def refusing(m, corpus):
    y, _, u, _ = question(corpus)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    one, x = torch.ones_like(sigma), sigma.clone().requires_grad_()
    for ask in (
        lambda: m.denoise(y, x),
        lambda: m.score(y, x),
        lambda: m(y, x),
        lambda: torch.func.grad(lambda s: (u * m.denoise(y, s)).sum())(sigma),
        lambda: torch.func.jvp(lambda s: m.denoise(y, s), (sigma,), (one,)),
        lambda: torch.func.jvp(lambda t: m(y, t).mean, (sigma,), (one,)),
        lambda: torch.func.jacrev(lambda s: m.denoise(y, s))(sigma),
        lambda: torch.func.grad(  # y is mapped over inside, sigma is not
            lambda s: torch.func.vmap(lambda y: m.denoise(y[None], s)[0])(y).sum()
        )(sigma),
    ):
        with pytest.raises(NotImplementedError, match=r"no derivative by sigma here.*detach it"):
            ask()
    with torch.no_grad():  # nothing is asked for
        D = m.denoise(y, x)
    assert torch.equal(D, m.denoise(y, 0.5))
    with pytest.raises(ValueError, match=r"torch\.func\.vmap maps over.*shape \(B,\)"):
        torch.func.vmap(lambda s: m.denoise(y, s))(sigma.expand(3))


def test_trained_networks_refuse_derivatives_by_sigma():
    network = Network.of(lambda x_t, t: x_t, (1, 5, 6), "x0")
    y = torch.zeros(1, 1, 5, 6)
    with pytest.raises(NotImplementedError, match="no derivative by sigma here"):
        network.denoise(y, torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("order", ["sigma, sigma", "sigma, y", "y, sigma"])
def test_second_derivatives_by_sigma_are_refused(order):
    corpus = blurred()
    m, (y, _, u, _) = small("ideal", corpus), question(corpus)
    y, sigma = y.requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = {"y": y, "sigma": sigma}
    first, second = (inputs[name] for name in order.split(", "))
    g = torch.autograd.grad((u * m.denoise(y, sigma)).sum(), first, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(g.sum(), second)


def test_mixed_second_derivatives_of_log_density():
    """By y and then sigma, the slope of the score, is a first derivative of D; the rest refuses."""
    corpus = blurred()
    m, (y, sigma, u, _) = small("ideal", corpus, bandwidth=0.2), question(corpus)
    y, sigma = y.requires_grad_(), sigma.requires_grad_()
    g = torch.autograd.grad(m.log_density(y, sigma).sum(), y, create_graph=True)[0]
    got = torch.autograd.grad((u * g).sum(), sigma)[0]
    p = brute_density(corpus, 0.2, y, sigma).sum()
    slope = torch.autograd.grad(p, y, create_graph=True)[0]
    true = torch.autograd.grad((u * slope).sum(), sigma)[0]
    torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-8)
    for second in (y, sigma):
        g = torch.autograd.grad(m.log_density(y, sigma).sum(), sigma, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="no second derivative by sigma"):
            torch.autograd.grad(g.sum(), second)


@pytest.mark.parametrize("name", SMOOTH)
def test_vmap_over_noise_levels(name):
    corpus = blurred()
    m, (y, sigma, _, _) = small(name, corpus, bandwidth=0.1), question(corpus)
    together = torch.func.vmap(lambda x, s: m.denoise(x[None], s)[0])(y, sigma)
    torch.testing.assert_close(together, m.denoise(y, sigma))
    levels = torch.func.vmap(lambda s: m.denoise(y, s))(sigma)
    torch.testing.assert_close(levels, torch.stack([m.denoise(y, s) for s in sigma]))
    density = torch.func.vmap(lambda x, s: m.log_density(x[None], s)[0])(y, sigma)
    torch.testing.assert_close(density, m.log_density(y, sigma))
    slopes = torch.func.vmap(torch.func.grad(lambda s, x: m.denoise(x[None], s).sum()))(sigma, y)
    expected = torch.func.grad(lambda s: m.denoise(y, s).sum())(sigma)
    torch.testing.assert_close(slopes, expected)


# ---------------------------------------------------------------- transforms and compilers


@pytest.mark.parametrize("name", ["ideal", "ls"])
def test_arguments_are_checked_under_transforms(name):
    m = small(name, blurred())
    y = torch.zeros(2, 1, 5, 6)
    y[1, 0, 0, 0] = math.nan
    for ask in (
        lambda: torch.func.vmap(lambda x: m.denoise(x[None], 1.0))(y),
        lambda: torch.func.grad(lambda x: m.denoise(x, 1.0).sum())(y),
        lambda: torch.func.jvp(lambda x: m.denoise(x, 1.0), (y,), (y,)),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ask()
    with pytest.raises(ValueError, match=r"sigma is -1\.0"):
        torch.func.grad(lambda x: m.denoise(x, -1.0).sum())(torch.zeros(1, 1, 5, 6))
    if name == "ideal":
        with pytest.raises(ValueError, match=r"sigma is \[1\.0, -1\.0\]"):
            torch.func.vmap(lambda s: m.denoise(y[:1], s))(torch.tensor([1.0, -1.0]))


def test_dtypes_are_those_of_the_pictures():
    m = small("ls", blurred())
    y = torch.zeros(1, 1, 5, 6)
    D, along = torch.func.jvp(lambda x: m.denoise(x, 1.0), (y,), (y + 1,))
    assert D.dtype == along.dtype == torch.func.grad(lambda x: m.denoise(x, 1.0).sum())(y).dtype
    assert D.dtype == torch.float32


@pytest.mark.parametrize("name", ["ideal", "ls"])
def test_compiled_code_calls_machines_as_they_are(name):
    m = small(name, blurred())
    y = question(blurred())[0].float()
    D, q = m.denoise(y, 0.5), m(y, torch.tensor(0.3)).mean
    assert torch.equal(torch.compile(m.denoise)(y, 0.5), D)
    assert torch.equal(torch.compile(m)(y, torch.tensor(0.3)).mean, q)
    score = torch.compile(lambda y: 2 * m.score(y, 0.5))(y)
    torch.testing.assert_close(score, 2 * m.score(y, 0.5))


def test_what_is_tracked():
    x = torch.ones(3)
    assert not tracked(x)
    assert tracked(x.clone().requires_grad_())
    with torch.no_grad():
        assert not tracked(x.clone().requires_grad_())
    seen = []

    def look(x):
        seen.append((tracked(x), mapped(x)))
        assert torch.equal(values(x), torch.ones(values(x).shape))
        return x.sum()

    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(x)
    torch.func.vmap(torch.func.grad(look))(x)
    assert seen == [(True, False), (True, False), (False, True), (True, True), (True, True)]


def test_refusals_and_slopes():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(refused(x, "why"), x)
    with pytest.raises(NotImplementedError, match="why"):
        refused(x, "why").sum().backward()
    with pytest.raises(NotImplementedError, match="why"):
        torch.func.jvp(lambda x: refused(x, "why"), (x.detach(),), (x.detach(),))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def cubes(x):
        return with_slope((x.detach() ** 3).sum(1), 3 * x**2, x)

    assert torch.autograd.gradcheck(cubes, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(cubes, x, check_fwd_over_rev=True)
    H = torch.func.vmap(torch.func.hessian(lambda x: cubes(x[None])[0]))(x.detach())
    torch.testing.assert_close(H, torch.diag_embed(6 * x.detach()))
