"""What a record on disk was made with, against what is asked now."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from scoremachine._version import __version__

ABSENT = object()


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    packages = ("torch", "numpy", "numba", "azula")
    return {"scoremachine": __version__} | {name: version(name) for name in packages}


def differing(asked: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, those that only one side has among them."""
    names = dict.fromkeys([*asked, *known])
    return [name for name in names if asked.get(name, ABSENT) != known.get(name, ABSENT)]


def other_versions(known: Mapping[str, str] | None) -> str:
    """What a record was made with where that is not what runs now, as in "numpy 2.0"; or ""."""
    now = versions()
    if known is None:
        return "unknown versions"
    return " and ".join(f"{name} {known.get(name, 'unknown')}" for name in differing(now, known))
