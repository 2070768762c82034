"""Query and response windows, and which size they have at which noise level.

A machine is a row of a table (docs/design.md): where its sites are, what each looks at, what it
contributes to, and what it is compared with. `Collection` is that row for one patch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Boundary = Literal["broken", "circular"]


@dataclass(frozen=True)
class Collection:
    """A filtered posterior mean collection (Niedoba et al. 2605.24192) of box windows.

    Attributes:
        image: Height and width (H, W) of the images.
        window: Height and width of every query box.
        sites: "pixels": one site per pixel, its box centred there and cut off at the border;
            "boxes": one site per box that fits inside the image.
        response: "pixel": a site answers for its own pixel; "box": for its whole box.
        source: "same": the images at the site's own position; "every": all the positions at which
            a window fits.
        boundary: What a site whose box crosses the border sees, where `source` is "every".
            "broken": the box is cut off, and compared only with boxes cut off in the same way;
            "circular": the box wraps around, and is compared with every box that fits.
    """

    image: tuple[int, int]
    window: tuple[int, int]
    sites: Literal["pixels", "boxes"]
    response: Literal["pixel", "box"]
    source: Literal["same", "every"] = "same"
    boundary: Boundary = "broken"

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of sites."""
        if self.sites == "pixels":
            return self.image
        (H, W), (P, Q) = self.image, self.window
        return H - P + 1, W - Q + 1

    @property
    def wraps(self) -> bool:
        """Whether the query is continued periodically."""
        return self.source == "every" and self.boundary == "circular"

    @property
    def cut(self) -> bool:
        """Whether boxes are cut off at the border."""
        return self.sites == "pixels" and not self.wraps

    @property
    def whole(self) -> bool:
        """Whether the only site is the whole image."""
        return self.response == "box" and self.grid == (1, 1)

    @cached_property
    def shifts(self) -> np.ndarray:
        """Displacements (dy, dx) from query to source, as an int64 array of shape (K, 2)."""
        if self.source == "same":
            return np.zeros((1, 2), dtype=np.int64)
        axes = []
        for n, p in zip(self.image, self.window, strict=True):
            last = max(n - p, 0)
            axes.append(np.arange(1 - n if self.wraps else -last, last + 1))
        dy, dx = np.meshgrid(*axes, indexing="ij")
        return np.stack([dy.ravel(), dx.ravel()], axis=1).astype(np.int64)

    @cached_property
    def coverage(self) -> np.ndarray:
        """How many sites answer for each pixel, float64 (H, W): the sum of r_i."""
        if self.response == "pixel":
            return np.ones(self.image)
        counts = [
            np.convolve(np.ones(n), np.ones(p)) for n, p in zip(self.grid, self.window, strict=True)
        ]
        return np.outer(*counts)


def edm_sigmas(
    steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """The noise levels of Karras et al. 2022 (2206.00364, eq. 5), falling, float64 (steps,)."""
    if steps == 1:
        return np.array([sigma_max])
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + np.arange(steps) / (steps - 1) * (low - high)) ** rho


def kamb_sigmas(steps: int = 20) -> np.ndarray:
    """The noise levels sigma / alpha at t = 1/steps ... 1 of Kamb & Ganguli's cosine schedule."""
    abar = np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps / 1.008) ** 2
    return np.sqrt((1 - abar) / abar)


class LevelSchedule:
    """Noise level -> value: the value listed at the nearest noise level, in log sigma.

    Arguments:
        sigmas: Noise levels (positive, distinct), in any order.
        values: As many values.
        name: What to call the schedule in messages and records.

    Raises:
        ValueError: Where the lists differ in length, are empty, or hold anything else.
    """

    def __init__(self, sigmas: Iterable[float], values: Iterable[float], name: str) -> None:
        levels, entries = np.asarray(list(sigmas), dtype=np.float64), np.asarray(list(values))
        if len(levels) != len(entries) or len(levels) == 0:
            raise ValueError(
                f"a schedule got {len(levels)} noise levels and {len(entries)} values; "
                "expected one value for each of at least one level"
            )
        if not (np.isfinite(levels).all() and (levels > 0).all()):
            raise ValueError(f"noise levels are {levels.tolist()}; expected positive numbers")
        if len(np.unique(levels)) != len(levels):
            raise ValueError("a schedule lists a noise level twice; keep one of the two")
        order = np.argsort(levels)
        self.sigmas, self.values, self.name = levels[order], entries[order], name

    def at(self, sigma: float) -> float:
        """The value at noise level `sigma`."""
        return self.values[np.argmin(np.abs(np.log(self.sigmas) - math.log(sigma)))].item()

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and isinstance(other, LevelSchedule)
            and np.array_equal(self.sigmas, other.sigmas)
            and np.array_equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((self.sigmas.tobytes(), self.values.tobytes()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.values.tolist()})"

    def plain(self) -> dict[str, object]:
        """The schedule as JSON can hold it."""
        return {
            "name": self.name,
            "sigmas": self.sigmas.tolist(),
            "values": self.values.tolist(),
        }


