"""What a GPU folds at once: the plan of it anywhere, the program itself where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scoremachine as sm
from conftest import noised, random_corpus
from scoremachine.core.collection import Collection
from scoremachine.core.posterior import ScanRequest, posterior, wrap
from scoremachine.core.windows import Augment, Box, Soft
from scoremachine.engines import choose
from scoremachine.engines import pytorch as device
from scoremachine.engines import triton as fused

SIGMAS = [0.002, 0.02, 0.2, 1.0, 10.0, 80.0]
seeds = st.integers(0, 2**31)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not fused.available(), reason="there is no GPU with Triton")


class Told:
    """`program.fold_rows` as it is told: plain sums over the sources, in numpy."""

    def __getitem__(self, launched):
        return lambda *given, **sizes: self.run(launched, *given, **sizes)

    def run(
        self, launched, digits, scales, blocks, classes, offsets, images, ids, sums, best, places,
        R, K, n, width, pixels, C, LEADERS, **launch,
    ):  # fmt: skip
        count, parts = launched
        q = sum(256**k * digits[k].double() for k in range(3))
        flat = images.reshape(-1)
        for kind, first, rows in blocks[:count].tolist():
            numbers, down, across, begins, pixel = classes[kind].tolist()
            down, across = (torch.arange(n, device=images.device) for n in (down, across))
            at = (down[:, None] * width + across + begins).reshape(-1)
            total, r = n * len(at), slice(first, first + rows)
            for part in range(parts):
                s = torch.arange(total * part // parts, total * (part + 1) // parts).to(at)
                if len(s) == 0:
                    sums[part, 0, r] = -torch.inf
                    continue
                image, place = ids[s // len(at)], at[s % len(at)]
                base = image * C * pixels + place
                x = flat[base[:, None] + offsets[kind, :numbers]].double()
                l = q[r, :numbers] @ x.T * scales[r, :1] - (x**2).sum(1) * scales[r, 1:]
                m = l.amax(1)
                w = torch.exp(l - m[:, None])
                v = flat[base[:, None] + pixel + torch.arange(C) * pixels].double()
                S = (w @ v).T
                sums[part, :, r] = torch.cat([m[None], w.sum(1)[None], (w**2).sum(1)[None], S])
                k = min(LEADERS, l.shape[1])
                top = l.topk(k, dim=1)
                best[part, r, :k] = top.values
                places[part, r, :k] = (image * pixels + place + pixel)[top.indices]


def asked(C, H, W, P, boundary, canvas=None, augment=None, N=9):
    corpus = random_corpus(seed=1, N=N, C=C, H=H, W=W)
    variants = (augment or Augment()).variants
    c = Collection(
        (H, W), Box((P, P)), "pixels", "pixel", "every",
        boundary=boundary, canvas=canvas, variants=variants,
    )  # fmt: skip
    y, sigma = noised(corpus, SIGMAS)
    if canvas:
        y = y.repeat(1, 1, 3, 3)[:, :, : canvas[0], : canvas[1]]
    query = wrap(y.double(), c) if c.wraps else y.double()
    T = torch.full_like(sigma, 60.0)
    return ScanRequest(corpus.images, np.arange(N)[1:], query, sigma, c, T)


def assert_same(a, b, leaders):
    assert (a.mean - b.mean).abs().max() <= 1e-4
    assert torch.allclose(a.effective_sources, b.effective_sources, rtol=1e-3)
    assert a.logits.shape == b.logits.shape
    if leaders:
        assert torch.allclose(a.logits, b.logits, rtol=1e-4, atol=1e-3)
        assert (a.leader_weights - b.leader_weights).abs().max() <= 1e-3
        # equals may come in any order
        same = (a.places == b.places) | ((a.logits - b.logits).abs() <= 1e-3 * (1 + b.logits.abs()))
        assert same.all()
        assert (a.places == b.places).float().mean() > 0.9


CASES = [
    (1, 7, 7, 1, "broken", None, None),
    (3, 8, 11, 5, "broken", None, None),
    (3, 8, 11, 11, "broken", None, None),
    (4, 9, 5, 3, "circular", None, None),
    (1, 7, 7, 7, "circular", None, None),
    (3, 8, 8, 3, "broken", (11, 20), Augment(flips=True)),
    (1, 8, 8, 5, "circular", (11, 20), Augment(flips=True)),
]


@pytest.mark.parametrize("leaders", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_compares_what_the_definition_compares(case, leaders, monkeypatch):
    monkeypatch.setattr(fused, "_program", Told)
    request = asked(*case)
    assert fused.answers(request)
    found = fused.fold(request, leaders, CPU)
    assert_same(found, plain(request, leaders), leaders)


@needs_gpu
@pytest.mark.parametrize("leaders", [0, 1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_program_equals_the_definition(case, leaders):
    request = asked(*case, N=40)
    found = fused.fold(request, leaders, torch.device("cuda"))
    assert_same(found, plain(request, leaders), leaders)


@needs_gpu
def test_a_rise_of_millions_of_nats_within_a_step_is_no_loss():
    image = np.zeros((1, 3, 16, 16), dtype=np.uint8)
    image[:, :, 8:] = np.random.default_rng(0).integers(250, 256, (1, 3, 8, 16))
    corpus = sm.Corpus(image)
    y, sigma = torch.ones(1, 3, 16, 16), torch.tensor([0.002])
    c = Collection((16, 16), Box((7, 7)), "pixels", "pixel", "every", boundary="circular")
    T = torch.full((1,), 60.0)
    request = ScanRequest(corpus.images, np.arange(1), wrap(y.double(), c), sigma.double(), c, T)
    found = fused.fold(request, 3, torch.device("cuda"))
    assert_same(found, choose("reference").fold(request, 3, None), 3)


@needs_gpu
@pytest.mark.parametrize("P", [3, 7, 15])
def test_a_picture_is_the_same_alone_and_among_others(P):
    corpus = random_corpus(seed=2, N=300, C=3, H=20, W=20)
    machine = sm.build("els", corpus, patch_size=P, kernel="torch")
    y, sigma = noised(corpus, SIGMAS)
    together = machine.denoise(y, sigma)
    for p, level in enumerate(SIGMAS):
        assert torch.equal(machine.denoise(y[p : p + 1], level)[0], together[p])


def plain(request, leaders):
    """The fold of the kernels that are everywhere."""
    if request.collection.canvas is None:
        return choose("reference").fold(request, leaders, None)
    return choose("numba").fold(request, leaders, None)


@given(st.lists(st.integers(-fused.LARGEST, fused.LARGEST), min_size=1, max_size=50))
def test_three_bytes_hold_a_number(numbers):
    whole = torch.tensor(numbers, dtype=torch.int32)[None]
    digits = fused._digits(whole)
    assert digits.dtype == torch.int8
    assert torch.equal(sum(256**k * digits[k].int() for k in range(3)), whole)


def test_images_are_the_same_bytes_less_128():
    u = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert fused._bytes(u, CPU).flatten().tolist() == list(range(-128, 128))


def test_the_last_corpus_stays_on_the_device(monkeypatch):
    monkeypatch.setattr(fused, "_program", Told)
    sent = []
    send = fused._bytes
    monkeypatch.setattr(fused, "_bytes", lambda *given: sent.append(1) or send(*given))
    request = asked(1, 6, 6, 3, "broken")
    for _ in range(3):
        fused.fold(request, 0, device.where())
    assert len(sent) == 1


def test_a_corpus_too_large_for_the_device_comes_in_pieces(monkeypatch):
    monkeypatch.setattr(fused, "_program", Told)
    request = replace(asked(3, 6, 6, 3, "broken", N=20), index=np.array([15, 2, 9, 3, 16]))
    whole = fused.fold(request, 2, CPU)
    monkeypatch.setattr(fused, "ROOM", 3 * 6 * 6 * 7)  # bytes: seven images
    monkeypatch.setattr(fused, "CHUNK", 3 * 6 * 6 * 2)
    assert_same(fused.fold(request, 2, CPU), whole, 2)


def test_many_pictures_go_some_at_a_time(monkeypatch):
    monkeypatch.setattr(fused, "_program", Told)
    request = asked(3, 6, 6, 3, "broken", N=20)
    whole = fused.fold(request, 2, CPU)
    monkeypatch.setattr(fused, "NUMBERS", 2 * 36 * fused.PARTS * 10)
    assert_same(fused.fold(request, 2, CPU), whole, 2)


@given(seeds, st.floats(-3, 2).map(lambda e: 10.0**e))
def test_a_picture_is_rounded_once(seed, size):
    y = size * torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 5, 4)))
    near = fused.rounded(y)
    largest = (127.5 * y - 0.5).abs().amax((1, 2, 3), keepdim=True).clamp(min=1) / 127.5
    assert ((near - y).abs() <= largest * 2.0**-23).all()
    assert torch.allclose(fused.rounded(near), near, rtol=0, atol=1e-14 * largest.max().item())


@pytest.mark.parametrize("P", [3, 7])
def test_what_is_differentiated_is_what_was_compared(P, monkeypatch):
    monkeypatch.setattr(fused, "_program", Told)
    monkeypatch.setattr(fused, "available", lambda: True)
    monkeypatch.setattr(device, "where", lambda: CPU)
    rng = np.random.default_rng(0)
    one = rng.integers(4, 250, (1, 3, 9, 10))
    images = (one + (rng.random((12, 3, 9, 10)) < 0.02)).astype(np.uint8)
    # halfway between two of them, so that several count at any noise level
    sigma = torch.tensor([0.002, 0.005, 0.02], dtype=torch.float64)
    eps = torch.from_numpy(rng.normal(size=(3, 3, 9, 10)))
    y = torch.from_numpy(images[:2].mean(0) / 127.5 - 1) + 0.3 * sigma[:, None, None, None] * eps
    corpus = sm.Corpus(images)
    c = Collection((9, 10), Box((P, P)), "pixels", "pixel", "every")
    u = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def slope(kernel, y):
        x = y.clone().requires_grad_()
        fold, D = posterior(choose(kernel), corpus.images, np.arange(12), x, sigma, c, 2)
        return fold, torch.autograd.grad(D, x, u)[0]

    fold, g = slope("torch", y)
    slow, g_slow = slope("reference", fused.rounded(y))
    for found, expected in zip(g, g_slow, strict=True):
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    torch.testing.assert_close(fold.log_partition, slow.log_partition, rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(fold.logits, slow.logits, rtol=1e-7, atol=1e-5)


def test_other_questions_go_to_the_general_kernel():
    plain_one = asked(1, 6, 6, 3, "broken")
    for other in (
        Collection((6, 6), Box((3, 3)), "pixels", "pixel"),
        Collection((6, 6), Soft.gaussian(3, 3), "pixels", "pixel", "every"),
        Collection((6, 6), Box((3, 3)), "boxes", "window", "every"),
        Collection((6, 6), Box((3, 3)), "pixels", "pixel", "every",
                   variants=Augment(contrast=0.5).variants),
    ):  # fmt: skip
        assert not fused.folds(other)
    assert fused.folds(plain_one.collection)
    assert device.where().type == ("cuda" if torch.cuda.is_available() else "cpu")
