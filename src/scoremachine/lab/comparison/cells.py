"""A study of when the theory holds: how well machines predict networks that differ in one thing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.calibration.copies import tell, without_copies
from scoremachine.data.corpus import Corpus
from scoremachine.lab.comparison.agreement import Summary
from scoremachine.lab.comparison.parts import EARLIER, compare, denoised, forward_pictures
from scoremachine.lab.networks.architectures import check_settings
from scoremachine.lab.networks.network import Network
from scoremachine.lab.networks.training import Training, train
from scoremachine.runtime.files import keep_text, read_json
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.records import differing, other_versions, versions
from scoremachine.runtime.validation import check_integer, options_of

HELD_OUT = 64  # images that no cell is trained on
LEVELS = (5.0, 2.0, 1.0, 0.5, 0.2)  # of the forward process
MEMORY = 0.5  # the noise level at which errors on seen and unseen images are compared
LAYOUT = 2  # version of compared.json
DRAWS = 2000  # resamples of a bootstrap


@dataclass(frozen=True)
class Cell:
    """A network of the study.

    Attributes:
        group: The property that varies: "images", "steps" or "network".
        label: Its value, in words.
        images, steps: The numbers of training images and steps.
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
    """The results of a cell and a machine.

    Attributes:
        cell: The cell.
        machine: The machine's label.
        r2, R2: Of final samples.
        forward: Median R2 on held-out images, at each of `LEVELS`.
        seen, unseen: The network's mean squared errors at noise level `MEMORY`, one by one, on up
            to 64 images that it was trained on, and on as many others. They are the same images in
            every cell (fewer seen ones if it was trained on fewer), and one set may be harder than
            the other, so a single cell says little; see `memorization`.
        nearest: Root mean square distance of its samples to the nearest training images.
    """

    cell: Cell
    machine: str
    r2: Summary
    R2: Summary
    forward: list[float]
    seen: list[float]
    unseen: list[float]
    nearest: float


def cells(N: int, steps: int, sides: Sequence[int]) -> list[Cell]:
    """The cells for a corpus of N images: numbers of images, training times, and networks."""
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


@dataclass(frozen=True)
class StudyOptions:
    """The options of a study.

    Attributes:
        steps: The number of training steps, in cells that differ in something else.
        chosen: The cells; None: `cells`.
        count, pictures, max_images_els, seed: As in `compare`.
        training: The training settings, apart from steps and seed.
    """

    steps: int = 2000
    chosen: Sequence[Cell] | None = None
    count: int = 16
    pictures: int = 16
    max_images_els: int = 1000
    seed: int = 0
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        for name in ("steps", "count", "pictures", "max_images_els"):
            check_integer(name, getattr(self, name))


def study(
    corpus: Corpus, out: str | Path, machines: Sequence[str] = ("els", "ls"), **options: Any
) -> list[Row]:
    """Trains the cells' networks and compares machines of the same images with each.

    Finished cells are kept in `out`, and the same call resumes after them.

    Arguments:
        corpus: The images; 64 of them and all their copies are held out in all cells.
        out: A folder for networks and their results.
        machines: As in `compare`.
        options: Those of `StudyOptions`, by name.

    Raises:
        ValueError: For a corpus of fewer than 8 images.
        TypeError: For an unknown option.
    """
    o = options_of(StudyOptions, options, EARLIER)
    N = len(corpus)
    if N < 8:
        raise ValueError(f"a study needs at least 8 images, and {corpus.name!r} has {N}")
    order = np.random.default_rng(o.seed).permutation(N)
    held, rest = order[: min(HELD_OUT, N // 4)], order[min(HELD_OUT, N // 4) :]
    different = without_copies(corpus, held, rest)
    tell(corpus, len(rest) - len(different))
    rows: list[Row] = []
    todo = list(o.chosen if o.chosen is not None else cells(N, o.steps, corpus.shape[1:]))
    with bar("Studying", total=len(todo)) as progress:
        # longer training of the same network resumes from shorter training
        for cell in sorted(todo, key=lambda c: c.steps):
            part = corpus.subset(np.concatenate([held, different[: cell.images]]))
            how = replace(
                o.training,
                steps=cell.steps,
                seconds=None,
                seed=o.seed,
                held_out=list(range(len(held))),
            )
            network, folder = _trained(cell, part, how, Path(out))
            rows += _measured(cell, network, machines, part, o, folder)
            progress.advance()
    places = {cell: k for k, cell in enumerate(todo)}
    return sorted(rows, key=lambda row: places[row.cell])


def _trained(cell: Cell, part: Corpus, how: Training, out: Path) -> tuple[Network, Path]:
    """The cell's network, from its folder if it is finished."""
    what = "-".join([cell.network, *(f"{k}={v}" for k, v in cell.settings), str(cell.images)])
    folder = out / what
    finished = folder / f"{cell.steps}"
    if (finished / "network.json").exists():
        network = Network.load(finished)
        known = network.card["training"]
        asked = {**how.settings(), "corpus_digest": part.digest, "steps": cell.steps,
                 "held_out": how.held_out}  # fmt: skip
        others = differing(asked, {name: known[name] for name in asked if name in known})
        chosen = {**check_settings(cell.network, {}), **dict(cell.settings)}
        others += differing(chosen, network.card["settings"])
        if others:
            raise ValueError(
                f"{finished} holds a network of another {', '.join(others)}; going on needs the "
                "same study: repeat the command, or choose another --out"
            )
        if ran := other_versions(known.get("versions")):
            say(f"{finished} was trained with {ran}, and is not trained again")
        return network, finished
    network = train(part, cell.network, folder, how, True, **dict(cell.settings))
    network.save(finished)
    return network, finished


def _measured(
    cell: Cell,
    network: Network,
    machines: Sequence[str],
    part: Corpus,
    options: StudyOptions,
    folder: Path,
) -> list[Row]:
    how = {"pictures": options.pictures, "count": options.count, "seed": options.seed,
           "max_images_els": options.max_images_els}  # fmt: skip
    asked = [LAYOUT, list(machines), how, network.key, part.digest, versions()]
    path = folder / "compared.json"
    if path.exists():
        kept = read_json(path, "expected what a study found")
        if kept["asked"] == asked:
            return [_row(cell, fields) for fields in kept["rows"]]
    found = compare(
        network, machines, part, sigmas=LEVELS, kept=folder / ".unfinished", trajectories=1, **how
    )
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
            "seen": _errors(network, part, seen, options.seed),
            "unseen": _errors(network, part, unseen, options.seed),
            "nearest": float(found.distances["network"].mean()),
        })  # fmt: skip
    keep_text(path, json.dumps({"asked": asked, "rows": rows}))
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    return [_row(cell, fields) for fields in rows]


