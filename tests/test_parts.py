"""Work in parts: each once, and what goes wrong in one comes out."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import random_corpus, small
from scoremachine.kept import Kept
from scoremachine.kernels.parts import fill


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
    kept, made = Kept(2), []
    for key in "abacba":
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "a"]
    assert len(kept.known) == 2
