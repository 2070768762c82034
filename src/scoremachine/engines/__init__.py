"""The same fold, fast, one file per way to compute it.

A kernel is a module with the functions of `posterior.Engine`. It knows windows and sources, and
no machine: adding a machine touches no kernel.
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
