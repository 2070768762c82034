"""Names that nobody knows: an error that says which are known, and which was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(met: str, name: object, known: Iterable[str], near: Iterable[str] = ()) -> str:
    """One sentence: what was met, the nearest name (of `near` too), and which there are."""
    known = list(known)
    close = difflib.get_close_matches(str(name), [*known, *near], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{met}{hint}; there are {', '.join(known) or 'none'}"


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Raises a ValueError unless `name` is known; `what` is what it names, as "machine"."""
    if name not in (known := list(known)):
        raise ValueError(unknown(f"no {what} is called {name!r}", name, known))
