"""One progress bar for everything that can take longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

DELAY = 1.0  # seconds of silence before a bar appears
EVERY = 60.0  # seconds between lines, where standard error is no terminal

_said: set[Hashable] = set()

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


def say(sentence: str, about: Hashable = None) -> None:
    """Prints a sentence to standard error, unless quiet, or it has been said already.

    `about`: what counts as the same; None: the sentence itself.
    """
    key = sentence if about is None else about
    if not _quiet.get() and key not in _said:
        _said.add(key)
        print(sentence, file=sys.stderr)


class Bar:
    """A bar that shows itself once the work has taken longer than `DELAY`.

    Where standard error is no terminal, as in a log, it is a line every `EVERY` seconds.
    """

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.start = time.monotonic()
        self.rich: Any = None
        self.next_line: float | None = None  # when it is due, where lines stand for the bar
        self.hidden = _quiet.get() or _inside.get()

    def advance(self, amount: float = 1.0) -> None:
        """Counts `amount` more as done."""
        self.done += amount
        if self.hidden:
            return
        if self.rich is None and self.next_line is None:
            if time.monotonic() - self.start < DELAY:
                return
            self._appear()
        if self.rich is not None:
            self.rich.update(self.task, completed=self.done)
        elif self.next_line is not None and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + EVERY
            of = "" if self.total is None else f" of {self.total:,.0f}"
            print(f"{self.description}: {self.done:,.0f}{of}", file=sys.stderr)

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

        console = Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            self.next_line = self.start + EVERY
            return
        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
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
