"""The last few of things that are dear to make."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Remembers the last `size` things made, by key; several threads may ask."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.known: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is known by `key`, or else is made now."""
        if key in (known := dict(self.known)):  # a copy, since another thread may forget it
            return known[key]
        made = make()
        for old in list(known)[: max(0, len(known) - self.size + 1)]:
            self.known.pop(old, None)
        self.known[key] = made
        return made
