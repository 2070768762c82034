"""When does the theory hold? How well a machine predicts networks that differ in one thing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.calibration.copies import tell, without_copies
from scoremachine.data.corpus import Corpus
from scoremachine.lab.comparison.agreement import Summary
from scoremachine.lab.comparison.parts import answers, compare, forward_pictures
from scoremachine.lab.networks.network import Network
from scoremachine.lab.networks.training import Training, train
from scoremachine.runtime.files import write_text
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer

HELD_OUT = 64  # images that no cell trains on
LEVELS = (5.0, 2.0, 1.0, 0.5, 0.2)  # of the forward process
MEMORY = 0.5  # the noise level at which errors on seen and unseen images are compared


@dataclass(frozen=True)
class Cell:
    """A network of the study.

    Attributes:
        group: Which request it answers: "images", "steps" or "network".
        label: What differs, in words.
        images, steps: How many it is trained on, and how long.
        network, settings: Of `train`.
    """

    group: str
    label: str
    images: int
    steps: int
    network: str = "resnet"
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass
class Row:
    """What was found of a cell and a machine.

    Attributes:
        cell: The cell.
        machine: The machine's label.
        r2, R2: Of final samples.
        forward: Median R2 on held-out images, at each of `LEVELS`.
        seen, unseen: The network's mean squared error on images that it was trained on, and on
            others, at noise level `MEMORY`: far apart where it has learnt its images by heart.
        nearest: How far its samples are from the images it was trained on, root mean square.
    """

    cell: Cell
    machine: str
    r2: Summary
    R2: Summary
    forward: list[float]
    seen: float
    unseen: float
    nearest: float


def cells(N: int, steps: int, sides: Sequence[int]) -> list[Cell]:
    """The study of a corpus of N images: sizes of the set, times, and kinds of networks."""
    most = N - min(HELD_OUT, N // 4)
    sizes = [n for n in (100, 300, 1_000, 3_000, 10_000) if n < most]
    found = [Cell("images", f"{n:,} images", n, steps) for n in [*sizes, most]]
    times = [max(1, round(steps * share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    found += [Cell("steps", f"{k:,} steps", most, k) for k in times]
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("plain", "resnet", {}),
        ("depth 3", "resnet", {"depth": 3}),
        ("depth 12", "resnet", {"depth": 12}),
        ("circular padding", "resnet", {"padding": "circular"}),
        ("group normalisation", "resnet", {"normalised": True}),
        ("MLP", "mlp", {}),
    ]
    if not any(side % 4 for side in sides):
        variants[5:5] = [
            ("U-Net", "unet", {}),
            ("U-Net, attention", "unet-attention", {}),
            ("DiT", "dit", {}),
        ]
    found += [
        Cell("network", label, most, steps, name, tuple(settings.items()))
        for label, name, settings in variants
    ]
    return found


def study(
    corpus: Corpus,
    out: str | Path,
    machines: Sequence[str] = ("els", "ls"),
    steps: int = 2000,
    chosen: Sequence[Cell] | None = None,
    count: int = 16,
    pictures: int = 16,
    everywhere: int = 1000,
    seed: int = 0,
    training: Training | None = None,
) -> list[Row]:
    """Trains the cells' networks and compares machines of the same images with each.

    What is finished stays in `out`, and the same call goes on after it.

    Arguments:
        corpus: The images; 64 are held out of everything.
        out: A folder for networks and what was found of each.
        machines: As `compare`'s.
        steps: How long a network is trained, where the time is not what differs.
        chosen: The cells; None: `cells`.
        count, pictures, everywhere, seed: As `compare`'s.
        training: How, apart from steps and seed.

    Raises:
        ValueError: For a corpus of fewer than 8 images.
    """
    check_integer("steps", steps)
    N = len(corpus)
    if N < 8:
        raise ValueError(f"a study needs at least 8 images, and {corpus.name!r} has {N}")
    order = np.random.default_rng(seed).permutation(N)
    held, rest = order[: min(HELD_OUT, N // 4)], order[min(HELD_OUT, N // 4) :]
    different = without_copies(corpus, held, rest)
    tell(corpus, len(rest) - len(different))
    rest = different
    rows: list[Row] = []
    todo = list(chosen if chosen is not None else cells(N, steps, corpus.shape[1:]))
    with bar("Studying", total=len(todo)) as progress:
        # longer trainings of the same network go on from shorter ones
        for cell in sorted(todo, key=lambda c: c.steps):
            part = corpus.subset(np.concatenate([held, rest[: cell.images]]))
            how = replace(
                training or Training(),
                steps=cell.steps,
                seconds=None,
                seed=seed,
                held_out=list(range(len(held))),
            )
            network, folder = _trained(cell, part, how, Path(out))
            rows += _measured(
                cell, network, machines, part, count, pictures, everywhere, seed, folder
            )
            progress.advance()
    places = {cell: k for k, cell in enumerate(todo)}
    return sorted(rows, key=lambda row: places[row.cell])


def _trained(cell: Cell, part: Corpus, how: Training, out: Path) -> tuple[Network, Path]:
    """The cell's network, from its folder where it is finished."""
    what = "-".join([cell.network, *(f"{k}={v}" for k, v in cell.settings), str(cell.images)])
    folder = out / what
    finished = folder / f"{cell.steps}"
    if (finished / "network.json").exists():
        network = Network.load(finished)
        known = network.card["training"]
        asked = {**how.settings(), "corpus_digest": part.digest, "steps": cell.steps}
        differing = [name for name, value in asked.items() if known.get(name) != value]
        if differing:
            raise ValueError(
                f"{finished} holds a network of another {', '.join(differing)}; going on needs the "
                "same study: repeat the command, or choose another --out"
            )
        return network, finished
    network = train(part, cell.network, folder, how, True, **dict(cell.settings))
    network.save(finished)
    return network, finished


