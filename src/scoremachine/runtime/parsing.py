"""Numbers in texts, where they are some."""

from __future__ import annotations

from typing import Any


def number(text: str, kind: type, otherwise: Any) -> Any:
    """`text` as a number of a kind, or else what it is otherwise."""
    try:
        return kind(text)
    except ValueError:
        return otherwise


def any_number(text: str) -> Any:
    """`text` as an int or a float, where it is one."""
    return number(text, int, number(text, float, text))
