"""The fold: every machine is a softmax mean over a source, and a softmax mean is a monoid."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class Fold:
    """The summary, at every site, of the sources seen so far. All fields but `places` are float64.

    Attributes:
        m: The largest logit, shape (B, *sites).
        Z: Sum of e^(l - m), shape (B, *sites).
        Z2: Sum of e^(2 (l - m)), shape (B, *sites).
        S: Sum of e^(l - m) v, shape (B, C, *sites); (B, C, H, W) if the one site is the whole
            image; (B, 0, *sites) if a second pass computes the mean; (B, 1, *sites) if the values
            are inner products (`ScanRequest.u`).
        logits: The k largest logits, in descending order, shape (B, k, *sites).
        places: Their sources, int64, shape (B, k, *sites): (n H + row) W + column, with n the
            position in the corpus and (row, column) the source pixel under the site's middle.
            Variant v of image n is image v N + n of a corpus of N.
        omitted: An upper bound of the part of Z that is missing, shape (B, *sites): 0 if every
            source was compared (even if up to `SKIPPED` / 2 Z was skipped), more after a search.
    """

    m: Tensor
    Z: Tensor
    Z2: Tensor
    S: Tensor
    logits: Tensor
    places: Tensor
    omitted: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.omitted is None:
            self.omitted = torch.zeros_like(self.Z)

    @classmethod
    def batch(cls, folds: Iterable[Fold]) -> Fold:
        """The folds of several batches of pictures, one after the other."""
        fields = zip(*(vars(fold).values() for fold in folds), strict=True)
        return cls(*map(torch.cat, fields))

    @classmethod
    def of_parts(cls, *fields: np.ndarray) -> Fold:
        """The fold of all sources, from fields whose first axis is chunks of the sources."""
        m, Z, Z2, S, logits, places = (torch.from_numpy(x) for x in fields)
        none = logits[0, :, :0], places[0, :, :0]
        folds = (cls(*part, *none) for part in zip(m, Z, Z2, S, strict=True))
        whole = functools.reduce(cls.merge, folds)
        k = logits.shape[2]
        logits, places = (x.transpose(0, 1).flatten(1, 2) for x in (logits, places))
        order = largest(logits, k)
        return replace(whole, logits=logits.gather(1, order), places=places.gather(1, order))

    def merge(self, other: Fold) -> Fold:
        """The fold of both sets of sources."""
        m = torch.maximum(self.m, other.m)
        a, b = _exp(self.m - m), _exp(other.m - m)
        logits = torch.cat([self.logits, other.logits], dim=1)
        places = torch.cat([self.places, other.places], dim=1)
        order = largest(logits, self.logits.shape[1])
        return Fold(
            m,
            a * self.Z + b * other.Z,
            a**2 * self.Z2 + b**2 * other.Z2,
            a[:, None] * self.S + b[:, None] * other.S,
            logits.gather(1, order),
            places.gather(1, order),
            a * self.omitted + b * other.omitted,
        )

    def cpu(self) -> Fold:
        """The fold in CPU memory."""
        return Fold(*(field.cpu() for field in vars(self).values()))

    @property
    def mean(self) -> Tensor:
        """S / Z, the softmax mean."""
        return self.S / self.Z[:, None]

    @property
    def omitted_mass(self) -> Tensor:
        """An upper bound of the share of the posterior that is not in the fold, (B, *sites)."""
        return self.omitted / (self.Z + self.omitted)

    @property
    def log_partition(self) -> Tensor:
        """log sum e^l, shape (B, *sites)."""
        return self.m + torch.log(self.Z)

    @property
    def effective_sources(self) -> Tensor:
        """Z^2 / Z2: the effective number of sources, >= 1."""
        return self.Z**2 / self.Z2

    @property
    def leader_weights(self) -> Tensor:
        """The posterior weights of the k leading sources, shape (B, k, *sites)."""
        return torch.exp(self.logits - self.m[:, None]) / self.Z[:, None]


def largest(values: Tensor, k: int) -> Tensor:
    """Positions along axis 1 of the k largest values of every site, of equals the first.

    values (B, K, *sites) -> int64 (B, k, *sites), in descending order.
    """
    rows = values.movedim(1, -1).contiguous()  # sorted faster along the last axis
    return torch.argsort(rows, dim=-1, descending=True, stable=True)[..., :k].movedim(-1, 1)


def _exp(x: Tensor) -> Tensor:
    """exp whose bits do not depend on an element's position in the tensor; those of torch may."""
    return torch.exp(x) if x.is_cuda else torch.from_numpy(np.exp(x.numpy()))
