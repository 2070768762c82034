"""Measures scoremachine against what was asked of it, the published algorithms and the hardware.

    python benchmarks/table.py [--quick] [--only ls,pspc,els,...] [--data ZIP]

See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import plain
import scoremachine as sm
import setting
from scoremachine.core.windows import Soft
from scoremachine.data.moments import moments
from scoremachine.machines.windowed import stationary
from scoremachine.runtime.progress import quiet

HELD_OUT = 16  # images that are denoised and are no source
ENOUGH = 3.0  # seconds after which a measurement is not repeated
DISTURBED = 0.1  # cores kept busy by other programs that make a row untrustworthy
BENIGN = 0.7  # from this sigma on, rounding in float32 is too small to be taken for a mistake


@dataclass
class Row:
    """One line of the table; `asked` are sentences with whether they are met."""

    what: str
    asked: list[tuple[str, bool]]
    got: str
    definition: str = ""
    ratio: str = ""
    floor: str = ""
    differs: str = ""
    others: float = 0.0  # cores that other programs kept busy meanwhile


class Bench:
    """The corpus, its parts, and the hardware's floors, measured when first asked for."""

    def __init__(self, archive: Path, quick: bool) -> None:
        self.path = setting.corpus_file(archive)
        self.images = np.load(self.path, mmap_mode="r")
        self.source = archive.stem if archive.exists() else "random smooth images"
        order = np.random.default_rng(0).permutation(len(self.images))
        self.held_out, rest = self.images[order[:HELD_OUT]], order[HELD_OUT:]
        self.all = np.sort(rest[:2_000] if quick else rest)
        self.few = np.sort(rest[: 200 if quick else 2_000])  # for position-by-position code
        self.patches = np.sort(rest[: 50 if quick else 1_000])  # for ELS
        self.sizes = (2_000, 8_000) if quick else (len(self.images), 4 * len(self.images))

    @cached_property
    def reading(self) -> float:
        """Seconds to read the whole corpus from memory once, by adding it up (one thread)."""
        words = self.images[: len(self.all)].reshape(-1).view(np.uint64)
        return min(timed(lambda: np.sum(words))[0] for _ in range(4))

    @cached_property
    def peak(self) -> float:
        """float64 operations per second of a large matrix product, all cores."""
        a = torch.ones(1536, 1536, dtype=torch.float64)
        return 2 * len(a) ** 3 / min(timed(lambda: a @ a)[0] for _ in range(5))

    def denoise(self, machine: str, P: int, sigma: float, index: np.ndarray) -> Tensor:
        """scoremachine's answer for the first held-out image, (1, C, H, W)."""
        windows = setting.collection(machine, self.images.shape[2:], P)
        return setting.denoise(self.images, index, self.picture(sigma), sigma, windows)

    def picture(self, sigma: float) -> Tensor:
        """The picture that is denoised: the first held-out image with noise."""
        return setting.noisy(self.held_out[:1], sigma)


def timed(f: Callable[[], object]) -> tuple[float, object]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    value = f()
    return time.perf_counter() - start, value


def seconds(f: Callable[[], object], repeats: int = 5, warm: bool = True) -> float:
    """Median seconds of `repeats` calls, fewer once `ENOUGH` is spent, after one for warming up."""
    if warm:
        f()
    runs: list[float] = []
    while len(runs) < repeats and sum(runs) < ENOUGH:
        runs.append(timed(f)[0])
    return statistics.median(runs)


