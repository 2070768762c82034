"""The fold over every patch of every image in one GPU kernel: products, softmax and mean at once.

Logits are differences of large numbers, so they are made of whole ones. A picture is rounded to
2^-23 of its largest number, and cut into three signed bytes,

    q = 65536 q_2 + 256 q_1 + q_0,

whose products with the images' bytes the matrix units of a GPU add up without an error. Only what
is left after the largest logit is subtracted, in float64, goes through exp in float32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.posterior import Fold, Question
from scoremachine.windows import Box, Collection

LARGEST = 127 * (65536 + 256 + 1)  # number of three signed bytes
PARTS = 64  # of the source, at most, that are folded side by side
STATES = 2**18  # of sites and parts of the source
NUMBERS = 2**25  # of the windows of pictures that go together
ROOM = 2**34  # bytes, at most, of a corpus that stays on the device
CHUNK = 2**28  # bytes that are sent there at a time
CHANNELS = 4  # at most
WINDOW = 2**17  # numbers of a window whose squares an int32 can hold
LEAST = (8, 0)  # a GPU's version with such matrix units
NOTHING = -1e300  # the logit of no source at all


@dataclass(frozen=True)
class Launch:
    """How a GPU is filled.

    Attributes:
        rows: Queries of a program.
        sources: Patches that it looks at in one step.
        depth: Numbers of both in one product.
        warps: Of 32 threads each, in a program.
        stages: Steps whose numbers are fetched ahead.
    """

    rows: int = 64
    sources: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 3


LAUNCH = Launch()


def available() -> bool:
    """Whether there is a GPU with matrix units for bytes, and Triton to write for it."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= LEAST
        and importlib.util.find_spec("triton") is not None
    )


def folds(collection: Collection) -> bool:
    """Whether sites are compared as they are here: boxes of pixels with all patches as they are."""
    plain = all(v.contrast == 1 and v.brightness == 0 for v in collection.variants)
    pixels = collection.sites == "pixels" and collection.response == "pixel"
    boxes = isinstance(collection.window, Box) and collection.source == "every"
    return pixels and boxes and plain


def answers(question: Question) -> bool:
    """Whether `fold` can answer."""
    images, c = question.images, question.collection
    levels = images.dtype == np.uint8 and question.values is None and question.u is None
    small = images.shape[1] <= CHANNELS and images.shape[1] * math.prod(c.window.shape) <= WINDOW
    return folds(c) and levels and small


