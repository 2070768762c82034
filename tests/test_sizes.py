"""Pictures of another size than the images, which a machine that forgets positions can denoise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scoremachine as sm
from conftest import SMALL, random_corpus, random_images, small
from scoremachine.core.collection import Collection
from scoremachine.core.posterior import ScanRequest, wrap
from scoremachine.core.windows import Box
from scoremachine.engines import cpu, strips
from scoremachine.sources.searched import Search


def along(i: int, P: int, seen: int, n: int, boundary: str) -> tuple[list[int], list[list[int]]]:
    """Along an axis: the pixels that a box around i sees, and those of every source."""
    r = P // 2
    if boundary == "circular":
        places = range(n - P + 1)
        return [(i + k) % seen for k in range(-r, r + 1)], [
            [a + k for k in range(P)] for a in places
        ]
    box = [i + k for k in range(-r, r + 1) if 0 <= i + k < seen]
    if i < r:
        return box, [box]
    if i + r >= seen:
        return box, [[a + n - seen for a in box]]
    return box, [[a + k for k in range(P)] for a in range(n - P + 1)]


def definition(images, y, sigma, P, boundary):
    """D of every pixel from its box and all boxes that are cut off likewise, float64."""
    s = images.astype(np.float64) / 127.5 - 1
    D = np.zeros(y.shape)
    (H, W), (n, m) = y.shape[2:], images.shape[2:]
    for p, level in enumerate(sigma):
        for i in range(H):
            for j in range(W):
                rows, sources_down = along(i, P, H, n, boundary)
                columns, sources_across = along(j, P, W, m, boundary)
                query = y[p][:, rows][:, :, columns]
                logits, values = [], []
                for down in sources_down:
                    for across in sources_across:
                        patch = s[:, :, down][..., across]
                        logits.append(-((patch - query) ** 2).sum((1, 2, 3)) / (2 * level**2))
                        middle = down[rows.index(i)], across[columns.index(j)]
                        values.append(s[:, :, middle[0], middle[1]])
                l, v = np.concatenate(logits), np.concatenate(values)
                w = np.exp(l - l.max())
                D[p, :, i, j] = (w / w.sum()) @ v
    return D


CASES = [((6, 8), (9, 11), 3), ((6, 8), (5, 9), 5), ((7, 7), (7, 12), 5), ((9, 12), (4, 5), 3)]


@pytest.mark.parametrize(("image", "canvas", "P"), CASES)
@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize("kernel", ["numba", "torch", "reference"])
def test_other_sizes_equal_their_definition(image, canvas, P, boundary, kernel):
    images = random_images(1, 5, 3, *image)
    m = small("els", images, patch_size=P, boundary=boundary, kernel=kernel)
    y = torch.randn(2, 3, *canvas, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.3, 1.5])
    D = m.denoise(y, sigma)
    assert (
        np.abs(D.numpy() - definition(images, y.numpy(), sigma.numpy(), P, boundary)).max() < 1e-4
    )


def composite(images, y, sigma, P, wraps):
    """The mean of all boxes over a pixel, each the mean of all patches of the images, float64."""
    s = images.astype(np.float64) / 127.5 - 1
    n, m = images.shape[2:]
    places = [(a, b) for a in range(n - P + 1) for b in range(m - P + 1)]
    patches = np.stack([s[:, :, a : a + P, b : b + P] for a, b in places], 1)
    patches = patches.reshape(-1, *patches.shape[2:])
    D = np.zeros(y.shape)
    count = np.zeros(y.shape[2:])
    (H, W) = y.shape[2:]
    for i in range(H if wraps else H - P + 1):
        for j in range(W if wraps else W - P + 1):
            rows, columns = (i + np.arange(P)) % H, (j + np.arange(P)) % W
            count[rows[:, None], columns] += 1
            for p, level in enumerate(sigma):
                query = y[p][:, rows[:, None], columns]
                l = -((patches - query) ** 2).sum((1, 2, 3)) / (2 * level**2)
                w = np.exp(l - l.max())
                D[p][:, rows[:, None], columns] += np.einsum("s,scab->cab", w / w.sum(), patches)
    return D / count


@pytest.mark.parametrize(("image", "canvas", "P"), [*CASES, ((6, 8), (20, 7), 4)])
@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize("kernel", ["numba", "torch", "reference"])
def test_composites_of_other_sizes_equal_their_definition(image, canvas, P, boundary, kernel):
    images = random_images(1, 3, 3, *image)
    m = small("epc", images, patch_size=P, boundary=boundary, kernel=kernel)
    y = torch.randn(2, 3, *canvas, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.3, 1.5])
    expected = composite(images, y.numpy(), sigma.numpy(), P, boundary == "circular")
    assert np.abs(m.denoise(y, sigma).numpy() - expected).max() < 1e-4


def test_a_composite_is_differentiable_at_other_sizes():
    images = random_images(1, 2, 1, 6, 6)
    y = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    for boundary in ("broken", "circular"):
        m = small("epc", images, patch_size=3, boundary=boundary)
        assert torch.autograd.gradcheck(lambda y, m=m: m.denoise(y, 1.0), y.requires_grad_())


@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_the_images_own_size_is_no_exception(boundary):
    images = random_images(1, 5, 1, 6, 8)
    y = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    D = small("els", images, boundary=boundary).denoise(y, 0.4)
    assert np.abs(D.numpy() - definition(images, y.numpy(), [0.4], 3, boundary)).max() < 1e-5


@pytest.mark.parametrize(
    ("image", "canvas", "P"), [((12, 12), (15, 20), 3), ((14, 12), (9, 30), 5)]
)
@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize("bound", ["deterministic", "statistical"])
def test_a_search_keeps_its_word_at_other_sizes(image, canvas, P, boundary, bound):
    corpus = sm.Corpus(random_images(2, 30, 1, *image))
    settings = {"patch_size": P, "boundary": boundary}
    exact = small("els", corpus, search="exact", **settings)
    # whatever it costs, it is the search that answers
    searched = small("els", corpus, search=Search("bounded", 0.01, bound, 1e9), **settings)
    x = torch.from_numpy(random_images(3, 2, 1, *canvas)).double() / 127.5 - 1
    y = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = searched.denoise_bounded(y, 0.2)
    assert found.omitted_mass.shape == (2, *canvas)
    assert (found.D - exact.denoise(y, 0.2)).abs().max() <= 0.01
    assert found.omitted_mass.max() > 0


@pytest.mark.parametrize(("n", "image", "P"), [(1, (40, 12), 3), (3, (38, 9), 5), (3, (90, 8), 7)])
@pytest.mark.parametrize("canvas", [None, (9, 50)])
def test_few_large_images_go_as_strips(n, image, P, canvas, monkeypatch):
    monkeypatch.setattr(strips, "SITES", 100)
    images = random_images(4, n, 2, *image)
    collection = Collection(
        image, Box((P, P)), "pixels", "pixel", "every", boundary="circular", canvas=canvas
    )
    cut, share = strips.cut(collection, n)
    assert n / 8 <= share < 1
    high, wide = (k - P + 1 for k in image)
    assert sum(len(group.corners) * group.high * group.wide for group in cut) == high * wide
    y = torch.randn(2, 2, *collection.frame, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.3, 5.0], dtype=torch.float64)
    index, T = np.arange(n)[::-1].copy(), torch.full_like(sigma, 60.0)
    asked = ScanRequest(images, index, wrap(y, collection), sigma, collection, T)
    found = cpu.fold(asked, 3, None)
    monkeypatch.setattr(strips, "WORTHWHILE", 0)
    plain = cpu.fold(asked, 3, None)
    assert (found.mean - plain.mean).abs().max() < 1e-6
    assert torch.allclose(found.log_partition, plain.log_partition)
    assert torch.allclose(found.logits, plain.logits)
    far = (found.logits - plain.logits).abs() + (found.logits.diff(dim=1).abs().amin(1)[:, None])
    assert ((found.places == plain.places) | (far < 1e-6)).all()


@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(0, 20))
def test_circular_pictures_of_any_size_have_no_origin(seed, dy, dx):
    m = small("els", random_images(seed, 3, 1, 6, 7), boundary="circular")
    y = torch.randn(1, 1, 9, 10, generator=torch.Generator().manual_seed(seed % 1000))
    moved = m.denoise(torch.roll(y, (dy, dx), (2, 3)), 0.7)
    assert (torch.roll(m.denoise(y, 0.7), (dy, dx), (2, 3)) - moved).abs().max() < 1e-5


@pytest.mark.parametrize("boundary", ["broken", "circular"])
def test_gradients_at_other_sizes(boundary):
    m = small("els", random_images(1, 4, 1, 5, 6), boundary=boundary)
    y = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: m.denoise(y, 0.7), y)


def test_els_generates_any_size():
    m = small("els", random_corpus(N=9))
    x = sm.generate(m, count=3, steps=3, shape=(1, 9, 14))
    assert x.shape == (3, 1, 9, 14)
    again = sm.generate(m, count=2, steps=3, shape=(1, 9, 14), batch=1)
    assert torch.equal(again, x[:2])


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"els", "epc"}))
def test_others_say_that_they_cannot(name):
    m = small(name, random_corpus())
    with pytest.raises(ValueError, match=r"depends on the position in an image.*use els"):
        sm.generate(m, count=1, steps=2, shape=(1, 9, 14))


def test_sizes_that_cannot_be():
    m = small("els", random_corpus(), patch_size=5)
    with pytest.raises(ValueError, match="takes patches of at most 3, and patch_size goes up to 5"):
        sm.generate(m, count=1, shape=(1, 4, 20))
    with pytest.raises(ValueError, match="takes patches of at most 3"):
        m.denoise(torch.zeros(1, 1, 20, 4), 1.0)
    with pytest.raises(ValueError, match=r"y has shape \(1, 3, 20, 20\)"):
        m.denoise(torch.zeros(1, 3, 20, 20), 1.0)
    with pytest.raises(ValueError, match="of the images' shape"):
        sm.generate(m, count=1, shape=(3, 20, 20))
    with pytest.raises(ValueError, match="start begins with training images"):
        sm.generate(m, count=1, shape=(1, 20, 20), start=0.5)
