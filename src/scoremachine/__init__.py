"""scoremachine: training-free diffusion, exact and fast.

For a finite set of images the ideal diffusion denoiser E[clean | noisy] has a closed form; so have
its local, shift-equivariant and patch-composite variants. This package computes them.

    import scoremachine as sm

    corpus = sm.Corpus.open("digits")
    machine = sm.build("els", corpus)
    pictures = sm.generate(machine, count=16, steps=20, seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scoremachine._version import __version__

if TYPE_CHECKING:
    from scoremachine.calibration import Calibration
    from scoremachine.comparison import Comparison, compare
    from scoremachine.corpus import Corpus
    from scoremachine.heatmaps import HeatMaps
    from scoremachine.machines import (
        Composite,
        EquivariantLocalScore,
        EquivariantScore,
        GaussianScore,
        IdealScore,
        LocalScore,
        Machine,
        PatchComposite,
        PatchCompositeFlex,
        PCALocality,
        SmoothedScore,
        build,
        calibrate,
    )
    from scoremachine.mixtures import Mixture, compress
    from scoremachine.networks import Network, Training, train
    from scoremachine.processes import HeatDissipation, Process, Pyramid
    from scoremachine.sample import EDMSchedule, generate
    from scoremachine.schedules import (
        BandwidthSchedule,
        PatchSchedule,
        ShareSchedule,
        SmoothingSchedule,
        ThresholdSchedule,
        WeightSchedule,
        edm_sigmas,
    )
    from scoremachine.windows import Augment

_HOMES = {
    "calibration": ("Calibration",),
    "corpus": ("Corpus",),
    "machines": (
        "Composite",
        "EquivariantLocalScore",
        "EquivariantScore",
        "GaussianScore",
        "IdealScore",
        "LocalScore",
        "Machine",
        "PCALocality",
        "PatchComposite",
        "PatchCompositeFlex",
        "SmoothedScore",
        "build",
        "calibrate",
    ),
    "comparison": ("Comparison", "compare"),
    "mixtures": ("Mixture", "compress"),
    "processes": ("HeatDissipation", "Process", "Pyramid"),
    "networks": ("Network", "Training", "train"),
    "sample": ("EDMSchedule", "generate"),
    "heatmaps": ("HeatMaps",),
    "windows": ("Augment",),
    "schedules": (
        "BandwidthSchedule",
        "PatchSchedule",
        "ShareSchedule",
        "SmoothingSchedule",
        "ThresholdSchedule",
        "WeightSchedule",
        "edm_sigmas",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Augment",
    "BandwidthSchedule",
    "Calibration",
    "Comparison",
    "Composite",
    "Corpus",
    "EDMSchedule",
    "EquivariantLocalScore",
    "EquivariantScore",
    "GaussianScore",
    "HeatDissipation",
    "HeatMaps",
    "IdealScore",
    "LocalScore",
    "Machine",
    "Mixture",
    "Network",
    "PCALocality",
    "PatchComposite",
    "PatchCompositeFlex",
    "PatchSchedule",
    "Process",
    "Pyramid",
    "ShareSchedule",
    "SmoothedScore",
    "SmoothingSchedule",
    "ThresholdSchedule",
    "Training",
    "WeightSchedule",
    "__version__",
    "build",
    "calibrate",
    "compare",
    "compress",
    "edm_sigmas",
    "generate",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: PyTorch takes a second to load."""
    if name not in _HOME:
        raise AttributeError(f"module 'scoremachine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"scoremachine.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
