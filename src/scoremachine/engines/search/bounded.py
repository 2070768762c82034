"""The fold over every patch of every image through an index, with a bound or an estimated error."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from copy import copy
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
from scoremachine.engines.search import sampling
from scoremachine.engines.search.certified import Budget, Search, blank
from scoremachine.engines.search.index import (
    Index,
    Source,
    build_all,
    check_number,
    estimate,
    indexed,
)
from scoremachine.engines.search.queries import queries
from scoremachine.engines.search.readahead import Readahead
from scoremachine.engines.simd import LANES
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.progress import Bar, say

ERROR = 1e-3  # the default of the largest error of a pixel
LEVEL = 0.99  # confidence level of an estimate: the least share of pixels with errors within it
KINDS = ("auto", "deterministic", "statistical")
DETERMINISTIC = 100  # values of a patch up to which a deterministic bound costs little more
SHARE = {"deterministic": 0.25, "statistical": 0.5}  # share of the budget, for a limited search
LEAST = 3e-4  # seconds of one core that are always allowed for the search of a pixel
SAMPLE = 1e-7  # seconds times error^2: allowed if sampling is an alternative
REPORTED = 10.0  # seconds of one core: longer scans that replace a search are reported
LOGIT = 1.3  # ns of one core of the exact scan, per source and pixel of an overlap


def exact_cost(collection: Collection, n: int) -> float:
    """The approximate cost of the exact scan of n images for a picture, in seconds of one core."""
    area = 1.0
    c = collection
    for side, seen, p in zip(c.image, c.frame, c.window.shape, strict=True):
        shifts = np.arange(-max(seen - p, 0), max(side - p, 0) + 1)
        overlaps = np.minimum(seen, side - shifts) - np.maximum(0, -shifts)
        area *= int(overlaps.sum())
    return 1e-9 * LOGIT * LANES * -(-n // LANES) * area * strips.cut(c, n)[1]


def searchable(collection: Collection) -> bool:
    """Whether a collection can have indexes."""
    return (
        collection.source == "every"
        and collection.response == "pixel"
        and isinstance(collection.window, Box)
        and collection.variants == (Variant(),)
    )


class Record:
    """The number of pixels for which a call relied on estimates; thread-safe."""

    def __init__(self) -> None:
        self.estimated = 0
        self._lock = Lock()

    def add(self, pixels: int) -> None:
        """Adds a number of pixels."""
        with self._lock:
            self.estimated += pixels

    @property
    def kind(self) -> str:
        """The kind of bound that holds for all pixels."""
        return "statistical" if self.estimated else "deterministic"


class Bounded:
    """An engine that searches indexes of the patches.

    No channel of D differs by more than `error` from the exact one. There are two kinds of
    guarantee:

    - deterministic: a bound. The mass omitted from a pixel's posterior is at most error / 2,
      whatever the picture.
    - statistical: an estimate with a confidence level. For pictures whose noise is independent of
      the images, the errors of at least `LEVEL` of all pixels are within it. The omitted mass is
      estimated from the effect of noise on distances; or the sums over all patches are estimated
      from a sample (`engines.search.sampling`), and the error from its standard error.

    If both would cost more than the exact scan, the exact scan is used.

    Arguments:
        corpus: The images.
        exact: The engine for everything else: corners, derivatives, and where a search costs more.
        error: The largest error of a pixel, > 0, in units of x.
        bound: The kind: "deterministic", "statistical", or "auto": deterministic where few patches
            matter to a pixel and have up to `DETERMINISTIC` numbers, statistical elsewhere.
        patience: The budget of the search for a picture, as a multiple of the exact scan's cost.
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
        self.record: Record | None = None
        self._sources: LRUCache[Source] = LRUCache(2)
        self._indexes: dict[tuple[str, str], Index] = {}
        self._moments: LRUCache[sampling.Moments] = LRUCache(64)
        self._reported: set[float] = set()
        self._readahead = Readahead()
        self._lock = Lock()

    def recorded(self, record: Record) -> Bounded:
        """The same engine, with the same caches, that counts its estimates in `record`."""
        other = copy(self)
        other.record = record
        return other

    def batch(self, collection: Collection, channels: int, leaders: int) -> int:
        """The exact engine's; see `scoremachine.core.posterior.Engine`."""
        return self.exact.batch(collection, channels, leaders)

    def tiles(self, n: int, collection: Collection) -> Iterator[slice]:
        """The whole source as one tile."""
        yield slice(0, n)

    def _kinds(self, collection: Collection) -> tuple[str, ...]:
        """The kinds of guarantee to try, in this order."""
        if self.bound != "auto":
            return (self.bound,)
        D = math.prod(collection.window.shape) * self.corpus.shape[0]
        return ("deterministic", "statistical") if D <= DETERMINISTIC else ("statistical",)

    def source(self, index: np.ndarray) -> Source:
        """The images at `index`, laid out for searching."""
        return self._sources.get(index.tobytes(), lambda: Source.of(self.corpus, index))

    def missing(self, index: np.ndarray, collection: Collection) -> list[Patches]:
        """The patches of a collection that have no index yet; opens existing indexes."""
        source = self.source(index)
        needed = dict.fromkeys(c.patches for c in indexed(collection))
        return [p for p in needed if self._open(source, p) is None]

    def check_space(self, index: np.ndarray, collection: Collection) -> tuple[list[Patches], float]:
        """The patches that have no index yet, and the size of their indexes in bytes.

        Raises:
            OSError: If the disk does not have enough space.
            ValueError: For more patches than an index can number.
        """
        missing = self.missing(index, collection)
        source, C = self.source(index), self.corpus.shape[0]
        for p in missing:
            check_number(p, len(index))
        size = sum(estimate(p, len(index), C)[0] for p in missing)
        if missing and size + 2**28 > (free := shutil.disk_usage(source.folder).free):
            P, Q = collection.window.shape
            raise OSError(
                f"an index of the {P} x {Q} patches of {len(index):,} images needs about "
                f"{size / 1e9:.1f} GB, and {source.folder} has {free / 1e9:.1f} GB left: make "
                "room, set SCOREMACHINE_CACHE to another disk, or use search='exact'"
            )
        return missing, size

    def prepare(self, index: np.ndarray, collection: Collection) -> list[Path]:
        """Builds the missing indexes of a collection; returns the folders of all.

        Raises:
            OSError, ValueError: See `check_space`.
        """
        missing, size = self.check_space(index, collection)
        source, (P, Q) = self.source(index), collection.window.shape
        seconds = sum(estimate(p, len(index), self.corpus.shape[0])[1] for p in missing)
        if seconds > 2:
            say(
                f"building an index of the {P} x {Q} patches of {len(index):,} images, once: "
                f"about {_duration(seconds)} and {size / 1e9:.1f} GB in {source.folder}"
            )
        build_all(source, missing)
        for p in missing:
            self._open(source, p)
        folders = [source.folder / each.patches.name for each in indexed(collection)]
        self._readahead.expect(folders)
        return folders

    def _open(self, source: Source, patches: Patches) -> Index | None:
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
        """The fold over the source; see `scoremachine.core.posterior.Engine`.

        Raises:
            RuntimeError: If `prepare` has not been called for the collection and these images.
        """
        if request.u is not None:
            return self._exact(request, leaders)
        source = self.source(request.index)
        searched = indexed(request.collection)
        if any((source.key, each.patches.name) not in self._indexes for each in searched):
            raise RuntimeError(
                "the indexes of a collection are opened or built before a fold, and not in the "
                "middle of one: call prepare(index, collection) first"
            )
        self._readahead.reached([source.folder / each.patches.name for each in searched])
        pictures = [  # separately: the result for a picture must not depend on the others
            replace(
                request,
                y=request.y[b : b + 1].detach(),
                sigma=request.sigma[b : b + 1].detach(),
                log_cutoff=request.log_cutoff[b : b + 1].detach(),
            )
            for b in range(len(request.y))
        ]
        first = self._picture(pictures[0], leaders)  # alone: it may read the index from disk
        others = side_by_side(lambda picture: self._picture(picture, leaders), pictures[1:])
        return Fold.batch([first, *others])

    def accumulate_response(self, request: ScanRequest, known: Fold) -> Tensor:
        """sum_is q_i a_is s, by the exact engine; see `scoremachine.core.posterior.Engine`."""
        return accumulate_response(self.exact, request, known, Bar("Comparing", None))

    def response_covariance(self, request: ScanRequest, known: Fold) -> Tensor:
        """Cov_i(v_sp, b_is), by the exact engine; see `scoremachine.core.posterior.Engine`."""
        return self.exact.response_covariance(request, known)

    def _exact(self, request: ScanRequest, leaders: int, known: Fold | None = None) -> Fold:
        return folded(self.exact, request, leaders, Bar("Comparing", None), known)

    def _picture(self, request: ScanRequest, leaders: int) -> Fold:
        """The fold of one picture."""
        c, source = request.collection, self.source(request.index)
        budget = Budget(self.patience * exact_cost(c, len(request.index)))
        searched = indexed(c)
        found: list[tuple[Class, Fold]] = []
        for each in sorted(searched, key=lambda c: -c.patches.per_image):  # most expensive first
            result = self._class(request, source, each, leaders, budget)
            if result is None:
                self._report(request)
                return self._exact(request, leaders)
            found.append((each, result))
        fold = self._corners(request, leaders, searched)
        half = float(1 / (2 * request.sigma[0] ** 2))
        energy = c.window_sum((request.y**2).sum(1)) * half  # omitted from an engine's logits
        for each, result in found:
            _enter(fold, each, result, energy, request, source)
        return fold

    def _corners(self, request: ScanRequest, leaders: int, searched: list[Class]) -> Fold:
        """The exact fold of the sites whose classes are not searched; empty for all others."""
        c = request.collection
        fold = blank(1, request.y.shape[1], leaders, c.grid)
        if len(searched) == len(classes(c)):
            return fold
        for each in searched:  # a leader that no source can reach, so all sources are skipped
            fold.m[..., each.rows, each.columns] = -NOTHING
        return self._exact(replace(request, collection=replace(c, source="same")), leaders, fold)

    def _report(self, request: ScanRequest) -> None:
        """Reports that a picture is compared with all patches, once for each noise level."""
        if exact_cost(request.collection, len(request.index)) < REPORTED:
            return
        sigma = round(float(request.sigma[0]), 6)
        with self._lock:
            new = sigma not in self._reported
            self._reported.add(sigma)
        if new:
            pixels = math.prod(request.collection.grid)
            say(
                f"sigma {sigma:.3g}: all {pixels:,} pixels of a picture are compared with "
                "everything, since a search would take longer"
            )

    def _class(
        self, request: ScanRequest, source: Source, of: Class, leaders: int, budget: Budget
    ) -> Fold | None:
        """The fold of the sites of a class; None if it exceeds the budget.

        Flat posteriors are sampled; the others are searched, up to a limit of the cost. If that is
        not enough, their heaviest patches are enumerated and the others sampled; and if that is not
        enough either, they are searched without a limit.
        """
        kinds = self._kinds(request.collection)
        index = self._indexes[source.key, of.patches.name]
        w = source.windows(of.patches, of.middle)
        q, centred = queries(request, index, of, kinds[0])
        search, at = Search.begin(index, w, q, of, leaders), np.arange(len(q.half))
        targets = None
        if "statistical" in kinds and not leaders:
            key = source.key, of.patches.name
            moments = self._moments.get(key, lambda: sampling.Moments.of(index))
            surrogate = moments.surrogate(float(request.sigma[0]) ** 2)
            targets = sampling.Targets(index, w, surrogate, q, centred, search.best)
            at = self._sample(search, targets, at, budget)
        for kind in kinds:
            if kind != kinds[0]:
                search.queries, _ = queries(request, index, of, kind)
            limit = math.inf
            if targets is not None or kind != kinds[-1]:
                limit = SHARE[kind] * budget.seconds / len(q.half)
                if targets is not None:
                    limit = max(LEAST, min(limit, SAMPLE / self.error**2))
            at = self._certify(search, at, kind, budget, limit)
        if len(at) and targets is not None:
            nats = -math.log(sampling.LIGHT * self.error) - search.log_mass
            enumerated = search.enumerate(at, nats, budget)
            if enumerated is not None:
                stratum = sampling.Stratum.of(enumerated, search.best, q.half, nats)
                at = self._sample(search, targets, at, budget, stratum)
            at = self._certify(search, at, kinds[-1], budget, math.inf)
        return None if len(at) else search.found

    def _certify(
        self, search: Search, at: np.ndarray, kind: str, budget: Budget, limit: float
    ) -> np.ndarray:
        """Searches for the queries `at`; returns those whose omitted mass is still too large."""
        done = search.certify(at, self.error, budget, limit)
        if kind == "statistical":
            self._estimated(len(done))
        return np.setdiff1d(at, done)

    def _sample(
        self,
        search: Search,
        targets: sampling.Targets,
        at: np.ndarray,
        budget: Budget,
        stratum: sampling.Stratum | None = None,
    ) -> np.ndarray:
        """Samples for the queries `at`; returns those with an estimated error that is too large."""
        if not len(at) or budget.seconds <= 0:
            return at
        result, cost = sampling.sampled(targets, at, self.error, budget.seconds, stratum)
        budget.seconds -= cost
        enough = result.error <= self.error
        done, found = at[enough], search.found
        found.m[done] = torch.from_numpy(-search.best[done] * search.queries.half[done])
        for have, new in zip((found.Z, found.Z2, found.S), result, strict=False):
            have[done] = torch.from_numpy(new[enough])
        # the mass whose omission would cause this error
        error = torch.from_numpy(result.error[enough])
        found.omitted[done] = found.Z[done] * error / (2 - error)
        self._estimated(len(done))
        usable = np.isfinite(result.Z) & (result.Z > 1)
        search.log_mass[at[usable]] = np.log(result.Z[usable])
        return at[~enough]

    def _estimated(self, pixels: int) -> None:
        if self.record is not None:
            self.record.add(pixels)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _enter(
    fold: Fold, of: Class, found: Fold, energy: Tensor, request: ScanRequest, source: Source
) -> None:
    """Writes the fold of a class to its sites in the fold of a picture."""
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
