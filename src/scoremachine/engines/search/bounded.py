"""The fold over every patch of every image, by search: a kernel that says what it leaves out."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Class, Collection, Patches, classes
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import Engine, ScanRequest, accumulate_response, folded
from scoremachine.core.windows import Box, Variant
from scoremachine.data.corpus import Corpus
from scoremachine.engines import strips
from scoremachine.engines.chunks import side_by_side
from scoremachine.engines.compiled import NOTHING
from scoremachine.engines.search.ahead import Ahead
from scoremachine.engines.search.draw import Gaussians
from scoremachine.engines.search.drawn import Asked, Near, Nodes, drawn
from scoremachine.engines.search.index import (
    Index,
    Source,
    build_all,
    check_number,
    estimate,
    indexed,
)
from scoremachine.engines.search.rounds import Purse, blank, guessed, nearby, queries, sought
from scoremachine.engines.simd import LANES
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.progress import Bar, say

ERROR = 1e-3  # the largest error of a pixel, unless another is asked for
LEVEL = 0.01  # how often, at most, an error is larger than a statistical bound tells
KINDS = ("auto", "deterministic", "statistical")
DETERMINISTIC = 100  # numbers of a patch up to which a deterministic bound costs little more
DEAR = {"deterministic": 0.25, "statistical": 0.5}  # of the exact scan of a pixel: for its search
FIRST = 0.5  # of what is left, that the first of two kinds of bound may cost
CHEAP = 3e-4  # seconds of one core that a search for a pixel may take in any case
LOTS = 4.5e-8  # likewise where lots may do, times the square of the error
HEAVY = 5e-5  # of a pixel's mass: for patches that weigh more there are no lots, where some fail
HEAVIER = 0.01  # of the error: likewise, where that is less
SAMPLED, ENOUGH = 8, 64  # one of so many queries, if there are as many, is drawn for first
WORTH = 0.1  # of them: for which lots must do
TOLD = 10.0  # seconds of one core: that a scan which takes longer is done in place of a search
LOGIT = 1.3  # ns of one core that the exact scan needs for a source under a pixel of an overlap


def exact_cost(collection: Collection, n: int) -> float:
    """About how many seconds of one core the exact scan of n images needs for a picture."""
    area = 1.0
    c = collection
    for side, seen, p in zip(c.image, c.frame, c.window.shape, strict=True):
        shifts = np.arange(-max(seen - p, 0), max(side - p, 0) + 1)
        overlaps = np.minimum(seen, side - shifts) - np.maximum(0, -shifts)
        area *= int(overlaps.sum())
    return 1e-9 * LOGIT * LANES * -(-n // LANES) * area * strips.cut(c, n)[1]  # by eights


def searchable(collection: Collection) -> bool:
    """Whether there are indexes for a collection."""
    return (
        collection.source == "every"
        and collection.response == "pixel"
        and isinstance(collection.window, Box)
        and collection.variants == (Variant(),)
    )


class Bounded:
    """A kernel (`posterior.Engine`) that looks most patches up in indexes instead of at them all.

    What is left out of a pixel's posterior has a mass of at most error / 2, so that no channel of D
    is further than `error` from the exact one. The bound of that mass is one of two kinds:

    - deterministic: true of every picture, whatever its noise.
    - statistical: for pictures with noise that is independent of the images, not true of at most
      one pixel in 1 / `LEVEL` (measured: docs/search.md). Where very many patches matter, lots are
      drawn (`scoremachine.search.draw`), and the bound is 3.3 standard errors of their mean.

    Where both would cost more than the exact scan, the picture is compared with everything.

    Arguments:
        corpus: The images.
        exact: The kernel for everything else: corners, derivatives, flat posteriors.
        error: The largest error of a pixel, > 0, in units of x.
        bound: The kind: "deterministic", "statistical", or "auto": statistical where lots are
            drawn, for patches of more than `DETERMINISTIC` numbers, and where the deterministic
            bound is too dear.
        patience: How many times the cost of the exact scan the search for a picture may take.
    """

    def __init__(
        self,
        corpus: Corpus,
        exact: Engine,
        error: float = ERROR,
        bound: str = "auto",
        patience: float = 1.0,
    ) -> None:
        self.corpus, self.exact, self.error = corpus, exact, error
        self.bound, self.patience = bound, patience
        self._sources: LRUCache[Source] = LRUCache(2)
        self._indexes: dict[tuple[str, str], Index] = {}
        self._nodes: LRUCache[Nodes] = LRUCache(64)
        self._gaussians: LRUCache[Gaussians | None] = LRUCache(64)
        self._told: set[float] = set()
        self._ahead = Ahead()
        self.statistical = 0  # for how many pixels the bound was statistical so far
        self._lock = Lock()

    def batch(self, collection: Collection, channels: int, leaders: int) -> int:
        """The exact kernel's; see `scoremachine.core.posterior.Engine`."""
        return self.exact.batch(collection, channels, leaders)

    def tiles(self, n: int, collection: Collection) -> Iterator[slice]:
        """The source whole."""
        yield slice(0, n)

    def _kinds(self, collection: Collection) -> tuple[str, ...]:
        """The kinds of bound to try, one after the other."""
        if self.bound != "auto":
            return (self.bound,)
        D = math.prod(collection.window.shape) * self.corpus.shape[0]
        return ("deterministic", "statistical") if D <= DETERMINISTIC else ("statistical",)

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
            check_number(p, len(index))
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
        folders = [source.folder / each.patches.name for each in indexed(collection)]
        self._ahead.expect(folders)
        return folders

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
            return None
        self._indexes[source.key, patches.name] = opened
        return opened

    def fold(self, request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
        """The fold over the source; see `scoremachine.core.posterior.Engine`."""
        if request.u is not None:
            return self._all(request, leaders)
        self._ahead.reached(self.prepare(request.index, request.collection))
        B = len(request.y)
        pictures = [  # each for itself: what is left out may not depend on the others
            replace(
                request,
                y=request.y[b : b + 1].detach(),
                sigma=request.sigma[b : b + 1].detach(),
                T=request.T[b : b + 1].detach(),
            )
            for b in range(B)
        ]
        first = self._picture(pictures[0], leaders)  # alone: it may have to read what all need
        others = side_by_side(lambda picture: self._picture(picture, leaders), pictures[1:])
        return Fold.batch([first, *others])

    def accumulate_response(self, request: ScanRequest, known: Fold) -> Tensor:
        """sum_is q_i a_is s, by the exact kernel; see `scoremachine.core.posterior.Engine`."""
        return accumulate_response(self.exact, request, known, Bar("Comparing", None))

    def response_covariance(self, request: ScanRequest, known: Fold) -> Tensor:
        """Cov_i(v_sp, b_is), by the exact kernel; see `scoremachine.core.posterior.Engine`."""
        return self.exact.response_covariance(request, known)

    def _all(self, request: ScanRequest, leaders: int, known: Fold | None = None) -> Fold:
        return folded(self.exact, request, leaders, Bar("Comparing", None), known)

    def _picture(self, request: ScanRequest, leaders: int) -> Fold:
        """The fold of one picture."""
        c, source = request.collection, self.source(request.index)
        purse = Purse(self.patience * exact_cost(c, len(request.index)))
        searched = indexed(c)
        found: list[tuple[Class, Fold]] = []
        for each in sorted(searched, key=lambda c: -c.patches.per_image):  # the dearest first
            opened = self._opened(source, each.patches)
            assert opened is not None
            result = self._search(request, source, opened, each, leaders, purse)
            if result is None:
                self._tell(request)
                return self._all(request, leaders)
            found.append((each, result))
        fold = self._corners(request, leaders, searched)
        half = float(1 / (2 * request.sigma[0] ** 2))
        energy = c.window_sum((request.y**2).sum(1)) * half  # which the logits of a fold lack
        for each, result in found:
            _enter(fold, each, result, energy, request, source)
        return fold

    def _corners(self, request: ScanRequest, leaders: int, searched: list[Class]) -> Fold:
        """The exact fold of the sites that no class is searched for; nothing for all others."""
        c = request.collection
        fold = blank(1, request.y.shape[1], leaders, c.grid)
        if len(searched) == len(classes(c)):
            return fold
        for each in searched:  # nothing is as near as what they know
            fold.m[..., each.rows, each.columns] = -NOTHING
        return self._all(replace(request, collection=replace(c, source="same")), leaders, fold)

    def _count(self, pixels: int) -> None:
        """The bound of so many more is statistical."""
        with self._lock:
            self.statistical += pixels

    def _tell(self, request: ScanRequest) -> None:
        if exact_cost(request.collection, len(request.index)) < TOLD:
            return
        sigma = round(float(request.sigma[0]), 6)
        with self._lock:
            new = sigma not in self._told
            self._told.add(sigma)
        if new:
            pixels = math.prod(request.collection.grid)
            say(
                f"sigma {sigma:.3g}: all {pixels:,} pixels of a picture are compared with "
                "everything, since a search would take longer"
            )

    def _search(
        self,
        request: ScanRequest,
        source: Source,
        opened: Index,
        of: Class,
        leaders: int,
        purse: Purse,
    ) -> Fold | None:
        """Searches for the sites of a class; None if that costs more than there is."""
        kinds = self._kinds(request.collection)
        q, centred = queries(request, opened, of, kinds[0])
        Q, w = len(q.half), source.windows(of.patches, of.middle)
        best, least = guessed(q, opened, w, of)
        found = blank(Q, request.y.shape[1], leaders, ())
        at = np.arange(Q)
        asked = None
        if self.bound != "deterministic" and not leaders:
            asked = self._asked(source, opened, of, centred, float(q.half[0]), best)
        if asked is not None and purse.lots:
            at = self._first_lots(asked, at, found, least, purse)

        def missing(at: np.ndarray, apiece: float, part: float = 1.0) -> np.ndarray:
            """Those of the queries `at` that a search for a part of the purse does not settle."""
            done = sought(q, opened, w, at, found, best, least, self.error, purse, apiece, part)
            if kind == "statistical":
                self._count(int(done.sum()))
            return at[~done[at]]

        for kind in kinds:
            if len(at) and purse.left <= 0:
                return None
            if kind != kinds[0]:
                q, _ = queries(request, opened, of, kind)
            # lots may be cheaper than the exact scan, or a search: then some are left to them
            apiece = min(DEAR[kind] * purse.left / Q, LOTS / self.error**2)
            apiece = math.inf if asked is None else max(apiece, CHEAP)
            at = missing(at, apiece, 1.0 if kind == kinds[-1] else FIRST)
            if not len(at):
                return found
        if asked is not None and purse.left > 0:
            if not purse.lots:
                at = self._draw(asked, at, found, least, purse)
                if not len(at):
                    return found
            nats = -math.log(min(HEAVY, HEAVIER * self.error)) - least
            near = nearby(q, opened, w, at, best, nats, purse)
            if near is not None:
                at = self._draw(asked, at, found, least, purse, Near.of(near, asked, nats))
            at = missing(at, math.inf)
        return None if len(at) else found

    def _asked(
        self,
        source: Source,
        opened: Index,
        of: Class,
        windows: np.ndarray,
        half: float,
        best: np.ndarray,
    ) -> Asked | None:
        """What is asked of those who draw; None where nothing can stand in for patches."""
        key = source.key, of.patches.name, of.middle
        nodes = self._nodes.get(key, lambda: Nodes.of(source, opened, of))
        g = self._gaussians.get((key, half), lambda: nodes.gaussians(1 / (2 * half)))
        return g and Asked(windows, half, best, source, opened, of, nodes.known, g)

    def _first_lots(
        self, asked: Asked, at: np.ndarray, found: Fold, least: np.ndarray, purse: Purse
    ) -> np.ndarray:
        """Draws for the queries `at`, unless lots do for few of a sample; returns those left."""
        if len(at) < ENOUGH:
            return self._draw(asked, at, found, least, purse)
        some, others = at[::SAMPLED], np.delete(at, np.s_[::SAMPLED])
        left = self._draw(asked, some, found, least, purse)
        purse.lots = len(some) - len(left) >= WORTH * len(some)
        if purse.lots:
            others = self._draw(asked, others, found, least, purse)
        return np.sort(np.concatenate([left, others]))

    def _draw(
        self,
        asked: Asked,
        at: np.ndarray,
        found: Fold,
        least: np.ndarray,
        purse: Purse,
        near: Near | None = None,
    ) -> np.ndarray:
        """Draws lots for the queries `at`, and returns those for which they say too little."""
        some = asked._replace(windows=asked.windows[at], best=asked.best[at])
        known = None if near is None else Near(*(a[at] for a in near))
        lots = drawn(some, self.error, purse, known)
        enough = lots.error <= self.error
        done = at[enough]
        found.m[done] = torch.from_numpy(-some.best[enough] * asked.half)
        for have, new in zip((found.Z, found.Z2, found.S), lots, strict=False):
            have[done] = torch.from_numpy(new[enough])
        # as much mass as would make that much of an error, were it left out
        error = torch.from_numpy(lots.error[enough])
        found.omitted[done] = found.Z[done] * error / (2 - error)
        self._count(len(done))
        least[at] = np.maximum(least[at], lots.least)
        return at[~enough]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _enter(
    fold: Fold, of: Class, found: Fold, energy: Tensor, request: ScanRequest, source: Source
) -> None:
    """Writes what was found for a class where its sites are in the fold of a picture."""
    at = ..., of.rows, of.columns
    more = energy[at]
    for name, value in vars(found).items():
        v = value.reshape(*of.shape, -1).movedim(-1, 0)[None]
        if name in ("m", "Z", "Z2", "omitted"):
            v = v[:, 0]
        if name == "m":
            v = v + more
        if name == "logits":
            v = v + more[:, None]
        if name == "places":
            _, H, W, _ = source.pixels.shape
            n = torch.from_numpy(request.index)[v // (H * W)]
            v = torch.where(v < 0, v, n * H * W + v % (H * W))
        getattr(fold, name)[at] = v
