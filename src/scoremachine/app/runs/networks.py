"""The work of the commands for networks: they write files, then print results."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.app import figures as drawing
from scoremachine.app import report, tables
from scoremachine.data.corpus import Corpus
from scoremachine.lab.comparison import (
    Bias,
    Comparison,
    Quality,
    Row,
    compare,
    qualities,
    shared_bias,
    study,
)
from scoremachine.lab.comparison.parts import built_machines, held_out_and_source
from scoremachine.lab.networks import Network, Training, train
from scoremachine.lab.networks.architectures import check_settings
from scoremachine.lab.networks.training import losses_of
from scoremachine.lab.sensitivity import Sensitivity, sensitivity
from scoremachine.machines import BoxMachine, Machine
from scoremachine.runtime.files import check_folder, write_text, written
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer


def train_network(
    corpus: Corpus,
    architecture: str,
    out: Path,
    how: Training,
    resume: bool,
    settings: dict[str, Any],
) -> Network:
    """Trains a network, writes it and loss.png to `out`, and prints a summary."""
    check_settings(architecture, settings)
    check_folder(out)
    network = train(corpus, architecture, out, how, resume, **settings)
    drawing.save_losses(*losses_of(out), Path(out) / "loss.png")
    trained = network.card["training"]
    print(
        f"{trained['steps']:,} steps of {how.batch} pictures in {trained['seconds']:.0f} s, "
        f"{network.parameters_count:,} parameters: {out}"
    )
    return network


def compare_network(
    network: Network,
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    page: bool,
    **settings: Any,
) -> Comparison:
    """Compares, prints the tables, and writes the files of `report.write` to `out`.

    Finished parts are kept in OUT/.unfinished, so that the same command resumes after Ctrl-C.
    """
    check_folder(out)
    kept = Path(out) / ".unfinished"
    found = compare(network, machines, corpus, kept=kept, **settings)
    files = report.write(found, Path(out), page)
    shutil.rmtree(kept, ignore_errors=True)
    report.print_tables(found)
    print(f"{files[-1]}")
    return found


def study_networks(
    corpus: Corpus, out: Path, machines: Sequence[str], **settings: Any
) -> list[Row]:
    """Runs a study, and writes the files of `report.write_study` to `out`."""
    check_folder(out)
    rows = study(corpus, Path(out), machines, **settings)
    files = report.write_study(rows, Path(out))
    print(files[0].read_text(encoding="utf-8"))
    print(f"{files[-1]}")
    return rows


def judge_samples(
    networks: Sequence[Network], machines: Sequence[str], corpus: Corpus, out: Path, **settings: Any
) -> list[Quality]:
    """Generates and evaluates pictures, and writes the files of `report.write_quality`."""
    check_folder(out)
    found = qualities(networks, machines, corpus, **settings)
    files = report.write_quality(found, Path(out))
    print(files[0].read_text(encoding="utf-8"))
    print(f"{files[-1]}")
    return found


def measure_bias(
    networks: Sequence[Network],
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    **options: Any,
) -> Bias:
    """Measures the shared bias, writes the files of `report.write_bias` to `out`, and prints it.

    `options` are those of `shared_bias`.
    """
    check_folder(out)
    kept = Path(out) / ".unfinished"
    found = shared_bias(networks, machines, corpus, kept=kept, **options)
    files = report.write_bias(found, Path(out))
    shutil.rmtree(kept, ignore_errors=True)
    report.print_bias(found)
    print(f"{files[0]}")
    return found


@dataclass(frozen=True)
class SensitivityOptions:
    """The options of `measure_sensitivity`.

    Attributes:
        sigmas: Noise levels.
        count, pixels, seed: Of `sensitivity`.
        max_images_els: The most images of machines that compare all positions.
    """

    sigmas: Sequence[float]
    count: int = 4
    pixels: int = 32
    seed: int = 0
    max_images_els: int = 500

    def __post_init__(self) -> None:
        for name in ("count", "pixels", "max_images_els"):
            check_integer(name, getattr(self, name))


def measure_sensitivity(
    networks: Sequence[Network],
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    options: SensitivityOptions,
) -> list[Sensitivity]:
    """Measures sensitivities, writes sensitivity.csv, .npz and .png, and prints widths."""
    check_folder(out)
    for network in networks:
        network.check_corpus(corpus)
        for sigma in options.sigmas:
            network.time(sigma)  # raises outside its range
    count, sigmas = options.count, options.sigmas
    held, source = held_out_and_source(networks, corpus, count, options.seed)
    denoisers: dict[str, Network | Machine] = {network.name: network for network in networks}
    denoisers |= built_machines(machines, source, options.max_images_els)
    if not denoisers:
        raise ValueError("there is neither a network nor a machine to measure; give one")
    found, sizes, unseen = [], {}, corpus.subset(held)
    with bar("Differentiating", total=len(denoisers)) as progress:
        for label, denoiser in denoisers.items():
            found.append(
                sensitivity(denoiser, unseen, sigmas, label, count, options.pixels, options.seed)
            )
            if isinstance(denoiser, BoxMachine):
                sizes[label] = [denoiser.local_at(sigma) for sigma in sigmas]
            progress.advance()
    write_text(Path(out) / "sensitivity.csv", tables.sensitivities_csv(found, sizes))
    with written(Path(out) / "sensitivity.npz") as temporary, temporary.open("wb") as file:
        maps: dict[str, Any] = {s.label: s.maps for s in found}
        np.savez_compressed(file, sigmas=np.asarray(sigmas), **maps)
    drawing.save_sensitivities(found, Path(out) / "sensitivity.png")
    tables.print_sensitivities(found, sizes)
    print(f"maps: {Path(out) / 'sensitivity.png'}")
    return found
