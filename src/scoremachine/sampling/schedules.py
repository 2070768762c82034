"""Noise schedules: noise levels as a function of a sampler's time."""

from __future__ import annotations

import math

import torch
from azula.noise import CosineSchedule, RectifiedSchedule, Schedule, VPSchedule
from scipy.optimize import brentq
from torch import Tensor

from scoremachine.runtime.validation import check_name


class EDMSchedule(Schedule):
    r"""The noise levels of Karras et al. 2022 (2206.00364, eq. 5) as an azula schedule.

    alpha_t = 1, sigma_t = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
            raise ValueError(
                f"an EDM schedule goes from sigma_max = {sigma_max:g} to sigma_min = {sigma_min:g} "
                f"with rho = {rho:g}; expected sigma_max > sigma_min > 0 and rho > 0"
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho


SCHEDULES: dict[str, type[Schedule]] = {
    "vp": VPSchedule,
    "cosine": CosineSchedule,
    "edm": EDMSchedule,
    "rectified": RectifiedSchedule,
}


def schedule_of(text: str) -> Schedule:
    """A schedule by its name in `SCHEDULES`; "edm:8,0.03" is EDM's from noise level 8 to 0.03.

    Raises:
        ValueError: For an unknown name, or invalid noise levels.
    """
    name, colon, levels = text.partition(":")
    check_name("schedule", name, SCHEDULES)
    if not colon:
        return SCHEDULES[name]()
    try:
        high, low = map(float, levels.split(","))
    except ValueError:
        high = low = 0.0
    if name != "edm" or not high > low > 0:
        raise ValueError(
            f"schedule is {text!r}; expected {', '.join(SCHEDULES)}, or edm:HIGH,LOW with noise "
            "levels HIGH > LOW > 0, as edm:8,0.03"
        )
    return EDMSchedule(low, high)


def times_of(schedule: Schedule, steps: int, start: float = 0.0) -> Tensor:
    """The times of the steps of a trajectory, in descending order, float64 (steps,)."""
    first = 1.0 if start == 0 else time_of(schedule, (1 - start) / start)
    return torch.linspace(first, 0, steps, dtype=torch.float64)


def time_of(schedule: Schedule, sigma: float) -> float:
    """The time t in [0, 1] at which sigma_t / alpha_t is `sigma`, or the nearer end of [0, 1]."""

    def excess(t: float) -> float:
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        return math.log(max(float(sigma_t / alpha_t), 1e-300)) - math.log(sigma)

    if excess(1.0) <= 0:
        return 1.0
    return 0.0 if excess(0.0) >= 0 else float(brentq(excess, 0.0, 1.0, xtol=1e-12))
