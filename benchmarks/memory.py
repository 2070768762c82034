"""Peak memory of one denoising call: python benchmarks/memory.py CORPUS.npy N BATCH MACHINE

Prints the largest RssAnon that /proc/self/status showed, in bytes, sampled every two milliseconds:
all that the process holds, interpreter and libraries included, but for files mapped into memory,
which the system may drop whenever it likes. So the mapped corpus does not count; a copy would.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import torch

import setting
from scoremachine.runtime.progress import quiet

STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """Bytes of memory now held that no file stands behind."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no line RssAnon; this benchmark needs Linux 4.5 or newer")


class Peak(threading.Thread):
    """Keeps the largest value of `anonymous` until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = anonymous()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        """Samples."""
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def stop(self) -> int:
        """The peak."""
        self.done.set()
        self.join()
        return max(self.bytes, anonymous())


def main(path: str, count: str, batch: str, machine: str) -> None:
    """Maps the corpus, denoises a batch of its own first images, prints the peak."""
    peak = Peak()
    images = np.load(path, mmap_mode="r")[: int(count)]
    y = setting.noisy(images[: int(batch)], sigma=0.5)
    index = np.arange(int(batch), len(images))
    if machine == "pca":
        setting.pca(images).denoise_from(y, torch.full((len(y),), 0.5, dtype=torch.float64), index)
    else:
        windows = setting.collection(machine, images.shape[2:], P=7)
        setting.denoise(images, index, y, 0.5, windows)
    print(peak.stop())


if __name__ == "__main__":
    with quiet():
        main(*sys.argv[1:])
