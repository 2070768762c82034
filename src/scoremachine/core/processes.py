"""Forward processes per frequency: x_t = A_t x + sigma_t eps, with white noise eps.

A_t is diagonal in an orthonormal basis of pictures, the same for every channel. In coefficients
z = T x of that basis a process is an azula schedule whose alpha_t is a picture of gains, so that
azula's samplers run on it, coefficient by coefficient. Hoogeboom & Salimans 2209.05557 (blurring
diffusion).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from azula.noise import Schedule, VPSchedule
from scipy.fft import dct
from torch import Tensor

from scoremachine.runtime.validation import check_integer, check_name

LEAST = 1e-3  # the smallest gain
TILE = 2048  # images that are read at a time


class Process(Schedule):
    """Ordinary diffusion, x_t = alpha_t x + sigma_t eps, and the base class of other processes.

    Arguments:
        shape: Height and width (H, W) of the pictures.
        schedule: azula's schedule of alpha_t and sigma_t; None: `VPSchedule()`.
    """

    name = "ordinary"

    def __init__(self, shape: tuple[int, int], schedule: Schedule | None = None) -> None:
        self.shape = check_integer("height", shape[0]), check_integer("width", shape[1])
        self.base = VPSchedule() if schedule is None else schedule

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        """Orthonormal matrices (H, H) and (W, W), float64: z = bases[0] x bases[1]^T."""
        H, W = self.shape
        return torch.eye(H, dtype=torch.float64), torch.eye(W, dtype=torch.float64)

    def coefficients(self, x: Tensor) -> Tensor:
        """z = T x of pictures x (..., H, W)."""
        rows, columns = (basis.to(x) for basis in self.bases)
        return rows @ x @ columns.T

    def picture(self, z: Tensor) -> Tensor:
        """x = T^-1 z of coefficients z (..., H, W)."""
        rows, columns = (basis.to(z) for basis in self.bases)
        return rows.T @ z @ columns

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The gains A_t, shape (H, W), none below 1e-3, and sigma_t, shape (), at a time t ()."""
        alpha, sigma = self.base(torch.as_tensor(t))
        return (alpha * self.damping(float(t))).clamp(min=LEAST), sigma

    def damping(self, t: float) -> Tensor:
        """The factor in [0, 1] of each gain besides alpha_t, float64 (H, W)."""
        return torch.ones(self.shape, dtype=torch.float64)

    def check(self, shape: Sequence[int]) -> None:
        """ValueError unless the process is for pictures of that height and width."""
        if self.shape != tuple(shape):
            raise ValueError(
                f"the process is one of {self.shape[0]} x {self.shape[1]} pictures; expected "
                f"{shape[0]} x {shape[1]}"
            )

    def apply(self, x: Tensor, t: float) -> Tensor:
        """A_t x of pictures x (..., H, W)."""
        gains, _ = self(torch.tensor(t, dtype=torch.float64))
        return self.picture(gains.to(x) * self.coefficients(x))

    def seen(self, images: np.ndarray, t: float) -> np.ndarray:
        """A_t x of images uint8 (N, C, H, W), float32."""
        found = np.empty(images.shape, np.float32)
        for start in range(0, len(images), TILE):
            x = torch.from_numpy(np.array(images[start : start + TILE])).float() / 127.5 - 1
            found[start : start + TILE] = self.apply(x, t).numpy()
        return found


class HeatDissipation(Process):
    """Blur that grows with the noise: A_t = alpha_t exp(-lambda tau_t) in the cosine basis.

    The heat equation of Rissanen et al. 2206.13397 in the form of Hoogeboom & Salimans 2209.05557:
    cosine (i, j) has lambda = pi^2 (i^2 / H^2 + j^2 / W^2), tau_t = sigma_B^2 / 2, and the blur's
    standard deviation sigma_B grows as blur sin^2(pi t / 2).

    Arguments:
        blur: The standard deviation of the blur at t = 1, in pixels, > 0; None: 20 for a side of
            32, as published, and in proportion for other sides.
        shape, schedule: See `Process`.
    """

    name = "heat"

    def __init__(
        self,
        shape: tuple[int, int],
        schedule: Schedule | None = None,
        blur: float | None = None,
    ) -> None:
        super().__init__(shape, schedule)
        if blur is None:
            blur = 20 * max(self.shape) / 32
        if isinstance(blur, bool) or not isinstance(blur, int | float) or not 0 < blur < math.inf:
            raise ValueError(f"blur is {blur!r}; expected a number of pixels above 0")
        self.blur = float(blur)

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        H, W = (torch.from_numpy(dct(np.eye(n), axis=0, norm="ortho").copy()) for n in self.shape)
        return H, W

    def damping(self, t: float) -> Tensor:
        H, W = self.shape
        i, j = torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64)
        rate = math.pi**2 * ((i / H)[:, None] ** 2 + (j / W) ** 2)
        deviation = self.blur * math.sin(math.pi * t / 2) ** 2
        return torch.exp(-rate * deviation**2 / 2)


