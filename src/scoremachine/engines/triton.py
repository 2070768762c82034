"""The fold over every patch of every image in one GPU kernel: products, softmax and mean at once.

Logits are differences of large numbers, so they are computed from integers. A picture is rounded
to 2^-23 of its largest value, and split into three signed bytes,

    q = 65536 q_2 + 256 q_1 + q_0,

whose products with the images' bytes the matrix units of a GPU sum without rounding. The largest
logit is subtracted in float64; only this difference is passed to exp in float32.
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

from scoremachine.core.collection import Collection, classes
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest
from scoremachine.core.windows import Box
from scoremachine.engines.compiled import NOTHING

LARGEST = 127 * (65536 + 256 + 1)  # the largest number with three equal signed bytes
PARTS = 64  # the most chunks of the source that are folded in parallel
STATES = 2**18  # the most pairs of a site and a chunk of the source
NUMBERS = 2**25  # values in the windows of pictures that are processed together
ROOM = 2**34  # the most bytes of a corpus that is kept on the device
CHUNK = 2**28  # bytes that are sent there at a time
CHANNELS = 4  # the most channels
WINDOW = 2**17  # the most values of a window, so that int32 can hold the sum of their squares
LEAST = (8, 0)  # the least compute capability with such matrix units


@dataclass(frozen=True)
class Launch:
    """The launch configuration of the kernel.

    Attributes:
        rows: Queries of a program.
        sources: Patches that it processes in one step.
        depth: Values of both in one product.
        warps: Warps of a program.
        stages: Pipeline stages of loads.
    """

    rows: int = 64
    sources: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 3


LAUNCH = Launch()


@functools.cache
def available() -> bool:
    """Whether there is a GPU with matrix units for bytes, and Triton."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= LEAST
        and importlib.util.find_spec("triton") is not None
    )


def folds(collection: Collection) -> bool:
    """Whether the kernel supports a collection: plain boxes around pixels, all patches."""
    plain = all(v.contrast == 1 and v.brightness == 0 for v in collection.variants)
    pixels = collection.sites == "pixels" and collection.response == "pixel"
    boxes = isinstance(collection.window, Box) and collection.source == "every"
    return pixels and boxes and plain


def answers(request: ScanRequest) -> bool:
    """Whether `fold` supports a request."""
    images, c = request.keys, request.collection
    levels = images.dtype == np.uint8 and request.values is None and request.u is None
    small = images.shape[1] <= CHANNELS and images.shape[1] * math.prod(c.window.shape) <= WINDOW
    return folds(c) and levels and small


def rounded(y: Tensor) -> Tensor:
    """The rounded pictures (B, C, H, W) that are compared instead of y."""
    return _in_units(*_in_steps(y))


def compared(request: ScanRequest, known: Fold) -> tuple[ScanRequest, Fold]:
    """The request for the rounded pictures, and their fold, without the term of `_left_out`."""
    near = rounded(request.y)
    extra = _left_out(request.y, near, request.sigma, request.collection)
    return replace(request, y=near), replace(known, m=known.m - extra)


def _left_out(y: Tensor, near: Tensor, sigma: Tensor, c: Collection) -> Tensor:
    """The correction of logits of `near` if the omitted term is |y|^2 of y instead: (B, *sites)."""
    return c.window_sum((y**2 - near**2).sum(1)) / (2 * sigma[:, None, None] ** 2)


