"""A weighted sum of other machines, with weights for every noise level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from scoremachine.calibration.stacking import automatic_weights
from scoremachine.core.processes import Process
from scoremachine.core.schedules import WeightSchedule
from scoremachine.core.shares import Shares, mixed
from scoremachine.core.windows import Variant
from scoremachine.data.corpus import Corpus
from scoremachine.machines.build import build, spelled
from scoremachine.machines.machine import Batch, Label, Machine, apply_bandwidth, source_share

Members = str | Sequence["str | Machine"] | Mapping[str, Machine]


class Composite(Machine):
    """A weighted sum of other machines and the noisy picture: D = w_0 y + sum_m w_m D_m.

    The weights of a noise level sum to 1 and may be negative. "auto" fits them by ridge least
    squares on held-out images (`scoremachine.calibration.stacking`; Breiman 1996, Stacked
    regressions). w_0 has the effect of a bandwidth.

    Arguments:
        of: The machines: comma-separated names ("gaussian,ls:7,pspc"), or a sequence of names and
            machines, or a mapping from labels to machines. For names see `machines.build.spelled`.
        weights: A `WeightSchedule`, or one number for each machine (w_0 is 1 minus their sum; also
            as comma-separated text), or "auto".
        corpus, settings: See `Machine`.

    Raises:
        ValueError: For no machines, a repeated label, machines of another shape, or weights that
            are not finite or not one for each machine.
    """

    name = "composite"

    def __init__(
        self,
        corpus: Corpus,
        of: Members = "ideal,gaussian,ls,pspc,pspc-flex,pca:auto",
        weights: WeightSchedule | Sequence[float] | float | str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(corpus, **settings)
        self.of = _members(of, corpus, self.kernel)
        self.weights = self._checked(weights)
        self.equivariant = any(m.equivariant for m in self.of.values())
        self.relative_cost = sum(m.relative_cost for m in self.of.values())

    @property
    def members(self) -> dict[str, Machine]:
        """The machines by label."""
        return self.of

    def _checked(self, weights: Any) -> WeightSchedule | str:
        if isinstance(weights, str) and weights == "auto":
            return weights
        if not isinstance(weights, WeightSchedule):
            try:
                each = weights.split(",") if isinstance(weights, str) else weights
                row = [float(w) for w in (each if isinstance(each, Iterable) else [each])]
            except (TypeError, ValueError):
                raise ValueError(
                    f"weights is {weights!r}; expected 'auto', a WeightSchedule or "
                    f"{len(self.members)} numbers"
                ) from None
            weights = WeightSchedule([1.0], [row])
        if weights.values.shape[1] != len(self.members):
            raise ValueError(
                f"there are {weights.values.shape[1]} weights at every noise level for the "
                f"{len(self.members)} machines {', '.join(self.members)}; expected one for each"
            )
        return weights

    def weights_at(self, sigma: float) -> np.ndarray:
        """The machines' weights at noise level `sigma`; w_0 is 1 minus their sum."""
        weights = self.resolved().weights
        assert isinstance(weights, WeightSchedule)
        return weights(sigma)

    @property
    def is_resolved(self) -> bool:
        explicit = super().is_resolved and not isinstance(self.weights, str)
        return explicit and all(m.is_resolved for m in self.members.values())

    def resolve(self) -> Self:
        machine = self.with_resolved_members()
        if isinstance(self.weights, str):
            plain = machine.clone_with(bandwidth=0.0)
            machine = machine.clone_with(weights=automatic_weights(plain))
        return machine if machine.is_resolved else super(Composite, machine).resolve()

    def with_resolved_members(self) -> Self:
        """The same composite, with explicit settings of its members."""
        return self.clone_with(of={label: m.resolved() for label, m in self.members.items()})

    def each(self, batch: Batch) -> list[Tensor]:
        """D_m of every machine, with its own bandwidth."""
        return [
            apply_bandwidth(member.mean(wider), batch.y, batch.sigma, h)
            for member, wider, h in self._with_bandwidths(batch)
        ]

    def _with_bandwidths(self, batch: Batch) -> Iterator[tuple[Machine, Batch, Tensor]]:
        """Every machine, the pictures at its bandwidths, and these."""
        for member in self.members.values():
            h = member.bandwidths(batch.level)
            yield member, replace(batch, sigma=torch.sqrt(batch.sigma**2 + h**2)), h

    @property
    def has_sources(self) -> bool:  # type: ignore[override]
        return any(m.has_sources for m in self.members.values())

    @property
    def variants(self) -> tuple[Variant, ...]:
        several = {m.variants for m in self.members.values() if len(m.variants) > 1}
        if len(several) > 1:
            raise ValueError(
                "the machines of this composite read the images in different variants, which "
                "cannot be named together: give all of them the same augment"
            )
        return several.pop() if several else (Variant(),)

    def shares(self, batch: Batch, k: int) -> Shares:
        w = torch.tensor(np.stack([self.weights_at(float(s)) for s in batch.level]))
        # what leads in one machine may be further down in another
        parts = [
            member.shares(wider, 2 * k).with_own(batch.y, source_share(batch.sigma, h))
            for member, wider, h in self._with_bandwidths(batch)
        ]
        return mixed(batch.y / self.source.scale, w, parts, k)

    def answers(self, y: Tensor, sigma: Tensor, index: np.ndarray) -> list[Tensor]:
        """D_m of every machine for valid float64 pictures, with the images at `index` as source."""
        return self.with_resolved_members().each(Batch(y, sigma, sigma, index))

    def mean(self, batch: Batch) -> Tensor:
        w = torch.tensor(np.stack([self.weights_at(float(s)) for s in batch.level]))
        D = (1 - w.sum(1))[:, None, None, None] * batch.y / self.source.scale
        for m, D_m in enumerate(self.each(batch)):
            D = D + w[:, m, None, None, None] * D_m
        return D

    def seen_through(self, process: Process, t: float) -> Self:
        other = super().seen_through(process, t)
        members = {label: m.under_process(process, t) for label, m in self.of.items()}
        other.__dict__["of"] = members
        return other

    def smaller(self, corpus: Corpus) -> Machine:
        return self.clone_with(
            corpus, of={label: m.smaller(corpus) for label, m in self.members.items()}
        )

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> Self:
        machine = super().prepare(label, levels)
        for member in machine.members.values():
            member.prepare(label, levels)
        return machine

    def settings(self) -> dict[str, object]:
        of = {label: member.settings() for label, member in self.members.items()}
        return {**super().settings(), "of": of}


