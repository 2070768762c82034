"""Query and response windows, and the variants of a source.

A machine is a row of the table in docs/design.md: its sites, their query and response windows, and
the source that they are compared with. `Collection` is that row at one noise level.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, vstack
from torch import Tensor
from torch.nn.functional import pad

from scoremachine.runtime.validation import check_integer


@dataclass(frozen=True)
class Box:
    """A window of P x Q ones."""

    shape: tuple[int, int]

    @property
    def weights(self) -> np.ndarray:
        """The weights q, float64 (P, Q)."""
        return np.ones(self.shape)


@dataclass(frozen=True, eq=False)
class Soft:
    """A tapered box: weights q[a, b] = sum_k rows[k, a] columns[k, b] >= 0.

    Attributes:
        rows: float64, shape (K, P).
        columns: float64, shape (K, Q).
    """

    rows: np.ndarray
    columns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width (P, Q) of the box."""
        return self.rows.shape[1], self.columns.shape[1]

    @property
    def weights(self) -> np.ndarray:
        """The weights q, float64 (P, Q)."""
        return self.rows.T @ self.columns

    def filter(self, device: torch.device) -> Tensor:
        """The weights as the filter of a convolution, (1, 1, P, Q)."""
        return torch.from_numpy(self.weights).to(device)[None, None]

    @classmethod
    def gaussian(cls, P: int, Q: int) -> Soft:
        """A Gaussian around the middle whose standard deviation is a quarter of the box's side."""

        def taper(p: int) -> np.ndarray:
            return np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 4)) ** 2)[None]

        return cls(taper(P), taper(Q))

    @classmethod
    def of(cls, weights: np.ndarray) -> Soft:
        """Any weights (P, Q), as a sum of as few products as represent them in float64."""
        U, values, V = np.linalg.svd(weights)
        kept = values > 1e-14 * values[0]
        return cls((U[:, : len(values)] * values)[:, kept].T.copy(), V[: len(values)][kept])


@dataclass(frozen=True, eq=False)
class Masks:
    """A separate window for every pixel, which may be any set of pixels, stored as few table terms.

    Three tables give the sum of v over any set of pixels: T[a, b] = sum of v[:a, :b], the row sums
    R[a, b] = sum of v[a - 1, :b], and v[a - 1, b - 1] itself. A connected region needs T only at
    the corners of its outline, an isolated run of pixels in one row needs R at its two ends, and an
    isolated pixel needs v only.

    Attributes:
        terms: A sparse row for each site: the factors of the three tables, one table after the
            other, (H W, 3 (H + 1) (W + 1)).
        image: Height and width (H, W) of the images.
    """

    terms: csr_array
    image: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """As if the window were the site's own pixel only."""
        return 1, 1

    @classmethod
    def of(cls, blocks: Iterable[np.ndarray], image: tuple[int, int]) -> Masks:
        """From boolean windows, site by site: blocks of shape (n, H W)."""
        terms = [_few_terms(block.reshape(-1, *image)) for block in blocks]
        flat = [csr_array(each.reshape(len(each), math.prod(each.shape[1:]))) for each in terms]
        return cls(csr_array(vstack(flat)), image)

    @cached_property
    def by_sign(self) -> tuple[np.ndarray, np.ndarray]:
        """The terms without their signs, as positions in the tables (int32), and their starts.

        For each mask the positions to add come before those to subtract, a position of weight 2
        twice; they begin at starts[2 site] and starts[2 site + 1].
        """
        n = coo_array(self.terms)
        times = np.abs(n.data).astype(np.int64)
        half = 2 * n.coords[0].astype(np.int64) + (n.data < 0)
        order = np.argsort(half, kind="stable")
        places = np.repeat(n.coords[1][order].astype(np.int32), times[order])
        counts = np.bincount(half, weights=times, minlength=2 * self.terms.shape[0])
        return places, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def row(self, site: int) -> np.ndarray:
        """One site's window, ones and zeros, float64 (H, W)."""
        return self._weights(torch.from_numpy(self.terms[[site]].toarray()).double())[0].numpy()

    def window_sum(self, v: Tensor) -> Tensor:
        """The window sums, (B, H, W) -> (B, H W)."""
        pixels = pad(v, (1, 0, 1, 0))
        rows = pixels.cumsum(2)
        tables = torch.stack([rows.cumsum(1), rows, pixels], dim=1).flatten(1)
        if not v.is_cuda:
            return torch.from_numpy((self.terms @ tables.numpy().T).T.copy())
        return (self._on(v.device, False) @ tables.T).T

    def window_adjoint(self, w: Tensor) -> Tensor:
        """The adjoint of `window_sum`, (B, H W) -> (B, H, W)."""
        if w.is_cuda:
            return self._weights((self._on(w.device, True) @ w.T).T)
        return self._weights(torch.from_numpy((self.terms.T @ w.numpy().T).T.copy()))

    def _weights(self, tables: Tensor) -> Tensor:
        """Pixel weights from terms, by reversed cumulative sums.

        (B, 3 (H + 1) (W + 1)) -> (B, H, W).
        """
        H, W = self.image
        corners, ends, pixels = tables.reshape(len(tables), 3, H + 1, W + 1).unbind(1)
        rows = corners.flip(1).cumsum(1).flip(1) + ends
        return (rows.flip(2).cumsum(2).flip(2) + pixels)[:, 1:, 1:]

    def _on(self, device: torch.device, transposed: bool) -> Tensor:
        known: dict[tuple[torch.device, bool], Tensor] = self.__dict__.setdefault("_known", {})
        if (device, transposed) not in known:
            q = csr_array(self.terms.T if transposed else self.terms)
            rows, columns, values = map(torch.from_numpy, (q.indptr, q.indices, q.data))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "sparse CSR tensors are in beta"
                matrix = torch.sparse_csr_tensor(rows, columns, values.double(), q.shape)
            known[device, transposed] = matrix.to(device)
        return known[device, transposed]


