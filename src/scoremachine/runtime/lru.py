"""A cache of the last few results, by key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Remembers the `size` results that were used last. Any number of threads may ask.

    A result is made once: whoever asks for it meanwhile waits for it. A copy of a cache, also one
    in another process, begins empty.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = RLock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result remembered under `key`, or else what `make` returns."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
            made = make()
            self._results[key] = made
            while len(self._results) > self.size:
                self._results.popitem(last=False)
            return made

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._results.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)
