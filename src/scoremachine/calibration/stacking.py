"""Weights of composites: ridge least squares on held-out images.

At each noise level the clean held-out pictures are regressed on the machines' D_1 ... D_M of the
noised pictures y, and on y itself, with weights that sum to 1. The penalty shrinks the weights
towards the machine that is best by itself. It is the largest whose leave-one-out error is within
one standard error of the smallest, so if the other machines do not improve on the best one, the
composite *is* the best one. Breiman 1996, Stacked regressions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from scoremachine.calibration.heldout import (
    AUTO_SIGMAS,
    TOWARDS,
    TOWARDS_SIGMAS,
    Calibrated,
    NothingDiffersError,
    Parts,
    Pictures,
    Teacher,
    affordable,
    calibrate,
    held_out_pictures,
    kept_by_level,
    split,
    spread_candidates,
    unseen_parts,
)
from scoremachine.core.schedules import WeightSchedule
from scoremachine.data.corpus import Corpus
from scoremachine.runtime.progress import bar, say

LAYOUT = 3  # version of the cached files
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # penalties, relative to each difference's square
HELD_OUT = 16  # validation pictures for "auto" weights
BEYOND = (60.0, 200.0, 1000.0)  # noise levels at which only the weight of y is fitted


class Mixed(Calibrated, Protocol):
    """The interface of composites that stacking needs."""

    members: Mapping[str, Calibrated]

    def answers(
        self, y: torch.Tensor, sigma: torch.Tensor, index: np.ndarray
    ) -> list[torch.Tensor]:
        """D_m of every machine."""

    def with_resolved_members(self) -> Mixed:
        """The same composite, with explicit settings of its members."""


@dataclass
class Stacking:
    """The result of stacking. Errors are mean squared, in units of x in [-1, 1].

    Attributes:
        machines: The M machines' labels.
        sigmas: The K noise levels, in descending order.
        weights: (K, M); that of the noisy picture is 1 minus their sum.
        ridges: (K,): the penalty; infinite if the best machine has all weight.
        errors: (K, R): of the composite on R test pictures.
        member_errors: (K, M, R): of every machine on the same.
        source: The number of images in the source.
        held_out: The number of validation images.
    """

    machines: list[str]
    sigmas: list[float]
    weights: list[list[float]]
    ridges: list[float]
    errors: list[list[float]]
    member_errors: list[list[list[float]]]
    source: int
    held_out: int

    @property
    def schedule(self) -> WeightSchedule:
        """The weights as a schedule."""
        return WeightSchedule(self.sigmas, self.weights, name="held-out")


def stack(
    machine: Mixed,
    sigmas: Sequence[float] | np.ndarray,
    parts: Parts,
    seed: int = 0,
    network: Teacher | None = None,
    beyond: Sequence[float] = (),
) -> Stacking:
    """Fits the weights of a composite.

    Arguments:
        machine: The composite.
        sigmas: Noise levels.
        parts: The images: a corpus, and positions in it of the source, of the validation pictures
            and of the test pictures (which may be none).
        seed: Of the noise.
        network: If given, its D is the target of the regression, not the clean picture.
        beyond: Noise levels above the others, where the machines hardly differ. Their weights are
            those of the highest other level plus a common offset, since only the weight of the
            noisy picture is fitted: one that is right at a lower level would add much noise. No
            errors are reported at these levels.

    Raises:
        ValueError: If a level in `beyond` is not above all others.
    """
    if len(beyond) and (len(sigmas) == 0 or min(beyond) <= max(sigmas)):
        raise ValueError(f"beyond is {list(beyond)}; expected noise levels above all others")
    corpus, source, validation, _ = parts
    machine = machine.clone_with(corpus)  # type: ignore[assignment]
    levels = np.sort(np.asarray([*sigmas, *beyond], dtype=float))[::-1]
    of = {label: member.settings() for label, member in machine.members.items()}
    asked = [
        LAYOUT,
        of,
        levels.tolist(),
        seed,
        None if network is None else network.key,
        list(beyond),
    ]
    asked += [corpus.key, *(hashlib.sha256(p.tobytes()).hexdigest() for p in parts[1:])]
    record = corpus.record("stacking", asked)
    kept = record.read(lambda found: Stacking(**found))
    if kept is not None:
        return kept
    validating, testing = held_out_pictures(parts, seed)

    def both(pictures: Pictures, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """D_1 ... D_M and y, (M + 1, R, n), and the target, (R, n)."""
        x, eps = pictures
        y, level = x + sigma * eps, torch.full((len(x),), sigma, dtype=torch.float64)
        with torch.no_grad():
            target = x if network is None else network.denoise(y, sigma)
            answers = machine.answers(y, level, source)
        return torch.stack([*answers, y]).flatten(2).numpy(), target.flatten(1).numpy()

    def measured(sigma: float) -> dict[str, Any]:
        Z, x = both(validating, sigma)
        if sigma in beyond:  # the mean of the machines instead of each
            (rest, w_0), ridge = weights_of(np.stack([Z[:-1].mean(0), Z[-1]]), x)
            w = np.append(np.full(len(of), rest / len(of)), w_0)
        else:
            w, ridge = weights_of(Z, x)
        found: dict[str, Any] = {"weights": w[:-1].tolist(), "ridges": ridge}
        found |= {"errors": [], "member_errors": [[] for _ in of]}
        if len(testing[0]) and sigma not in beyond:
            Z, x = both(testing, sigma)
            found["errors"] = _squared(np.tensordot(w, Z, 1) - x).tolist()
            found["member_errors"] = _squared(Z[:-1] - x).tolist()
        return found

    with bar("Weighing machines", total=len(levels)) as progress:
        rows = kept_by_level(record.unfinished, levels, measured, "member_errors", progress, 1)
    w = np.array(rows[len(beyond)]["weights"])
    for row in rows[: len(beyond)]:
        row["weights"] = (w + (sum(row["weights"]) - w.sum()) / len(of)).tolist()
    columns = ("weights", "ridges", "errors", "member_errors")
    found = Stacking(
        machines=list(of),
        sigmas=levels.tolist(),
        source=len(source),
        held_out=len(validation),
        **{column: [row[column] for row in rows] for column in columns},
    )
    record.write(asdict(found))
    record.unfinished.remove()
    return found


def with_calibrated(
    machine: Mixed, sigmas: Sequence[float] | np.ndarray, held_out: int, seed: int, parts: Parts
) -> Mixed:
    """The composite, with its members' "auto" localities calibrated on `parts`."""
    members = {}
    for label, member in machine.members.items():
        setting = member.locality
        if setting is not None and getattr(member, setting) == "auto":
            values = spread_candidates(member)
            c = calibrate(member, sigmas, held_out, values, seed=seed, parts=parts)
            member = member.clone_with(member.corpus, **{setting: c.locality})
        members[label] = member
    return machine.clone_with(machine.corpus, of=members)  # type: ignore[return-value]


