"""Trains small networks on MNIST and CIFAR-10, compares machines with them, and writes the docs.

    make reproduce                                  # about an hour on two cores
    python docs/examples/reproduce.py --longer 4    # half a night: narrower intervals

Interrupted, it goes on where it was. Needs the images as zips, mnist-train.zip and
cifar10-train.zip, in --data. With --docs, the tables and pictures of docs/ are made again, and the
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
from scoremachine.comparison import report
from scoremachine.networks.network import CARD, WEIGHTS
from scoremachine.run import train_network

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
UNET = ("gaussian", "pca", "ls", "ls+h", "ls:network+h", "pspc", "pspc+h", "pspc:network+h")
CASES = (
    Case("mnist", "resnet", 2500, MNIST, 16),
    Case("cifar10", "resnet", 2500, CIFAR10, 8),
    Case("cifar10", "unet", 1500, UNET, 8, 10),
)
SHIPPED = ("mnist-resnet", "cifar10-resnet")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--longer", type=int, default=1, help="times the steps and the samples")
    parser.add_argument("--pictures", type=int, default=8, help="held-out images")
    parser.add_argument("--images", type=int, default=1000, help="that els is made of")
    parser.add_argument("--only", default="", help="cases by commas, as mnist-resnet")
    parser.add_argument("--docs", action="store_true", help="write docs/ and the weights too")
    options = parser.parse_args()
    pages, pieces = [], options.out / ".unfinished"
    for case in CASES:
        name = f"{case.data}-{case.network}"
        if options.only and name not in options.only.split(","):
            continue
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
            count=case.seeds * options.longer, steps=case.levels, everywhere=options.images,
            kept=pieces, ways=4,
        )  # fmt: skip
        report.write(found, folder, page=True)
        report.print_tables(found)
        pages.append((name, found, folder))
    if options.docs:
        write_docs(pages, options.out)
    shutil.rmtree(pieces, ignore_errors=True)


def write_docs(pages: list[tuple[str, sm.Comparison, Path]], out: Path) -> None:
    """Tables and pictures of docs/, and the networks that come with the package."""
    lines = ["# Machines against networks: tables", "",
             "Made by `make reproduce`; [what they say](networks.md).", ""]  # fmt: skip
    for name, found, folder in pages:
        trained = found.settings["card"]["training"]
        most = max(m["images"] for m in found.settings["machines"].values())
        made_of = "; ".join(
            f"`{label}` of {m['images']:,}"
            for label, m in found.settings["machines"].items()
            if m["images"] < most
        )
        lines += [
            f"## {name}",
            "",
            f"{trained['parameters']:,} parameters, {trained['steps']:,} steps of "
            f"{trained['batch']} pictures. Machines of {most:,} images"
            + (f"; {made_of}." if made_of else "."),
            "",
            f"![Samples of {name} and of machines from the same noise]"
            f"(pictures/{name}-samples.png)",
            "",
            report.markdown(found),
        ]
        for picture in ("samples", "compare", "way"):
            to = ROOT / "docs" / "pictures" / f"{name}-{picture}.png"
            shutil.copy(folder / f"{picture}.png", to)
            if to.stat().st_size > 250_000:
                Image.open(to).convert("P", palette=Image.Palette.ADAPTIVE).save(to, optimize=True)
    (ROOT / "docs" / "networks-tables.md").write_text("\n".join(lines))
    for name in SHIPPED:
        if name in [page[0] for page in pages]:
            (WEIGHTS_OF / name).mkdir(parents=True, exist_ok=True)
            for file in (WEIGHTS, CARD):
                shutil.copy(out / name / file, WEIGHTS_OF / name / file)


if __name__ == "__main__":
    main()
