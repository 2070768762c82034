"""azula's samplers by name."""

from __future__ import annotations

from azula.sample import DDIMSampler, DDPMSampler, EulerSampler, HeunSampler, Sampler

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
}
