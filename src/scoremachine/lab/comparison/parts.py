"""Comparison of machines with a network: held-out images, its trajectory, and final samples."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.noise import Schedule
from torch import Tensor

from scoremachine.calibration.copies import single, tell, without_copies
from scoremachine.calibration.heldout import check_images, towards
from scoremachine.calibration.stacking import weights_towards
from scoremachine.data.corpus import Corpus
from scoremachine.data.heatmaps import UNREADABLE
from scoremachine.data.pixels import to_uint8
from scoremachine.lab.comparison.agreement import Summary, agreement
from scoremachine.lab.denoising_error import fewer, highest_or_tied
from scoremachine.lab.networks.network import Network, Within
from scoremachine.machines import Composite, IdealScore, Machine, build, kind_of, spelled
from scoremachine.provenance.novelty import explained, left_out, originals_of
from scoremachine.runtime.files import optional, written
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.records import versions
from scoremachine.runtime.validation import check_integer, check_name, check_seed, options_of
from scoremachine.sampling.generate import generate_batches
from scoremachine.sampling.samplers import SAMPLERS
from scoremachine.sampling.schedules import times_of
from scoremachine.sampling.trajectory import Sampling, trajectory

ERROR = 1e-2  # the largest error of a pixel in searches of els; networks differ by more
LEVELS = 10  # the default number of noise levels of the forward process
SHOWN = {"forward": "R2", "reverse": "R2", "samples": "r2"}  # the measure of the tables
LEFT_OUT = "images left out"  # the label of pictures to compare with
BATCH = 8  # pictures in a batch
TRAJECTORIES = 16  # the most trajectories of the network that machines follow
MAX_IMAGES_ELS = 2000  # the most images of machines that compare all positions
EARLIER = {"everywhere": "max_images_els", "ways": "trajectories"}  # names of arguments


@dataclass
class MachineSpec:
    """The specification of a machine in a comparison.

    Attributes:
        label: Its label in tables: "els:kamb-mnist-resnet", "ls+h", "els:network".
        name: The machine's name.
        settings: Of `build`.
        towards: Whether its locality is the one that agrees best with the network, and its
            bandwidth too if it has one.
    """

    label: str
    name: str
    settings: dict[str, Any]
    towards: bool = False

    @classmethod
    def of(cls, text: str) -> MachineSpec:
        """From NAME[:LOCALITY][+WINDOW][+circular][+h], as in `machines.spelled`.

        The locality "network" means the one that agrees best with the network
        (`heldout.towards`); for a composite, the weights (`stacking.weights_towards`).

        Raises:
            ValueError: For an unknown name, or a locality of a machine that has none.
        """
        text = text.strip()
        if text == f"{Composite.name}:network":
            return cls(text, Composite.name, {}, True)
        name, settings = spelled(text)
        local = str(kind_of(name).locality)
        towards = settings.get(local) == "network"
        if towards:
            del settings[local]
        return cls(text, name, settings, towards)

    def built(self, corpus: Corpus, network: Network | None, everything: Corpus | None) -> Machine:
        """The machine on a corpus, which is a part of the network's corpus `everything`.

        Raises:
            ValueError: If the settings need a network, and there is none.
        """
        search = {"error": ERROR} if kind_of(self.name).equivariant else {}
        machine = build(self.name, corpus, **search, **self.settings)
        if not self.towards:
            return machine
        if network is None or everything is None:
            raise ValueError(
                f"{self.label} is chosen by agreement with a network, which only compare and study "
                "support; here, give a size, a schedule, or nothing"
            )
        if isinstance(machine, Composite):
            return machine.clone_with(corpus, weights=weights_towards(network, machine, everything))
        locality, bandwidth = towards(network, machine, everything, machine.bandwidth == "auto")
        chosen: dict[str, Any] = {str(machine.locality): locality}
        if machine.bandwidth == "auto":
            chosen["bandwidth"] = bandwidth
        return machine.clone_with(corpus, **chosen)


@dataclass
class Part:
    """The measures of one machine in one part, at its K noise levels.

    Attributes:
        part: "forward", "reverse" or "samples".
        label: The machine's.
        sigmas: The noise levels, in descending order; [0] for samples.
        measures: By name ("mse", "cosine", "r", "r2", "R2": agreement with the network; "truth":
            mean squared error to the clean picture, forward only) the values of every picture,
            float64 (K, n).
    """

    part: str
    label: str
    sigmas: list[float]
    measures: dict[str, np.ndarray]

    @functools.cached_property
    def summaries(self) -> list[dict[str, Summary]]:
        """The summaries of every noise level, by measure."""
        return [
            {name: Summary.of(values[k]) for name, values in self.measures.items()}
            for k in range(len(self.sigmas))
        ]


@dataclass
class Comparison:
    """The result of `compare`.

    Attributes:
        settings: The settings of the comparison, as JSON values.
        parts: Every machine in every part; the network itself is in "forward" with "truth" only.
        samples: Final pictures by label, the network's as "network": float32 (n, C, H, W).
        nearest: The training image nearest to each, uint8 (n, C, H, W).
        distances: Their root mean square distances, (n,).
        explained: The share of each of the first pictures that its most alike training image
            explains, aligned (`provenance.novelty`); and of images left out, as `LEFT_OUT`.
        path: Of the first picture, y = x_t / alpha_t along the network's trajectory as "y", the
            network's D as "network", and the machines' by label: float32 (K, C, H, W).
    """

    settings: dict[str, Any]
    parts: list[Part]
    samples: dict[str, np.ndarray]
    nearest: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]
    explained: dict[str, np.ndarray]
    path: dict[str, np.ndarray]

    @property
    def labels(self) -> list[str]:
        """The labels of the machines."""
        return [label for label in self.samples if label != "network"]

    def of(self, part: str) -> list[Part]:
        """The measures of the machines in a part."""
        return [p for p in self.parts if p.part == part and p.label != "network"]

    def best(self, part: str) -> np.ndarray:
        """(machines, K): whether a machine's median is the highest, or tied with it.

        The median over pictures of the measure in the tables (`SHOWN`); see `highest_or_tied`.
        """
        return highest_or_tied(np.stack([p.measures[SHOWN[part]] for p in self.of(part)]))


class Pieces:
    """Expensive intermediate results, kept in a folder until everything is finished.

    So after an interruption the same command resumes, with the same versions of all packages.
    """

    def __init__(self, folder: Path | None, of: Any) -> None:
        self.folder, self.of = folder, [of, versions()]

    def get(self, key: list[Any], make: Callable[[], Tensor]) -> Tensor:
        """A tensor by a key of all that determines it."""
        if self.folder is None:
            return make()
        digest = hashlib.sha256(json.dumps([self.of, key], default=str).encode()).hexdigest()[:20]
        path = self.folder / f"{digest}.npy"
        if path.exists():
            try:
                return torch.from_numpy(np.load(path, allow_pickle=False))
            except UNREADABLE:
                path.unlink(missing_ok=True)
        made = make()
        with optional(path), written(path) as temporary:
            np.save(temporary, made.numpy())
        return made


@dataclass(frozen=True)
class ComparisonOptions:
    """The options of `compare`.

    Attributes:
        sigmas: Noise levels of the forward process; None: ten from 0.05 to 20.
        pictures: The number of held-out images.
        count: The number of samples.
        steps, sampler, schedule: Of samples and trajectories; schedule None: the network's own.
        seed: Of all noise.
        max_images_els: The most images of machines that compare all positions.
        kept: A folder for finished intermediate results, in case of an interruption.
        trajectories: The number of the network's trajectories that machines follow: those of its
            first samples.

    Raises:
        ValueError: For numbers out of their range, or an unknown sampler.
    """

    sigmas: Sequence[float] | np.ndarray | None = None
    pictures: int = 32
    count: int = 16
    steps: int = 20
    seed: int = 0
    sampler: str = "ddim"
    schedule: Schedule | None = None
    max_images_els: int = MAX_IMAGES_ELS
    kept: Path | None = None
    trajectories: int = TRAJECTORIES

    def __post_init__(self) -> None:
        for name in ("pictures", "count", "steps", "trajectories", "max_images_els"):
            check_integer(name, getattr(self, name))
        check_name("sampler", self.sampler, SAMPLERS)
        check_seed(self.seed)

    def levels(self) -> np.ndarray:
        """The noise levels of the forward process, in descending order."""
        known = np.geomspace(20, 0.05, LEVELS) if self.sigmas is None else self.sigmas
        return np.sort(np.asarray(known, dtype=float))[::-1]


def compare(
    network: Network, machines: Sequence[str | Machine], corpus: Corpus, **options: Any
) -> Comparison:
    """Measures how well machines predict a network.

    There are three parts. *Forward*: network and machine denoise held-out images with noise.
    *Reverse*: both denoise every x_t along the network's sampling trajectory. *Samples*: each
    follows its own sampling trajectory from the same noise.

    Arguments:
        network: The network.
        machines: "NAME[:LOCALITY][+h]" (see `MachineSpec.of`; LOCALITY "network" means the one
            that agrees best with this network), or machines, which are used as they are.
        corpus: The images that the network was trained on, or similar ones. The images that the
            network has not seen according to its card are held out, or else random ones.
        options: Those of `ComparisonOptions`, by name.

    Raises:
        ValueError: For pictures of another shape, unknown names, or noise levels outside the range
            of the network.
        TypeError: For an unknown option.
    """
    o = options_of(ComparisonOptions, options, EARLIER)
    network.check_corpus(corpus)
    levels = o.levels()
    for sigma in levels:
        network.time(float(sigma))  # raises outside its range
    network = network.under(o.schedule)
    walk = Walk(*network.on_noise_levels(o.steps), o.sampler, o.seed)
    held, source = held_out_and_source([network], corpus, o.pictures, o.seed)
    built = built_machines(machines, source, o.max_images_els, network, corpus)
    if not built:
        raise ValueError("there is no machine to compare with; give at least one")
    schedule = walk.network.schedule
    built = {label: m.clone_with(m.corpus, schedule=schedule) for label, m in built.items()}
    pieces = Pieces(o.kept, [network.key, corpus.key, o.seed])
    one = _Comparing(network, built, corpus, pieces, walk)
    total = len(built) * (len(levels) + walk.steps + 1) + 1
    with bar("Comparing", total=total) as progress, torch.no_grad():
        one.progress = progress
        parts = one.forward(levels, held)
        followed, path = one.reverse(min(o.trajectories, o.count))
        parts += followed
        more, samples = one.samples(o.count)
        parts += more
    nearest, distances = _nearest(samples, source)
    sets = [*((to_uint8(x), None) for x in samples.values()), left_out(source)]
    originals = map(explained, originals_of(sets, source))
    shares = dict(zip([*samples, LEFT_OUT], originals, strict=True))
    settings = {
        "network": network.name, "network_key": network.key, "card": network.card,
        "machines": {k: m.settings() | {"images": len(m.corpus)} for k, m in built.items()},
        "corpus": corpus.name, "corpus_key": corpus.key, "held_out": held.tolist(),
        "sigmas": levels.tolist(), "count": o.count, "steps": walk.steps, "seed": o.seed,
        "sampler": o.sampler, "schedule": name_of(schedule), "versions": versions(),
    }  # fmt: skip
    return Comparison(settings, parts, samples, nearest, distances, shares, path)


def built_machines(
    machines: Sequence[str | Machine],
    source: Corpus,
    max_images_els: int,
    network: Network | None = None,
    corpus: Corpus | None = None,
) -> dict[str, Machine]:
    """Machines by label; those given by name are built on the source.

    The settings of NAME:network are those that agree best with `network`, trained on `corpus`.
    """
    built: dict[str, Machine] = {}
    whole = source.indices()
    for each in machines:
        if isinstance(each, Machine):
            label, machine = each.name, each
        else:
            spec = MachineSpec.of(each)
            some = fewer(spec.name, whole, max_images_els)
            part = source if len(some) == len(whole) else source.subset(some)
            label, machine = spec.label, spec.built(part, network, corpus)
        if label in built:
            raise ValueError(f"{label} appears twice; give every machine once")
        built[label] = machine
    return built


def held_out_and_source(
    networks: Sequence[Network], corpus: Corpus, pictures: int, seed: int
) -> tuple[np.ndarray, Corpus]:
    """Positions of images held out from networks and machines, and the machines' source.

    Exact and near copies of them (`calibration.copies`) are held out too: if a network was trained
    on a copy of an unseen image, the image is skipped, and copies are left out of the source.

    Raises:
        ValueError: For a mixture, or if nothing can be held out.
    """
    check_images(corpus, "give the images")
    N = len(corpus)
    known = [network.unseen(corpus) for network in networks]
    common = _common(known) if known else None
    if common is not None and len(common) >= 2:
        # all images that the networks have not seen are left out of the source too
        held = single(corpus, common, min(pictures, len(common)))
        if len(held) >= min(2, pictures):
            return held, corpus.subset(np.setdiff1d(np.arange(N), common))
    if N < 2:
        raise ValueError(f"the corpus {corpus.name!r} has one image; none can be held out")
    if networks:
        names = ", ".join(network.name for network in networks)
        if common is None:
            why = f"it is not known which images of {corpus.name} {names} was trained on"
        elif len(common) < 2:
            why = f"{names} left out too few images of {corpus.name} in common"
        else:
            why = f"{names} was trained on copies of the images of {corpus.name} that it left out"
        say(f"{why}: those that are held out here may have been seen")
    order = np.random.default_rng(seed).permutation(N)
    held, rest = order[: min(pictures, N // 2)], order[min(pictures, N // 2) :]
    source = without_copies(corpus, held, rest)
    if len(source) == 0:
        raise ValueError(
            f"all images of {corpus.name!r} are copies of each other; none can be held out"
        )
    tell(corpus, len(rest) - len(source))
    return np.sort(held), corpus.subset(np.sort(source))


def _common(positions: list[np.ndarray | None]) -> np.ndarray | None:
    """Their intersection; None if one of them is unknown."""
    found = positions[0]
    for others in positions[1:]:
        found = None if found is None or others is None else np.intersect1d(found, others)
    return found


def forward_pictures(corpus: Corpus, held: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Held-out images and their standard noise, float32."""
    x = torch.from_numpy(np.array(corpus.images[held])).float() / 127.5 - 1
    return x, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Walk:
    """The settings of sampling trajectories.

    Attributes:
        network: The network, on the part of its schedule that has noise levels.
        steps, sampler, seed: Of the trajectories of the network and of the machines.
    """

    network: Network
    steps: int
    sampler: str
    seed: int

    @property
    def schedule(self) -> Schedule:
        """The schedule of the network and of the machines."""
        return self.network.schedule

    def key(self, count: int) -> list[Any]:
        """All that determines the trajectories of `count` pictures, as JSON values."""
        levels = [v.tolist() for v in self.schedule(times_of(self.schedule, self.steps))]
        return [name_of(self.schedule), levels, self.sampler, self.steps, self.seed, count]


