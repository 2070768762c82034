"""Images whose patches are looked up in an index where that is faster than comparing them all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.core.collection import Collection
from scoremachine.core.posterior import Engine
from scoremachine.data.corpus import Corpus
from scoremachine.engines import pytorch, triton
from scoremachine.engines.search.bounded import (
    KINDS,
    Bounded,
    Record,
    exact_cost,
    searchable,
)
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.progress import say
from scoremachine.runtime.validation import check_name
from scoremachine.sources.images import ImageSource
from scoremachine.sources.source import Evidence, FoldRequest

SEARCHES = ("auto", "exact", "bounded")
# sides of patches up to which, and seconds of one core for `PIXELS` of a picture: a scan that takes
# longer is worth an index
WORTHWHILE = (3, 1.0), (7, 2.5), (math.inf, 4.0)
PIXELS = 1024


@dataclass(frozen=True)
class Search:
    """How the patches of a corpus are searched.

    Attributes:
        mode: "exact": every patch is compared; "bounded": patches are looked up in an index;
            "auto": whichever is faster.
        error: The largest error of a pixel that a search may make, in (0, 1], in units of x.
        bound: "deterministic": a bound, true of every picture; "statistical": an estimate with a
            confidence level; "auto": see `machines.EquivariantLocalScore`.
        patience: How many times the cost of the exact scan the search for a picture may take,
            before every patch is compared after all.
    """

    mode: str = "auto"
    error: float = 1e-3
    bound: str = "auto"
    patience: float = 1.0

    def __post_init__(self) -> None:
        check_name("search", self.mode, SEARCHES)
        check_name("bound", self.bound, KINDS)
        error = self.error
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error <= 1:
            raise ValueError(
                f"error is {error!r}; expected the largest error of a pixel, above 0 and at most 1"
            )
        object.__setattr__(self, "error", float(error))

    def plain(self) -> dict[str, object]:
        """It as JSON can hold it."""
        return asdict(self)


class SearchedImages(ImageSource):
    """The images of a corpus, whose patches from every position may be looked up in an index.

    Arguments:
        corpus, kernel: See `ImageSource`.
        search: How they are searched.
    """

    def __init__(self, corpus: Corpus, kernel: str, search: Search) -> None:
        super().__init__(corpus, kernel)
        self.search = search
        self._made: LRUCache[Bounded] = LRUCache(1)

    @property
    def bounded(self) -> Bounded:
        """The engine that searches."""
        s = self.search
        return self._made.get(
            "bounded", lambda: Bounded(self.corpus, self.engine, s.error, s.bound, s.patience)
        )

    def engine_for(self, collection: Collection, index: np.ndarray) -> Engine:
        """The search where it is asked for, or faster, and there is room for its index."""
        mode, exact = self.search.mode, self.engine
        if mode == "exact" or not searchable(collection):
            return exact
        if mode == "auto":
            if exact is pytorch and triton.available():
                return exact  # a GPU compares everything before an index is looked through
            side = max(collection.window.shape)
            least = next(seconds for most, seconds in WORTHWHILE if side <= most)
            pictures = max(1.0, math.prod(collection.frame) / PIXELS)
            if exact_cost(collection, len(index)) < least * pictures:
                return exact
            try:
                self.bounded.check_space(index, collection)
            except (OSError, ValueError) as error:
                say(f"every patch is compared, which takes longer than a search: {error}")
                return exact
        return self.bounded

    def folded_with_kind(self, request: FoldRequest) -> tuple[Evidence, str]:
        """`fold`, and what its omitted masses are: "deterministic" bounds, or "statistical"."""
        engine, record = self.engine_for(request.collection, request.index), Record()
        if engine is self.bounded:
            engine = self.bounded.recorded(record)
        return self.folded(request, engine), record.kind

    def prepare(self, collection: Collection, index: np.ndarray) -> list[Path]:  # type: ignore[override]
        """Builds the indexes that a row needs and that are missing; their folders, if any.

        Raises:
            OSError: If there is no room for them.
        """
        engine: Any = self.engine_for(collection, index)
        return engine.prepare(index, collection) if engine is self.bounded else []
