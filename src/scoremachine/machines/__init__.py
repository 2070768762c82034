"""The machines, one short file each, found by importing this folder, and `build`."""

from __future__ import annotations

import importlib
import pkgutil

from scoremachine.machines.build import build, calibrate, kind_of, spelled
from scoremachine.machines.composite import Composite
from scoremachine.machines.equivariant import EquivariantLocalScore, EquivariantPatchComposite
from scoremachine.machines.gaussian import GaussianScore
from scoremachine.machines.ideal import EquivariantScore, IdealScore
from scoremachine.machines.local import LocalScore
from scoremachine.machines.machine import MACHINES, LocalMachine, Machine
from scoremachine.machines.patch_composite import PatchComposite, PatchCompositeFlex
from scoremachine.machines.pca import PCALocality
from scoremachine.machines.smoothed import SmoothedScore
from scoremachine.machines.windowed import BoxMachine, EquivariantMachine, WindowMachine

TABLE = "ideal gaussian es ls els pspc epc pspc-flex pca smoothed composite".split()  # noqa: SIM905

# a machine is added to MACHINES when its module is imported; sorted: the table's order, then others
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _name in [*TABLE, *sorted(MACHINES.keys() - set(TABLE))]:
    MACHINES[_name] = MACHINES.pop(_name)

__all__ = [
    "MACHINES",
    "BoxMachine",
    "Composite",
    "EquivariantLocalScore",
    "EquivariantMachine",
    "EquivariantPatchComposite",
    "EquivariantScore",
    "GaussianScore",
    "IdealScore",
    "LocalMachine",
    "LocalScore",
    "Machine",
    "PCALocality",
    "PatchComposite",
    "PatchCompositeFlex",
    "SmoothedScore",
    "WindowMachine",
    "build",
    "calibrate",
    "kind_of",
    "spelled",
]
