"""Fast implementations of the fold, one file for each.

A kernel is a module with the functions of `posterior.Engine`. It depends on windows and sources,
not on machines: a new machine needs no change of a kernel.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import cast

from scoremachine.core.posterior import Engine
from scoremachine.runtime.validation import check_name

MODULES = {"numba": "engines.cpu", "torch": "engines.pytorch", "reference": "core.reference"}
KERNELS = ("auto", *MODULES)


def choose(name: str) -> Engine:
    """The kernel called `name`; "auto" takes torch where there is a GPU, numba elsewhere."""
    check_name("kernel", name, KERNELS)
    if name == "auto":
        import torch

        name = "torch" if torch.cuda.is_available() else "numba"
    return cast(Engine, importlib.import_module(f"scoremachine.{MODULES[name]}"))


def name_of(kernel: Engine) -> str:
    """The name under which `choose` finds a kernel."""
    home = cast(ModuleType, kernel).__name__.removeprefix("scoremachine.")
    return next(name for name, module in MODULES.items() if module == home)