def _members(of: Members, corpus: Corpus, kernel: str) -> dict[str, Machine]:
    """The machines by label, on a corpus."""
    if isinstance(of, Mapping):
        given: list[tuple[str, Any]] = list(of.items())
    else:
        texts = of.split(",") if isinstance(of, str) else of
        try:
            given = [(getattr(each, "name", str(each)).strip(), each) for each in texts]
        except TypeError:
            raise ValueError(
                f"of is {of!r}; expected machines or their names, as 'gaussian,ls,pspc'"
            ) from None
    members: dict[str, Machine] = {}
    for label, each in given:
        if isinstance(each, str):
            name, settings = spelled(each)
            each = build(name, corpus, **{"kernel": kernel, **settings})
        if not isinstance(each, Machine):
            raise ValueError(f"of holds {each!r}; expected machines or their names")
        if each.corpus.shape != corpus.shape:
            raise ValueError(
                f"{label} is made of images {each.corpus.shape}, and the corpus {corpus.name!r} "
                f"has {corpus.shape}; expected the same"
            )
        if label in members:
            raise ValueError(f"{label} appears twice; give every machine once")
        members[label] = each if each.corpus is corpus else each.clone_with(corpus)
    if not members:
        raise ValueError("there is no machine to mix; give at least one, as 'gaussian,ls,pspc'")
    return members
