"""Work cut into parts that are the same whatever the number of threads, so that answers are too.

Compiled code releases the interpreter's lock, so plain threads run it side by side: as many as
PyTorch is told to use (`torch.set_num_threads`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

PARTS = 32

T = TypeVar("T")
R = TypeVar("R")


class _Team:
    """Threads with something of their own to do each."""

    def __init__(self, threads: int) -> None:
        self.busy = deque(range(threads))  # one entry for each that still has
        self.stopped = False  # whether nobody waits for it any more


class _StoppedError(Exception):
    """Nobody waits for this any more."""


_team: ContextVar[_Team | None] = ContextVar("team", default=None)


def fill(compiled: Dispatcher, args: tuple[Any, ...], filled: tuple[np.ndarray, ...] = ()) -> None:
    """Calls compiled(part, parts, *args, *(a[part] for a in filled)) for every part of `filled`.

    With nothing to fill by parts there are `PARTS` of them.
    """
    parts = len(filled[0]) if filled else PARTS
    left, team, failed = deque(range(parts)), _team.get(), list[BaseException]()

    def work(most: int = parts) -> None:
        for _ in range(most):
            try:
                part = left.popleft()
            except IndexError:
                return
            if team is not None and team.stopped:
                raise _StoppedError
            compiled(part, parts, *args, *(a[part] for a in filled))

    def take_part() -> None:
        try:
            work()
        except BaseException as error:
            left.clear()  # what stops one part stops them all
            failed.append(error)

    if not compiled.signatures:  # compile in this thread, the one that hears Ctrl-C
        work(1)
    sharing = 1 if team is None else len(team.busy)
    threads = min(torch.get_num_threads() // sharing, len(left))
    others = [Thread(target=take_part) for _ in range(threads - 1)]  # not worth a pool
    for thread in others:
        thread.start()
    try:
        work()
    finally:
        left.clear()
        for thread in others:
            thread.join()
    if failed:
        raise failed[0]


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[work(item) for item in items], several at once, which share the threads of `fill`.

    So there is something to do for every thread while one does what no compiled code does.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or _team.get() is not None:
        return [work(item) for item in items]
    team, left, results = _Team(threads), deque(range(len(items))), dict[int, R]()

    def take() -> None:
        _team.set(team)
        try:
            while True:
                try:
                    k = left.popleft()
                except IndexError:
                    return
                results[k] = work(items[k])
        except _StoppedError:
            return
        except BaseException:
            team.stopped = True
            left.clear()
            raise
        finally:
            team.busy.pop()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(copy_context().run, take) for _ in range(threads)]:
                done.result()
        finally:
            team.stopped = True  # nothing is left, unless this thread was interrupted
            left.clear()
    return [results[k] for k in range(len(items))]
