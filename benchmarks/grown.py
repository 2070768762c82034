"""Measures `grow`: patch statistics beside other methods, what the candidates leave out, times.

    python benchmarks/grown.py [--only table,exact,times] [--side 96] [--count 4]

table: twelve photographs, reduced to a shorter side of 96 pixels, and new pictures of the same size
by five methods:

    grow        as it is
    GPNN        nearest patches by bidirectional similarity (Granot et al. 2103.15545), from noise
                of 0.75, as published, and of 3
    els         one scale, from noise
    shuffle     the photograph's blocks of 16 x 16 pixels in another order

distance: sliced Wasserstein distance of their 7 x 7 patches to the photograph's, in units of x in
[-1, 1], mean over four scales (1, 1/2, 1/4, 1/8) and 64 directions.
diversity: the standard deviation of a pixel over the pictures, averaged over pixels, over that of
the photograph's pixels (SinGAN; Shaham et al. 1905.01164).
copied: the share of pixels in pieces of more than 21 x 21 pixels that are copied as they are, each
7 x 7 patch coming from its nearest patch of the photograph.

exact: a picture whose boxes all are compared with all patches, beside one with candidates; the same
noise, without balance.

times: seconds and memory of several sizes, each in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn.functional import fold, interpolate, unfold

import scoremachine as sm
from scoremachine.core.noise import PictureNoise
from scoremachine.engines import boxes
from scoremachine.provenance.places import pieces, share_of_large
from scoremachine.runtime.progress import bar, quiet
from scoremachine.sampling import grow as growing

PHOTOGRAPHS = (
    "china", "flower", "coffee", "chelsea", "astronaut", "rocket", "hubble", "brick", "grass",
    "gravel", "coins", "tissue",
)  # fmt: skip
P = 7
DIRECTIONS = 64
BLOCK = 16


def photographs(side: int) -> dict[str, Tensor]:
    """The photographs, (1, C, H, W) in [-1, 1], with a shorter side of `side` pixels."""
    found = {}
    for name in PHOTOGRAPHS:
        x = growing.photograph(name)
        h, w = x.shape[:2]
        ratio = side / min(h, w)
        small = growing.resized(x, round(h * ratio), min(2 * side, round(w * ratio)))
        found[name] = torch.from_numpy(small).permute(2, 0, 1)[None].clamp(-1, 1)
    return found


def pixels(x: Tensor) -> np.ndarray:
    """uint8 (C, H, W) of a picture (1, C, H, W)."""
    return ((x[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


# ---------------------------------------------------------------------------------------------
# The methods: pictures (count, C, H, W) from a photograph


def grown(x: Tensor, count: int) -> Tensor:
    return sm.grow(pixels(x), count=count)


def flat(x: Tensor, count: int) -> Tensor:
    machine = sm.build("els", sm.Corpus(pixels(x)[None]), patch_size=P)
    return sm.generate(machine, count=min(2, count), steps=10).clamp(-1, 1)  # it is slow


def shuffled(x: Tensor, count: int) -> Tensor:
    made, (H, W) = [], x.shape[2:]
    down, across = H // BLOCK, W // BLOCK
    for k in range(count):
        order = np.random.default_rng(k).permutation(down * across)
        y = x.clone()
        for to, of in enumerate(order.tolist()):
            (a, b), (i, j) = divmod(of, across), divmod(to, across)
            y[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = x[
                ..., a * BLOCK : (a + 1) * BLOCK, b * BLOCK : (b + 1) * BLOCK
            ]
        made.append(y)
    return torch.cat(made)


def gpnn(x: Tensor, count: int, sigma: float = 0.75) -> Tensor:
    """As the paper has it: a ratio of 3/4, alpha = 0.005, noise of 0.75 at the coarsest scale."""
    alpha, ratio, coarsest, iterations = 0.005, 0.75, 21, 10
    scales = round(math.log(min(x.shape[2:]) / coarsest) / -math.log(ratio))

    def at(k: int) -> Tensor:
        size = [max(P + 1, round(n * ratio**k)) for n in x.shape[2:]]
        return interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)

    def enlarged(x: Tensor, like: Tensor) -> Tensor:
        return interpolate(x, like.shape[2:], mode="bicubic", align_corners=False)

    made = []
    for seed in range(count):
        photograph = at(scales)
        noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(seed))
        y = photograph + sigma * noise
        for k in range(scales, -1, -1):
            photograph = at(k)
            keys = photograph
            if k < scales:
                keys, y = enlarged(at(k + 1), photograph), enlarged(y, photograph)
            for _ in range(iterations if k < scales else 1):
                y = composed_of_nearest(y, keys, photograph, alpha)
                keys = photograph
        made.append(y)
    return torch.cat(made).clamp(-1, 1)


def gpnn_from_more(x: Tensor, count: int) -> Tensor:
    return gpnn(x, count, 3.0)


def composed_of_nearest(y: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Each patch of y replaced by the value whose key has the least normalized distance."""
    q, k, v = (unfold(x, P)[0].T for x in (y, keys, values))
    d = squared(q, k)
    nearest = d.div_(alpha + d.amin(0)).argmin(1)
    total = fold(v[nearest].T[None], y.shape[2:], P)
    return total / fold(torch.ones_like(v.T[None]), y.shape[2:], P)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences of patches, (n, m)."""
    d = torch.addmm(a.square().sum(1)[:, None], a, b.T, alpha=-2)
    return d.add_(b.square().sum(1)).clamp_(min=0).div_(a.shape[1])


LIKE = "GPNN, noise 3"  # about as diverse as grow
METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "grow": grown, "GPNN": gpnn, LIKE: gpnn_from_more, "els": flat, "shuffle": shuffled,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What is measured


def distance(made: Tensor, photograph: Tensor) -> float:
    """The sliced Wasserstein distance of patches, mean over pictures, scales and directions."""
    found = []
    for scale in (1, 2, 4, 8):
        size = [max(P, round(n / scale)) for n in photograph.shape[2:]]
        directions = torch.randn(
            DIRECTIONS, photograph.shape[1] * P * P, generator=torch.Generator().manual_seed(scale)
        )
        directions /= directions.norm(dim=1, keepdim=True)
        real, new = (
            directions @ unfold(interpolate(x, size, mode="area"), P) for x in (photograph, made)
        )
        found += [
            wasserstein_distance(a, b)
            for each in new.numpy()
            for a, b in zip(each, real[0].numpy(), strict=True)
        ]
    return float(np.mean(found))


def diversity(made: Tensor, photograph: Tensor) -> float:
    return float(made.std(0).mean() / photograph.std())


def copied(made: Tensor, photograph: Tensor) -> float:
    source = unfold(photograph, P)[0].T
    (H, W), across = photograph.shape[2:], photograph.shape[3] - P + 1
    shares = []
    for each in made:
        patches = unfold(each[None], P)[0].T
        nearest = torch.cat([squared(some, source).argmin(1) for some in patches.split(2048)])
        places = np.stack(np.divmod(nearest.numpy(), across), -1).astype(np.int32)
        places = places.reshape(H - P + 1, W - P + 1, 1, 2)
        weights = np.ones(places.shape[:3], dtype=np.float32)
        origins, _ = boxes.origins(places, weights, P, (H, W), wraps=False)
        origins = np.concatenate([np.zeros((H, W, 1), np.int32), origins], -1)
        x, photo = (np.ascontiguousarray(z.permute(1, 2, 0).numpy()) for z in (each, photograph[0]))
        shares.append(share_of_large(pieces(x, origins, [photo])[1]))
    return float(np.mean(shares))


def table(side: int, count: int, methods: list[str]) -> None:
    found = Table(title=f"distance / diversity / copied, {count} pictures each, side {side}")
    for head in ("photograph", *methods):
        found.add_column(head)
    better = 0
    for name, x in photographs(side).items():
        row, distances = [name], {}
        for method in methods:
            make = METHODS[method]
            start = time.perf_counter()
            with quiet(True):
                made = make(x, count)
            seconds = (time.perf_counter() - start) / count
            distances[method] = distance(made, x)
            row.append(
                f"{distances[method]:.3f} / {diversity(made, x):.2f} / {copied(made, x):.2f}"
            )
            print(name, method, row[-1], f"{seconds:.1f} s", flush=True)
        if {"grow", LIKE} <= set(methods):
            better += distances["grow"] < distances[LIKE]
        found.add_row(*row)
    Console(width=160).print(found)
    if {"grow", LIKE} <= set(methods):
        print(f"a smaller distance than that of {LIKE}: {better} of {len(PHOTOGRAPHS)}")


def exact(side: int) -> None:
    for name in ("china", "coffee", "gravel"):
        x = pixels(photographs(side)[name])
        noise = PictureNoise(0, [0])
        made = []
        for most in (growing.DENSE, 2**62):
            growing.DENSE = most
            grower = growing.grower_of(x, balance=0.0)
            with quiet(True), bar("", total=1) as progress:
                *_, last = grower.run(noise, progress)
            made.append(last.x)
        growing.DENSE = 2**23
        error = float(((made[0] - made[1]) ** 2).mean())
        print(name, made[0].shape, f"mean squared difference {error:.2e}", flush=True)


SIZES = {
    "160 x 240 from 160 x 240": ("china", 160, (160, 240)),
    "427 x 640 from 427 x 640": ("china", 427, (427, 640)),
    "427 x 1280 from 427 x 640": ("china", 427, (427, 1280)),
    "854 x 1280 from 427 x 640": ("china", 427, (854, 1280)),
    "1024 x 1024 from 512 x 512": ("astronaut", 512, (1024, 1024)),
    "2448 x 3264 from 512 x 512": ("astronaut", 512, (2448, 3264)),
}


def _timed(name: str) -> None:
    photograph, side, size = SIZES[name]
    x = growing.photograph(photograph)
    ratio = side / min(x.shape[:2])
    x = growing.resized(x, side, round(x.shape[1] * ratio))
    x = pixels(torch.from_numpy(x).permute(2, 0, 1)[None])
    with quiet(True):
        sm.grow(x, size=(60, 80))  # compiled
        start = time.perf_counter()
        sm.grow(x, size=size)
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {seconds:.1f} s, {memory:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="table,exact,times")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--methods", default="; ".join(METHODS))
    parser.add_argument("--sizes", type=int, default=5, help="how many of the sizes, of 6")
    given = parser.parse_args()
    if "times" in given.only:
        for name in list(SIZES)[: given.sizes]:
            process = multiprocessing.get_context("spawn").Process(target=_timed, args=(name,))
            process.start()
            process.join()
    if "exact" in given.only:
        exact(given.side)
    if "table" in given.only:
        table(given.side, given.count, given.methods.split("; "))


if __name__ == "__main__":
    main()
