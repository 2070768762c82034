"""The same fold, fast, one file per way to compute it.

A kernel is a module with two functions, `fold` and `compose`. It knows windows and sources, and
no machine: adding a machine touches no kernel.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Protocol, cast

import numpy as np
from torch import Tensor

from scoremachine.posterior import Fold
from scoremachine.windows import Collection

MODULES = {"numba": "cpu", "torch": "device", "reference": "reference"}
KERNELS = ("auto", *MODULES)


class Kernel(Protocol):
    """What a kernel answers. Logits lack the term -|y|^2 / (2 sigma^2), common to all sources."""

    def fold(
        self,
        images: np.ndarray,
        index: np.ndarray,
        y: Tensor,
        sigma: Tensor,
        collection: Collection,
        T: float,
        leaders: int,
        known: Fold | None,
    ) -> Fold:
        """Folds images[index].

        `y` is float64 on the CPU, wrapped already where the boundary is circular. Sources more
        than T nats below their site's leader may be left out; `known` is the fold of the tiles
        before, whose leaders may be relied on.
        """

    def compose(
        self,
        images: np.ndarray,
        index: np.ndarray,
        y: Tensor,
        sigma: Tensor,
        collection: Collection,
        T: float,
        known: Fold,
    ) -> Tensor:
        """sum_i r_i mu_i of the sources images[index], with the whole fold known: (B, C, H, W)."""


def choose(name: str) -> Kernel:
    """The kernel called `name`; "auto" takes torch where there is a GPU, numba elsewhere."""
    if name not in KERNELS:
        raise ValueError(f"no kernel is called {name!r}; there are {', '.join(KERNELS)}")
    if name == "auto":
        import torch

        name = "torch" if torch.cuda.is_available() else "numba"
    return cast(Kernel, importlib.import_module(f"scoremachine.kernels.{MODULES[name]}"))


def name_of(kernel: Kernel) -> str:
    """The name under which `choose` finds a kernel."""
    home = cast(ModuleType, kernel).__name__.rsplit(".", 1)[-1]
    return next(name for name, module in MODULES.items() if module == home)