def _row(cell: Cell, fields: dict[str, Any]) -> Row:
    r2, R2 = (
        Summary(**{**fields[name], "interval": tuple(fields[name]["interval"])})
        for name in ("r2", "R2")
    )
    return Row(cell, **{**fields, "r2": r2, "R2": R2})


def _errors(network: Network, corpus: Corpus, index: np.ndarray, seed: int) -> list[float]:
    """The network's mean squared errors on some images at noise level `MEMORY`, one by one."""
    x, eps = forward_pictures(corpus, index, seed)
    D = denoised(network, x + MEMORY * eps, MEMORY)
    return ((D - x) ** 2).mean((1, 2, 3)).tolist()


def memorization(row: Row, reference: Row) -> tuple[float, float, float]:
    """Error on seen images divided by that on unseen ones, relative to another cell's ratio.

        (seen / unseen) / (seen / unseen of the reference, on the same images)

    The reference, trained on all images, hardly memorizes any of them: its ratio differs from 1
    only because one set of images is harder. So if the result is below 1, with an interval that
    excludes 1, the network is better on its training images by more than that explains: it
    overfits.

    Returns:
        The ratio, and its 95% interval by bootstrap over images, paired between the two cells.
    """
    rng = np.random.default_rng(0)
    logs, resampled = 0.0, np.zeros(DRAWS)
    for name, sign in (("seen", 1), ("unseen", -1)):
        a, b = np.asarray(getattr(row, name)), np.asarray(getattr(reference, name))
        n = min(len(a), len(b))
        a, b = a[:n], b[:n]
        some = rng.integers(0, n, (DRAWS, n))
        logs += sign * float(np.log(a.mean() / b.mean()))
        resampled += sign * np.log(a[some].mean(1) / b[some].mean(1))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return math.exp(logs), math.exp(low), math.exp(high)


def markdown_rows(rows: Sequence[Row], group: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one group; for "images" with `memorization`."""
    some = [row for row in rows if row.cell.group == group]
    header = ["", "machine", "r² of samples", "95% interval", "R² of samples"]
    header += [*(f"R² at {s:g}" for s in LEVELS), "error on seen", "on unseen", "to nearest"]
    most = max((row.cell.images for row in some), default=0)
    if group == "images":
        header.append("seen / unseen, over that of all images")
    lines = []
    for row in some:
        cells = [
            row.cell.label,
            f"`{row.machine}`",
            _number(row.r2.median),
            f"{_number(row.r2.interval[0])} to {_number(row.r2.interval[1])}",
            _number(row.R2.median),
            *map(_number, row.forward),
            f"{np.mean(row.seen):.4f}",
            f"{np.mean(row.unseen):.4f}",
            f"{row.nearest:.2f}",
        ]
        if group == "images":
            reference = next(r for r in some if r.machine == row.machine and r.cell.images == most)
            ratio, low, high = memorization(row, reference)
            cells.append("1" if row is reference else f"{ratio:.2f} ({low:.2f} to {high:.2f})")
        lines.append(cells)
    return header, lines


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""
