"""Ordinary diffusion, heat dissipation and a pyramid, at equal time: cost, denoising, pictures.

    python docs/examples/processes.py --data cifar10-train.zip --limit 10000 --out runs/processes
    python docs/examples/processes.py --data photographs --out runs/processes-photographs

One machine draws pictures under each process. The first has --steps steps, and each of the others
as many as take the same time (the processor's, so that what else runs does not count). Below each
picture, smaller, is the training image nearest to it. The tables say how long a picture took, how
good (kernel distance to held-out images, as in scoremachine quality), how new and how varied they
are; and how far D is from the clean picture, by time. The photographs are six that come with the
package, cut into tiles of 64 x 64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import scoremachine as sm
from scoremachine.app import figures as drawing
from scoremachine.app import tables
from scoremachine.core.processes import PROCESSES, process_of
from scoremachine.lab.comparison.quality import features, kernel_distance, variety
from scoremachine.machines import spelled

PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee", "flower", "rocket")
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", default="digits", help="as for scoremachine generate, or photographs"
    )
    parser.add_argument("--size", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--machine", default="pspc")
    parser.add_argument("--count", type=int, default=64, help="how many pictures are judged")
    parser.add_argument("--shown", type=int, default=10, help="and how many shown")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of ordinary diffusion")
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    options = parser.parse_args()
    if options.data != "photographs":
        whole = sm.Corpus.open(options.data, size=options.size, limit=options.limit)
    elif options.limit:
        parser.error("--limit is for other --data; the photographs are taken whole")
    else:
        whole = photographs(options.size or 64)
    order = np.random.default_rng(0).permutation(len(whole))
    held = min(options.held_out, len(whole) // 4)
    unseen, corpus = whole.subset(np.sort(order[:held])), whole.subset(np.sort(order[held:]))
    name, settings = spelled(options.machine)
    machine = sm.build(name, corpus, **settings)
    machine.prepare()
    ideal = sm.IdealScore(corpus)
    known = features(unseen.images)
    rows, table, budget = [], [], 0.0
    for process in PROCESSES:
        steps, pictures = options.steps, range(options.count)
        sm.generate(machine, 1, steps, process=process)  # what is done once
        start = time.process_time()
        sm.generate(machine, 2, steps, process=process)
        seconds = time.process_time() - start
        budget = budget or seconds
        steps = max(2, round(steps * budget / seconds))
        start = time.process_time()
        x = sm.generate(machine, len(pictures), steps, process=process)
        seconds = (time.process_time() - start) / len(pictures)
        images = drawing.to_uint8(x.numpy())
        places, far = ideal.nearest(x)
        f = features(images)
        distance, spread = (1e3 * v for v in kernel_distance(f, known))
        table.append([
            f"`{process}`", str(steps), f"{seconds:.2f}", f"{distance:.2f} ± {spread:.2f}",
            f"{far.mean():.2f}", f"{variety(f) / variety(known):.2f}",
        ])  # fmt: skip
        some = slice(options.shown)
        nearest = np.asarray(corpus.images[places.numpy()])
        rows.append((f"{process}\n{steps} steps\n{seconds:.2f} s", images[some], nearest[some]))
    options.out.mkdir(parents=True, exist_ok=True)
    drawing.save_zoo(rows, options.out / "processes.png")
    head = ["", "steps", "seconds a picture", "kernel distance x 1,000", "to nearest", "variety"]
    text = "\n".join([*tables.markdown(head, table), "", *denoising(machine, unseen)])
    (options.out / "processes.md").write_text(text + "\n")
    print(text)


def photographs(side: int) -> sm.Corpus:
    """Tiles of photographs, (n, 3, side, side)."""
    tiles = []
    for name in PHOTOGRAPHS:
        u = sm.Corpus.open(f"photo/{name}").images[0]
        rows, columns = (n // side for n in u.shape[1:])
        cut = u[:, : rows * side, : columns * side].reshape(3, rows, side, columns, side)
        tiles.append(cut.transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side))
    return sm.Corpus(np.concatenate(tiles), name="photographs")


def denoising(machine: sm.Machine, unseen: sm.Corpus) -> list[str]:
    """A table of the mean squared error of D by time and process, on 16 held-out images."""
    x = torch.from_numpy(np.array(unseen.images[:16])).double() / 127.5 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for name in PROCESSES:
        process = process_of(name, machine.corpus.shape[1:], machine.schedule)
        row = [f"`{name}`"]
        for t in TIMES:
            _, sigma = process(torch.tensor(t, dtype=torch.float64))
            D = machine.denoise_through(process, process.apply(x, t) + sigma * eps, t)
            row.append(f"{((D - x) ** 2).mean():.4f}")
        rows.append(row)
    return tables.markdown(["t", *(f"{t:g}" for t in TIMES)], rows)


if __name__ == "__main__":
    main()
