"""Noise levels, and the settings of a machine at each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from scoremachine.runtime.files import read_json
from scoremachine.runtime.validation import check_integer, check_name

CALIBRATION = "the calibration.json that scoremachine calibrate --out writes"


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


class ByLevel:
    """A table of entries for noise levels, in ascending order of the levels.

    Arguments:
        levels: Noise levels, float64 (K,), in any order.
        entries: The entry of each, an array of K rows.
        name: Its name in messages and records.

    Raises:
        ValueError: If a level is not positive, or appears twice.
    """

    def __init__(self, levels: np.ndarray, entries: np.ndarray, name: str) -> None:
        if not (np.isfinite(levels).all() and (levels > 0).all()):
            raise ValueError(f"noise levels are {levels.tolist()}; expected positive numbers")
        if len(np.unique(levels)) != len(levels):
            raise ValueError("a schedule lists a noise level twice; keep one of the two")
        order = np.argsort(levels)
        self.sigmas, self.values, self.name = levels[order], entries[order], name

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and isinstance(other, ByLevel)
            and np.array_equal(self.sigmas, other.sigmas)
            and np.array_equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((self.sigmas.tobytes(), self.values.tobytes()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.values.tolist()})"

    def plain(self) -> dict[str, object]:
        """A form that JSON can represent."""
        return {
            "name": self.name,
            "sigmas": self.sigmas.tolist(),
            "values": self.values.tolist(),
        }


class LevelSchedule(ByLevel):
    """Noise level -> value: the value listed at the nearest noise level, in log sigma.

    Arguments:
        sigmas: Noise levels (positive, distinct), in any order.
        values: One value for each level.
        name: The name of the schedule in messages and records.

    Raises:
        ValueError: If the lists differ in length, are empty, or have invalid entries.
    """

    setting = "value"  # the argument of a machine that such a schedule sets
    published: Mapping[str, tuple[np.ndarray, Sequence[float]]] = {}

    def __init__(
        self, sigmas: Iterable[float], values: Iterable[float], name: str = "custom"
    ) -> None:
        levels = np.asarray(list(sigmas), dtype=np.float64)
        entries = np.asarray([self.check(value) for value in values])
        if len(levels) != len(entries) or len(levels) == 0:
            raise ValueError(
                f"a schedule got {len(levels)} noise levels and {len(entries)} values; "
                "expected one value for each of at least one level"
            )
        super().__init__(levels, entries, name)

    @classmethod
    def check(cls, value: Any) -> float:
        """`value` if it is valid in such a schedule; else a ValueError."""
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise ValueError(f"{cls.setting} is {value!r}; expected a number")
        return float(value)

    def __call__(self, sigma: float) -> Any:
        """The value at noise level `sigma`."""
        return self.values[np.argmin(np.abs(np.log(self.sigmas) - math.log(sigma)))].item()

    @classmethod
    def constant(cls, value: float) -> Self:
        """One value at every noise level."""
        return cls([1.0], [value], name=str(value))

    @classmethod
    def named(cls, name: str) -> Self:
        """A published schedule: one of `names()`."""
        otherwise = f"or give a number, auto, or {CALIBRATION}"
        check_name(f"published schedule of {cls.setting}", name, cls.names(), otherwise)
        return cls(*cls.published[name], name=name)

    @classmethod
    def names(cls) -> list[str]:
        """The names that `named` accepts."""
        return sorted(cls.published)

    @classmethod
    def of(cls, value: Any) -> Self:
        """A schedule from a number, a published name, the path of a calibration, or a schedule."""
        if isinstance(value, cls):
            return value
        if isinstance(value, LevelSchedule):
            raise ValueError(f"{cls.setting} is a {value!r}; expected a {cls.__name__}")
        if isinstance(value, str):
            return cls.calibrated(Path(value)) if value.endswith(".json") else cls.named(value)
        return cls.constant(value)

    @classmethod
    def calibrated(cls, path: Path) -> Self:
        """The schedule that `scoremachine calibrate --out` wrote to a calibration.json.

        Raises:
            ValueError: For any other file, or the calibration of another setting.
        """
        name = path.resolve().parent.name
        expected = f"expected {CALIBRATION}"
        record = read_json(path, expected)
        try:
            setting = "weights" if "weights" in record else record["setting"]
            if setting == cls.setting:
                return cls(record["sigmas"], record["chosen"], name=name)
        except (LookupError, TypeError):
            raise ValueError(f"{path} holds no {cls.setting}; {expected}") from None
        raise ValueError(
            f"{path} is a calibration of {setting or 'a machine that has no locality'}; expected "
            f"one of {cls.setting}: calibrate the same kind of machine"
        )


class PatchSchedule(LevelSchedule):
    """Noise level -> patch size, a positive whole number; see `LevelSchedule`.

    Published: "pspc-cifar10" is PSPC-Square of Niedoba et al. 2411.19339; the "kamb-..." lists
    are the equivariant local machines of Kamb & Ganguli 2412.20292, calibrated on zero-padded
    ResNets and U-Nets at 32 x 32, entry i at t = (i + 1) / 20. "texture" is for pictures generated
    from one photograph of 256 x 256: its patches are large enough for the objects in it. With
    "mnist-resnet" `els` of 8,000 images agrees best with the bundled network of that name (on 32
    images that the network has not seen).
    """

    setting = "patch_size"

    @classmethod
    def check(cls, value: Any) -> int:
        return check_integer("patch_size", value)

    @property
    def sizes(self) -> np.ndarray:
        """The sizes, in ascending order of the noise level."""
        return self.values


class FractionSchedule(LevelSchedule):
    """Noise level -> a number in (0, 1]; see `LevelSchedule`."""

    @classmethod
    def check(cls, value: Any) -> float:
        fraction = super().check(value)
        if not 0 < fraction <= 1:
            raise ValueError(f"{cls.setting} is {value!r}; expected a number above 0 and at most 1")
        return fraction


class ShareSchedule(FractionSchedule):
    """Noise level -> share of a heat map, in (0, 1]; see `LevelSchedule`.

    Published: "pspc-flex-cifar10", PSPC-Flex of Niedoba et al. 2411.19339.
    """

    setting = "share"


class ThresholdSchedule(FractionSchedule):
    """Noise level -> threshold tau of a Wiener filter's entries, in (0, 1]."""

    setting = "threshold"