def weights_of(Z: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (M + 1,) with sum 1 for Z, which is D_1 ... D_M and y; and the penalty.

    Z is (M + 1, R, n), and the target x (R, n).

    With the best Z_b, w minimizes |x - Z_b - sum_m w_m (Z_m - Z_b)|^2 + lambda sum_m w_m^2
    |Z_m - Z_b|^2. lambda, which may be infinite, is the largest whose leave-one-out error is within
    one standard error of the smallest (paired, over pictures).
    """
    M, R, _ = Z.shape
    best = int(((Z - x) ** 2).sum((1, 2)).argmin())
    A = np.delete(Z, best, axis=0) - Z[best]
    r = x - Z[best]
    G = np.einsum("arn,brn->rab", A, A)
    c = np.einsum("arn,rn->ra", A, r)

    def solved(G: np.ndarray, c: np.ndarray, ridge: float) -> np.ndarray:
        return np.linalg.lstsq(G + ridge * np.diag(np.diag(G)), c, rcond=1e-12)[0]

    def left_out(ridge: float) -> list[float]:
        """The leave-one-out error of each picture, minus that of the best machine."""
        found = []
        for k in range(R):
            w = solved(G.sum(0) - G[k], c.sum(0) - c[k], ridge)
            found.append(w @ G[k] @ w - 2 * w @ c[k])
        return found

    ridge = float("inf")
    if R > 1:
        losses = np.array([*map(left_out, RIDGES), [0.0] * R])
        worse = losses - losses[losses.sum(1).argmin()]
        near = worse.sum(1) <= worse.std(1) * R**0.5  # within a standard error of the sum
        ridge = (*RIDGES, ridge)[np.flatnonzero(near)[-1]]
    w = np.zeros(M - 1) if np.isinf(ridge) else solved(G.sum(0), c.sum(0), ridge)
    return np.insert(w, best, 1 - w.sum()), ridge


def automatic_weights(machine: Mixed) -> WeightSchedule:
    """The weights that "auto" resolves to, from a subset of the corpus, in under a minute."""
    N = len(machine.corpus)
    M = len(machine.members)
    if N < 3:  # nothing can be held out
        return WeightSchedule([1.0], [[1 / M] * M], name="equal")
    subset = affordable(machine, len(AUTO_SIGMAS) * HELD_OUT)
    say(
        f"'auto': choosing weights of {', '.join(machine.members)} by denoising {HELD_OUT} "
        f"held-out pictures with {len(subset):,} of {N:,} images (kept for the next time)"
    )
    none = np.zeros(0, dtype=np.int64)
    try:
        corpus, source, validation, _ = split(subset, HELD_OUT, seed=0, test=1)
    except NothingDiffersError:
        return WeightSchedule([1.0], [[1 / M] * M], name="equal")
    return stack(machine, AUTO_SIGMAS, (corpus, source, validation, none), beyond=BEYOND).schedule


def weights_towards(network: Teacher, machine: Mixed, corpus: Corpus) -> WeightSchedule:
    """The weights with which a composite agrees best with a network; see `heldout.towards`."""
    low, high = network.levels()
    sigmas = [s for s in TOWARDS_SIGMAS if low <= s <= high]
    machine = machine.with_resolved_members()
    subset = affordable(machine, len(sigmas) * HELD_OUT, TOWARDS)
    say(
        f"choosing weights of {', '.join(machine.members)} by agreement with {network.name} on "
        f"{HELD_OUT} held-out pictures, with {len(subset):,} of {len(machine.corpus):,} images "
        "(kept for the next time)"
    )
    parts = unseen_parts(network, subset, corpus, HELD_OUT) or split(subset, HELD_OUT, seed=0)
    none = np.zeros(0, dtype=np.int64)
    beyond = sorted({min(sigma, high) for sigma in BEYOND if high > max(TOWARDS_SIGMAS)})
    return stack(machine, sigmas, (*parts[:3], none), 0, network, beyond).schedule


def _squared(d: np.ndarray) -> np.ndarray:
    return (d**2).mean(-1)
