"""Machines do not change while they are used, and give one answer to everybody who asks."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

import scoremachine as sm
from conftest import SMALL, noised, random_corpus, small
from scoremachine.machines import MACHINES
from scoremachine.sampling.generate import generate_batches
from scoremachine.sampling.trajectory import Sampling

NAMES = list(MACHINES)


def answers(machine: sm.Machine) -> list[torch.Tensor]:
    """What a machine says, in several ways that used to meet in its attributes."""
    y, sigma = noised(machine.corpus, [0.3, 1.0, 4.0])
    return [
        machine.denoise(y, sigma),
        machine.denoise(y, sigma, bandwidth=0.2),
        sm.generate(machine, 2, 3, seed=1),
        sm.generate(machine, 2, 3, seed=2, sampler="ddpm", bandwidth=0.3),
    ]


def answers_here(pickled: bytes) -> list[np.ndarray]:
    """`answers` in another process."""
    torch.set_num_threads(1)
    return [each.numpy() for each in answers(pickle.loads(pickled))]


def same(a: list[torch.Tensor], b: list) -> bool:
    return all(np.array_equal(x.numpy(), np.asarray(z)) for x, z in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_machine_changes_while_it_is_used(name):
    machine = small(name, random_corpus())
    before = dict(vars(machine))
    answers(machine)
    machine.prepare(levels=[0.5])
    machine.score(*noised(machine.corpus, [0.5]))
    after = vars(machine)
    assert after.keys() == before.keys()
    for attribute, value in before.items():
        assert after[attribute] is value or after[attribute] == value, attribute


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_machine_are_the_machine(name):
    machine = small(name, random_corpus())
    expected = answers(machine)
    assert same(expected, answers(copy.deepcopy(machine)))
    assert same(expected, answers(pickle.loads(pickle.dumps(machine))))


def test_a_machine_refuses_to_be_changed():
    machine = small("ls", random_corpus())
    with pytest.raises(AttributeError, match=r"clone_with\(bandwidth=\.\.\.\)"):
        machine.bandwidth = 0.3
    with pytest.raises(AttributeError, match="clone_with"):
        machine.corpus = random_corpus(1)
    assert machine.clone_with(bandwidth=0.3).bandwidth == 0.3
    assert machine.bandwidth == 0.0


@pytest.mark.parametrize("name", ["ideal", "ls", "els", "pspc-flex", "smoothed", "composite"])
def test_eight_threads_get_the_bits_of_one(name):
    machine = small(name, random_corpus())
    expected = answers(machine)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: answers(machine), range(16)):
            assert same(expected, found)


def test_four_processes_get_the_bits_of_one():
    machines = [small(name, random_corpus()) for name in ("ideal", "ls", "els", "smoothed")]
    expected = [answers(machine) for machine in machines]
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(answers_here, map(pickle.dumps, machines)))
    for one, other in zip(expected, found, strict=True):
        assert same(one, other)


def test_auto_is_chosen_once_whoever_asks_first():
    corpus = sm.Corpus.open("digits", limit=60)
    machine = sm.build("ls", corpus, bandwidth="auto")
    y, sigma = noised(corpus, [0.2, 0.5])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: machine.denoise(y, sigma), range(8)))
    assert all(torch.equal(found[0], D) for D in found)
    assert machine.patch_size == "auto"
    chosen = machine.resolved()
    assert chosen is machine.resolved()
    assert isinstance(chosen.patch_size, sm.PatchSchedule)
    assert isinstance(chosen.bandwidth, sm.BandwidthSchedule)
    assert torch.equal(chosen.denoise(y, sigma), found[0])
    assert chosen.resolved() is chosen


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun"])
def test_generation_leaves_the_global_generator_alone(sampler):
    """Neither while it runs nor afterwards does it change what torch draws for others."""
    machine = small("ls", random_corpus())
    torch.manual_seed(0)
    expected = torch.randn(5)
    like = torch.randn_like(expected)
    torch.manual_seed(0)
    batches = generate_batches(machine, range(2), Sampling(3, sampler=sampler, batch=1))
    next(batches)
    assert torch.equal(torch.randn(5), expected)
    next(batches)
    assert torch.equal(torch.randn_like(expected), like)


def test_perturbations_belong_to_a_picture():
    """What `smoothed` draws depends on neither the batch nor what was generated before."""
    machine = small("smoothed", random_corpus(), perturbations="fresh")
    x = sm.generate(machine, 3, 4, seed=5, batch=3)
    assert torch.equal(x, sm.generate(machine, 3, 4, seed=5, batch=1))
    assert not torch.equal(x, sm.generate(machine, 3, 4, seed=6, batch=1))


def test_small_settings_are_of_machines_that_there_are():
    assert SMALL.keys() <= MACHINES.keys()
