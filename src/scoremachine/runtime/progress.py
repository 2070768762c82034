"""One progress bar for everything that can take longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

DELAY = 1.0  # seconds of silence before a bar appears

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_inside: ContextVar[bool] = ContextVar("inside", default=False)  # another bar


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Hides (`on=True`) or allows progress bars inside the block."""
    token = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(sentence: str) -> None:
    """Prints a sentence to standard error, unless quiet."""
    if not _quiet.get():
        print(sentence, file=sys.stderr)


class Bar:
    """A bar that shows itself once the work has taken longer than `DELAY`."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.start = time.monotonic()
        self.rich: Any = None
        self.hidden = _quiet.get() or _inside.get()

    def advance(self, amount: float = 1.0) -> None:
        """Counts `amount` more as done."""
        self.done += amount
        if self.hidden:
            return
        if self.rich is None:
            if time.monotonic() - self.start < DELAY:
                return
            self._appear()
        self.rich.update(self.task, completed=self.done)

    def _appear(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.rich.start()
        self.task = self.rich.add_task(self.description, total=self.total, completed=self.done)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self.rich is not None:
            self.rich.stop()


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Bar]:
    """A `Bar` on standard error, gone when the block ends; the outermost alone is shown."""
    b = Bar(description, total)
    token = _inside.set(True)
    try:
        yield b
    finally:
        _inside.reset(token)
        b.close()
