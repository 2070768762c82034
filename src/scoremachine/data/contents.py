"""What a source of images answers: what identifies it, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scoremachine.data.content import Hashed


@dataclass
class Contents:
    """The files (or items) of a source, not read yet.

    Attributes:
        ids: A name for every file.
        read: File i as a PIL image, which may have several pages, or a uint8 array (C, H, W).
            Whatever it raises means that the file is bad, unless it is `decoding.Refused`.
        labels: Its class, as a position in `class_names`.
        class_names: The classes.
        array: All images at once, uint8 (N, C, H, W), where they lie in one array already.
        notes: What was decided about the source, one sentence each, for its user to read.
    """

    ids: Sequence[str]
    read: Callable[[int], Any]
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    array: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Source:
    """Where images come from.

    Attributes:
        name: What to call it in messages.
        identity: What tells this content from another, as JSON can hold it; None where only
            reading it all would tell.
        contents: Finds what it holds.
        hashed: The files that it is read from, where there are some.
    """

    name: str
    identity: Any
    contents: Callable[[], Contents]
    hashed: Hashed | None = None
