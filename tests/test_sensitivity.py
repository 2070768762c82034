"""What denoisers look at, where that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scoremachine as sm
from conftest import random_corpus
from scoremachine.lab.networks import Network
from scoremachine.lab.sensitivity import Sensitivity, sensitivity


def test_the_map_of_a_convolution_is_its_kernel():
    kernel = torch.randn(1, 1, 3, 5, generator=torch.Generator().manual_seed(0))

    def f(x_t, t):
        return torch.nn.functional.conv2d(x_t, kernel.to(x_t), padding=(1, 2))

    network = Network.of(f, (1, 6, 6))  # x0, so D(y) = f(alpha y)
    found = sensitivity(network, random_corpus(), [0.01], pixels=36)
    alpha = float(network.schedule(torch.tensor(network.time(0.01)))[0])
    expected = np.zeros((11, 11))
    expected[4:7, 3:8] = (alpha * kernel[0, 0].numpy()) ** 2
    assert np.allclose(found.maps[0], expected, rtol=1e-5, atol=1e-12)
    assert found.width(0, 1.0) == 5


@pytest.mark.parametrize("name", ["ls", "els"])
def test_a_machine_of_boxes_looks_at_its_box(name):
    corpus = random_corpus(N=30, H=9, W=9)
    machine = sm.build(name, corpus, patch_size=3)
    found = sensitivity(machine, corpus, [1.0, 3.0], name, count=2, pixels=30)
    for k in range(2):
        assert found.width(k, 1.0) == 3
        assert found.maps[k][8, 8] > 0


def test_the_ideal_machine_looks_everywhere():
    corpus = random_corpus(N=30, H=7, W=7)
    found = sensitivity(sm.build("ideal", corpus), corpus, [5.0], count=2)
    assert found.width(0) > 5


def test_the_wiener_filter_is_its_own_map():
    corpus = random_corpus(N=30, H=4, W=4)
    machine = sm.build("gaussian", corpus)
    found = sensitivity(machine, corpus, [0.7], count=1, pixels=16)
    y = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    W = torch.autograd.functional.jacobian(lambda y: machine.denoise(y, 0.7), y).reshape(16, 16)
    pairs = [
        W[i * 4 + j, (i + 1) * 4 + j + 2] ** 2 for i in range(3) for j in range(2)
    ]  # one down, two right
    assert found.maps[0][3 + 1, 3 + 2] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)


def test_a_width_is_odd_and_grows_with_its_share():
    maps = np.random.default_rng(0).exponential(size=(1, 9, 13))
    s = Sensitivity("random", [1.0], maps)
    widths = [s.width(0, share) for share in (0.01, 0.3, 0.6, 0.9, 1.0)]
    assert widths == sorted(widths)
    assert all(w % 2 for w in widths)
    assert widths[-1] == 13


def test_senseless_numbers_are_refused():
    corpus = random_corpus()
    machine = sm.build("ls", corpus, patch_size=3)
    for options, words in [
        ({"count": 0}, "count is 0"),
        ({"pixels": 0}, "pixels is 0"),
        ({"sigmas": []}, "at least one"),
        ({"sigmas": [-1.0]}, "sigma is"),
    ]:
        with pytest.raises(ValueError, match=words):
            sensitivity(machine, corpus, **({"sigmas": [1.0]} | options))


def test_a_map_of_zeros_has_no_width():
    assert Sensitivity("blind", [1.0], np.zeros((1, 9, 9))).width(0) == 0
