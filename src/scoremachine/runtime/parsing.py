"""Numbers in texts, where they are some."""

from __future__ import annotations

import math
from typing import Any

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1.0, "": 1.0}


def number(text: str, kind: type, otherwise: Any) -> Any:
    """`text` as a number of a kind, or else what it is otherwise."""
    try:
        return kind(text)
    except ValueError:
        return otherwise


def any_number(text: str) -> Any:
    """`text` as an int or a float, where it is one."""
    return number(text, int, number(text, float, text))


def bytes_of(text: str, what: str) -> int:
    """How many bytes "20GB", "1.5 TB" or "500000" are; `what` is what they are of, for the error.

    Raises:
        ValueError: For what is no size.
    """
    unit = next(unit for unit in UNITS if text.strip().lower().endswith(unit.lower()))
    count = number(text.strip()[: -len(unit) or None], float, math.nan)
    if not (math.isfinite(count) and count >= 0):
        raise ValueError(f"{what} is {text!r}; expected bytes, or a size such as 500MB or 20GB")
    return int(count * UNITS[unit])