class _Comparing:
    """The three parts of a comparison."""

    progress: Any

    def __init__(
        self,
        network: Network,
        machines: dict[str, Machine],
        corpus: Corpus,
        pieces: Pieces,
        walk: Walk,
    ) -> None:
        self.network, self.machines, self.corpus = network, machines, corpus
        self.pieces, self.walk = pieces, walk
        # before "auto" is resolved
        self.asked = {k: json.dumps(m.settings()) for k, m in machines.items()}

    def forward(self, levels: np.ndarray, held: np.ndarray) -> list[Part]:
        """Held-out images with noise."""
        x, eps = forward_pictures(self.corpus, held, self.walk.seed)
        targets = [denoised(self.network, x + float(s) * eps, float(s)) for s in levels]
        truth = np.stack([_squared(D, x) for D in targets])
        parts = [Part("forward", "network", levels.tolist(), {"truth": truth})]
        for label, machine in self.machines.items():
            found = []
            for sigma, D in zip(levels.tolist(), targets, strict=True):
                key = ["forward", self.asked[label], sigma, held.tolist()]
                E = self.pieces.get(key, lambda s=sigma, m=machine: denoised(m, x + s * eps, s))  # type: ignore[misc]
                found.append(agreement(D.numpy(), E.numpy()) | {"truth": _squared(E, x)})
                self.progress.advance()
            parts.append(Part("forward", label, levels.tolist(), _stacked(found)))
        return parts

    def reverse(self, count: int) -> tuple[list[Part], dict[str, np.ndarray]]:
        """The network's sampling trajectory."""
        w = self.walk
        points = []
        sampling = Sampling(w.steps, w.seed, w.sampler, shape=w.network.shape)
        for x_t, D, t in trajectory(w.network, range(count), sampling):
            alpha, sigma = w.schedule(torch.tensor(t, dtype=torch.float64))
            points.append((x_t / float(alpha), D.float(), float(sigma / alpha)))
        sigmas = [sigma for _, _, sigma in points]
        path = {"y": np.stack([y[0].numpy() for y, _, _ in points]),
                "network": np.stack([D[0].numpy() for _, D, _ in points])}  # fmt: skip
        parts = []
        for label, machine in self.machines.items():
            found, shown = [], []
            machine.prepare(None, sigmas)
            for k, (y, D, sigma) in enumerate(points):
                key = ["reverse", self.asked[label], w.key(count), k]
                E = self.pieces.get(key, lambda y=y, s=sigma, m=machine: denoised(m, y, s))  # type: ignore[misc]
                found.append(agreement(D.numpy(), E.numpy()))
                shown.append(E[0].float().numpy())
                self.progress.advance()
            parts.append(Part("reverse", label, sigmas, _stacked(found)))
            path[label] = np.stack(shown)
        return parts, path

    def samples(self, count: int) -> tuple[list[Part], dict[str, np.ndarray]]:
        """The samples of each denoiser, from the same noise."""
        samples = {"network": self._samples("network", self.walk.network, count)}
        parts = []
        for label, machine in self.machines.items():
            samples[label] = self._samples(label, machine, count)
            alike = agreement(samples["network"], samples[label])
            parts.append(Part("samples", label, [0.0], _stacked([alike])))
            self.progress.advance()
        return parts, samples

    def _samples(self, label: str, denoiser: Network | Machine, count: int) -> np.ndarray:
        bandwidth = denoiser.bandwidth if isinstance(denoiser, Machine) else 0.0
        w, found = self.walk, []
        for first in range(0, count, BATCH):
            some = range(first, min(first + BATCH, count))

            def make(some: range = some) -> Tensor:
                shape, steps = w.network.shape, w.steps
                sampling = Sampling(
                    steps, w.seed, w.sampler, bandwidth=bandwidth, batch=len(some), shape=shape
                )
                batches = generate_batches(denoiser, some, sampling)
                return torch.cat([path[-1][1] for _, path in batches]).float()

            key = ["samples", self.asked.get(label), w.key(len(some)), first]
            found.append(self.pieces.get(key, make))
        return torch.cat(found).numpy()


def name_of(schedule: Schedule) -> str:
    """The name of a schedule; a part of a schedule has the name of the whole one."""
    return type(schedule.schedule if isinstance(schedule, Within) else schedule).__name__


def denoised(denoiser: Network | Machine, y: Tensor, sigma: float) -> Tensor:
    """D, batch by batch."""
    with torch.no_grad():
        return torch.cat([denoiser.denoise(some, sigma) for some in y.split(BATCH)]).float()


def _squared(D: Tensor, x: Tensor) -> np.ndarray:
    return ((D.double() - x.double()) ** 2).mean((1, 2, 3)).numpy()


def _stacked(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([f[name] for f in found]) for name in found[0]}


def _nearest(
    samples: dict[str, np.ndarray], source: Corpus
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    ideal = build("ideal", source)
    assert isinstance(ideal, IdealScore)
    images, distances = {}, {}
    for label, x in samples.items():
        places, far = ideal.nearest(torch.from_numpy(x).clamp(-1, 1))
        images[label], distances[label] = np.asarray(source.images[places.numpy()]), far.numpy()
    return images, distances
