"""What brings `els` nearer to a network on the network's own way: more images, bandwidth, windows.

    python docs/examples/nearer.py --network cifar10-resnet --data cifar10-train.zip

Prints a table: at some noise levels of the way, the patch size whose D is nearest to the network's,
and the squared error of D to the network's there and with one thing changed. Ten minutes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import scoremachine as sm
from scoremachine.lab.comparison.parts import held_out_and_source
from scoremachine.lab.denoising_error import fewer
from scoremachine.runtime.progress import bar
from scoremachine.sampling.trajectory import trajectory

PLACES = (1, 4, 6, 8, 10, 12)  # of 20 steps
SIZES = (5, 7, 9, 11, 13, 15, 17)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", default="cifar10-resnet")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--trajectories", type=int, default=3)
    parser.add_argument("--seed", type=int, default=777)
    options = parser.parse_args()
    network = sm.Network.load(options.network)
    corpus = sm.Corpus.open(options.data, size=network.shape[1])
    _, source = held_out_and_source([network], corpus, 8, 0)
    way = list(
        trajectory(
            network, range(options.trajectories), network.shape, 20, options.seed, "ddim", None
        )
    )
    images = options.images
    changes: list[tuple[str, int, int, dict[str, Any]]] = [
        (f"{4 * images:,} images", 4 * images, 0, {}),
        ("h = 0.1", images, 0, {"bandwidth": 0.1}),
        ("Gaussian window, 4 wider", images, 4, {"window": "gaussian"}),
        ("Wiener window", images, 0, {"window": "wiener"}),
        ("circular", images, 0, {"boundary": "circular"}),
    ]
    parts = {n: source.subset(fewer("els", source.indices(), n)) for n in (images, 4 * images)}
    header = ["sigma", "patch size", f"{images:,} images", *(name for name, *_ in changes)]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    with bar(
        "Looking for what is nearer", total=len(PLACES) * (len(changes) + len(SIZES))
    ) as progress:
        for k in PLACES:
            x_t, D, t = way[k]
            alpha, sigma = (float(v) for v in network.schedule(torch.tensor(t).double()))
            y, level = x_t / alpha, sigma / alpha

            def error(n: int, P: int, settings: dict[str, Any], y=y, D=D, level=level) -> float:  # type: ignore[no-untyped-def]
                machine = sm.build("els", parts[n], patch_size=P, search="exact", **settings)
                progress.advance()
                return float(((machine.denoise(y, level) - D) ** 2).mean())

            errors = [error(images, P, {}) for P in SIZES]
            best = SIZES[int(np.argmin(errors))]
            row = [min(errors)] + [error(n, best + more, how) for _, n, more, how in changes]
            print(f"| {level:.3g} | {best} | " + " | ".join(f"{e:.5f}" for e in row) + " |")


if __name__ == "__main__":
    main()
