"""What all tests share: a cache of their own, small corpora, the two fast kernels."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

import scoremachine as sm
from scoremachine.core.collection import Collection
from scoremachine.data.corpus import Corpus
from scoremachine.engines import triton as fused

CODE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# every machine, with settings small enough for a corpus of 6 x 6 pictures
SMALL: dict[str, dict] = {
    "ideal": {},
    "gaussian": {},
    "es": {},
    "ls": {"patch_size": 3},
    "els": {"patch_size": 3},
    "pspc": {"patch_size": 3},
    "epc": {"patch_size": 3},
    "pspc-flex": {"share": 0.6},
    "pca": {"threshold": 0.1},
    "smoothed": {"delta": 0.3},
    "composite": {"of": "gaussian,ls:3", "weights": [0.4, 0.5]},
}

settings.register_profile("scoremachine", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("scoremachine")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """No test touches the user's cache; compiled code, known by its content, outlives a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCOREMACHINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NUMBA_CACHE_DIR", str(CODE))
        patch.setattr("numba.config.CACHE_DIR", str(CODE))
        yield


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """What one test was told is said again in the next."""
    monkeypatch.setattr("scoremachine.runtime.progress._said", set())


@pytest.fixture(params=["numba", "torch"])
def kernel(request):
    return request.param


@pytest.fixture
def data_folder():
    """The folder of the CIFAR-10 and MNIST zips; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip("the CIFAR-10 and MNIST zips are not at ../shared/data")
    return DATA


def random_images(seed: int, N: int, C: int, H: int, W: int) -> np.ndarray:
    """uint8 images with a duplicate and a near-duplicate among them, where N allows."""
    u = np.random.default_rng(seed).integers(0, 256, (N, C, H, W), dtype=np.uint8)
    if N > 3:
        u[1] = u[0]
        u[2] = u[0]
        u[2, 0, H // 2, W // 2] ^= 1
    return u


def random_corpus(seed: int = 0, N: int = 9, C: int = 1, H: int = 6, W: int = 6) -> Corpus:
    return Corpus(random_images(seed, N, C, H, W))


def noised(corpus: Corpus, sigma, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One corpus image per noise level with that much noise, float32, and the levels."""
    levels = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(corpus), (len(levels),), generator=generator)
    x = torch.from_numpy(np.array(corpus.images[picks.numpy()])).double() / 127.5 - 1
    eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x + levels[:, None, None, None] * eps).float(), levels


def small(name: str, corpus: Corpus | np.ndarray, **settings) -> sm.Machine:
    """The machine called `name` with its settings in `SMALL`, or others."""
    corpus = Corpus(corpus) if isinstance(corpus, np.ndarray) else corpus
    return sm.build(name, corpus, **{**SMALL.get(name, {}), **settings})


def compared(y: torch.Tensor, kernel: str, collection: Collection) -> torch.Tensor:
    """The pictures that a kernel compares instead of y: rounded ones by `engines.triton`."""
    takes = kernel == "torch" and fused.available() and fused.folds(collection)
    return fused.rounded(y) if takes else y
