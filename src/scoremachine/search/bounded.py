"""The fold over every patch of every image, by search: a kernel that says what it leaves out."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoremachine.corpus import Corpus
from scoremachine.kept import Kept
from scoremachine.kernels import simd
from scoremachine.kernels.parts import PARTS, fill
from scoremachine.kernels.whole import NOTHING
from scoremachine.posterior import Fold, Kernel, Question, folded, spread
from scoremachine.progress import Bar, say
from scoremachine.search.embedding import ROUNDING
from scoremachine.search.floats import LANES
from scoremachine.search.index import (
    DETERMINISTIC,
    Class,
    Index,
    Patches,
    Source,
    build_all,
    classes,
    estimate,
    indexed,
)
from scoremachine.search.sampled import FLAT, Asked, sampled
from scoremachine.search.seek import COSTS, Queries, guess, seek
from scoremachine.windows import Box, Collection, Variant

ERROR = 1e-3  # the largest error of a pixel, unless another is asked for
BOXES, PATCHES = 22.0, 18.0  # nats below the nearest known patch at which the first round skips
LEVEL = 0.01  # how often, at most, an error is larger than a statistical bound tells
KINDS = ("auto", "deterministic", "statistical")
DEVIATIONS = 0.5  # of the noise, that a statistical bound allows for in a group of components
SURVEYED = 2  # parts of a search that are done first, to see what all will cost
LOGIT = 1.3  # ns of one core that the exact scan needs for a source under a pixel of an overlap
DIFFERENCE = 0.35  # ns of one core for a number of a patch that is compared


def exact_cost(collection: Collection, n: int) -> float:
    """About how many seconds of one core the exact scan of n images needs for a picture."""
    area = 1.0
    for side, p in zip(collection.image, collection.window.shape, strict=True):
        reach = max(side - p, 0)
        area *= side * (2 * reach + 1) - reach * (reach + 1)
    return 1e-9 * LOGIT * n * area


def searchable(collection: Collection) -> bool:
    """Whether there are indexes for a collection."""
    return (
        collection.source == "every"
        and collection.response == "pixel"
        and isinstance(collection.window, Box)
        and collection.variants == (Variant(),)
    )


class Bounded:
    """A kernel (`posterior.Kernel`) that looks most patches up in indexes instead of at them all.

    What is left out of a pixel's posterior has a mass of at most error / 2, so that no channel of D
    is further than `error` from the exact one. The bound of that mass is one of two kinds:

    - deterministic: true of every picture, whatever its noise.
    - statistical: for pictures with noise that is independent of the images, not true of at most
      one pixel in 1 / `LEVEL` (measured: docs/search.md). Where very many patches matter, a sample
      of them is looked at, and the bound is four standard errors of its mean.

    Where a search would cost more than the exact scan, the picture is compared with everything.

    Arguments:
        corpus: The images.
        exact: The kernel for everything else: corners, derivatives, flat posteriors.
        error: The largest error of a pixel, > 0, in units of x.
        bound: The kind: "deterministic", "statistical", or "auto": deterministic for patches of
            up to `DETERMINISTIC` numbers.
        patience: How many times the cost of the exact scan a search may take.
    """

    def __init__(
        self,
        corpus: Corpus,
        exact: Kernel,
        error: float = ERROR,
        bound: str = "auto",
        patience: float = 1.0,
    ) -> None:
        self.corpus, self.exact, self.error = corpus, exact, error
        self.bound, self.patience = bound, patience
        self._sources: Kept[Source] = Kept(2)
        self._indexes: dict[tuple[str, str], Index] = {}
        self._told: set[float] = set()

    def tiles(self, n: int, collection: Collection) -> Iterator[slice]:
        """The source whole."""
        yield slice(0, n)

    def kind(self, collection: Collection) -> str:
        """Which kind of bound the search of a collection has."""
        if self.bound != "auto":
            return self.bound
        D = math.prod(collection.window.shape) * self.corpus.shape[0]
        return "deterministic" if D <= DETERMINISTIC else "statistical"

    def source(self, index: np.ndarray) -> Source:
        """The images at `index`, laid out for searching."""
        return self._sources.get(index.tobytes(), lambda: Source.of(self.corpus, index))

    def missing(self, index: np.ndarray, collection: Collection) -> list[Patches]:
        """The patches of a collection that have no index yet; opens those that have one."""
        source = self.source(index)
        needed = dict.fromkeys(c.patches for c in indexed(collection))
        return [p for p in needed if self._opened(source, p) is None]

    def check_room(self, index: np.ndarray, collection: Collection) -> tuple[list[Patches], float]:
        """The patches that have no index yet, and the bytes that their indexes will need.

        Raises:
            OSError: If the disk has less.
            ValueError: For more patches than an index can number.
        """
        missing = self.missing(index, collection)
        source, C = self.source(index), self.corpus.shape[0]
        for p in missing:
            p.check(len(index))
        room = sum(estimate(p, len(index), C)[0] for p in missing)
        if missing and room + 2**28 > (free := shutil.disk_usage(source.folder).free):
            P, Q = collection.window.shape
            raise OSError(
                f"an index of the {P} x {Q} patches of {len(index):,} images needs about "
                f"{room / 1e9:.1f} GB, and {source.folder} has {free / 1e9:.1f} GB left: make "
                "room, set SCOREMACHINE_CACHE to another disk, or use search='exact'"
            )
        return missing, room

    def prepare(self, index: np.ndarray, collection: Collection) -> list[Path]:
        """Builds the indexes of a collection that are missing; returns the folders of all.

        Raises:
            OSError, ValueError: See `check_room`.
        """
        missing, room = self.check_room(index, collection)
        source, (P, Q) = self.source(index), collection.window.shape
        seconds = sum(estimate(p, len(index), self.corpus.shape[0])[1] for p in missing)
        if seconds > 2:
            say(
                f"building an index of the {P} x {Q} patches of {len(index):,} images, once: "
                f"about {_duration(seconds)} and {room / 1e9:.1f} GB in {source.folder}"
            )
        build_all(source, missing)
        return [source.folder / each.patches.name for each in indexed(collection)]

    def _opened(self, source: Source, patches: Patches) -> Index | None:
        known = self._indexes.get((source.key, patches.name))
        if known is not None:
            return known
        folder = source.folder / patches.name
        try:
            opened = Index.open(folder, source.identity(patches))
        except FileNotFoundError:
            return None
        except ValueError as error:
            warnings.warn(f"{error}: it will be built again", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self._indexes[source.key, patches.name] = opened
        return opened

    def fold(self, question: Question, leaders: int, known: Fold | None) -> Fold:
        """The fold over the source; see `scoremachine.posterior.Kernel`."""
        if question.u is not None:
            return self._all(question, leaders)
        self.prepare(question.index, question.collection)
        B = len(question.y)
        pictures = [
            replace(
                question,
                y=question.y[b : b + 1],
                sigma=question.sigma[b : b + 1],
                T=question.T[b : b + 1],
            )
            for b in range(B)
        ]
        return Fold.batch(self._picture(picture, leaders) for picture in pictures)

    def spread(self, question: Question, known: Fold) -> Tensor:
        """sum_is q_i a_is s, by the exact kernel; see `scoremachine.posterior.Kernel`."""
        return spread(self.exact, question, known, Bar("Comparing", None))

    def _all(self, question: Question, leaders: int) -> Fold:
        return folded(self.exact, question, leaders, Bar("Comparing", None))

    def _picture(self, question: Question, leaders: int) -> Fold:
        """The fold of one picture."""
        c, source = question.collection, self.source(question.index)
        budget = self.patience * exact_cost(c, len(question.index))
        searched = indexed(c)
        found: list[tuple[Class, Fold]] = []
        for each in sorted(searched, key=lambda c: -c.patches.per_image):  # the dearest first
            opened = self._opened(source, each.patches)
            assert opened is not None
            result = self._search(question, source, opened, each, leaders, budget)
            if result is None:
                self._tell(question)
                return self._all(question, leaders)
            found.append((each, result))
        if len(searched) < len(classes(c)):
            fold = self._all(replace(question, collection=replace(c, source="same")), leaders)
        else:
            fold = _blank(1, question.y.shape[1], leaders, c.grid)
        half = float(1 / (2 * question.sigma[0] ** 2))
        energy = c.look((question.y**2).sum(1)) * half  # which the logits of a fold lack
        for each, result in found:
            _enter(fold, each, result, energy, question, source)
        return fold

    def _tell(self, question: Question) -> None:
        sigma = round(float(question.sigma[0]), 6)
        if sigma not in self._told:
            self._told.add(sigma)
            pixels = math.prod(question.collection.grid)
            say(
                f"sigma {sigma:.3g}: all {pixels:,} pixels of a picture are compared with "
                "everything, since a search would take longer"
            )

    def _search(
        self,
        question: Question,
        source: Source,
        opened: Index,
        of: Class,
        leaders: int,
        budget: float,
    ) -> Fold | None:
        """Searches for the sites of a class; None if that costs more than `budget` seconds."""
        kind = self.kind(question.collection)
        q, centred = _queries(question, opened, of, kind)
        Q, C = len(q.half), question.y.shape[1]
        t, w = opened.tree, source.windows(of)
        share = self.error / 2  # of the mass, that may be left out
        near, known = np.full((PARTS, Q), np.inf), np.zeros((PARTS, Q))
        fill(guess, (t, w, q), (near, known))
        best = near.min(0)
        found = _blank(Q, C, leaders, ())
        if kind == "statistical" and not leaders and known.max(0).min() > FLAT:
            asked = Asked(centred, float(q.half[0]), best, source, opened, of)
            if _sample(asked, self.error, found):
                return found
        Z, left_out = found.Z.numpy(), found.left.numpy()
        T = math.log(opened.total / share) + 0.1  # with which no more can be left out
        pace = COSTS + np.array([0, 0, 0, DIFFERENCE * len(opened.embedding.mean)])
        left = 1e9 * budget  # nanoseconds

        def search(asked: np.ndarray, boxes: np.ndarray, patches: np.ndarray) -> None:
            """Fills `found` at `asked`, unless `left` is too little."""
            nonlocal left
            reach = boxes / q.half, patches / q.half  # squared distances
            groups = -(-len(t.widest) // LANES)
            count = min(PARTS, groups)
            parts = _parts(count, best, Q, C, leaders)
            for begun, end in ((0, min(SURVEYED, count)), (SURVEYED, count)):
                if left > 0 and begun < end:
                    some = tuple(a[begun:end] for a in parts)
                    fill(seek, (begun, count, t, w, q, asked, *reach, pace, 3 * left / count), some)
                    spent = float((parts[-2] * pace).sum())
                    if not parts[-1][:end].all() or spent * count / end > left:
                        left = 0.0
            if left > 0:
                left -= spent
                _merge(parts, q.half, asked, found, best)

        least = np.log(known.max(0))  # that log Z may be
        patches = min(T, PATCHES) - least
        search(np.arange(Q), min(T, BOXES) - least, patches)
        again = np.flatnonzero(~(left_out <= share * Z) & (Z > 0))
        if len(again) and left > 0:
            patches[again] = T - np.log(Z[again])
            search(again, patches, patches)
        across = (q.fuzz / ROUNDING) ** 2 * q.half  # nats: more than any patch is away
        while left > 0:  # what may be missing yet is looked for further away
            m = found.m.numpy()
            sure = m >= -best * q.half * (1 + 1e-12)  # the nearest known is in
            if leaders:
                sure &= found.logits.numpy()[:, -1] >= m - patches
            again = np.flatnonzero(~sure & (patches <= across))
            if not len(again):
                break
            patches[again] *= 4
            search(again, patches, patches)
        return found if left > 0 and (left_out <= share * Z).all() else None


def _sample(asked: Asked, error: float, found: Fold) -> bool:
    """Fills `found` from a sample of the patches, if that is near enough."""
    fields = sampled(asked, error)
    if fields is None:
        return False
    *totals, errors = map(torch.from_numpy, fields)
    for have, new in zip(vars(found).values(), totals, strict=False):
        have[:] = new
    # as much mass as would make that much of an error, were it left out
    found.left[:] = found.Z * errors / (2 - errors)
    return True


def _blank(B: int, C: int, leaders: int, sites: tuple[int, ...]) -> Fold:
    """A fold to be filled in."""

    def zeros(*k: int) -> Tensor:
        return torch.zeros(B, *k, *sites, dtype=torch.float64)

    return Fold(zeros(), zeros(), zeros(), zeros(C), zeros(leaders), zeros(leaders).long(), zeros())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _queries(question: Question, opened: Index, of: Class, kind: str) -> tuple[Queries, np.ndarray]:
    """The windows of a picture at the sites of a class; and less the mean, float64 (Q, D)."""
    c, (h, w) = question.collection, of.patches.size
    y = question.y[0].numpy()
    (a, b), C = of.middle, len(y)
    rows, columns = of.rows, of.columns
    top = rows.start + (c.window.shape[0] // 2 if c.wraps else 0) - a
    left = columns.start + (c.window.shape[1] // 2 if c.wraps else 0) - b
    n = (rows.stop - rows.start, columns.stop - columns.start)
    y = y[:, top : top + n[0] + h - 1, left : left + n[1] + w - 1].transpose(1, 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view(y, (h, w), (0, 1)).transpose(0, 1, 3, 4, 2)
    windows = windows.reshape(-1, h, w * C)
    row = -(-w * C // simd.LANES) * simd.LANES
    filled = np.zeros((len(windows), h, row))
    filled[..., : w * C] = windows
    mask = (np.arange(row) < w * C).astype(np.float64)
    centred = np.ascontiguousarray(windows.reshape(len(windows), -1) - opened.embedding.mean)
    half = np.full(len(windows), float(1 / (2 * question.sigma[0] ** 2)))
    e = opened.embedding
    E, squares = e(centred)
    fuzz = (ROUNDING * (np.sqrt(squares) + opened.furthest) + 1e-9).astype(np.float32)
    tails = np.zeros((len(windows), 2), np.float32)
    if kind == "statistical":
        # What a patch may have in common with the query in a group of components that are not
        # looked at: not all of |q_g|, but the content that q_g seems to have besides noise, and
        # c standard deviations of the noise.
        sizes = [*np.diff(e.edges), *[e.kept - e.leading] * (e.kept > e.leading)]
        own = E[:, e.leading : e.first].astype(np.float64)
        sigma = float(question.sigma[0])
        content = np.sqrt(np.maximum(own**2 - sigma**2 * np.array(sizes), 0))
        common = np.minimum(own, content + DEVIATIONS * sigma)
        E[:, e.leading : e.first] = common
        rest = (own**2 - common**2) * (1 - ROUNDING)
        tails[:, 0], tails[:, 1] = rest.sum(1), rest[:, : len(e.edges) - 1].sum(1)
    return Queries(E.reshape(-1), filled.reshape(-1), mask, half, fuzz, tails), centred


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
        np.zeros((count, 4), np.int64),
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
    found.left[asked] = torch.from_numpy(1.001 * (left.astype(np.float64).sum(2) * scale).sum(0))


def _enter(
    fold: Fold, of: Class, found: Fold, energy: Tensor, question: Question, source: Source
) -> None:
    """Writes what was found for a class where its sites are in the fold of a picture."""
    at = ..., of.rows, of.columns
    shape = of.rows.stop - of.rows.start, of.columns.stop - of.columns.start
    more = energy[at]
    for name, value in vars(found).items():
        v = value.reshape(*shape, -1).movedim(-1, 0)[None]
        if name in ("m", "Z", "Z2", "left"):
            v = v[:, 0]
        if name == "m":
            v = v + more
        if name == "logits":
            v = v + more[:, None]
        if name == "places":
            _, H, W, _ = source.pixels.shape
            n = torch.from_numpy(question.index)[v // (H * W)]
            v = torch.where(v < 0, v, n * H * W + v % (H * W))
        getattr(fold, name)[at] = v