def fold(question: Question, leaders: int, device: torch.device, launch: Launch = LAUNCH) -> Fold:
    """The fold over the source; see `scoremachine.posterior.Kernel`."""
    c, B = question.collection, len(question.y)
    kept = 1 << max(leaders - 1, 0).bit_length()  # a power of 2
    plan = _plan(c, question.y.shape[1], tuple(question.y.shape[2:]), launch.depth, device)
    state = PARTS * (question.y.shape[1] + 3 + 2 * kept)
    together = max(1, NUMBERS // (len(plan.sites) * max(plan.places.shape[1], state)))
    if together < B:
        pairs = zip(question.y.split(together), question.sigma.split(together), strict=True)
        some = [replace(question, y=y, sigma=sigma) for y, sigma in pairs]
        return Fold.batch(fold(part, leaders, device, launch) for part in some)
    y = question.y.to(device)
    picture, site, blocks = plan.rows(B, launch.rows)
    q = 127.5 * y - 0.5  # as images are stored: bytes from -128 to 127
    step = q.abs().amax((1, 2, 3)).clamp(min=1.0) / LARGEST
    digits = plan.digits(torch.round(q / step[:, None, None, None]), picture, site)
    variance = (127.5 * question.sigma.to(device)) ** 2
    scales = torch.stack([step / variance, 0.5 / variance], dim=1)[picture].contiguous()

    def parts() -> Iterator[Fold]:
        for images, ids, first in _read(question, device):
            for k, variant in enumerate(c.variants):
                axes = [a for a, m in ((2, variant.mirror_rows), (3, variant.mirror_columns)) if m]
                source = images.flip(axes) if axes else images
                rows = _launched(plan, digits, scales, blocks, source, ids, leaders, kept, launch)
                part = _in_order(rows, c, B, picture, site)
                before = (first + k * len(question.images)) * math.prod(c.image)
                part.places[part.places >= 0] += before
                yield part

    found = functools.reduce(Fold.merge, parts())
    # from sums of bytes to those of x: (s + 1/2) / 127.5
    found.S = (found.S + 0.5 * found.Z[:, None]) / 127.5
    sizes = c.look(torch.ones_like(y).sum(1))
    constant = (2 * c.look(y.sum(1)) - sizes / 255) / (510 * variance[:, None, None] / 127.5**2)
    found.m += constant
    found.logits += constant[:, None]
    found.logits[found.places < 0] = NOTHING
    return found.cpu()


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sites see which numbers of a picture, and which patches they are compared with.

    Attributes:
        classes: A row for every kind of site, int32 (n, 5): numbers in its window; rows and
            columns of patches in an image; where the first of them begins, and how far from there
            the site's own pixel is.
        places: Where the numbers of each site's window are in a picture, int32 (sites, K); K is
            the most of them, rounded up to `Launch.depth`.
        offsets: Where the numbers of each kind's patches are in an image, counted from the
            patch's first, int32 (n, K).
        sites: The sites, kind by kind.
        counts: How many of each kind.
        work: How many patches of an image each kind is compared with.
    """

    classes: Tensor
    places: Tensor
    offsets: Tensor
    sites: Tensor
    counts: np.ndarray
    work: np.ndarray

    def rows(self, B: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
        """For B pictures: picture and site of each row, and (kind, first row, rows) of each block.

        The rows go by kinds, in each by pictures. The blocks with most to do come first.
        """
        device = self.sites.device
        kinds = torch.from_numpy(np.repeat(np.arange(len(self.counts)), self.counts)).to(device)
        picture = torch.arange(B, device=device).repeat_interleave(len(self.sites))
        order = torch.argsort(kinds.repeat(B) * B + picture, stable=True)
        counts = B * self.counts
        stops, each = np.cumsum(counts), -(-counts // height)
        kind = np.repeat(np.arange(len(counts)), each)
        within = np.arange(len(kind)) - np.repeat(np.cumsum(each) - each, each)
        first = (stops - counts)[kind] + height * within
        blocks = np.stack([kind, first, np.minimum(height, stops[kind] - first)], axis=1)
        blocks = blocks[np.argsort(-self.work[kind], kind="stable")].astype(np.int32)
        return picture[order], self.sites.repeat(B)[order], torch.from_numpy(blocks).to(device)

    def digits(self, whole: Tensor, picture: Tensor, site: Tensor) -> Tensor:
        """Windows of pictures of whole numbers as three signed bytes, lowest first: (3, R, K)."""
        R, K = len(site), self.places.shape[1]
        found = torch.empty(3, R, K, dtype=torch.int8, device=whole.device)
        flat, step = whole.to(torch.int32).flatten(1), max(1, NUMBERS // K)
        for start in range(0, R, step):
            rows = slice(start, start + step)
            found[:, rows] = _digits(flat[picture[rows, None], self.places[site[rows]].long()])
        return found


@dataclass(frozen=True)
class _Kind:
    """Sites of one axis that see the same part of their window.

    Attributes:
        sites: Which.
        first: Where the window begins, for the first of them.
        size: How many rows of the window they see.
        begins: Where the first patch that they are compared with begins.
        count: How many there are.
        pixel: The site's own row in what it sees.
    """

    sites: range
    first: int
    size: int
    begins: int
    count: int
    pixel: int


def _kinds(n: int, seen: int, sites: int, p: int, cut: bool) -> list[_Kind]:
    """The kinds of sites of an axis: images of n, pictures of `seen`, windows of p pixels."""
    if not cut:
        return [_Kind(range(sites), 0, p, 0, n - p + 1, p // 2)]
    half, inner = p // 2, []
    kinds = []
    for i in range(sites):
        top, bottom = max(i - half, 0), min(i - half + p, seen)
        if bottom - top == p:
            inner.append(i)
        else:  # what is cut off at the first row begins an image; at the last, ends it
            begins = 0 if i < half else n - (bottom - top)
            kinds.append(_Kind(range(i, i + 1), top, bottom - top, begins, 1, i - top))
    if inner:
        whole = range(inner[0], inner[-1] + 1)
        kinds.append(_Kind(whole, inner[0] - half, p, 0, n - p + 1, half))
    return kinds


@functools.lru_cache(maxsize=8)
def _plan(c: Collection, C: int, query: tuple[int, ...], depth: int, device: torch.device) -> Plan:
    H, W = c.image
    axes = [
        _kinds(*sizes, c.cut)
        for sizes in zip(c.image, c.frame, c.grid, c.window.shape, strict=True)
    ]
    K = max(C * a.size * b.size for a in axes[0] for b in axes[1])
    K = -(-K // depth) * depth
    places = np.zeros((math.prod(c.grid), K), dtype=np.int32)
    classes, offsets, members = [], [], []
    for a in axes[0]:
        for b in axes[1]:
            k, i, j = (x.ravel() for x in np.indices((C, a.size, b.size)))
            rows = np.arange(len(a.sites))[:, None] + a.first
            columns = np.arange(len(b.sites))[None] + b.first
            sites = (np.array(a.sites)[:, None] * c.grid[1] + np.array(b.sites)[None]).ravel()
            corner = (rows * query[1] + columns).reshape(-1, 1)
            places[sites, : len(k)] = corner + (k * query[0] + i) * query[1] + j
            offset = np.zeros(K, dtype=np.int32)
            offset[: len(k)] = (k * H + i) * W + j
            begins, pixel = a.begins * W + b.begins, a.pixel * W + b.pixel
            classes.append((len(k), a.count, b.count, begins, pixel))
            offsets.append(offset)
            members.append(sites)
    return Plan(
        torch.tensor(classes, dtype=torch.int32, device=device),
        torch.from_numpy(places).to(device),
        torch.from_numpy(np.stack(offsets)).to(device),
        torch.from_numpy(np.concatenate(members)).to(device),
        np.array([len(sites) for sites in members]),
        np.array([down * across for _, down, across, *_ in classes]),
    )


def _digits(whole: Tensor) -> Tensor:
    """The three signed bytes of int32 numbers (R, K), lowest first: int8 (3, R, K)."""
    found = []
    for _ in range(3):
        low = ((whole + 128) & 255) - 128
        found.append(low.to(torch.int8))
        whole = (whole - low) >> 8
    return torch.stack(found)


_kept: tuple[weakref.ref[np.ndarray], Tensor] | None = None  # the last corpus, on the device


def _read(question: Question, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The images of the source as bytes from -128 on: a corpus or a part of it, and which of them.

    With them comes the place of their first in the corpus.
    """
    global _kept
    images, index = question.images, question.index
    device = torch.empty(0, device=device).device  # "cuda" is one of them
    room = ROOM
    if device.type == "cuda":
        room = min(room, torch.cuda.get_device_properties(device).total_memory // 4)
    if images.nbytes <= room:
        kept = _kept
        if kept is None or kept[0]() is not images or kept[1].device != device:
            kept = _kept = None  # never two at once
            kept = _kept = weakref.ref(images), _bytes(images, device)
        yield kept[1], torch.from_numpy(index).to(device), 0
        return
    step, stop = max(1, room // images[0].nbytes), int(index.max()) + 1
    for first in range(int(index.min()), stop, step):
        some = index[(index >= first) & (index < first + step)] - first
        if len(some):
            part = _bytes(images[first : min(first + step, stop)], device)
            yield part, torch.from_numpy(some).to(device), first


def _bytes(images: np.ndarray, device: torch.device) -> Tensor:
    found = torch.empty(images.shape, dtype=torch.uint8, device=device)
    step = max(1, CHUNK // images[0].nbytes)
    for start in range(0, len(images), step):
        found[start : start + step] = torch.from_numpy(np.array(images[start : start + step]))
    return found.bitwise_xor_(128).view(torch.int8)


def _launched(
    plan: Plan, digits: Tensor, scales: Tensor, blocks: Tensor, images: Tensor, ids: Tensor,
    leaders: int, kept: int, launch: Launch,
) -> Fold:  # fmt: skip
    """Folds of all rows, (1, R): the parts of the source side by side, then merged."""
    (C, H, W), R = images.shape[1:], digits.shape[1]
    parts = max(1, min(PARTS, STATES // len(plan.sites)))
    sums = torch.zeros(parts, C + 3, R, dtype=torch.float64, device=images.device)
    best = torch.full((parts, R, kept), NOTHING, dtype=torch.float64, device=images.device)
    places = torch.full((parts, R, kept), -1, device=images.device)
    _program()[len(blocks), parts](
        digits, scales, blocks, plan.classes, plan.offsets, images, ids, sums, best, places,
        R, digits.shape[2], len(ids), W, H * W,
        C=C, LEADERS=leaders, KEPT=kept, ROWS=launch.rows, SOURCES=launch.sources,
        DEPTH=launch.depth, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    m = sums[:, 0]
    top = m.amax(0)
    a = torch.exp(m - top)
    logits = best[..., :leaders].permute(0, 2, 1).reshape(-1, R)
    order = torch.argsort(logits, dim=0, descending=True, stable=True)[:leaders]
    return Fold(
        top[None], (a * sums[:, 1]).sum(0)[None], (a**2 * sums[:, 2]).sum(0)[None],
        (a[:, None] * sums[:, 3:]).sum(0)[None], logits.gather(0, order)[None],
        places[..., :leaders].permute(0, 2, 1).reshape(-1, R).gather(0, order)[None],
    )  # fmt: skip


def _in_order(fold: Fold, c: Collection, B: int, picture: Tensor, site: Tensor) -> Fold:
    """A fold of rows (1, ..., R) as one of pictures and sites (B, ..., *sites)."""
    n = c.grid[0] * c.grid[1]
    to = picture * n + site

    def ordered(x: Tensor) -> Tensor:
        flat = torch.empty_like(x[0])
        flat[..., to] = x[0]
        return flat.reshape(*flat.shape[:-1], B, *c.grid).movedim(-3, 0)

    fields = (fold.m, fold.Z, fold.Z2, fold.S, fold.logits, fold.places)
    return Fold(*map(ordered, fields))


@functools.cache
def _program() -> Any:
    """The kernel, compiled when it is first launched."""
    from scoremachine.kernels.program import fold_rows

    return fold_rows
