"""What the benchmarks share: the images, the pictures to denoise, and the machines."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import scoremachine as sm
from scoremachine import engines as kernels
from scoremachine.core.collection import Boundary, Collection
from scoremachine.core.posterior import posterior
from scoremachine.core.windows import Box, Window
from scoremachine.runtime.progress import quiet

CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-train.zip"
RANDOM = (50_000, 3, 32, 32)  # the shape of the images made where there are none


def corpus_file(archive: Path) -> Path:
    """The pictures of a zip as an .npy file, uint8 (N, C, H, W), made once and kept.

    Where there is no such zip the images are random and smooth, in the shape of CIFAR-10.
    """
    name = f"{archive.stem}-{archive.stat().st_size}" if archive.exists() else "random"
    path = Path(tempfile.gettempdir()) / f"scoremachine-benchmark-{name}.npy"
    if not path.exists():
        images = decoded(archive) if archive.exists() else smooth_noise()
        unfinished = path.with_suffix(f".{os.getpid()}")
        with unfinished.open("wb") as file:
            np.save(file, images)
        unfinished.replace(path)
    return path


def decoded(archive: Path) -> np.ndarray:
    """Every picture of a zip, uint8 (N, C, H, W); all must have the same shape."""
    with zipfile.ZipFile(archive) as pictures:
        names = [name for name in pictures.namelist() if not name.endswith("/")]
        images = [np.asarray(Image.open(io.BytesIO(pictures.read(name)))) for name in names]
    stack = np.stack(images)
    return np.ascontiguousarray(stack[:, None] if stack.ndim == 3 else stack.transpose(0, 3, 1, 2))


def smooth_noise() -> np.ndarray:
    """Random images whose neighbouring pixels are alike, uint8 (N, C, H, W)."""
    N, C, H, W = RANDOM
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(N, C, H, W)
    for grid in (2, 4, 8):
        coarse = torch.randn(N, C, grid, grid, generator=generator)
        x += torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear", align_corners=True)
    return (127.5 * (1 + torch.tanh(x / 2))).to(torch.uint8).numpy()


def collection(
    machine: str, image: tuple[int, ...], P: int = 0, window: Window | None = None
) -> Collection:
    """The windows of "ideal", "es", "ls", "pspc", "els-circular" or "els-broken".

    `window` is a box of P x P unless given.
    """
    H, W = image
    window = window or Box((P, P))
    if machine == "ideal":
        return Collection((H, W), Box((H, W)), "boxes", "window")
    if machine == "es":
        return Collection((H, W), Box((H, W)), "boxes", "window", "rolled")
    if machine == "ls":
        return Collection((H, W), window, "pixels", "pixel")
    if machine == "pspc":
        return Collection((H, W), window, "boxes", "window")
    boundary: Boundary = "circular" if machine == "els-circular" else "broken"
    return Collection((H, W), window, "pixels", "pixel", "every", boundary=boundary)


def pca(images: np.ndarray) -> sm.Machine:
    """PCA locality with the paper's threshold for CIFAR-10."""
    return sm.build("pca", sm.Corpus(images), threshold=0.05, kernel="numba")


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return torch.tensor(np.asarray(images)).float() / 127.5 - 1


def noisy(images: np.ndarray, sigma: float) -> Tensor:
    """The images with noise of standard deviation `sigma`, always the same, float64."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (to_unit(images) + sigma * noise).double()


def denoise(
    images: np.ndarray, index: np.ndarray, y: Tensor, sigma: float, windows: Collection
) -> Tensor:
    """scoremachine's D(y, sigma) on the CPU, float64 (B, C, H, W), differentiable by y."""
    levels = torch.full((len(y),), sigma, dtype=torch.float64)
    with quiet():
        return posterior(kernels.choose("numba"), images, index, y, levels, windows)[1]


def pulled_back(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """u^T dD/dy for D = f(y) and u of ones: one pass forward and one back."""
    x = y.clone().requires_grad_()
    D = f(x)
    with quiet():
        return torch.autograd.grad(D, x, torch.ones_like(D))[0]
