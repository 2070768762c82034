"""A search of one class of windows: rounds of seeking, until nothing more can be missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Class
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest
from scoremachine.engines import simd
from scoremachine.engines.chunks import PARTS, fill
from scoremachine.engines.compiled import NOTHING
from scoremachine.engines.search.distances import Queries, in_vectors
from scoremachine.engines.search.embedding import ROUNDING
from scoremachine.engines.search.floats import LANES, MOST, WHOLE, halves
from scoremachine.engines.search.guess import beside, guess
from scoremachine.engines.search.index import Index
from scoremachine.engines.search.patches import Windows
from scoremachine.engines.search.seek import COSTS, seek

BOXES, PATCHES = 23.0, 19.0  # nats below the nearest known patch at which the first round skips
PASSES = 2  # from windows to those beside them
DEVIATIONS = 0.75  # of the noise, that a statistical bound allows for in a group of components
FOR_A_PART = 0.125  # of what a query may cost, while nobody knows what all will
SURVEYED = 2  # parts of a search that are done first, to see what all will cost
DIFFERENCE = 0.35  # ns of one core for a number of a patch that is compared
WORTHWHILE = 200  # numbers of a patch from which on bytes are compared before


Reach = tuple[np.ndarray, np.ndarray]


@dataclass
class Purse:
    """What the search for a picture may cost.

    Attributes:
        left: Seconds of one core that are left; below 0 where more was spent.
        lots: Whether lots may do for some pixels, by what they did for those before.
    """

    left: float
    lots: bool = True


def guessed(q: Queries, opened: Index, w: Windows, of: Class) -> tuple[np.ndarray, np.ndarray]:
    """What is known of the queries of a class before they are searched for.

    Returns:
        |q - s|^2 of the nearest patch that is easily found, float64 (Q,), and a guess at log Z,
        mostly too small, in units of its weight, (Q,).
    """
    Q = len(q.half)
    best, known, places = np.zeros(Q), np.zeros(Q), np.zeros(Q, np.int64)
    fill(guess, (opened.tree, w, q, best, known, places))
    for _ in range(PASSES):
        nearer, there = best.copy(), places.copy()
        fill(beside, (w, q, of.shape[1], best, places, nearer, there))
        weight = 1 + known * np.exp((nearer - best) * q.half)  # a new nearest one, and those known
        known = np.where(nearer < best, weight, known)
        best, places = nearer, there
    return best, np.log(known)


def sought(
    q: Queries,
    opened: Index,
    w: Windows,
    at: np.ndarray,
    found: Fold,
    best: np.ndarray,
    least: np.ndarray,
    error: float,
    purse: Purse,
    apiece: float = math.inf,
    part: float = 1.0,
) -> np.ndarray:
    """Searches for the queries `at`.

    Arguments:
        found: Their fold, filled in here.
        best: |q - s|^2 of the nearest patch known, improved here, float64 (Q,).
        least: A guess at log Z, better too small, in units of the weight of that patch, (Q,).
        error: The largest error of a pixel.
        purse: What all may cost, and is taken from it.
        apiece: Seconds that a query may take; those that would take longer are left out.
        part: Of what is left in the purse, that may be spent.

    Returns:
        Whose bounds hold now, bool (Q,).
    """
    t, leaders = opened.tree, found.logits.shape[1]
    Q, C = found.S.shape
    Z, left_out = found.Z.numpy(), found.omitted.numpy()
    share = error / 2  # of the mass, that may be left out
    T = math.log(opened.total / share) + 0.1  # with which no more can be left out
    pace, count = _pace(opened), _count(opened)
    some = min(SURVEYED, count)
    left = 1e9 * part * purse.left  # nanoseconds
    done = np.zeros(Q, bool)

    def seen(
        parts: tuple[np.ndarray, ...], of: slice, asked: np.ndarray, reach: Reach, most: float
    ) -> bool:
        """Does some parts, of queries that cost at most `most` in each; returns whether all."""
        nonlocal left
        filled = tuple(a[of] for a in parts)
        at = asked.astype(np.uint32)
        fill(seek, (of.start, count, t, w, q, at, *reach, pace, 3 * left / count, most), filled)
        spent = float(filled[-2].sum())
        left -= spent
        purse.left -= 1e-9 * spent
        return bool(filled[-1].all())

    def search(asked: np.ndarray, boxes: np.ndarray, patches: np.ndarray) -> None:
        """Fills `found` at `asked`: at those that are not too dear, and if all are not together."""
        nonlocal left
        done[asked] = False
        reach = boxes / q.half, patches / q.half  # squared distances
        most = 1e9 * apiece  # nanoseconds
        while len(asked) and left > 0:
            parts = _parts(count, best, Q, C, leaders)
            cost = parts[-2]
            whole = seen(parts, slice(0, some), asked, reach, most * FOR_A_PART)
            cheap = cost[:, asked].sum(0) * (count / some) <= most
            cheap &= (cost[:, asked] <= most * FOR_A_PART).all(0)
            asked = asked[cheap]
            if not whole and cheap.all():
                left = 0.0
            if whole:
                missing = float(cost[:, asked].sum()) * (count / some - 1)
                if missing > left:
                    left = 0.0
                elif some == count or seen(parts, slice(some, count), asked, reach, most):
                    asked = asked[(cost[:, asked] <= most).all(0)]
                    _merge(parts, q.half, asked, found, best)
                    done[asked] = True
                else:
                    left = 0.0
                return

    patches = np.maximum(min(T, PATCHES) - least, 1)  # whatever is guessed
    search(at, np.maximum(min(T, BOXES) - least, 1), patches)
    at = at[done[at]]
    again = at[(~(left_out <= share * Z) & (Z > 0))[at]]
    if len(again) and left > 0:
        patches[again] = T - np.log(Z[again])
        search(again, patches, patches)
    across = (q.fuzz / ROUNDING) ** 2 * q.half  # nats: more than any patch is away
    while True:  # what may be missing yet is looked for further away
        m = found.m.numpy()
        sure = m >= -best * q.half * (1 + 1e-12)  # the nearest known is in
        if leaders:
            sure &= found.logits.numpy()[:, -1] >= m - patches
        again = at[(done & ~sure & (patches <= across))[at]]
        if not len(again) or left <= 0:
            break
        patches[again] *= 4
        search(again, patches, patches)
    done &= (left_out <= share * Z) & (sure | (patches > across))
    return done


def nearby(
    q: Queries,
    opened: Index,
    w: Windows,
    at: np.ndarray,
    best: np.ndarray,
    nats: np.ndarray,
    purse: Purse,
) -> Fold | None:
    """The patches that weigh at least e^-nats as much as the nearest one known, and no others.

    Arguments:
        at: For which queries.
        best: |q - s|^2 of the nearest patch known, float64 (Q,).
        purse: What it may cost, and is taken from it.

    Returns:
        Their fold, of the queries `at`, (Q,); None if it costs more.
    """
    Q, C, count = len(q.half), w.shape[2], _count(opened)
    parts = _parts(count, best, Q, C, 0)
    reach, left = nats / q.half, 1e9 * purse.left  # nanoseconds
    asked = q._replace(fixed=True), at.astype(np.uint32)
    within = reach, reach, _pace(opened), 3 * left / count, math.inf
    fill(seek, (0, count, opened.tree, w, *asked, *within), parts)
    spent = float(parts[-2].sum())
    purse.left -= 1e-9 * spent
    if spent > left or not parts[-1].all():
        return None
    found = blank(Q, C, 0, ())
    _merge(parts, q.half, at, found, best)
    return found


def _pace(opened: Index) -> np.ndarray:
    """What `seek` takes for a node, a leaf, a second look and a comparison, ns."""
    return COSTS + np.array([0, 0, 0, DIFFERENCE * len(opened.embedding.mean)])


def _count(opened: Index) -> int:
    """In how many parts an index is searched."""
    return min(PARTS, -(-len(opened.tree.widest) // LANES))


def blank(B: int, C: int, leaders: int, sites: tuple[int, ...]) -> Fold:
    """The fold of nothing, to be filled in or merged into."""

    def full(value: float, *k: int) -> Tensor:
        return torch.full((B, *k, *sites), value, dtype=torch.float64)

    m, zero, places = full(NOTHING), full(0.0), full(-1.0, leaders).long()
    return Fold(m, zero, zero.clone(), full(0.0, C), full(NOTHING, leaders), places, zero.clone())


def queries(
    request: ScanRequest, opened: Index, of: Class, kind: str
) -> tuple[Queries, np.ndarray]:
    """The windows of a picture at the sites of a class; and less the mean, float64 (Q, D)."""
    (h, w), y = of.patches.size, request.y[0].numpy()
    C = len(y)
    y = y[:, of.seen[0], of.seen[1]].transpose(1, 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view(y, (h, w), (0, 1)).transpose(0, 1, 3, 4, 2)
    windows = windows.reshape(-1, h, w * C)
    row = -(-w * C // simd.LANES) * simd.LANES
    filled = np.zeros((len(windows), h, row))
    filled[..., : w * C] = windows
    mask = (np.arange(row) < w * C).astype(np.float64)
    centred = np.ascontiguousarray(windows.reshape(len(windows), -1) - opened.embedding.mean)
    half = np.full(len(windows), float(1 / (2 * request.sigma[0] ** 2)))
    e = opened.embedding
    E, squares = e(centred)
    fuzz = (ROUNDING * (np.sqrt(squares) + opened.furthest) + 1e-9).astype(np.float32)
    tails = np.zeros((len(windows), 2), np.float32)
    if kind == "statistical":
        # What a patch may have in common with the query in a group of components that are not
        # looked at: not all of |q_g|, but the content that q_g seems to have besides noise, and
        # c standard deviations of the noise.
        sizes = np.zeros(e.first - e.leading)  # of what is filled up: nothing
        sizes[: len(e.edges) - 1] = np.diff(e.edges)
        if e.kept > e.leading:
            sizes[-1] = e.kept - e.leading
        own = E[:, e.leading : e.first].astype(np.float64)
        sigma = float(request.sigma[0])
        content = np.sqrt(np.maximum(own**2 - sigma**2 * sizes, 0))
        common = np.minimum(own, content + DEVIATIONS * sigma)
        E[:, e.leading : e.first] = common
        rest = (own**2 - common**2) * (1 - ROUNDING)
        tails[:, 0], tails[:, 1] = rest.sum(1), rest[:, : len(e.edges) - 1].sum(1)
    E = in_vectors(E, e.first).reshape(-1)
    whole, inside, unit, known = _in_bytes(windows)
    q = Queries(
        E, filled.reshape(-1), mask, half, fuzz, tails, whole, inside, unit, known, False
    )  # fmt: skip
    return q, centred


def _in_bytes(windows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Windows (Q, h, row) as whole multiples of a unit: see `Queries`."""
    Q, h, row = windows.shape
    wide = -(-row // 64) * 64
    inside = (255 * (np.arange(wide) < row)).astype(np.uint8)
    if not WORTHWHILE <= h * row < MOST:
        return np.zeros(0, np.int8), inside, np.zeros(0), np.zeros(0)
    factors = windows + (1 - 64 / 127.5)
    unit = np.abs(factors).max((1, 2)) / WHOLE + 1e-30
    n = np.rint(factors / unit[:, None, None])
    off = np.maximum(factors - n * unit[:, None, None], 0).sum((1, 2))
    bytes_ = np.zeros((Q, h, 2, wide), np.int8)
    bytes_[..., :row] = np.stack(halves(n), 2)
    known = ((windows + 1) ** 2).sum((1, 2)) - 2 / 127.5 * 255 * off
    known -= 1e-12 * (np.abs(known) + h * row)
    return bytes_.reshape(-1), inside, unit, known


def _parts(count: int, best: np.ndarray, Q: int, C: int, leaders: int) -> tuple[np.ndarray, ...]:
    """What the parts of a search fill; see `seek`."""
    return (
        np.repeat(best[None], count, 0),
        np.repeat(best[None], count, 0),
        np.zeros((count, Q * LANES), np.float32),
        np.full((count, Q), NOTHING),
        np.zeros((count, Q)),
        np.zeros((count, Q)),
        np.zeros((count, Q, C)),
        np.full((count, leaders, Q, 1), NOTHING),
        np.full((count, leaders, Q, 1), -1),
        np.zeros((count, Q)),
        np.zeros((count, 1), np.int64),
    )


def _merge(
    parts: tuple[np.ndarray, ...],
    half: np.ndarray,
    asked: np.ndarray,
    found: Fold,
    best: np.ndarray,
) -> None:
    """Merges what the parts of a search found for the queries `asked`."""
    count = len(parts[0])
    near, ref, left, *totals = (
        a[:, asked] for a in (*parts[:2], parts[2].reshape(count, -1, LANES), *parts[3:7])
    )
    logits, places = (np.moveaxis(a[..., 0], 1, 2)[:, asked] for a in parts[7:9])
    best[asked] = near.min(0)
    fold = Fold.of_parts(*totals, logits, places)
    for have, new in zip(vars(found).values(), vars(fold).values(), strict=True):
        have[asked] = new
    with np.errstate(over="ignore"):
        scale = np.exp(-ref * half[asked] - fold.m.numpy())
    # a thousandth more than the weights of what is skipped: they are sums in float32
    found.omitted[asked] = torch.from_numpy(1.001 * (left.astype(np.float64).sum(2) * scale).sum(0))
