"""Base classes of machines that compare windows: rows of the table in docs/design.md."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Boundary, Collection
from scoremachine.core.derivatives import outside_transforms, regrouped
from scoremachine.core.schedules import PatchSchedule
from scoremachine.core.shares import Shares
from scoremachine.core.windows import Augment, Box, Soft, Variant, Window, check_window
from scoremachine.data.corpus import Corpus
from scoremachine.machines.machine import Batch, LocalMachine
from scoremachine.runtime.lru import LRUCache
from scoremachine.sources.source import Evidence, FoldRequest

KEPT_WINDOWS = 64
WINDOWS = {"box": 1.0, "gaussian": 2.0, "wiener": 10.0}  # relative cost of a logit
FAINTEST = 1e-6  # the least weight in a tapered window


class WindowMachine(LocalMachine):
    """A machine that compares windows: a row of the table in docs/design.md."""

    depends_on_noise = False  # whether windows depend on the noise level itself

    def __init__(self, corpus: Corpus, local: Any, **settings: Any) -> None:
        super().__init__(corpus, local, **settings)
        self._rows: LRUCache[Collection] = LRUCache(KEPT_WINDOWS)

    def clone_with(self, corpus: Any = None, **changes: Any) -> Self:
        other = super().clone_with(corpus, **changes)
        same = corpus is None or corpus is self.corpus
        if same and changes.keys() <= {"bandwidth", "kernel", self.locality}:
            other.__dict__["_rows"] = self._rows  # which do not depend on these settings
        return other

    @abstractmethod
    def collection(self, value: Any, sigma: float, index: np.ndarray) -> Collection:
        """The machine's row for a value of its locality, with the images at `index` as source."""

    def windows(
        self, level: float, index: np.ndarray, canvas: tuple[int, int] | None = None
    ) -> Collection:
        """The machine's row at a noise level; the last few are cached.

        `canvas`: height and width of the pictures, if they differ from those of the images.
        """

        def make() -> Collection:
            with outside_transforms():  # of torch.func: windows do not depend on the picture
                found = self.collection(self.local_at(level), level, index)
            return found if canvas is None else replace(found, canvas=canvas)

        key = *self._row(level), index.tobytes() if self.depends_on_noise else b"", canvas
        return self._rows.get(key, make)

    def _row(self, sigma: float) -> tuple[Any, float]:
        return self.local_at(sigma), sigma if self.depends_on_noise else 0.0

    def mean(self, batch: Batch) -> Tensor:
        groups = list(self.by_row(batch))
        parts = [self.evidence(batch.at(members), row).mean for members, row in groups]
        return regrouped([members for members, _ in groups], parts)

    def shares(self, batch: Batch, k: int) -> Shares:
        groups, parts = [], []
        for members, row in self.by_row(batch):
            some = batch.at(members)
            self.source.prepare(row, batch.index)
            request = FoldRequest(some.y, some.sigma, row, batch.index, k)
            groups.append(members.nonzero()[:, 0])
            parts.append(self.source.shares(request))
        return Shares.batch(groups, parts)

    def by_row(self, batch: Batch) -> Iterator[tuple[Tensor, Collection]]:
        """Groups pictures by the machine's row: a mask of each group, bool (B,), and its row."""
        rows = [self._row(float(s)) for s in batch.level]
        H, W = batch.y.shape[2:]
        canvas = None if self.corpus.shape[1:] == (H, W) else (H, W)
        for row in dict.fromkeys(rows):
            members = torch.tensor([other == row for other in rows])
            yield members, self.windows(float(batch.level[members][0]), batch.index, canvas)

    def evidence(self, batch: Batch, row: Collection, leaders: int = 0) -> Evidence:
        """The fold of pictures that share a row; see `FoldRequest`."""
        self.source.prepare(row, batch.index)
        return self.source.fold(FoldRequest(batch.y, batch.sigma, row, batch.index, leaders))


