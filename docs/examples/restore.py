"""Restores half-covered pictures with azula's guided samplers and a local score machine.

    python docs/examples/restore.py --data digits --out runs/restored-digits.png
    python docs/examples/restore.py --data cifar10-train.zip --out runs/restored-cifar10.png

Each row: a picture that the machine has not seen, what is given of it, and what MMPS (Rozet et al.
2405.13712) and DPS (Chung et al. 2209.14687) make of that. Both differentiate the machine, exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from azula.guidance import DPSSampler, MMPSDenoiser
from azula.sample import DDIMSampler
from torch import Tensor

import scoremachine as sm
from scoremachine.app import figures as drawing

NOISE = 0.05  # standard deviation with which the visible half is taken to be observed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="digits", help="as for scoremachine generate")
    parser.add_argument("--out", type=Path, default=Path("runs/restored.png"))
    parser.add_argument("--count", type=int, default=4, help="how many pictures")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bandwidth", type=float, default=0.0)
    parser.add_argument("--zeta", type=float, default=1.0, help="the strength of DPS")
    parser.add_argument("--limit", type=int, help="use this many images")
    options = parser.parse_args()

    corpus = sm.Corpus.open(options.data, limit=options.limit)
    held_out = np.linspace(0, len(corpus) - 1, options.count).astype(np.int64)
    others = corpus.subset(np.setdiff1d(np.arange(len(corpus)), held_out))
    machine = sm.build("ls", others, bandwidth=options.bandwidth)
    x = torch.from_numpy(corpus.images[held_out] / 127.5 - 1).float()
    W = x.shape[3]

    def visible(x: Tensor) -> Tensor:
        return x[..., : W // 2]

    def covered(half: Tensor) -> Tensor:
        """The visible half in a picture that is gray elsewhere."""
        return torch.nn.functional.pad(half, (0, W - W // 2))

    torch.manual_seed(0)
    y = visible(x)
    mmps = MMPSDenoiser(machine, y, visible, lambda v: NOISE**2 * v)
    samplers = [
        DDIMSampler(mmps, steps=options.steps),
        DPSSampler(machine, y, visible, zeta=options.zeta, steps=options.steps),
    ]
    restored = [sampler(sampler.init(x.shape)) for sampler in samplers]
    rows = torch.stack([x, covered(y), *restored], dim=1).flatten(0, 1)
    picture = drawing.grid(drawing.to_uint8(rows.numpy()), columns=2 + len(samplers))
    drawing.save_png(picture, options.out)
    for name, r in zip(("MMPS", "DPS"), restored, strict=True):
        seen, hidden = ((r - x) ** 2).split([W // 2, W - W // 2], dim=-1)
        print(f"{name}: squared error {seen.mean():.4f} where seen, {hidden.mean():.3f} elsewhere")
    print(options.out)


if __name__ == "__main__":
    main()