def _in_steps(y: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures, in units of bytes from -128 to 127, as integer multiples of a step; steps (B,)."""
    q = 127.5 * y - 0.5
    step = q.abs().amax((1, 2, 3)).clamp(min=1.0) / LARGEST
    return torch.round(q / step[:, None, None, None]), step


def _in_units(whole: Tensor, step: Tensor) -> Tensor:
    """The inverse of `_in_steps`: pictures in units of x."""
    return (whole * step[:, None, None, None] + 0.5) / 127.5


def fold(request: ScanRequest, leaders: int, device: torch.device, launch: Launch = LAUNCH) -> Fold:
    """The fold over the source; see `scoremachine.core.posterior.Engine`."""
    c, B = request.collection, len(request.y)
    kept = 1 << max(leaders - 1, 0).bit_length()  # a power of 2
    plan = _plan(c, request.y.shape[1], tuple(request.y.shape[2:]), launch.depth, device)
    state = PARTS * (request.y.shape[1] + 3 + 2 * kept)
    together = max(1, NUMBERS // (len(plan.sites) * max(plan.places.shape[1], state)))
    if together < B:
        pairs = zip(request.y.split(together), request.sigma.split(together), strict=True)
        some = [replace(request, y=y, sigma=sigma) for y, sigma in pairs]
        return Fold.batch(fold(part, leaders, device, launch) for part in some)
    y = request.y.to(device)
    picture, site, blocks = plan.rows(B, launch.rows)
    whole, step = _in_steps(y)
    digits = plan.digits(whole, picture, site)
    variance = (127.5 * request.sigma.to(device)) ** 2
    scales = torch.stack([step / variance, 0.5 / variance], dim=1)[picture].contiguous()

    def parts() -> Iterator[Fold]:
        for images, ids, first in _read(request, device):
            for k, variant in enumerate(c.variants):
                axes = [a for a, m in ((2, variant.mirror_rows), (3, variant.mirror_columns)) if m]
                source = images.flip(axes) if axes else images
                rows = _launched(plan, digits, scales, blocks, source, ids, leaders, kept, launch)
                part = _in_order(rows, c, B, picture, site)
                before = (first + k * len(request.keys)) * math.prod(c.image)
                part.places[part.places >= 0] += before
                yield part

    found = functools.reduce(Fold.merge, parts())
    # from sums of bytes to those of x: (s + 1/2) / 127.5
    found.S = (found.S + 0.5 * found.Z[:, None]) / 127.5
    sizes = c.window_sum(torch.ones_like(y).sum(1))
    near = _in_units(whole, step)
    constant = (2 * c.window_sum(near.sum(1)) - sizes / 255) / (
        510 * variance[:, None, None] / 127.5**2
    )
    constant += _left_out(y, near, request.sigma.to(device), c)
    found.m += constant
    found.logits += constant[:, None]
    found.logits[found.places < 0] = NOTHING
    return found.cpu()


@dataclass(frozen=True, eq=False)
class Plan:
    """The windows of all sites, and the patches that they are compared with.

    Attributes:
        classes: A row for every class of sites, int32 (n, 5): values in its window; rows and
            columns of patches in an image; the position of the first patch, and the offset of the
            site's own pixel from a patch's first.
        places: The positions of each site's window values in a picture, int32 (sites, K); K is the
            largest number of them, rounded up to a multiple of `Launch.depth`.
        offsets: The positions of a patch's values in an image, relative to its first, for each
            class, int32 (n, K).
        sites: The sites, class by class.
        counts: The number of sites of each class.
        work: The number of patches of an image that each class is compared with.
    """

    classes: Tensor
    places: Tensor
    offsets: Tensor
    sites: Tensor
    counts: np.ndarray
    work: np.ndarray

    def rows(self, B: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
        """For B pictures: picture and site of each row, and (class, first row, rows) of each block.

        The rows are sorted by class, then by picture. The blocks with most work come first.
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
        """Windows of integer pictures as three signed bytes, lowest first: int8 (3, R, K)."""
        R, K = len(site), self.places.shape[1]
        found = torch.empty(3, R, K, dtype=torch.int8, device=whole.device)
        flat, step = whole.to(torch.int32).flatten(1), max(1, NUMBERS // K)
        for start in range(0, R, step):
            rows = slice(start, start + step)
            found[:, rows] = _digits(flat[picture[rows, None], self.places[site[rows]].long()])
        return found


@functools.lru_cache(maxsize=8)
def _plan(c: Collection, C: int, query: tuple[int, ...], depth: int, device: torch.device) -> Plan:
    H, W = c.image
    kinds = classes(c)
    K = max(of.patches.numbers(C) for of in kinds)
    K = -(-K // depth) * depth
    places = np.zeros((math.prod(c.grid), K), dtype=np.int32)
    offsets = np.zeros((len(kinds), K), dtype=np.int32)
    grid, pixels = np.arange(len(places)).reshape(c.grid), np.arange(math.prod(query))
    rows, members = [], []
    for kind, of in enumerate(kinds):
        (h, w), (n, m) = of.patches.size, of.shape
        k, i, j = (x.ravel() for x in np.indices((C, h, w)))
        sites = grid[of.rows, of.columns].ravel()
        seen = pixels.reshape(query)[of.seen]
        corners = seen[:n, :m].reshape(-1, 1)
        places[sites, : len(k)] = corners + (k * query[0] + i) * query[1] + j
        offsets[kind, : len(k)] = (k * H + i) * W + j
        (top, down), (left, across), (a, b) = of.patches.tops, of.patches.lefts, of.middle
        rows.append((len(k), down, across, top * W + left, a * W + b))
        members.append(sites)
    return Plan(
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.from_numpy(places).to(device),
        torch.from_numpy(offsets).to(device),
        torch.from_numpy(np.concatenate(members)).to(device),
        np.array([len(sites) for sites in members]),
        np.array([of.patches.per_image for of in kinds]),
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


def _read(request: ScanRequest, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The images of the source as signed bytes, in one or several pieces of the corpus.

    Yields a piece, the positions of the source's images in it, and the position of its first image
    in the corpus.
    """
    global _kept
    images, index = request.keys, request.index
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    room = ROOM
    if device.type == "cuda":
        room = min(room, torch.cuda.get_device_properties(device).total_memory // 4)
    if images.nbytes <= room:
        kept = _kept
        if kept is None or kept[0]() is not images or kept[1].device != device:
            kept = _kept = None  # so that two are never in memory
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
    """Folds of all rows, (1, R): the chunks of the source in parallel, then merged."""
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
    """Rearranges a fold of rows (1, ..., R) to pictures and sites (B, ..., *sites)."""
    to = picture * math.prod(c.grid) + site

    def ordered(x: Tensor) -> Tensor:
        flat = torch.empty_like(x[0])
        flat[..., to] = x[0]
        return flat.reshape(*flat.shape[:-1], B, *c.grid).movedim(-3, 0)

    fields = (fold.m, fold.Z, fold.Z2, fold.S, fold.logits, fold.places)
    return Fold(*map(ordered, fields))


@functools.cache
def _program() -> Any:
    """The kernel, which is compiled at its first launch."""
    from scoremachine.engines.triton_programs import fold_rows

    return fold_rows