def _measured(
    cell: Cell,
    network: Network,
    machines: Sequence[str],
    part: Corpus,
    count: int,
    pictures: int,
    everywhere: int,
    seed: int,
    folder: Path,
) -> list[Row]:
    asked = [list(machines), count, pictures, everywhere, seed, network.key, part.digest]
    path = folder / "compared.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["asked"] == asked:
            return [_row(cell, fields) for fields in kept["rows"]]
    found = compare(
        network, machines, part, LEVELS, pictures, count, seed=seed, everywhere=everywhere,
        kept=folder / ".unfinished", ways=1,
    )  # fmt: skip
    unseen = network.unseen(part)
    assert unseen is not None
    seen = np.setdiff1d(np.arange(len(part)), unseen)[: len(unseen)]
    rows = []
    for forward, samples in zip(found.of("forward"), found.of("samples"), strict=True):
        rows.append({
            "machine": samples.label,
            "r2": vars(Summary.of(samples.measures["r2"][0])),
            "R2": vars(Summary.of(samples.measures["R2"][0])),
            "forward": [Summary.of(row).median for row in forward.measures["R2"]],
            "seen": _error(network, part, seen, seed),
            "unseen": _error(network, part, unseen, seed),
            "nearest": float(found.distances["network"].mean()),
        })  # fmt: skip
    write_text(path, json.dumps({"asked": asked, "rows": rows}))
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    return [_row(cell, fields) for fields in rows]


def _row(cell: Cell, fields: dict[str, Any]) -> Row:
    r2, R2 = (
        Summary(**{**fields[name], "interval": tuple(fields[name]["interval"])})
        for name in ("r2", "R2")
    )
    return Row(cell, **{**fields, "r2": r2, "R2": R2})


def _error(network: Network, corpus: Corpus, index: np.ndarray, seed: int) -> float:
    """The network's mean squared error on some images at noise level `MEMORY`."""
    x, eps = forward_pictures(corpus, index, seed)
    D = answers(network, x + MEMORY * eps, MEMORY)
    return float(((D - x) ** 2).mean())


def markdown_rows(rows: Sequence[Row], group: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of one request."""
    header = ["", "machine", "r² of samples", "95% interval", "R² of samples"]
    header += [*(f"R² at {s:g}" for s in LEVELS), "error on seen", "on unseen", "to nearest"]
    lines = [
        [
            row.cell.label,
            f"`{row.machine}`",
            _number(row.r2.median),
            f"{_number(row.r2.interval[0])} to {_number(row.r2.interval[1])}",
            _number(row.R2.median),
            *map(_number, row.forward),
            f"{row.seen:.4f}",
            f"{row.unseen:.4f}",
            f"{row.nearest:.2f}",
        ]
        for row in rows
        if row.cell.group == group
    ]
    return header, lines


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""
