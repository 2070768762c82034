"""Runs compiled code on chunks of work that do not depend on the number of threads.

So results do not depend on it either. Compiled code releases the interpreter's lock, so plain
threads run it in parallel: as many as `torch.get_num_threads()`.
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

PARTS = 32  # chunks of one call

T = TypeVar("T")
R = TypeVar("R")


class _ThreadGroup:
    """Threads of `side_by_side`, each of which works on items of its own."""

    def __init__(self, threads: int) -> None:
        self.busy = deque(range(threads))  # one entry for each thread that still has work
        self.stopped = False  # whether the results are no longer needed


class _StoppedError(Exception):
    """The result is no longer needed."""


_current_group: ContextVar[_ThreadGroup | None] = ContextVar("thread group", default=None)


def fill(compiled: Dispatcher, args: tuple[Any, ...], filled: tuple[np.ndarray, ...] = ()) -> None:
    """Calls compiled(chunk, chunks, *args, *(a[chunk] for a in filled)) for every chunk.

    The chunks run in parallel. They are the first axis of the output arrays `filled`; without such
    arrays there are `PARTS` chunks.
    """
    chunks = len(filled[0]) if filled else PARTS
    left, group, failed = deque(range(chunks)), _current_group.get(), list[BaseException]()

    def work(most: int = chunks) -> None:
        for _ in range(most):
            try:
                chunk = left.popleft()
            except IndexError:
                return
            if group is not None and group.stopped:
                raise _StoppedError
            compiled(chunk, chunks, *args, *(a[chunk] for a in filled))

    def work_in_thread() -> None:
        try:
            work()
        except BaseException as error:
            left.clear()  # an error in one chunk stops all
            failed.append(error)

    if not compiled.signatures:  # compile in this thread, the one that receives Ctrl-C
        work(1)
    sharing = 1 if group is None else len(group.busy)
    threads = min(torch.get_num_threads() // sharing, len(left))
    others = [Thread(target=work_in_thread) for _ in range(threads - 1)]  # cheaper than a pool
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
    """[work(item) for item in items], with several items in parallel, which share `fill`'s threads.

    So all threads are busy even while one of them runs code that is not compiled.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or _current_group.get() is not None:
        return [work(item) for item in items]
    group, left, results = _ThreadGroup(threads), deque(range(len(items))), dict[int, R]()

    def work_on_items() -> None:
        _current_group.set(group)
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
            group.stopped = True
            left.clear()
            raise
        finally:
            group.busy.pop()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(copy_context().run, work_on_items) for _ in range(threads)]:
                done.result()
        finally:
            group.stopped = True  # no work is left, unless this thread was interrupted
            left.clear()
    return [results[k] for k in range(len(items))]