def _few_terms(q: np.ndarray) -> np.ndarray:
    """Masks (n, H, W) as few terms, int8 (n, 3, H + 1, W + 1): in R or v wherever that saves terms.

    In columns one pixel wide, up to three pixels below each other are single terms of v. After that
    the end of a run that is at the same position in neither adjacent row is one term in R instead
    of two in T.
    """
    n, H, W = q.shape
    terms = np.zeros((n, 3, H + 1, W + 1), dtype=np.int8)
    q = np.pad(q.astype(np.int8), ((0, 0), (1, 1), (1, 1)))
    inside = q[:, 1:-1, 1:-1]
    lone = (inside > q[:, 1:-1, :-2]) & (inside > q[:, 1:-1, 2:])
    four = lone[:, 3:] & lone[:, 2:-1] & lone[:, 1:-2] & lone[:, :-3]
    few = lone.copy()
    for k in range(4):
        few[:, k : k + four.shape[1]] &= ~four
    terms[:, 2, 1:, 1:] = few
    inside -= few
    turns = -np.diff(q, axis=2)
    here = turns[:, 1:-1]
    ends = (here != turns[:, :-2]) & (here != turns[:, 2:])
    terms[:, 1, 1:] = here * ends
    here *= ~ends
    terms[:, 0] = -np.diff(turns, axis=1)
    terms[:, :, 0], terms[:, :, :, 0] = 0, 0  # empty sums
    return terms


Window = Box | Soft | Masks


@dataclass(frozen=True)
class Variant:
    """A transformation of every image of the source: mirroring, brightness and contrast.

    A source pixel is contrast x + brightness, not clipped.
    """

    mirror_rows: bool = False
    mirror_columns: bool = False
    contrast: float = 1.0
    brightness: float = 0.0

    def of(self, s: Tensor) -> Tensor:
        """The variant of images s (..., H, W)."""
        axes = [a for a, m in ((-2, self.mirror_rows), (-1, self.mirror_columns)) if m]
        return self.contrast * (torch.flip(s, axes) if axes else s) + self.brightness


@dataclass(frozen=True)
class Augment:
    """An augmented source (Niedoba et al. 2605.24192): additional variants of every image.

    Attributes:
        flips: Also mirrored left to right.
        shifts: Also shifted by up to that many rows and columns; windows that would extend beyond
            the border are no sources.
        brightness: Also brighter and darker by that much, in units of x.
        contrast: Also with contrast 1 + and 1 - that much.
    """

    flips: bool = False
    shifts: int = 0
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.flips, bool):
            raise ValueError(f"flips is {self.flips!r}; expected True or False")
        if self.shifts != 0:
            object.__setattr__(self, "shifts", check_integer("shifts", self.shifts))
        for what, value, limit in (
            ("brightness", self.brightness, math.inf),
            ("contrast", self.contrast, 1.0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise ValueError(f"{what} is {value!r}; expected a number")
            if not (0 <= value < limit):
                raise ValueError(
                    f"{what} is {value!r}; expected a number from 0 to below {limit:g}"
                )
            object.__setattr__(self, what, float(value))

    def plain(self) -> dict[str, object]:
        """A form that JSON can represent."""
        return asdict(self)

    @classmethod
    def parse(cls, text: str) -> Augment:
        """From a text such as "flips,shifts=1,brightness=0.1,contrast=0.2"."""
        settings: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in ("flips", "shifts", "brightness", "contrast"):
                raise ValueError(
                    f"no augmentation is called {name!r}; there are flips, shifts=N, "
                    "brightness=B and contrast=C"
                )
            if name == "flips":
                if value:
                    raise ValueError(f"{part!r} gives flips a value; say flips, or leave it out")
                settings[name] = True
                continue
            kind, what = (int, "a whole number") if name == "shifts" else (float, "a number")
            try:
                settings[name] = kind(value)
            except ValueError:
                raise ValueError(f"{part!r} does not say {what}; expected {name}=NUMBER") from None
        return cls(**settings)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of an image, the unchanged one first."""
        contrasts = (1.0, 1 - self.contrast, 1 + self.contrast) if self.contrast else (1.0,)
        levels = (0.0, -self.brightness, self.brightness) if self.brightness else (0.0,)
        return tuple(
            Variant(False, mirror, contrast, brightness)
            for mirror in ((False, True) if self.flips else (False,))
            for contrast in contrasts
            for brightness in levels
        )


def check_window(size: int, image: Sequence[int], odd: bool) -> int:
    """`size` if images of `image` = (H, W) can have a window of that size; else a ValueError."""
    H, W = image
    largest = max(H, W)
    if size > largest:
        raise ValueError(
            f"patch_size {size} is larger than the {H} x {W} images; "
            f"expected at most {largest}: choose a smaller one or larger images"
        )
    if odd and size % 2 == 0:
        raise ValueError(
            f"patch_size {size} is even; a window centred on a pixel has an odd size: "
            f"use {size - 1}" + (f" or {size + 1}" if size < largest else "")
        )
    return size
