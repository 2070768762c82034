"""The machines, one short file each, and `build`, which finds one by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from scoremachine.corpus import Corpus
from scoremachine.machines.composite import PatchComposite
from scoremachine.machines.equivariant import EquivariantLocalScore
from scoremachine.machines.gaussian import GaussianScore
from scoremachine.machines.ideal import IdealScore
from scoremachine.machines.local import LocalScore
from scoremachine.machines.machine import BoxMachine, Machine

MACHINES: dict[str, type[Machine]] = {
    machine.name: machine
    for machine in (IdealScore, GaussianScore, LocalScore, EquivariantLocalScore, PatchComposite)
}


def build(name: str, corpus: Corpus, **settings: Any) -> Machine:
    """The machine called `name` on `corpus`.

    Arguments:
        name: "ideal", "gaussian", "ls", "els" or "pspc".
        corpus: The images.
        settings: patch_size, bandwidth, kernel, schedule, boundary: those the machine has. A
            `patch_size` of "auto" is taken by machines without patches too.

    Raises:
        ValueError: For an unknown name or a setting that the machine does not have.
    """
    if name not in MACHINES:
        close = difflib.get_close_matches(str(name), MACHINES, n=1)
        raise ValueError(
            f"no machine is called {name!r}"
            + (f": did you mean {close[0]!r}?" if close else "")
            + f" There are {', '.join(MACHINES)}."
        )
    kind = MACHINES[name]
    known = inspect.signature(kind.__init__).parameters
    if settings.get("patch_size") == "auto" and "patch_size" not in known:
        del settings["patch_size"]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"machine {name!r} has no setting {setting!r}; it has "
                + ", ".join(p for p in known if p not in ("self", "corpus"))
            )
    return kind(corpus, **settings)


__all__ = [
    "MACHINES",
    "BoxMachine",
    "EquivariantLocalScore",
    "GaussianScore",
    "IdealScore",
    "LocalScore",
    "Machine",
    "PatchComposite",
    "build",
]
