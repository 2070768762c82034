"""Shares: how much every source gives to every pixel of a posterior mean.

D_p = sum_s W_p(s) v_s at p, with W_p(s) = sum_i r_i[p] w_is / sum_i r_i[p]: the weights of a fold
are the provenance of its mean. The k leading sources of every pixel are named, the others are one
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold, largest

CANDIDATES = 4096  # sources of a picture whose shares are computed, of responses over windows
CHUNK = 2**22  # numbers in memory at once

Weights = Callable[[int, Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True, eq=False)
class Shares:
    """Where every pixel of D comes from.

    The shares of the named sources, of all others and of the noisy picture itself add up to 1:
    sum of `weights` over k, plus `rest`, plus `own`.

    Attributes:
        D: float64 (B, C, H, W).
        weights: W_p(s) of the k leading sources of every pixel, largest first, float64
            (B, k, 1, H, W); (B, k, C, H, W) for a machine whose channels have sources of their own,
            which are in the order of their means over the channels.
        places: Which pixel of which source that is, int64 (B, k, H, W): (n H + row) W + column of
            the images, as in `Fold.places`; -1 where there is none.
        effective: The effective number of sources of every pixel, float64 (B, H, W). Where a pixel
            is a mean of several sites', queries' or machines' answers: the harmonic mean of theirs,
            which is at most its own.
        omitted: An upper bound of the posterior mass that a search has left out, float64 (B, H, W).
        own: The share of the noisy picture itself, or of a filter of it, float64 (B, H, W).
    """

    D: Tensor
    weights: Tensor
    places: Tensor
    effective: Tensor
    omitted: Tensor
    own: Tensor

    @property
    def rest(self) -> Tensor:
        """The share of all sources that are not named, float64 (B, H, W)."""
        return (1 - self.own - self.weights.mean(2).sum(1)).clamp(min=0)

    @classmethod
    def of_no_source(cls, D: Tensor) -> Shares:
        """Those of a filter of the noisy picture."""
        B, _, H, W = D.shape
        none = D.new_zeros(B, 0, 1, H, W)
        one = D.new_ones(B, H, W)
        return cls(D, none, none[:, :, 0].long(), one, torch.zeros_like(one), one)

    @classmethod
    def batch(cls, groups: Sequence[Tensor], parts: Sequence[Shares]) -> Shares:
        """The shares of all pictures, from those of groups of them, given by their positions."""
        order = torch.argsort(torch.cat(list(groups)))
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.cat(field)[order] for field in fields))

    def at(self, members: Tensor) -> Shares:
        """Those of some of the pictures, by their positions."""
        return Shares(*(field[members] for field in vars(self).values()))

    def with_own(self, y: Tensor, a: Tensor) -> Shares:
        """Those of a D + (1 - a) y, with a of every picture, float64 (B,)."""
        of = a[:, None, None]
        return replace(
            self,
            D=of[..., None] * self.D + (1 - of[..., None]) * y,
            weights=of[..., None, None] * self.weights,
            own=of * self.own + 1 - of,
        )


def mixed(y: Tensor, weights: Tensor, parts: Sequence[Shares], k: int) -> Shares:
    """Those of w_0 y + sum_m w_m D_m, with w_m of every picture, float64 (B, M); w_0 = 1 - sum w_m.

    A source's share adds up over those of the D_m that name it.
    """
    w = [weights[:, m, None, None] for m in range(len(parts))]
    left = 1 - torch.stack(w).sum(0)
    D = left[..., None] * y
    own = left.expand(parts[0].own.shape)
    omitted = total = inverse = torch.zeros_like(own)
    for w_m, part in zip(w, parts, strict=True):
        D = D + w_m[..., None] * part.D
        own = own + w_m * part.own
        omitted = omitted + w_m.abs() * part.omitted
        of = w_m.abs() * (1 - part.own)
        total, inverse = total + of, inverse + of / part.effective
    C = max(part.weights.shape[2] for part in parts)
    each = [w_m[:, None, None] * part.weights for w_m, part in zip(w, parts, strict=True)]
    W = torch.cat([x.expand(-1, -1, C, -1, -1) for x in each], 1)
    places = torch.cat([part.places for part in parts], 1)
    effective = torch.where(inverse > 0, total / inverse, 1.0)
    return Shares(D, *leading(*gathered(W, places), k), effective, omitted, own)


def gathered(weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The same sources (B, K, C, H, W) and (B, K, H, W), every one named once in a pixel."""
    places, order = places.sort(dim=1, stable=True)
    weights = weights.gather(1, order[:, :, None].expand_as(weights)).clone()
    for at in range(places.shape[1] - 1, 0, -1):
        same = places[:, at] == places[:, at - 1]
        weights[:, at - 1] += torch.where(same[:, None], weights[:, at], 0.0)
        weights[:, at] = torch.where(same[:, None], 0.0, weights[:, at])
        places[:, at] = torch.where(same, -1, places[:, at])
    return weights, places


