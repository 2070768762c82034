"""Weights of machines that are mixed: ridge least squares on images that were held out.

At a noise level, the machines' D_1 ... D_M to noised held-out pictures, and these pictures
y themselves, are regressed on the clean ones, with weights that add up to 1. The penalty pulls
towards the machine that is best by itself, as hard as costs no more than a standard error on
pictures left out one at a time, so that a composite of machines that have nothing to add to it *is*
the best one. Breiman 1996, Stacked regressions.
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

LAYOUT = 3  # of the files in the cache of the corpus
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # penalties, in units of each difference's own square
HELD_OUT = 16  # pictures that "auto" weights are chosen on
BEYOND = (60.0, 200.0, 1000.0)  # noise levels at which only y is weighed


class Mixed(Calibrated, Protocol):
    """What stacking asks of a composite."""

    members: Mapping[str, Calibrated]

    def answers(
        self, y: torch.Tensor, sigma: torch.Tensor, index: np.ndarray
    ) -> list[torch.Tensor]:
        """D_m of every machine."""

    def with_resolved_members(self) -> Mixed:
        """The same, of machines with explicit settings."""


@dataclass
class Stacking:
    """What was found, per noise level. Errors are mean squared, in units of x in [-1, 1].

    Attributes:
        machines: The M machines' labels.
        sigmas: The K noise levels, falling.
        weights: (K, M); what they lack to 1 is the noisy picture's.
        ridges: (K,): the penalty; infinite where the best machine stays alone.
        errors: (K, R): of the mixture on R pictures that have not chosen.
        member_errors: (K, M, R): of every machine on the same.
        source: How many images the machines were made of.
        held_out: How many images chose.
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
    """Finds the weights of a composite.

    Arguments:
        machine: The composite.
        sigmas: Noise levels.
        parts: The images: a corpus, and positions in it of the source, of the pictures that choose
            and of those that report (which may be none).
        seed: Of the noise.
        network: Its D is what is regressed on, where given, not the clean picture.
        beyond: Noise levels above the others, where the machines hardly differ. They keep the
            weights of the highest other one, and what is found is the noisy picture's: next to
            nothing of it, right at a lower level, is much noise there. No errors are reported.

    Raises:
        ValueError: Where a level `beyond` is not above all others.
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
        """D_1 ... D_M and y, (M + 1, R, n), and what they should be, (R, n)."""
        x, eps = pictures
        y, level = x + sigma * eps, torch.full((len(x),), sigma, dtype=torch.float64)
        with torch.no_grad():
            target = x if network is None else network.denoise(y, sigma)
            answers = machine.answers(y, level, source)
        return torch.stack([*answers, y]).flatten(2).numpy(), target.flatten(1).numpy()

    def measured(sigma: float) -> dict[str, Any]:
        Z, x = both(validating, sigma)
        if sigma in beyond:  # every machine is their mean
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
    """The composite, its machines' "auto" localities being those that `parts` choose."""
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
    """Weights (M + 1,) that add up to 1, of D_1 ... D_M and y, which are Z; the penalty.

    Z is (M + 1, R, n), and what it should be x (R, n).

    With the best Z_b, w minimizes |x - Z_b - sum_m w_m (Z_m - Z_b)|^2 + lambda sum_m w_m^2
    |Z_m - Z_b|^2. lambda, which may be infinite, is the largest whose error on pictures left out
    one at a time is within one standard error of the least (paired, over pictures).
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
        """The errors, less those of the best machine, on pictures left out one at a time."""
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
    """What "auto" stands for: chosen on a subset of the corpus that keeps it under a minute."""
    N = len(machine.corpus)
    M = len(machine.members)
    if N < 3:  # nothing can be held out
        return WeightSchedule([1.0], [[1 / M] * M], name="equal")
    subset = affordable(machine, len(AUTO_SIGMAS) * HELD_OUT)
    say(
        f"'auto': choosing weights of {', '.join(machine.members)} by denoising {HELD_OUT} "
        f"held-out pictures with {len(subset):,} of {N:,} images (kept for the next time)"
    )
    nobody = np.zeros(0, dtype=np.int64)
    try:
        corpus, source, validation, _ = split(subset, HELD_OUT, seed=0, test=1)
    except NothingDiffersError:
        return WeightSchedule([1.0], [[1 / M] * M], name="equal")
    return stack(machine, AUTO_SIGMAS, (corpus, source, validation, nobody), beyond=BEYOND).schedule


def weights_towards(network: Teacher, machine: Mixed, corpus: Corpus) -> WeightSchedule:
    """The weights with which a composite agrees best with a network, as `calibration.towards`."""
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
    nobody = np.zeros(0, dtype=np.int64)
    beyond = sorted({min(sigma, high) for sigma in BEYOND if high > max(TOWARDS_SIGMAS)})
    return stack(machine, sigmas, (*parts[:3], nobody), 0, network, beyond).schedule


def _squared(d: np.ndarray) -> np.ndarray:
    return (d**2).mean(-1)
