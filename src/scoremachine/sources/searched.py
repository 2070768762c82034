"""Images whose patches are searched through an index if that is faster than a full scan."""

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
# (largest side of a patch, seconds of one core for `PIXELS` pixels): a search through an index is
# worthwhile if the scan takes longer
WORTHWHILE = (3, 1.0), (7, 2.5), (math.inf, 4.0)
PIXELS = 1024


@dataclass(frozen=True)
class Search:
    """How the patches of a corpus are searched.

    Attributes:
        mode: "exact": every patch is compared; "bounded": patches are searched through an index;
            "auto": whichever is faster.
        error: The largest error of a pixel allowed to a search, in (0, 1], in units of x.
        bound: "deterministic": a bound, which holds for every picture; "statistical": an estimate
            with a confidence level; "auto": see `machines.EquivariantLocalScore`.
        patience: The most that the search for a picture may cost before it is replaced by the exact
            scan, as a multiple of the scan's cost.
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
        """A form that JSON can represent."""
        return asdict(self)


class SearchedImages(ImageSource):
    """The images of a corpus, whose patches at all positions may be searched through an index.

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
        """The search engine."""
        s = self.search
        return self._made.get(
            "bounded", lambda: Bounded(self.corpus, self.engine, s.error, s.bound, s.patience)
        )

    def engine_for(self, collection: Collection, index: np.ndarray) -> Engine:
        """The search engine if it is required, or if it is faster and its index fits on disk."""
        mode, exact = self.search.mode, self.engine
        if mode == "exact" or not searchable(collection):
            return exact
        if mode == "auto":
            if exact is pytorch and triton.available():
                return exact  # the full scan on a GPU is faster than a search
            side = max(collection.window.shape)
            least = next(seconds for most, seconds in WORTHWHILE if side <= most)
            pictures = max(1.0, math.prod(collection.frame) / PIXELS)
            if exact_cost(collection, len(index)) < least * pictures:
                return exact
            try:
                self.bounded.check_space(index, collection)
            except (OSError, ValueError) as error:
                say(f"no index, so every patch is compared, which takes longer: {error}")
                return exact
        return self.bounded

    def folded_with_kind(self, request: FoldRequest) -> tuple[Evidence, str]:
        """`fold`, and the kind of its omitted masses: "deterministic" or "statistical"."""
        engine, record = self.engine_for(request.collection, request.index), Record()
        if engine is self.bounded:
            engine = self.bounded.recorded(record)
        return self.folded(request, engine), record.kind

    def prepare(self, collection: Collection, index: np.ndarray) -> list[Path]:  # type: ignore[override]
        """Builds the missing indexes for a row; returns the folders of its indexes, if any.

        Raises:
            OSError: If the disk is too full for them.
        """
        engine: Any = self.engine_for(collection, index)
        return engine.prepare(index, collection) if engine is self.bounded else []