class PatchSchedule(LevelSchedule):
    """Noise level -> patch size, a positive whole number; see `LevelSchedule`."""

    def __init__(self, sigmas: Iterable[float], sizes: Iterable[int], name: str = "custom") -> None:
        super().__init__(
            sigmas, [check_integer("a size in a patch schedule", P) for P in sizes], name
        )

    @property
    def sizes(self) -> np.ndarray:
        """The sizes, by rising noise level."""
        return self.values

    def __call__(self, sigma: float) -> int:
        """The patch size at noise level `sigma`."""
        return int(self.at(sigma))

    @classmethod
    def constant(cls, size: int) -> PatchSchedule:
        """One size at every noise level."""
        check_integer("patch_size", size)
        return cls([1.0], [size], name=str(size))

    @classmethod
    def named(cls, name: str) -> PatchSchedule:
        """A published schedule: one of `PatchSchedule.names()`.

        Sources: "pspc-cifar10" is PSPC-Square of Niedoba et al. 2411.19339; the "kamb-..." lists
        are the equivariant local machines of Kamb & Ganguli 2412.20292, calibrated on zero-padded
        ResNets and U-Nets at 32 x 32, entry i at t = (i + 1) / 20.
        """
        if name not in PUBLISHED:
            raise ValueError(
                f"no published patch schedule is called {name!r}; there are "
                + ", ".join(sorted(PUBLISHED))
            )
        sigmas, sizes = PUBLISHED[name]
        return cls(sigmas, sizes, name=name)

    @staticmethod
    def names() -> list[str]:
        """The names that `named` takes."""
        return sorted(PUBLISHED)


class BandwidthSchedule(LevelSchedule):
    """Noise level -> bandwidth h, a finite number >= 0; see `LevelSchedule`."""

    def __init__(
        self, sigmas: Iterable[float], bandwidths: Iterable[float], name: str = "custom"
    ) -> None:
        super().__init__(sigmas, [check_bandwidth(float(h)) for h in bandwidths], name)

    def __call__(self, sigma: float) -> float:
        """The bandwidth at noise level `sigma`."""
        return self.at(sigma)


def check_integer(what: str, value: object) -> int:
    """`value` as an int, if it is a positive whole number; else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} is {value!r}; expected a positive whole number")
    return int(value)


def check_bandwidth(h: float) -> float:
    """`h` if it is a finite number >= 0; else a ValueError."""
    if not (math.isfinite(h) and h >= 0):
        raise ValueError(f"bandwidth is {h!r}; expected a finite number that is 0 or more")
    return h


def check_window(size: int, image: Sequence[int], odd: bool) -> int:
    """`size` if a window of that size suits images of `image` = (H, W); else a ValueError."""
    H, W = image
    largest = max(H, W)
    if size > largest:
        raise ValueError(
            f"patch_size {size} is larger than the {H} x {W} images; "
            f"expected at most {largest}: choose a smaller one or larger images"
        )
    if odd and size % 2 == 0:
        raise ValueError(
            f"patch_size {size} is even; a window centred on a pixel has an odd size: "
            f"use {size - 1}" + (f" or {size + 1}" if size < largest else "")
        )
    return size


def _digits(text: str) -> list[int]:
    return [int(n) for n in text.split()]


PUBLISHED: dict[str, tuple[np.ndarray, list[int]]] = {
    "pspc-cifar10": (edm_sigmas(18), [32] * 7 + [23, 15, 11, 7, 5] + [3] * 6),
    "kamb-cifar10-resnet": (
        kamb_sigmas(),
        _digits("3 3 3 3 5 5 5 7 7 7 7 9 9 11 11 13 15 17 17 17"),
    ),
    "kamb-mnist-resnet": (
        kamb_sigmas(),
        _digits("3 3 5 5 5 7 7 7 9 9 11 11 11 11 13 15 15 15 15 15"),
    ),
    "kamb-fashionmnist-resnet": (
        kamb_sigmas(),
        _digits("3 3 5 5 7 7 9 9 9 11 11 11 13 13 13 15 15 15 17 17"),
    ),
    "kamb-celeba-resnet": (
        kamb_sigmas(),
        _digits("3 3 3 5 5 5 5 5 7 7 9 9 9 11 11 11 13 15 19 19"),
    ),
    "kamb-cifar10-unet": (
        kamb_sigmas(),
        _digits("3 3 3 3 5 5 5 5 7 7 7 7 9 9 11 13 13 15 17 25"),
    ),
    "kamb-mnist-unet": (
        kamb_sigmas(),
        _digits("3 3 3 5 5 7 7 7 9 9 9 11 13 15 17 21 23 23 25 27"),
    ),
}