class BoxMachine(WindowMachine):
    """A box-window machine.

    Arguments:
        corpus: The images.
        patch_size: The box's side P: a number, a `PatchSchedule`, the name of a published one
            (`PatchSchedule.names()`), the path of a calibration.json, or "auto" (held-out
            calibration, the default).
        window: "box": ones; "gaussian": tapered, a standard deviation of P / 4; "wiener": tapered
            like the corpus's Wiener filter at the noise level, averaged over positions. Query and
            response windows have the same taper (Niedoba et al. 2605.24192).
        augment: None, an `Augment`, or its text, as "flips,shifts=1": an augmented source.
        settings: See `Machine`.
    """

    locality = "patch_size"
    patch_size: PatchSchedule | str
    odd = True  # whether a box has to have a middle pixel

    def __init__(
        self,
        corpus: Corpus,
        patch_size: int | PatchSchedule | str = "auto",
        window: str = "box",
        augment: Augment | str | None = None,
        **settings: Any,
    ) -> None:
        if window not in WINDOWS:
            raise ValueError(f"window is {window!r}; expected 'box', 'gaussian' or 'wiener'")
        if isinstance(augment, str):
            augment = Augment.parse(augment)
        if not isinstance(augment, Augment | None):
            raise ValueError(f"augment is {augment!r}; expected an Augment, its text, or None")
        super().__init__(corpus, patch_size, **settings)
        self.window, self.augment = window, augment or Augment()
        self.depends_on_noise = window == "wiener"
        self.relative_cost = WINDOWS[window] * (
            len(self.augment.variants) * (2 * self.augment.shifts + 1) ** 2
        )

    @property
    def variants(self) -> tuple[Variant, ...]:
        return self.augment.variants

    def check_local(self, value: Any) -> None:
        check_window(PatchSchedule.check(value), self.corpus.shape[1:], self.odd)

    def candidates(self) -> list[int]:
        sides = range(3, max(self.corpus.shape[1:]) + 1, 2)
        return [P for P in sides if self.supports(P)] or [P for P in (1,) if self.supports(P)]

    def tapered(self, shape: tuple[int, int], sigma: float, index: np.ndarray) -> Window:
        """The window of that height and width."""
        if self.window == "box" or shape == (1, 1):
            return Box(shape)
        if self.window == "gaussian":
            return Soft.gaussian(*shape)
        g = self.source.moments(index)
        return Soft.of(stationary(g.heat_maps(sigma, self.corpus.shape), self.corpus.shape, shape))

    def wider(self) -> dict[str, Any]:
        """The reach and the variants of the augmented source, for a `Collection`."""
        return {"reach": self.augment.shifts, "variants": self.augment.variants}


class EquivariantMachine(BoxMachine):
    """A box-window machine that compares boxes regardless of their position.

    It denoises pictures of any size.

    Arguments:
        corpus, patch_size, settings: See `BoxMachine`.
        boundary: "broken": boxes end at the border; "circular": they wrap around.
    """

    equivariant = True

    def __init__(
        self,
        corpus: Corpus,
        patch_size: int | PatchSchedule | str = "auto",
        boundary: Boundary = "broken",
        **settings: Any,
    ) -> None:
        if boundary not in ("broken", "circular"):
            raise ValueError(f"boundary is {boundary!r}; expected 'broken' or 'circular'")
        self.__dict__["boundary"] = boundary  # by which patch sizes are checked
        super().__init__(corpus, patch_size, **settings)
        self.relative_cost /= (2 * self.augment.shifts + 1) ** 2

    def check_local(self, value: Any) -> None:
        super().check_local(value)
        H, W = self.corpus.shape[1:]
        if self.boundary == "circular" and value > min(H, W):
            raise ValueError(
                f"no {value} x {value} patch fits inside the {H} x {W} images, and a circular "
                f"boundary compares with those that fit: use patch_size {min(H, W)} or less, or "
                "boundary='broken'"
            )

    def shape_for(self, y: Tensor) -> tuple[int, int, int]:
        if not isinstance(y, Tensor) or y.ndim != 4:
            return self.corpus.shape
        C, (H, W) = self.corpus.shape[0], y.shape[2:]
        if len(y) and y.shape[1] == C:
            self.check_shape((C, H, W))
        return C, H, W

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError unless pictures of that shape (C, H, W) are as large as the patches."""
        C, H, W = shape
        if tuple(shape) == self.corpus.shape:
            return
        if self.corpus.shape[0] != C:
            super().check_shape(shape)
        P, least = int(self.resolved().local.values.max()), min(H, W, *self.corpus.shape[1:])
        if least < P:
            most = least - (self.odd and least % 2 == 0)
            raise ValueError(
                f"a picture of {H} x {W} from images of {self.corpus.shape[1]} x "
                f"{self.corpus.shape[2]} takes patches of at most {most}, and "
                f"patch_size goes up to {P}: choose smaller patches, or a larger picture"
            )

    def wider(self) -> dict[str, Any]:
        """The boundary and the variants of the augmented source; it has every position already."""
        return {"boundary": self.boundary, "variants": self.augment.variants}


def stationary(maps: np.ndarray, image: tuple[int, int, int], shape: tuple[int, int]) -> np.ndarray:
    """The root mean square of heat maps (H W, H W) at each offset, over all positions, (P, Q).

    Scaled to 1 in the middle and at least `FAINTEST`, so that every pixel gets a contribution; ones
    if the corpus has no variance.
    """
    _, H, W = image
    P, Q = shape
    q = np.zeros(shape)
    flat = maps.reshape(H, W, H, W)
    for a in range(P):
        for b in range(Q):
            dy, dx = a - P // 2, b - Q // 2
            i = np.arange(max(0, -dy), min(H, H - dy))[:, None]
            j = np.arange(max(0, -dx), min(W, W - dx))
            if i.size and j.size:
                q[a, b] = math.sqrt(flat[i, j, i + dy, j + dx].mean())
    middle = q[P // 2, Q // 2]
    return np.maximum(q / middle, FAINTEST) if middle > 0 else np.ones(shape)
