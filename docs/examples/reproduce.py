"""Trains small networks on MNIST and CIFAR-10, compares machines with them, and writes the docs.

    make reproduce                                           # less than an hour on two cores
    python docs/examples/reproduce.py --longer 4             # a quarter of the night: narrower
    python docs/examples/reproduce.py --only cifar10-unet    # an hour more

Interrupted, it goes on where it was. Needs the images as zips, mnist-train.zip and
cifar10-train.zip, in --data. With --docs, the pages and pictures of docs/ are made again, and the
networks that come with the package.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import scoremachine as sm
from scoremachine.app import report
from scoremachine.app.runs.networks import train_network
from scoremachine.lab.networks.network import CARD, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS_OF = ROOT / "src" / "scoremachine" / "networks" / "weights"


class Case(NamedTuple):
    """A network, how long it is trained, and what it is compared with."""

    data: str
    network: str
    steps: int
    machines: tuple[str, ...]
    seeds: int  # samples of each
    levels: int = 20  # that a sample visits


MNIST = ("gaussian", "pca", "ls:kamb-mnist-resnet", "ls:network+h", "pspc", "els:network")
CIFAR10 = ("gaussian", "pca", "ls:kamb-cifar10-resnet", "ls:network+h", "pspc", "els:network")
UNET = ("gaussian", "pca", "pca:auto", "ls:network+h", "pspc", "pspc:network+h", "els:network",
        "els:network+gaussian", "composite:network")  # fmt: skip
CASES = (
    Case("mnist", "resnet", 2500, MNIST, 16),
    Case("cifar10", "resnet", 2500, CIFAR10, 8),
    Case("cifar10", "unet", 6000, UNET, 8, 10),
)
SHIPPED = ("mnist-resnet", "cifar10-resnet")  # trained unless others are asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--longer", type=int, default=1, help="times the steps and the samples")
    parser.add_argument("--pictures", type=int, default=6, help="held-out images")
    parser.add_argument("--images", type=int, default=1000, help="that els is made of")
    parser.add_argument("--only", default=",".join(SHIPPED), help="networks, by commas")
    parser.add_argument("--docs", action="store_true", help="write docs/ and the weights too")
    options = parser.parse_args()
    pages, pieces = [], options.out / ".unfinished"
    cases = {f"{case.data}-{case.network}": case for case in CASES}
    for name in options.only.split(","):
        if name not in cases:
            sys.exit(f"there is no network {name!r} here; there are {', '.join(cases)}")
        case = cases[name]
        archive = options.data / f"{case.data}-train.zip"
        if not archive.exists():
            sys.exit(f"there is no {archive}: say with --data where the images are")
        corpus = sm.Corpus.open(archive, size=32)
        how = sm.Training(steps=case.steps * options.longer, seconds=None)
        network = train_network(corpus, case.network, options.out / name, how, True, {})
        network.name = name
        folder = options.out / f"{name}-compared"
        found = sm.compare(
            network, case.machines, corpus, pictures=options.pictures,
            count=case.seeds * options.longer, steps=case.levels, max_images_els=options.images,
            kept=pieces, trajectories=3,
        )  # fmt: skip
        report.write(found, folder, page=True)
        report.print_tables(found)
        pages.append((name, found, folder))
    if options.docs:
        write_docs(pages, options.out)
    shutil.rmtree(pieces, ignore_errors=True)


def write_docs(pages: list[tuple[str, sm.Comparison, Path]], out: Path) -> None:
    """A page of docs/ for every network, and the networks that come with the package."""
    for name, found, folder in pages:
        trained = found.settings["card"]["training"]
        most = max(m["images"] for m in found.settings["machines"].values())
        made_of = "; ".join(
            f"`{label}` of {m['images']:,}"
            for label, m in found.settings["machines"].items()
            if m["images"] < most
        )
        only = "" if name in SHIPPED else f" --only {name}"
        lines = [
            f"# Machines against {name}",
            "",
            f"Made by `python docs/examples/reproduce.py{only} --docs`; "
            "[what is measured](networks.md).",
            "",
            f"{trained['parameters']:,} parameters, {trained['steps']:,} steps of "
            f"{trained['batch']} pictures. Machines of {most:,} images"
            + (f"; {made_of}." if made_of else "."),
            "",
            f"![Samples of {name} and of machines from the same noise]"
            f"(pictures/{name}-samples.png)",
            "",
            f"![Agreement by noise level](pictures/{name}-compare.png)",
            "",
            report.markdown(found),
        ]
        (ROOT / "docs" / f"against-{name}.md").write_text("\n".join(lines).rstrip() + "\n")
        for picture in ("samples", "compare", "trajectory"):
            to = ROOT / "docs" / "pictures" / f"{name}-{picture}.png"
            shutil.copy(folder / f"{picture}.png", to)
            if to.stat().st_size > 250_000:
                Image.open(to).convert("P", palette=Image.Palette.ADAPTIVE).save(to, optimize=True)
    for name in SHIPPED:
        if name in [page[0] for page in pages]:
            (WEIGHTS_OF / name).mkdir(parents=True, exist_ok=True)
            for file in (WEIGHTS, CARD):
                shutil.copy(out / name / file, WEIGHTS_OF / name / file)


if __name__ == "__main__":
    main()
