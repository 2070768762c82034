"""Work cut into parts that are the same whatever the number of threads, so that answers are too.

Compiled code releases the interpreter's lock, so plain threads run it side by side: as many as
PyTorch is told to use (`torch.set_num_threads`).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

PARTS = 32


def fill(compiled: Dispatcher, args: tuple[Any, ...], filled: tuple[np.ndarray, ...] = ()) -> None:
    """Calls compiled(part, parts, *args, *(a[part] for a in filled)) for every part of `filled`.

    With nothing to fill by parts there are `PARTS` of them.
    """
    parts = len(filled[0]) if filled else PARTS
    left = deque(range(parts))

    def work(most: int = parts) -> None:
        for _ in range(most):
            try:
                part = left.popleft()
            except IndexError:
                return
            try:
                compiled(part, parts, *args, *(a[part] for a in filled))
            except BaseException:
                left.clear()  # what stops one part stops them all
                raise

    if not compiled.signatures:  # compile in this thread, the one that hears Ctrl-C
        work(1)
    threads = min(torch.get_num_threads(), len(left))
    if threads <= 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
        finally:
            left.clear()  # nothing, unless this thread was interrupted