class Pyramid(Process):
    """Bands of a pyramid of block means: the finer a band, the sooner it is pure noise.

    Edify Image (NVIDIA 2411.07126): the differences between means of blocks of ever smaller size
    are attenuated ever faster. Of K + 1 bands, band k (0: means of the largest blocks) has gain
    alpha(t / t_k), with t_k = (K + 1 - k) / (K + 1), and 1e-3 from t_k on: then a picture of block
    means has all the information, and a sampler may work on that (`coarse`).

    Arguments:
        levels: K, how often the side is halved, >= 1.
        halvings: How often it has been halved already: `halved` gives the process of the block
            means, which has fewer bands and less noise.
        shape: (H, W), multiples of 2^(levels - halvings).
        schedule: See `Process`.
    """

    name = "pyramid"

    def __init__(
        self,
        shape: tuple[int, int],
        schedule: Schedule | None = None,
        levels: int = 2,
        halvings: int = 0,
    ) -> None:
        super().__init__(shape, schedule)
        self.levels, self.halvings = check_integer("levels", levels), halvings
        if (alpha := float(self.base(torch.tensor(1.0))[0])) > 0.1:
            raise ValueError(
                f"the schedule's alpha is {alpha:g} at t = 1, and the bands of a pyramid fade with "
                "it; expected one that vanishes: vp, cosine or rectified"
            )
        if any(n % 2**self.depth for n in self.shape):
            H, W = self.shape
            raise ValueError(
                f"a pyramid of {self.levels} levels halves the sides of {H} x {W} pictures as "
                f"often; expected multiples of {2**self.depth}: use size= or fewer levels"
            )

    @property
    def depth(self) -> int:
        """How often the pictures can still be halved."""
        return self.levels - self.halvings

    def halved(self, times: int) -> Pyramid:
        """The process of means of blocks of 2^times pixels."""
        H, W = (n // 2**times for n in self.shape)
        return Pyramid((H, W), self.base, self.levels, self.halvings + times)

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        H, W = (haar(n, self.depth) for n in self.shape)
        return H, W

    @cached_property
    def bands(self) -> Tensor:
        """The band of each coefficient, int64 (H, W)."""
        ends = range(1, self.depth + 1)
        i, j = (
            sum((torch.arange(n) >= n // 2**k).long() for k in ends) + torch.zeros(n).long()
            for n in self.shape
        )
        return torch.maximum(i[:, None], j)

    def last(self, band: int) -> float:
        """The time from which a band is pure noise."""
        return (self.levels + 1 - band) / (self.levels + 1)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = self.base(torch.as_tensor(t))
        times = torch.tensor(
            [min(1.0, float(t) / self.last(k)) for k in range(self.depth + 1)], dtype=torch.float64
        )
        gains = self.base(times)[0].clamp(min=LEAST)
        # of block means: averaging reduces the noise, and leaves the gain as it was
        return gains[self.bands], sigma / 2**self.halvings

    def coarse(self, t: float) -> int:
        """How often the side may be halved at time t, since finer bands are pure noise: 0 to K."""
        return sum(t >= self.last(k) for k in range(1, self.depth + 1))


def haar(n: int, levels: int) -> Tensor:
    """The orthonormal Haar matrix (n, n): block means first, then ever finer differences."""
    basis = torch.eye(n, dtype=torch.float64)
    for k in range(levels):
        m = n // 2**k
        even, odd = basis[:m:2], basis[1:m:2]
        basis = torch.cat([(even + odd) / math.sqrt(2), (even - odd) / math.sqrt(2), basis[m:]])
    return basis


PROCESSES: dict[str, Callable[..., Process]] = {
    kind.name: kind for kind in (Process, HeatDissipation, Pyramid)
}


def process_of(
    name: str | Process, shape: tuple[int, int], schedule: Schedule | None = None
) -> Process:
    """The process called "ordinary", "heat" or "pyramid" for pictures (H, W); or a given process.

    Raises:
        ValueError: For an unknown name, or a process of pictures of another size.
    """
    if not isinstance(name, Process):
        check_name("process", name, PROCESSES)
        return PROCESSES[name](shape, schedule)
    name.check(shape)
    return name
