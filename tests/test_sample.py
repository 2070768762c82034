"""Generation: seeds, schedules, samplers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from azula.denoise import Denoiser
from azula.guidance import CFGDenoiser
from azula.noise import CosineSchedule, VPSchedule
from azula.sample import DDIMSampler

import scoremachine as sm
from conftest import SMALL, noised, random_corpus, small
from scoremachine.core.schedules import edm_sigmas
from scoremachine.machines import MACHINES
from scoremachine.sampling.samplers import SAMPLERS
from scoremachine.sampling.schedules import SCHEDULES, EDMSchedule, schedule_of


def machine(name="els", schedule=None, **settings):
    return small(name, random_corpus(N=12), schedule=schedule, **settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", sorted(set(SMALL) - {"gaussian"}))
def test_one_seed_is_one_result_whatever_the_batch_and_the_threads(name, sampler):
    settings = {"count": 5, "steps": 4, "seed": 3, "sampler": sampler}
    m = machine(name)
    together = sm.generate(m, batch=5, **settings)
    assert together.shape == (5, 1, 6, 6)
    assert together.dtype == torch.float32
    alone = sm.generate(m, batch=1, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))  # another number than before
    try:
        single = sm.generate(m, batch=2, **settings)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    assert torch.equal(together, single)
    assert not torch.equal(together, sm.generate(m, batch=5, **settings | {"seed": 4}))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sm.generate(machine(), count=1, steps=2, sampler="ddpm")
    assert torch.equal(before, torch.get_rng_state())


class Recorder(Denoiser):
    """Answers 0, and remembers at which noise levels it was asked."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.sigmas = schedule, []

    def forward(self, x_t, t, **kwargs):
        from azula.denoise import DiracPosterior

        alpha, sigma = self.schedule(t)
        self.sigmas.append(float(sigma / alpha))
        return DiracPosterior(mean=torch.zeros_like(x_t))


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_edm_steps_visit_the_edm_levels_and_end_at_the_answer(steps):
    recorder = Recorder(EDMSchedule())
    x = sm.generate(recorder, count=1, steps=steps, shape=(1, 4, 4))
    np.testing.assert_allclose(recorder.sigmas, edm_sigmas(steps), rtol=1e-6)
    assert (x == 0).all()


def test_edm_may_begin_and_end_at_other_levels():
    recorder = Recorder(schedule_of("edm:8,0.03"))
    sm.generate(recorder, count=1, steps=10, shape=(1, 4, 4))
    np.testing.assert_allclose(recorder.sigmas, edm_sigmas(10, 0.03, 8.0), rtol=1e-6)
    for name, kind in SCHEDULES.items():
        assert type(schedule_of(name)) is kind


@pytest.mark.parametrize("text", ["edm:8", "edm:0.03,8", "edm:8,0", "edm:8,x", "edm:1,1", "vp:8,1"])
def test_levels_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=f"schedule is '{text}'; expected vp.*as edm:8,0.03"):
        schedule_of(text)


@pytest.mark.parametrize("levels", [(2.0, 1.0), (0.0, 1.0), (1.0, float("inf"))])
def test_an_edm_schedule_falls(levels):
    with pytest.raises(ValueError, match="expected sigma_max > sigma_min > 0"):
        EDMSchedule(*levels)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_on_every_schedule_ends_at_the_images(schedule, sampler):
    """The ideal machine memorizes: its samples are training images."""
    m = machine("ideal", SCHEDULES[schedule]())
    x = sm.generate(m, count=6, steps=24, sampler=sampler)
    assert torch.isfinite(x).all()
    images = torch.from_numpy(m.corpus.images / 127.5 - 1).float()
    nearest = (x[:, None] - images[None]).abs().amax((2, 3, 4)).min(1).values
    assert nearest.max() < 0.01


def test_gaussian_samples_have_the_moments_of_the_data():
    corpus = random_corpus(seed=1, N=200, H=3, W=3)
    x = sm.generate(sm.build("gaussian", corpus), count=800, steps=40, batch=400)
    data = torch.from_numpy(corpus.images / 127.5 - 1).float().flatten(1)
    x = x.flatten(1)
    assert (x.mean(0) - data.mean(0)).abs().max() < 0.1
    assert (torch.cov(x.T) - torch.cov(data.T)).abs().max() < 0.08


def test_generation_ignores_the_machines_bandwidth_unless_told():
    with_h = machine("ls", bandwidth=0.3)
    plain = sm.generate(machine("ls"), count=2, steps=4)
    assert torch.equal(sm.generate(with_h, count=2, steps=4), plain)
    assert not torch.equal(sm.generate(with_h, count=2, steps=4, bandwidth=0.3), plain)
    assert with_h.bandwidth == 0.3


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), EDMSchedule()])
def test_machines_are_azula_denoisers(name, schedule):
    """forward(x_t, t).mean = D(x_t / alpha_t, sigma_t / alpha_t), for one t or one each."""
    m = machine(name, schedule)
    assert isinstance(m, Denoiser)
    x_t = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.7])
    alpha, sigma = schedule(t)
    alpha, sigma = alpha.reshape(2, 1, 1, 1), sigma.double() / alpha.double()
    D = m(x_t, t).mean
    assert (D - m.denoise(x_t / alpha, sigma)).abs().max() < 1e-6
    assert (m(x_t[:1], t[0]).mean - D[:1]).abs().max() < 1e-6


def test_azulas_own_samplers_and_guidance_run_on_machines():
    images = random_corpus(N=8).images
    corpus = sm.Corpus(images, labels=np.array([0, 1] * 4))
    m = sm.build("ls", corpus, patch_size=3)
    sampler = DDIMSampler(m, steps=8, silent=True)
    x = sampler(sampler.init((2, 1, 6, 6)))
    assert torch.isfinite(x).all()
    guided = CFGDenoiser(m)
    sampler = DDIMSampler(guided, steps=8, silent=True)
    x = sampler(sampler.init((2, 1, 6, 6)), positive={"label": 0}, negative={"label": None})
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", MACHINES)
def test_a_label_makes_its_class_the_source(name, kernel):
    images = random_corpus(N=10).images
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    corpus = sm.Corpus(images, labels=labels)
    m = small(name, corpus)
    y, sigma = noised(corpus, [0.1, 1.0, 10.0])
    D = m.denoise(y, sigma, label=torch.tensor([1, 0, 1]))
    for p, label in enumerate([1, 0, 1]):
        alone = small(name, images[labels == label], kernel=kernel)
        assert (D[p] - alone.denoise(y[p : p + 1], sigma[p])[0]).abs().max() < 1e-5
    assert torch.equal(m.denoise(y, sigma, label=1)[0], D[0])


def test_score_and_shapes_follow_the_input():
    m = machine("ls")
    y = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    D = m.denoise(y, 0.5)
    assert D.dtype == torch.float64
    torch.testing.assert_close(m.score(y, 0.5), (D - y) / 0.25)
    assert m.denoise(y[:0], 0.5).shape == (0, 1, 6, 6)
