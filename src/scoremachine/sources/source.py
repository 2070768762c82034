"""The interface between machines and sources: a fold request, and its result."""

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
    """The request of a machine to its source.

    Attributes:
        y: The pictures, float64 on the CPU, shape (B, C, H, W).
        sigma: Their noise levels, float64, shape (B,).
        collection: The machine's row: windows, and the windows of a source to compare them with.
        index: Positions of the images to compare with, int64, shape (n,), n >= 1.
        leaders: How many leading sources of every site to record, k >= 0.
    """

    y: Tensor
    sigma: Tensor
    collection: Collection
    index: np.ndarray
    leaders: int = 0


@dataclass(frozen=True, eq=False)
class Evidence:
    """The result of a fold request: the posterior mean and the statistics of its sites.

    Attributes:
        mean: D with bandwidth 0, float64 (B, C, H, W), differentiable by y.
        fold: The sites' folds: log-partition, effective and leading sources; None if the source is
            not a finite set of images, or if no single fold gives the mean.
    """

    mean: Tensor
    fold: Fold | None


class Source(Protocol):
    """What pictures are compared with: images, images under a forward process, or a mixture.

    Attributes:
        name: Its name in messages.
        shape: (C, H, W) of its images.
        has_images: Whether it is a finite set of images, some of which can be held out.
        scale: The largest gain of the forward process: sigma / scale is the noise level at which
            the settings of a machine are looked up.
    """

    name: str
    shape: tuple[int, int, int]
    has_images: bool
    scale: float

    def prepare(self, collection: Collection, index: np.ndarray) -> Any:
        """Does the work that folds need once, such as building an index."""

    def fold(self, request: FoldRequest) -> Evidence:
        """The posterior mean of the pictures, and the folds of their sites."""

    def shares(self, request: FoldRequest) -> Shares:
        """The posterior mean of the pictures, and where every pixel of it comes from."""

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """Mean and covariance of the keys, divided by `scale`."""

    def under_process(self, process: Process, t: float) -> Source:
        """The source under a forward process at the time t."""