class DeviationSchedule(LevelSchedule):
    """Noise level -> a standard deviation, a finite number >= 0; see `LevelSchedule`."""

    @classmethod
    def check(cls, value: Any) -> float:
        deviation = super().check(value)
        if not (math.isfinite(deviation) and deviation >= 0):
            raise ValueError(
                f"{cls.setting} is {value!r}; expected a finite number that is 0 or more"
            )
        return deviation


class SmoothingSchedule(DeviationSchedule):
    """Noise level -> standard deviation delta of the perturbations, a finite number >= 0."""

    setting = "delta"


class BandwidthSchedule(DeviationSchedule):
    """Noise level -> bandwidth h, a finite number >= 0; see `LevelSchedule`."""

    setting = "bandwidth"


def check_bandwidth(value: Any) -> float | BandwidthSchedule | str:
    """A bandwidth, a schedule of them or "auto"; else a ValueError."""
    if isinstance(value, BandwidthSchedule) or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(
            f"bandwidth is {value!r}; expected a number, a BandwidthSchedule or 'auto'"
        )
    return BandwidthSchedule.check(value)


class WeightSchedule(ByLevel):
    """Noise level -> weights of M machines, interpolated linearly in log sigma between the levels.

    Arguments:
        sigmas: K noise levels (positive, distinct), in any order.
        values: The weights at each, (K, M), finite numbers.
        name: The name of the schedule in records.

    Raises:
        ValueError: For invalid levels or weights.
    """

    def __init__(
        self,
        sigmas: Iterable[float],
        values: Iterable[Iterable[float]],
        name: str = "custom",
    ) -> None:
        levels = np.asarray(list(sigmas), dtype=np.float64)
        try:
            rows = np.array([list(row) for row in values], dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("weights are no rows of numbers, one row a noise level") from None
        if rows.ndim != 2 or len(rows) != len(levels) or rows.size == 0:
            raise ValueError(
                f"a schedule got {len(levels)} noise levels and weights of shape {rows.shape}; "
                "expected a row of weights for each of at least one level"
            )
        if not np.isfinite(rows).all():
            raise ValueError("weights hold NaN or infinite numbers; expected finite ones")
        super().__init__(levels, rows, name)

    def __call__(self, sigma: float) -> np.ndarray:
        """The weights at noise level `sigma`, (M,); beyond the listed levels, those of the last."""
        at, levels = math.log(sigma), np.log(self.sigmas)
        return np.array([np.interp(at, levels, column) for column in self.values.T])


LOCALITIES: dict[str, type[LevelSchedule]] = {
    kind.setting: kind
    for kind in (PatchSchedule, ShareSchedule, ThresholdSchedule, SmoothingSchedule)
}


def _digits(text: str) -> list[int]:
    return [int(n) for n in text.split()]


PatchSchedule.published = {
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
    "mnist-resnet": (
        np.geomspace(0.05, 20.0, 16),
        _digits("3 3 3 3 3 5 5 7 9 9 11 15 15 15 15 15"),
    ),
    "texture": (
        np.array([0.05, 0.09, 0.13, 0.18, 0.22, 0.3, 0.375, 0.45, 0.57, 0.7, 0.83, 1, 1.5, 1000]),
        _digits("3 9 11 15 17 21 29 35 39 43 47 51 61 15"),
    ),
}
ShareSchedule.published = {
    "pspc-flex-cifar10": (
        edm_sigmas(18),
        [1.0] * 7 + [0.7, 0.7, 0.5] + [0.4] * 4 + [0.3] * 4,
    )
}
