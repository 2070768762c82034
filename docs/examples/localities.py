"""Draws els, ls and pspc at the same patch sizes from the same noise, from all images of a set.

    python docs/examples/localities.py --data cifar10-train.zip --patch-size kamb-cifar10-resnet \\
        --out runs/localities-cifar10.png
    python docs/examples/localities.py --data mnist-train.zip --patch-size kamb-mnist-resnet \\
        --out runs/localities-mnist.png

A column is a seed, and below each sample, smaller, stands the training image nearest to it. els is
searched, with errors of at most 0.01.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import scoremachine as sm
from scoremachine.app import figures as drawing

ERROR = 0.01  # about one gray level in 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="digits", help="as for scoremachine generate")
    parser.add_argument(
        "--patch-size", nargs="+", default=["auto"], help="published schedules, or auto"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/localities.png"))
    parser.add_argument("--count", type=int, default=4, help="how many pictures")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    corpus = sm.Corpus.open(options.data)
    ideal = sm.IdealScore(corpus)
    rows = []
    for P in options.patch_size:
        for name in ("els", "ls", "pspc"):
            settings = {"error": ERROR} if name == "els" else {}
            machine = sm.build(name, corpus, patch_size=P, **settings)
            x = sm.generate(machine, options.count, options.steps)
            places, distances = ideal.nearest(x)
            label = f"{name}\n{P}\nto nearest {distances.mean():.2f}"
            nearest = np.asarray(corpus.images[places.numpy()])
            rows.append((label, drawing.to_uint8(x.numpy()), nearest))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawing.save_zoo(rows, options.out)


if __name__ == "__main__":
    main()