def others() -> float:
    """Seconds of core time that all other programs have used since the start (Linux; else 0)."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def short(t: float) -> str:
    """Seconds with three figures."""
    return f"{t:.3g} s" if t < 100 else f"{t:.0f} s"


def difference(D: Tensor, expected: Tensor) -> str:
    """The largest |D - expected|."""
    return f"{(D - expected).abs().max().item():.0e}"


def by_position(bench: Bench, machine: str, limit: float) -> Iterator[Row]:
    """LS or PSPC on the whole corpus, against the loop over positions on a few images, scaled."""
    x = setting.to_unit(bench.images[bench.few])
    stored_last = plain.images_last(x)
    loop = plain.ls_by_position if machine == "ls" else plain.pspc_by_position
    factor = len(bench.all) / len(bench.few)
    scaled = f"({len(bench.few):,} x {factor:.3g})"
    for P in (3, 7, 15, 23):
        for sigma in (0.05, 0.2, 0.7, 1.5):
            y = bench.picture(sigma)[0].float()
            got = seconds(partial(bench.denoise, machine, P, sigma, bench.all))
            loop(x[:20], y, sigma, P)  # warms up
            slow, D = timed(partial(loop, x, y, sigma, P))
            slow *= factor
            differs = ""
            if sigma >= BENIGN:
                differs = difference(bench.denoise(machine, P, sigma, bench.few)[0], D)
            yield Row(
                f"{machine.upper()} P={P} sigma={sigma}",
                [(f"{limit} s", got <= limit), ("100x", slow >= 100 * got)],
                short(got),
                f"{short(slow)} {scaled}",
                f"{slow / got:.0f}x",
                f"{bench.reading / got:.0%}",
                differs,
            )
        # the last sigma again, with the images stored in the order that suits the loop
        slow, D = timed(partial(loop, stored_last, y, sigma, P))
        slow *= factor
        yield Row(
            f"{machine.upper()} P={P} sigma={sigma}, transposed",
            [],
            short(got),
            f"{short(slow)} {scaled}",
            f"{slow / got:.0f}x",
            differs=difference(bench.denoise(machine, P, sigma, bench.few)[0], D),
        )


def els(bench: Bench) -> Iterator[Row]:
    """ELS per 1,000 images, against well tiled convolutions."""
    x = setting.to_unit(bench.images[bench.patches])
    C, H, W = x.shape[1:]
    n = len(x)
    for boundary in ("circular", "broken"):
        for P in (3, 7, 15):
            for sigma in (0.1, 0.2, 0.7):
                machine = f"els-{boundary}"
                y = bench.picture(sigma)[0].float()
                fast = partial(bench.denoise, machine, P, sigma, bench.patches)
                slow = partial(plain.els_by_convolution, y=y, sigma=sigma, P=P, boundary=boundary)
                got = seconds(fast, repeats=3)
                slow(x[: n // 10])  # warms up
                t = seconds(partial(slow, x), repeats=3, warm=False)
                floor = n * pairs(H, P, boundary) * pairs(W, P, boundary) * (2 * C + 4) / bench.peak
                yield Row(
                    f"ELS {boundary} P={P} sigma={sigma}",
                    [("1 s per 1,000", got <= n / 1000), ("6x", t >= 6 * got)],
                    f"{short(got)} per {n:,}",
                    f"{short(t)} ({n:,})",
                    f"{t / got:.1f}x",
                    f"{floor / got:.0%} (flop)",
                    difference(fast()[0], slow(x)) if sigma >= BENIGN else "",
                )


def pairs(n: int, P: int, boundary: str) -> int:
    """Pairs of query and source positions along an axis of n pixels that ELS compares."""
    if boundary == "circular":
        return n * (n - P + 1)
    return (n - P + 1) ** 2 + P - 1


def ideal(bench: Bench) -> Iterator[Row]:
    """The ideal denoiser on the whole corpus, against tiled matrix products."""
    images = torch.from_numpy(bench.images[bench.all])
    for sigma in (0.1, 1.0, 10.0):
        fast = partial(bench.denoise, "ideal", 0, sigma, bench.all)
        slow = partial(plain.ideal, images, bench.picture(sigma)[0].float(), sigma)
        got, t = seconds(fast), seconds(slow)
        yield Row(
            f"ideal sigma={sigma}",
            [("4x reading", got <= 4 * bench.reading)],
            short(got),
            f"{short(t)} ({len(images):,})",
            f"{t / got:.1f}x",
            f"{bench.reading / got:.0%}",
            difference(fast()[0], slow()) if sigma >= BENIGN else "",
        )


def es(bench: Bench) -> Iterator[Row]:
    """The equivariant score on the whole corpus, against Fourier transforms in float32."""
    images = torch.from_numpy(bench.images[bench.all])
    for sigma in (0.1, 1.0, 10.0):
        fast = partial(bench.denoise, "es", 0, sigma, bench.all)
        slow = partial(plain.es_by_fourier, images, bench.picture(sigma)[0].float(), sigma)
        got, t = seconds(fast, repeats=3), seconds(slow, repeats=3)
        yield Row(
            f"es sigma={sigma}",
            [("2 s", got <= 2)],
            short(got),
            f"{short(t)} ({len(images):,})",
            f"{t / got:.1f}x",
            f"{bench.reading / got:.1%}",
            difference(fast()[0], slow()) if sigma >= BENIGN else "",
        )


def pca(bench: Bench) -> Iterator[Row]:
    """PCA locality on the whole corpus, against one matrix product of masks per tile."""
    machine = setting.pca(bench.images)
    few = torch.from_numpy(bench.images[bench.few])
    factor = len(bench.all) / len(few)
    for sigma in (0.05, 0.2, 0.7, 1.5, 10.0):
        y, level = bench.picture(sigma), torch.tensor([sigma], dtype=torch.float64)
        with quiet():
            made, collection = timed(partial(machine.windows, sigma, bench.all))
            got = seconds(partial(machine.mean, y, level, bench.all, level), repeats=3)
            D = machine.mean(y, level, bench.few, level)[0]
            masks = machine.windows(sigma, bench.few).window
        rows = range(masks.terms.shape[0])
        q = np.stack([masks.row(i).ravel() for i in rows])
        slow = partial(plain.pca_locality, few, y[0].float(), sigma, torch.from_numpy(q).float())
        t = seconds(slow, repeats=2) * factor
        terms = collection.window.terms.nnz / len(rows)
        yield Row(
            f"pca sigma={sigma}, {q.sum(1).mean():.0f} pixels, {terms:.0f} terms",
            [("5x", t >= 5 * got)],
            f"{short(got)} (masks: {short(made)} once)",
            f"{short(t)} ({len(few):,} x {factor:.3g})",
            f"{t / got:.1f}x",
            f"{bench.reading / got:.1%}",
            difference(D, slow()) if sigma >= BENIGN else "",
        )


def soft(bench: Bench) -> Iterator[Row]:
    """Tapered windows against boxes, the whole corpus."""
    maps = moments(sm.Corpus(bench.images), bench.few).heat_maps
    image = bench.images.shape[1:]
    for machine, P, sigma in (("ls", 7, 0.2), ("ls", 23, 1.5), ("pspc", 7, 0.2), ("pspc", 23, 1.5)):
        box = seconds(partial(bench.denoise, machine, P, sigma, bench.all))
        wiener = Soft.of(stationary(maps(sigma, image), image, (P, P)))
        for kind, window in (("gaussian", Soft.gaussian(P, P)), ("wiener", wiener)):
            windows = setting.collection(machine, image[1:], P, window)
            run = partial(setting.denoise, bench.images, bench.all, bench.picture(sigma), sigma)
            got = seconds(partial(run, windows), repeats=3)
            limits = [("4x a box", got <= 4 * box)] if kind == "gaussian" else []
            yield Row(
                f"{machine.upper()} P={P} sigma={sigma}, {kind} of rank {len(window.rows)}",
                limits,
                f"{short(got)} / {short(box)} = {got / box:.1f}x",
                floor=f"{bench.reading / got:.1%}",
            )


def derivative(bench: Bench) -> Iterator[Row]:
    """A vector-Jacobian product, less its forward pass, against that pass."""
    flex = sm.build("pspc-flex", sm.Corpus(bench.images), share=0.9, kernel="numba")
    local = setting.pca(bench.images)
    image = bench.images.shape[2:]
    cases = [
        ("ls P=7", "ls", 7, 0.2),
        ("ls P=23", "ls", 23, 1.5),
        ("pspc P=7", "pspc", 7, 0.2),
        ("pspc P=23", "pspc", 23, 1.5),
        ("ideal", "ideal", 0, 0.2),
        ("ideal", "ideal", 0, 10.0),
        ("es", "es", 0, 1.0),
        ("els P=7 (1,000 images)", "els-broken", 7, 0.2),
        ("pspc-flex", flex, 0, 0.7),
        ("pca", local, 0, 0.7),
    ]
    for what, machine, P, sigma in cases:
        index = bench.patches if what.startswith("els") else bench.all
        level = torch.tensor([sigma], dtype=torch.float64)
        if isinstance(machine, str):
            windows = setting.collection(machine, image, P)
            run = partial(setting.denoise, bench.images, index, sigma=sigma, windows=windows)
        else:
            run = partial(machine.mean, sigma=level, index=index, level=level)
        y = bench.picture(sigma)
        with quiet():
            forward = seconds(partial(run, y), repeats=3)
            both = seconds(partial(setting.pulled_back, run, y), repeats=3)
        ratio = (both - forward) / forward
        yield Row(
            f"derivative of {what} sigma={sigma}",
            [("4x forward", ratio <= 4)],
            f"{short(both - forward)} / {short(forward)} = {ratio:.1f}x",
        )


def batch(bench: Bench) -> Iterator[Row]:
    """A batch of 16 against the same 16 pictures one by one."""
    sigma = 0.2
    y = setting.noisy(bench.held_out, sigma)
    for machine, P in (("ls", 7), ("pspc", 7), ("ideal", 0)):
        windows = setting.collection(machine, bench.images.shape[2:], P)
        run = partial(setting.denoise, bench.images, bench.all, sigma=sigma, windows=windows)
        together = seconds(partial(run, y), repeats=3)
        one = seconds(lambda run=run: [run(picture) for picture in y.split(1)], repeats=3) / len(y)
        size = f" P={P}" if P else ""
        yield Row(
            f"{machine.upper() if P else machine}{size} sigma={sigma}, 16 / one",
            [("14x one", together <= 14 * one)],
            f"{short(together)} / {short(one)} = {together / one:.1f}x",
            floor=f"{bench.reading / together:.0%}",
        )


def memory(bench: Bench) -> Iterator[Row]:
    """Peak anonymous memory of a child process that maps the corpus and denoises a batch of 8."""
    if not Path("/proc/self/status").exists():
        print("memory is read from /proc, which this system lacks: skipped", file=sys.stderr)
        return
    for machine in ("ls", "pspc", "ideal"):
        bench.denoise(machine, 7, 0.5, bench.few[:64])  # compiled here, so not in the child
    small, large = bench.sizes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        shape = (large, *bench.images.shape[1:])
        tiled = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, large, small):
            tiled[start : start + small] = bench.images[:small]
        tiled.flush()
        del tiled
        for machine in ("ls", "pspc", "ideal", "es", "pca"):
            peaks = {}
            for N in bench.sizes:
                child = [sys.executable, str(Path(__file__).with_name("memory.py"))]
                child += [str(path), str(N), "8", machine]
                answer = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
                peaks[N] = int(answer.stdout)
                yield Row(
                    f"memory of {machine}, batch of 8, N={N:,}",
                    [("1 GB", peaks[N] < 1e9)],
                    f"{peaks[N] / 1e9:.2f} GB",
                )
            growth = peaks[large] / peaks[small]
            yield Row(
                f"memory of {machine}, N={large:,} / {small:,}",
                [("1.1x", growth <= 1.1)],
                f"{growth:.2f}x",
            )
        shape = (80, 3, 256, 256)
        np.save(path, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        for machine in ("ls", "pspc", "ideal"):
            child = [sys.executable, str(Path(__file__).with_name("memory.py"))]
            child += [str(path), "80", "64", machine]
            answer = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
            peak = int(answer.stdout)
            pictures = 64 * np.prod(shape[1:]) * 8  # y and D themselves, in float64
            yield Row(
                f"memory of {machine}, batch of 64 pictures of 256 x 256, besides y and D",
                [("1 GB", peak - 2 * pictures < 1e9)],
                f"{(peak - 2 * pictures) / 1e9:.2f} GB",
            )


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ls": partial(by_position, machine="ls", limit=0.12),
    "pspc": partial(by_position, machine="pspc", limit=0.2),
    "els": els,
    "ideal": ideal,
    "es": es,
    "pca": pca,
    "soft": soft,
    "derivative": derivative,
    "batch": batch,
    "memory": memory,
}


def table(bench: Bench, rows: list[Row], quick: bool) -> Table:
    """The rows, with what is met in green and what is missed in red."""
    N, *shape = bench.images.shape
    size = " x ".join(map(str, shape))
    title = f"{bench.source}: {N:,} images, {len(bench.all):,} of them sources, {size}"
    checks = [met for row in rows if row.others <= DISTURBED for _, met in row.asked]
    caption = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads. "
        f"Floors: reading the sources once {short(bench.reading)} "
        f"({len(bench.all) * np.prod(shape) / bench.reading / 1e9:.3g} GB/s, one thread); "
        f"float64 matrix product {bench.peak / 1e9:.3g} Gflop/s. "
        f"{sum(checks)} of {len(checks)} limits kept."
    )
    if any(row.others > DISTURBED for row in rows):
        caption += f" *: not counted, others kept more than {DISTURBED} cores busy; run again."
    if quick:
        caption += " --quick: small sizes, for which nothing was asked."
    grid = Table(title=title, caption=caption)
    grid.add_column("what")
    for header in ("asked", "got", "definition (timed at)", "ratio", "of the floor", "differs"):
        grid.add_column(header, justify="right")
    for row in rows:
        asked = ", ".join(
            f"[green]{what}[/]" if met else f"[red]{what} missed[/]" for what, met in row.asked
        )
        what = row.what + (" *" if row.others > DISTURBED else "")
        grid.add_row(what, asked, row.got, row.definition, row.ratio, row.floor, row.differs)
    return grid


def main() -> None:
    """Runs the chosen groups and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2,000 images or fewer, for trying")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of rows, by commas")
    parser.add_argument("--data", type=Path, default=setting.CIFAR10, help="a zip of pictures")
    options = parser.parse_args()
    chosen = options.only.split(",")
    for name in chosen:
        if name not in GROUPS:
            parser.error(f"no group of rows is called {name!r}; there are {', '.join(GROUPS)}")
    if options.data != setting.CIFAR10 and not options.data.exists():
        parser.error(f"there is no file {options.data}")
    start = time.monotonic()
    bench = Bench(options.data, options.quick)
    rows = []
    before, busy = start, others()
    for name in chosen:
        for row in GROUPS[name](bench):
            now, used = time.monotonic(), others()
            row.others = (used - busy) / max(now - before, 0.1)
            before, busy = now, used
            rows.append(row)
            print(f"{now - start:4.0f} s  {row.what}: {row.got}", file=sys.stderr)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table(bench, rows, options.quick))


if __name__ == "__main__":
    main()
