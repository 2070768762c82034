"""Words: names that nobody knows, and which were probably meant; numbers, where they are some."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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


def number(text: str, kind: type, otherwise: Any) -> Any:
    """`text` as a number of a kind, or else what it is otherwise."""
    try:
        return kind(text)
    except ValueError:
        return otherwise


def any_number(text: str) -> Any:
    """`text` as an int or a float, where it is one."""
    return number(text, int, number(text, float, text))
