"""Words: names that nobody knows, and which were probably meant; numbers, where they are some."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def unknown(met: str, name: object, known: Iterable[str], near: Iterable[str] = ()) -> str:
    """One sentence: what was met, the nearest name (of `near` too), and which there are."""
    known = list(known)
    close = difflib.get_close_matches(str(name), [*known, *near], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{met}{hint}; there are {', '.join(known) or 'none'}"


def check_name(what: str, name: object, known: Iterable[str], otherwise: str = "") -> None:
    """Raises a ValueError unless `name` is known; `what` is what it names, as "machine".

    The error ends with what else would do, `otherwise`.
    """
    if name not in (known := list(known)):
        met = unknown(f"no {what} is called {name!r}", name, known)
        raise ValueError(f"{met}; {otherwise}" if otherwise else met)


def check_integer(what: str, value: object) -> int:
    """`value` as an int, if it is a positive whole number; else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} is {value!r}; expected a positive whole number")
    return int(value)


def check_seed(seed: object) -> None:
    """ValueError unless a seed is a whole number that is 0 or more."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected a whole number that is 0 or more")


def options_of(
    kind: type[T], given: Mapping[str, Any], earlier: Mapping[str, str] | None = None
) -> T:
    """A dataclass of options from keyword arguments, of which `earlier` names are still taken.

    Raises:
        TypeError: For a keyword that is none of its fields.
    """
    earlier = earlier or {}
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    named = {earlier.get(name, name): value for name, value in given.items()}
    for name in named:
        if name not in known:
            raise TypeError(unknown(f"there is no argument {name!r}", name, known))
    return kind(**named)
