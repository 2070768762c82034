"""Flat posteriors: where a multitude of patches matters, some that are drawn stand for all.

`draw` says how lots are drawn, and how much each of its levels leaves to chance: parts of the lots,
taken in turns, tell; and whether that is for the draws of nodes, of leaves or of patches. A small
first round shows how many of each a pixel needs, and a second one draws that many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from scoremachine.core.collection import Class
from scoremachine.core.fold import Fold
from scoremachine.engines.chunks import PARTS, fill
from scoremachine.engines.search.distances import FAR, LEAST, in_vectors
from scoremachine.engines.search.draw import (
    AGAIN,
    BY_LEAF,
    BY_NODE,
    DOUBTFUL,
    LEAVES,
    LEVELS,
    NODES,
    OF_NODE,
    OF_PATCH,
    PATCHES,
    SQUARED,
    STAGES,
    STAND_IN,
    TRULY,
    TURNS,
    Gaussians,
    Known,
    Pixels,
    draw,
    middles,
    moments,
    weigh,
)
from scoremachine.engines.search.floats import LANES, by_fours
from scoremachine.engines.search.index import Index, Source
from scoremachine.engines.search.rounds import Purse
from scoremachine.engines.search.seek import LOG2E
from scoremachine.engines.search.tree import LEAF

NARROWEST, APART = 0.05, 20.0  # a share of the nodes, and nats: see `Nodes.gaussians`
STOOD_IN = 0.1  # about the relative variance of the weight of a node, if its patches' were known
FIRST = np.array([300.0, 600.0, 300.0])  # nodes, leaves and patches of the first round
MANY = 4.0  # times as many where near patches are known
FEWEST = 200.0  # of each in the others
ROUNDS = 6  # after the first
GROWTH = 64.0  # at most, of a number from one round to the next
FEWER = 4.0  # times fewer lots than asked for are drawn, at most, since heavy ones are drawn once
CAUTION = 1.15  # how much smaller an error is aimed at than asked for
COSTS = np.array([150.0, 50.0, 60.0])  # ns of a node, a leaf, a patch
DIFFERENCE = 0.15  # ns for a number of a patch
DEARER = 20.0  # times as unlike, where near patches are known
MISSED = 1e-3  # of the mass: what a patch weighs at most that is not known, if near patches are
KEPT = 0.1  # of the error, for such a patch
UNSURE = 1.0  # nats by which a sum may be wrong whose error is large
UNLIKE = np.array([4.0, 100.0, 6.0])  # levels (see `Round`) at most, for lots not to miss anything
EVEN = 1.1  # levels at most as unlike, for few lots to tell enough
STANDARD_ERRORS = 3.3  # in the bound of an error
ROUNDED = 1e-6  # of a weight, by which the nearest patch may seem not to be the nearest known
FLAT = 8.0  # patches as heavy as the nearest known one, from which on a posterior may be flat


class Nodes(NamedTuple):
    """What is known of the nodes of a tree and of their patches, before anything is asked.

    Attributes:
        known: Of patches and leaves.
        middles: The mean of the pixels that patches answer with, float32 (supers, C, 16).
        mean, variance: Of leading components, float32 (supers, leading, 16).
        others: The mean |.|^2 of all other components, float32 (supers, 16).
        counts: How many patches a node has, copies counted, float32 (supers, 16).
    """

    known: Known
    middles: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    others: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, source: Source, opened: Index, of: Class) -> Nodes:
        """The nodes of an index whose patches answer with the middle of a class."""
        t, C, supers = opened.tree, source.pixels.shape[3], len(opened.tree.widest)
        nodes, leading = len(t.radii), opened.embedding.leading
        values = np.zeros(len(t.ids) * C, np.uint8)
        of_leaves, of_nodes = (
            np.zeros(nodes * (C + 1) * LEAF, np.uint8),
            np.zeros((supers * LANES, C), np.float32),
        )
        fill(middles, (t, source.windows(of.patches, of.middle), values, of_leaves, of_nodes))
        in_sixteens = of_nodes.reshape(supers, LANES, C).transpose(0, 2, 1)
        shape = (supers, t.first, LANES)
        mean, variance = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        codes = np.zeros(nodes * 2 * t.first * LEAF, np.uint8)
        centres = np.zeros(nodes * (t.m - t.first) * LEAF, np.uint8)
        fill(moments, (t, codes, centres, mean, variance))
        others = (mean[:, leading:] ** 2 + variance[:, leading:]).sum(1)  # their norms' squares
        mean, variance = (np.ascontiguousarray(a[:, :leading]) for a in (mean, variance))
        known = Known(values, of_leaves, codes, centres)
        counts = t.node_counts.reshape(supers, LANES)
        return cls(known, np.ascontiguousarray(in_sixteens), mean, variance, others, counts)

    def gaussians(self, variance: float) -> Gaussians | None:
        """What stands in for the nodes where noise has a variance.

        None where nothing can: where there is so little noise that even in the narrowest nodes one
        patch weighs `APART` nats more than the others.
        """
        noise = np.float32(max(variance, LEAST))
        wider = noise + self.variance
        bits, none = np.log2(wider / noise).sum(1) / 2, self.counts == 0
        if np.quantile(bits[~none], NARROWEST) / LOG2E > APART:
            return None
        with np.errstate(divide="ignore"):
            plus = np.log2(self.counts) - bits
        plus[none] = -FAR
        x = np.minimum(self.others / noise, DOUBTFUL)
        doubt = np.sqrt(np.minimum(x + x * x / 2, DOUBTFUL) + STOOD_IN)
        parts = self.mean, LOG2E / 2 / wider, plus, doubt, self.middles
        return Gaussians(*(a.astype(np.float32, copy=False).reshape(-1) for a in parts))


class Asked(NamedTuple):
    """What is asked of those who draw.

    Attributes:
        windows: The queries, less the mean of the patches, float64 (Q, D).
        half: 1 / (2 sigma^2).
        best: |q - s|^2 of the nearest patch known, float64 (Q).
        source, opened, of: The images, their index, and the class of windows.
        known: What is known of the patches of the index.
        gaussians: What stands in for its nodes.
    """

    windows: np.ndarray
    half: float
    best: np.ndarray
    source: Source
    opened: Index
    of: Class
    known: Known
    gaussians: Gaussians


class Near(NamedTuple):
    """All patches of some queries up to some distance: they need no lots.

    Attributes:
        reach: |q - s|^2 of the furthest, float64 (Q).
        Z, Z2, S: Their fold in units of the weight of the nearest patch known, float64 (Q), (Q) and
            (Q, C).
    """

    reach: np.ndarray
    Z: np.ndarray
    Z2: np.ndarray
    S: np.ndarray

    @classmethod
    def of(cls, fold: Fold, asked: Asked, nats: np.ndarray) -> Near:
        """From the fold of what weighs at least e^-nats as much as the nearest patch known."""
        m, Z, Z2, S = (a.numpy() for a in (fold.m, fold.Z, fold.Z2, fold.S))
        reach = asked.best + nats / asked.half
        with np.errstate(over="ignore", invalid="ignore"):  # then nothing is told
            scale = np.exp(m + asked.best * asked.half)
            scale[scale < 1 - ROUNDED] = np.nan  # nor where the nearest known has been missed
            return cls(reach, Z * scale, Z2 * scale**2, S * scale[:, None])


class Drawn(NamedTuple):
    """The fold of some queries, from what was drawn.

    Attributes:
        Z, Z2, S: As in a fold, (Q), (Q) and (Q, C), in units of the weight of the nearest patch
            known.
        error: A bound of the error of every channel of S / Z, of `STANDARD_ERRORS`, and what is
            kept for a patch not known where near ones are; infinite where too little was drawn.
        least: What log Z may be, better too small, (Q); -inf where nobody knows.
    """

    Z: np.ndarray
    Z2: np.ndarray
    S: np.ndarray
    error: np.ndarray
    least: np.ndarray


def drawn(asked: Asked, error: float, purse: Purse, near: Near | None = None) -> Drawn:
    """Draws until errors are at most `error`.

    Arguments:
        asked: Queries and patches.
        error: The largest error of a pixel.
        purse: What it may cost, and is taken from it; the dearest are given up if all cost more.
        near: The near patches, if they are known: lots are drawn for the others, for all pixels.
            Otherwise for those pixels alone for which at least `FLAT` patches as heavy as the
            nearest known one seem to matter.
    """
    pixels = _pixels(asked, near)
    prices = COSTS + np.array([0, 0, DIFFERENCE * asked.windows.shape[1]])
    # how many patches as heavy as the nearest known one make up the sum: by all stand-ins
    unit = _unit(asked, pixels)
    many = unit + np.log(pixels.total[:, 0])
    flat, unlike, kept = np.isfinite(many), UNLIKE, 0.0
    if near is not None:
        pixels.amounts[:] *= MANY
        unlike, kept = UNLIKE * DEARER, KEPT * error
    else:
        flat &= many > math.log(FLAT)
    rounds = [_round(asked, pixels, np.flatnonzero(flat))]
    purse.left -= 1e-9 * float(np.nansum(rounds[0].spent, 0) @ prices)
    wanted, enough = (error / STANDARD_ERRORS / CAUTION) ** 2, error - kept
    answer, variance = _together(rounds)
    for _ in range(ROUNDS):
        before = rounds[-1]
        flat &= (before.unlike <= unlike).all(1)
        few = _few(rounds)
        again = np.flatnonzero(flat & (few | ~(answer.error <= enough)))
        root = np.sqrt(before.variances[again] * before.amounts[again])
        with np.errstate(divide="ignore", invalid="ignore"):
            missing = 1 / (1 / wanted - 1 / variance[again])
            amounts = root / np.sqrt(prices) * (root @ np.sqrt(prices) / missing)[:, None]
            growth = amounts / before.amounts[again]
            at_least = FIRST / np.maximum(before.spent[again], 1)
            growth = np.where(few[again, None], np.fmax(growth, at_least), growth)
        known = np.isfinite(growth).all(1)
        again, growth = again[known], growth[known]
        cost = 1e-9 * (np.maximum(growth, 1) * before.spent[again]) @ prices
        order = np.argsort(cost, kind="stable")  # the dearest are given up
        some = np.sort(order[np.cumsum(cost[order]) <= FEWER * purse.left])
        if not len(some):
            break
        again, growth = again[some], np.minimum(growth[some], GROWTH)
        pixels.amounts[again] = np.maximum(growth * before.amounts[again], FEWEST)
        pixels.start[again] = (pixels.start[again] + math.sqrt(0.5)) % 1
        rounds.append(_round(asked, pixels, again, before))
        purse.left -= 1e-9 * float((rounds[-1].spent[again] @ prices).sum())
        answer, variance = _together(rounds)
    with np.errstate(all="ignore"):  # then nothing is told
        scale = np.exp(unit)
        Z, Z2, S = answer.Z * scale, answer.Z2 * scale**2, answer.S * scale[:, None]
        if near is None:
            # so many must matter by what was drawn, too, or else something has been missed; and
            # more than there are do not: the nearest is not known, or what stands in is far off;
            # and if all squares together are less than that of the nearest known, that was missed
            seen = (Z > FLAT) & (Z**2 > FLAT * Z2) & (many < math.log(asked.opened.total))
            seen &= Z2 >= 1
        else:  # or nothing that has been missed weighs much
            Z2 = Z2 + near.Z2
            seen = (asked.best - near.reach) * asked.half <= np.log(MISSED * Z)
    seen &= np.isfinite(Z) & (rounds[-1].unlike <= unlike).all(1) & ~_few(rounds)
    told = np.where(seen, answer.error + kept, np.inf)
    return Drawn(Z, Z2, S, told, answer.least + unit)


class Round(NamedTuple):
    """What was drawn at once.

    Attributes:
        Z, Z2, S: Of a fold, (Q), (Q) and (Q, C); not a number where nothing was drawn.
        variance: Of S / Z, the largest of its channels, (Q).
        variances: By nodes, leaves and patches, in the last round of a pixel, (Q, 3).
        unlike: How unlike neighbouring levels are there: 1 and the squared coefficient of variation
            of the ratio of weights, in the worst round of a pixel, (Q, 3).
        amounts, spent: How many should be drawn in that round and how many were, (Q, 3).
    """

    Z: np.ndarray
    Z2: np.ndarray
    S: np.ndarray
    variance: np.ndarray
    variances: np.ndarray
    unlike: np.ndarray
    amounts: np.ndarray
    spent: np.ndarray


def _few(rounds: list[Round]) -> np.ndarray:
    """Where so few lots were drawn that nobody knows how much was left to chance."""
    spent = sum(np.nan_to_num(r.spent) * np.isfinite(r.variance)[:, None] for r in rounds)
    last = rounds[-1]
    enough = FIRST / np.where(last.unlike <= EVEN, 10, 2)  # none is much heavier than the others
    return ((spent < enough) & (last.variances > 0)).any(1)


def _together(rounds: list[Round]) -> tuple[Drawn, np.ndarray]:
    """The mean of several rounds, and the variance of its S / Z.

    A round weighs what it was meant to weigh, not what it seems to: estimates are best where they
    are too small.
    """
    last = rounds[-1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shares = np.stack(
            [1 / (last.variances * last.amounts / r.amounts).sum(1) * np.isfinite(r.variance)
             for r in rounds]
        )  # fmt: skip
        shares = np.nan_to_num(shares)
        shares /= shares.sum(0)

        def mean(name: str) -> np.ndarray:
            fields = np.stack([getattr(r, name) for r in rounds])
            by = shares if fields.ndim == 2 else shares[..., None]
            return np.where(by > 0, by * fields, 0).sum(0)

        Z, S = mean("Z"), mean("S")
        variances = np.stack([r.variance for r in rounds])
        variance = np.where(shares > 0, shares**2 * variances, 0).sum(0)
        told = np.isfinite(shares).all(0) & (Z > 0)
        S = np.clip(S, -Z[:, None], Z[:, None])  # values are in [-1, 1]
        variance = np.where(told, variance, np.inf)
        error = STANDARD_ERRORS * np.sqrt(variance)
        least = np.where(error < 1, np.log(Z) - UNSURE, -np.inf)
    return Drawn(Z, mean("Z2"), S, error, least), variance


def _pixels(asked: Asked, near: Near | None = None) -> Pixels:
    """What lots are drawn for, at first."""
    e, (Q, D) = asked.opened.embedding, asked.windows.shape
    numbers, squares = e(asked.windows)
    numbers[:, e.leading : e.first] = 0
    lead, others = ((numbers[:, some].astype(np.float64) ** 2).sum(1) for some in (
        slice(e.first), slice(e.first, None)
    ))  # fmt: skip
    E = in_vectors(numbers, e.first)
    h = asked.of.patches.size[0]
    filled = -(-(D // h) // LANES) * LANES
    y = np.zeros((Q, h, filled), np.float32)
    y[..., : D // h] = ((asked.windows + e.mean + 1) * 127.5).reshape(Q, h, D // h)
    mask = (np.arange(filled) < D // h).astype(np.float32)
    top, total = np.zeros(Q, np.float32), np.zeros((Q, 1 + asked.source.pixels.shape[3]))
    answer, scale = np.zeros((Q, total.shape[1] - 1), np.float32), np.zeros(Q)
    shares = np.zeros((Q, len(asked.opened.tree.widest)), np.float32)
    rest = squares - lead
    cut = np.full(Q, FAR, np.float32)
    if near is not None:
        cut[:] = LOG2E * asked.half * (rest - near.reach)
    fill(weigh, (asked.gaussians, E.reshape(-1), e.leading, cut, top, total, answer, shares, scale))
    start = np.arange(1, Q + 1) * (math.sqrt(5) - 1) / 2 % 1
    amounts = np.tile(FIRST, (Q, 1))
    p = Pixels(
        E.reshape(-1), e.leading, e.kept - e.leading, others, rest, y.reshape(-1), mask,
        asked.half, top, total, answer, shares, scale, amounts, start, cut, np.zeros_like(total),
    )  # fmt: skip
    if near is not None:
        with np.errstate(over="ignore", invalid="ignore"):  # then nothing is told
            p.near[:] = np.column_stack([near.Z, near.S]) * np.exp(-_unit(asked, p))[:, None]
    return p


def _unit(asked: Asked, p: Pixels) -> np.ndarray:
    """log of the weight that sums have as a unit, in units of that of the nearest patch known."""
    return p.top / LOG2E + (asked.best - p.rest) * asked.half


def _some(p: Pixels, at: np.ndarray) -> Pixels:
    """The pixels `at`."""
    Q = len(p.top)
    flat = {name: getattr(p, name).reshape(Q, -1)[at].reshape(-1) for name in ("E", "y")}
    rows = (
        "others", "rest", "top", "total", "answer", "shares", "scale", "amounts", "start", "cut",
        "near",
    )  # fmt: skip
    return p._replace(**flat, **{name: getattr(p, name)[at] for name in rows})


def _round(asked: Asked, pixels: Pixels, at: np.ndarray, before: Round | None = None) -> Round:
    """What is drawn for the pixels `at`; others keep the variances of the round before."""
    Q, K = pixels.total.shape
    if before is None:
        unknown = np.full((Q, 3), np.nan)
        before = Round(*(unknown[:, 0],) * 4, *(unknown,) * 4)
    Z, Z2, variance, S = *(np.full(Q, np.nan) for _ in range(3)), np.full((Q, K - 1), np.nan)
    variances, unlike, amounts, spent = (
        a.copy() for a in (before.variances, before.unlike, before.amounts, before.spent)
    )
    if len(at):
        p = _some(pixels, at)
        Z[at], Z2[at], S[at], variance[at], variances[at], more, spent[at] = _lots(asked, p)
        unlike[at] = np.fmax(unlike[at], more)
        amounts[at] = p.amounts
    return Round(Z, Z2, S, variance, variances, unlike, amounts, spent)


def _lots(asked: Asked, p: Pixels) -> tuple[np.ndarray, ...]:
    """Z, Z2, S, the variance of S / Z, what draws of nodes, leaves and patches add to it, how
    unlike levels are, and how many lots that took."""
    t, w = asked.opened.tree, asked.source.windows(asked.of.patches, asked.of.middle)
    Q, K = p.total.shape
    parts = min(PARTS // 2, len(t.widest))
    padded = by_fours(K)
    sums = np.zeros((parts, (TURNS + 1) * Q * LEVELS * padded))
    spread, spent = np.zeros((parts, Q, 3)), np.zeros((parts, Q, 3))
    chance = np.zeros((parts, Q, STAGES))
    fill(draw, (t, w, asked.gaussians, p, asked.known), (sums, spread, spent, chance))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # then nothing is told
        by_turns = sums.sum(0).reshape(TURNS + 1, Q, LEVELS, padded)[..., :K]
        everything, by_turns = by_turns.sum(0), by_turns[:TURNS]

        def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.where(b > 0, a / b, 1.0)[:, None]

        # each level in the units of the last
        weight = everything[..., 0]
        of_codes = weight[:, PATCHES] - everything[:, SQUARED, 1]  # known ones do not count
        b2 = ratio(weight[:, TRULY], of_codes)
        b1 = b2 * ratio(weight[:, AGAIN], weight[:, LEAVES])
        b0 = b1 * ratio(weight[:, NODES], weight[:, STAND_IN])

        def differences(a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """By which each level changes the one before."""
            return (
                b1 * a[..., NODES, :] - b0 * a[..., STAND_IN, :],
                b2 * a[..., AGAIN, :] - b1 * a[..., LEAVES, :],
                a[..., TRULY, :] - b2 * a[..., PATCHES, :],
            )

        T = p.near + b0 * p.total + sum(differences(everything))
        Z, S = T[:, 0], T[:, 1:]
        D = S / Z[:, None]
        moved = [(d[..., 1:] - d[..., :1] * D) / Z[:, None] for d in differences(by_turns)]
        moved.append(sum(moved[1:], start=moved[0]))
        # how unequal neighbouring levels are: 1 + the squared coefficient of variation of v / u
        before, after = weight[:, STAND_IN:SQUARED:2].copy(), weight[:, NODES:SQUARED:2]
        before[:, 2] = of_codes
        unlike = spread.sum(0) * before / after**2
        unlike[after == 0] = np.inf  # nothing was met
        unlike[(before == 0) & (after == 0)] = 1.0  # a level that is not there
        squares = [np.square(o - o.mean(0)).sum(0).max(1) for o in moved]
        *by_level, variance = np.stack(squares) * TURNS / (TURNS - 1)
        by_stage = _by_stage(by_level, chance.sum(0))
    return Z, weight[:, SQUARED], S, variance, by_stage, unlike, spent.sum(0)


def _by_stage(by_level: list[np.ndarray], chance: np.ndarray) -> np.ndarray:
    """What draws of nodes, leaves and patches add to a variance, (Q, 3), from what levels add.

    Where a leaf stands for many and all its patches are compared, what they change is left to
    chance by drawing the leaf, not by drawing them.
    """
    V = np.zeros((len(chance), 3))
    V[:, 0] = by_level[0]
    for level, (lo, hi) in enumerate(((BY_NODE, BY_LEAF), (OF_NODE, OF_PATCH)), 1):
        shares = chance[:, lo : hi + 1]
        total = shares.sum(1, keepdims=True)
        own = np.arange(hi + 1 - lo) == level
        V[:, : hi + 1 - lo] += by_level[level][:, None] * np.where(total > 0, shares / total, own)
    return V
