"""Work in parts: each once, and what goes wrong in one comes out."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import random_corpus, small
from scoremachine.engines.chunks import fill, side_by_side
from scoremachine.runtime.lru import LRUCache


class Compiled:
    """What numba's compiled functions are to `fill`."""

    def __init__(self, work, signatures=()):
        self.work, self.signatures = work, signatures

    def __call__(self, *args):
        self.work(*args)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("signatures", [(), ("known",)])
def test_every_part_is_filled_once(threads, signatures):
    def work(part, parts, offset, row, total):
        row += 10 * part + offset
        total += parts

    rows, totals = np.zeros((7, 3)), np.zeros((7, 1))
    fill(Compiled(work, signatures), (0.5,), (rows, totals))
    assert (rows == 10 * np.arange(7)[:, None] + 0.5).all()
    assert (totals == 7).all()


def test_what_is_done_side_by_side_comes_in_order(threads):
    """Also where it fills parts, and again does things side by side."""

    def filled(item):
        rows = np.zeros((9, 1))
        fill(Compiled(lambda part, parts, row: row.__iadd__(part + item), ("known",)), (), (rows,))
        return float(rows.sum()) + sum(side_by_side(lambda x: x * item, [1, 2, 3]))

    assert side_by_side(filled, range(20)) == [36 + 9 * k + 6 * k for k in range(20)]
    assert side_by_side(filled, []) == []


@pytest.mark.parametrize("wrong", [ValueError, KeyboardInterrupt])
def test_what_stops_one_stops_all_beside_it(threads, wrong):
    """At the end of the part that each is at; what is said is what went wrong."""
    filled = []

    def slowly(part, parts, row):
        filled.append(part)
        time.sleep(0.01)

    def work(item):
        if item == 1:
            time.sleep(0.05)
            raise wrong("this")
        fill(Compiled(slowly, ("known",)), (), (np.zeros((200, 1)),))

    with pytest.raises(wrong, match="this"):
        side_by_side(work, range(100))
    assert len(filled) < 200 * (2 if threads == 1 else threads)


@pytest.mark.parametrize("wrong", [ValueError, KeyboardInterrupt])
def test_what_stops_one_part_stops_them_all(threads, wrong):
    begun = []

    def work(part, parts, row):
        begun.append(part)
        if part == 1:
            raise wrong
        time.sleep(0.01)

    with pytest.raises(wrong):
        fill(Compiled(work), (), (np.zeros((1000, 1)),))
    assert len(begun) < 1000


def test_what_stops_a_later_thread_stops_the_first():
    begun = []

    def work(part, parts, row):
        begun.append(part)
        if part == 1:
            raise ValueError("stop")
        time.sleep(0.01)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="stop"):
            fill(Compiled(work, ("known",)), (), (np.zeros((1000, 1)),))
    finally:
        torch.set_num_threads(before)
    assert len(begun) < 100


def test_a_machine_may_be_asked_from_several_threads():
    m = small("ls", random_corpus(N=40), kernel="numba")
    y = torch.randn(8, 1, 6, 6, dtype=torch.float64)
    alone = [m.denoise(y[k : k + 1], 0.5) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda k: m.denoise(y[k : k + 1], 0.5), range(8)))
    assert all(map(torch.equal, alone, together))


def test_the_last_few_are_kept():
    kept, made = LRUCache(2), []
    for key in "abacba":  # the least recently used one is forgotten
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "b", "a"]
    kept.get("b", lambda: made.append("again"))
    assert made[-1] == "a"