def leading(weights: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k sources with the largest shares of every pixel, (B, k, C, H, W) and (B, k, H, W)."""
    missing = k - places.shape[1]
    if missing > 0:
        none = places.new_full((len(places), missing, *places.shape[2:]), -1)
        places = torch.cat([places, none], 1)
        zero = weights.new_zeros(len(weights), missing, *weights.shape[2:])
        weights = torch.cat([weights, zero], 1)
    rank = weights.mean(2).masked_fill(places < 0, -torch.inf)
    order = largest(rank, k)
    at = order[:, :, None].expand(-1, -1, *weights.shape[2:])
    return weights.gather(1, at), places.gather(1, order)


def of_images(D: Tensor, fold: Fold | None, image: tuple[int, int]) -> Shares:
    """Of whole images, under a translation each or as they are: one posterior for all pixels."""
    assert fold is not None
    H, W = image
    B, k = fold.places.shape[:2]
    n, middle = fold.places[:, :, 0, 0] // (H * W), fold.places[:, :, 0, 0] % (H * W)
    rows = (torch.arange(H) - H // 2 + (middle // W)[..., None]) % H  # (B, k, H)
    columns = (torch.arange(W) - W // 2 + (middle % W)[..., None]) % W
    places = (n[..., None, None] * H + rows[..., None]) * W + columns[:, :, None]
    places[fold.places[:, :, 0, 0] < 0] = -1
    weights = fold.leader_weights[:, :, None].expand(B, k, 1, H, W)
    effective, omitted = (x.expand(B, H, W) for x in (fold.effective_sources, fold.omitted_mass))
    return Shares(D, weights, places, effective, omitted, torch.zeros_like(omitted))


def of_pixels(D: Tensor, fold: Fold) -> Shares:
    """Of sites that contribute to their own pixel."""
    named = (fold.places >= 0)[:, :, None]
    weights = torch.where(named, fold.leader_weights[:, :, None], 0.0)
    own = torch.zeros_like(fold.Z)
    return Shares(D, weights, fold.places, fold.effective_sources, fold.omitted_mass, own)


def of_candidates(
    D: Tensor, fold: Fold, collection: Collection, k: int, weights_of: Weights
) -> Shares:
    """Of sites that contribute to windows, or that are channels of a pixel.

    The leading sources of all sites of a picture are its candidates, and their shares are computed
    from their weights at all its sites: they are exact, and what is not among the k largest is in
    `rest`.

    Arguments:
        D: The mean, (B, C, H, W).
        fold: That of the sites, with some leading sources.
        collection: The machine's row.
        k: How many sources a pixel names.
        weights_of: The posterior weights (n, *sites) of some sources of picture p, given their
            numbers (variant N + image, int64 (n,)) and their displacement.
    """
    c, (B, _, H, W) = collection, D.shape
    C = c.frame[0] // H  # of the channels below each other; 1 elsewhere
    Hi, Wi = c.image[0] // C, c.image[1]
    before = [p // 2 if c.wraps else 0 for p in c.window.shape]
    coverage = torch.from_numpy(c.coverage)
    top, left = (0 if c.sites == "pixels" else p // 2 for p in c.window.shape)
    i, j = (torch.arange(n) for n in c.grid)
    found = []
    for p in range(B):
        weights, places = D.new_zeros(1, 0, C, H, W), torch.zeros(1, 0, H, W, dtype=torch.int64)
        for n, (dy, dx) in candidates(fold, p, c, (i[:, None] + top, j + left)):
            step = max(1, CHUNK // D[0].numel())
            for some in n.split(step):
                w = weights_of(p, some, (dy - before[0], dx - before[1]))
                for share, (rows, columns) in _copies(w, c):
                    share = (share / coverage).unflatten(1, (C, H))[None]
                    row, column = rows[:H, None] + dy, columns + dx
                    place = (some[:, None, None] * Hi + row) * Wi + column
                    inside = (row >= 0) & (row < Hi) & (column >= 0) & (column < Wi)
                    place = torch.where(inside, place, -1)[None]
                    both = torch.cat([weights, share], 1), torch.cat([places, place], 1)
                    # the same source may give to a pixel in several of its copies
                    weights, places = leading(*(gathered(*both) if c.wraps else both), k)
        found.append((weights, places))
    weights, places = (torch.cat(x) for x in zip(*found, strict=True))

    def over_sites(x: Tensor) -> Tensor:
        mean = sum(share for share, _ in _copies(x, c)) / coverage
        return mean.unflatten(1, (C, H)).mean(1)

    effective = 1 / over_sites(1 / fold.effective_sources)
    omitted = over_sites(fold.omitted_mass)
    return Shares(D, weights, places, effective, omitted, torch.zeros_like(omitted))


def _copies(w: Tensor, c: Collection) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """What weights of sites (n, *sites) give to pixels, (n, H, W), and these pixels' positions.

    Once, or for a picture that wraps around once for each copy of it that windows reach: positions
    are then those of the copy, beyond the picture.
    """
    if c.response == "pixel":
        yield w, (torch.arange(w.shape[1]), torch.arange(w.shape[2]))
        return
    w = c.window_adjoint(w)
    if not c.wraps:
        yield w, (torch.arange(w.shape[1]), torch.arange(w.shape[2]))
        return
    H, W = c.frame
    rows, columns = (
        torch.arange(n) - p // 2 for n, p in zip(w.shape[1:], c.window.shape, strict=True)
    )
    for up in torch.unique(rows // H).tolist():
        for left in torch.unique(columns // W).tolist():
            i, j = rows // H == up, columns // W == left
            part = w.new_zeros(len(w), H, W)
            part[:, rows[i][:, None] % H, columns[j] % W] = w[:, i][:, :, j]
            yield part, (torch.arange(H) + up * H, torch.arange(W) + left * W)


def candidates(
    fold: Fold, p: int, c: Collection, middles: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, tuple[int, int]]]:
    """The leading sources of a picture's sites, those of one displacement together."""
    H, W = c.image
    places, weights = fold.places[p], fold.leader_weights[p]
    named = places >= 0
    dy = (places % (H * W) // W - middles[0])[named]
    dx = (places % W - middles[1])[named]
    keys = torch.stack([dy, dx, places[named] // (H * W)], 1)
    found, which = torch.unique(keys, dim=0, return_inverse=True)
    total = torch.zeros(len(found), dtype=torch.float64).index_add_(0, which, weights[named])
    order = torch.argsort(total, descending=True, stable=True)[:CANDIDATES]
    found = found[order.sort().values]
    shifts, which = torch.unique(found[:, :2], dim=0, return_inverse=True)
    return [
        (found[which == s, 2], (int(shifts[s, 0]), int(shifts[s, 1]))) for s in range(len(shifts))
    ]
