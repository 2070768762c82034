"""What a machine compares pictures with, and the one thing that it is asked: a fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.processes import Process
from scoremachine.core.shares import Shares
from scoremachine.data.moments import Moments


@dataclass(frozen=True, eq=False)
class FoldRequest:
    """What a machine asks of a source.

    Attributes:
        y: The pictures, float64 on the CPU, shape (B, C, H, W).
        sigma: Their noise levels, float64, shape (B,).
        collection: The machine's row: windows, and which of a source's windows they meet.
        index: Positions of the images that are compared with, int64, shape (n,), n >= 1.
        leaders: How many of the leading sources of every site are wanted, k >= 0.
    """

    y: Tensor
    sigma: Tensor
    collection: Collection
    index: np.ndarray
    leaders: int = 0


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one pass over a source says of a batch: the mean and where it comes from.

    Attributes:
        mean: D with bandwidth 0, float64 (B, C, H, W), differentiable by y.
        fold: The sites' folds: log-partition, effective and leading sources; None where the source
            is no finite set of images.
    """

    mean: Tensor
    fold: Fold | None


class Source(Protocol):
    """What pictures are compared with: images, images seen through a process, a mixture.

    Attributes:
        name: What to call it in messages.
        shape: (C, H, W) of its images.
        has_images: Whether it is a finite set of images, some of which can be held out.
        scale: The largest gain of what is seen of an image: sigma / scale is the noise level at
            which the settings of a machine are looked up.
    """

    name: str
    shape: tuple[int, int, int]
    has_images: bool
    scale: float

    def prepare(self, collection: Collection, index: np.ndarray) -> Any:
        """Does what a fold relies on and what is done once, such as building an index."""

    def fold(self, request: FoldRequest) -> Evidence:
        """The posterior mean of the pictures, and the folds of their sites."""

    def shares(self, request: FoldRequest) -> Shares:
        """The posterior mean of the pictures, and where every pixel of it comes from."""

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """Mean and covariance of what pictures are compared with, divided by `scale`."""

    def under_process(self, process: Process, t: float) -> Source:
        """The source as a forward process shows it at the time t."""
