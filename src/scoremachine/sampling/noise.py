"""Noise that belongs to a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


class PictureNoise(TorchFunctionMode):
    """Inside it `torch.randn_like` draws picture i's noise from a generator made of (seed, i).

    So a sampler's noise depends neither on the batch a picture is in nor on what ran before.
    """

    def __init__(self, seed: int, pictures: range) -> None:
        super().__init__()
        self.generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])
            )
            for i in pictures
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.randn_like:
            return func(*args, **(kwargs or {}))
        x, dtype = args[0], (kwargs or {}).get("dtype") or args[0].dtype
        return torch.stack(
            [torch.randn(x.shape[1:], generator=g, dtype=dtype) for g in self.generators]
        ).to(x.device)
