"""Trained networks with the interface of machines: azula denoisers with D(y, sigma)."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior, KarrasDenoiser, Posterior
from azula.nn.utils import get_module_dtype
from azula.noise import CosineSchedule, Schedule, VPSchedule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoremachine.data.corpus import Corpus
from scoremachine.engines.pytorch import where
from scoremachine.lab.networks.architectures import architecture
from scoremachine.lab.networks.foreign import (
    LATENT,
    PICKLES,
    is_diffusers,
    read_diffusers,
    refuse_plugin,
)
from scoremachine.lab.networks.vae import VAE, Autoencoder
from scoremachine.machines.machine import checked
from scoremachine.runtime.files import read_json, write_text, written
from scoremachine.runtime.validation import check_name
from scoremachine.sampling.generate import generate
from scoremachine.sampling.schedules import SCHEDULES, time_of

BUILT_IN = Path(__file__).parent / "weights"
WEIGHTS, CARD = "network.safetensors", "network.json"
LAYOUT = 1  # version of a card
NO_NETWORK = (
    f"a network is one of the bundled ones ({{}}), a folder with {WEIGHTS} and {CARD}, as "
    "scoremachine train writes it, or a folder of diffusers"
)
BATCH = 64  # pictures in a batch of a network
PREDICTIONS = ("x0", "eps", "v")
MOST = 1e3  # the noise level at which a trajectory begins if the schedule has higher ones


class Predicted(Denoiser):
    """A callable f(x_t, t) that predicts the clean picture, the noise, or the velocity.

    With x_t = alpha x + sigma eps:

        x0:   D = f
        eps:  D = (x_t - sigma f) / alpha                       (Ho et al. 2006.11239)
        v:    D = (alpha x_t - sigma f) / (alpha^2 + sigma^2)    v = alpha eps - sigma x
                                                                (Salimans & Ho 2202.00512)

    Arguments:
        f: Takes x_t (B, C, H, W) and `times` of t (B,), in the dtype of its parameters or float32;
            returns a tensor of the shape of x_t.
        prediction: "x0", "eps" or "v".
        schedule: An azula schedule.
        times: Maps the time t in [0, 1] to the time argument of f; None: t itself.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        prediction: str,
        schedule: Schedule,
        times: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_name("prediction", prediction, PREDICTIONS)
        if not callable(f):
            raise ValueError(f"a network is {f!r}; expected a callable f(x_t, t) or a Module")
        self.f, self.prediction, self.schedule, self.times = f, prediction, schedule, times

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
        t = torch.as_tensor(t).to(x_t.device)
        alpha, sigma = (v.to(x_t).reshape(-1, 1, 1, 1) for v in self.schedule(t))
        t = (t if self.times is None else self.times(t)).expand(len(x_t))
        # None for a module without parameters
        kind = get_module_dtype(self.f) if isinstance(self.f, nn.Module) else torch.float32
        f = self.f(x_t.to(kind), t.to(kind), **kwargs)
        if not isinstance(f, Tensor) or f.shape != x_t.shape:
            shape = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(
                f"the network returns {shape} for pictures of shape {tuple(x_t.shape)}; expected "
                "a tensor of the same shape"
            )
        f = f.to(x_t)
        if self.prediction == "eps":
            f = (x_t - sigma * f) / alpha
        elif self.prediction == "v":
            f = (alpha * x_t - sigma * f) / (alpha**2 + sigma**2)
        return DiracPosterior(mean=f)


class Under(Denoiser):
    """A network under another schedule, at noise levels that its own schedule contains."""

    def __init__(self, network: Network, schedule: Schedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
        alpha, sigma = (
            torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in self.schedule(t)
        )
        y = x_t / alpha.to(x_t).reshape(-1, 1, 1, 1)
        return DiracPosterior(mean=self.network.denoise(y, sigma / alpha))


class Within(Schedule):
    """The part of a schedule between two of its times, as a schedule of its own."""

    def __init__(self, schedule: Schedule, low: float, high: float) -> None:
        self.schedule, self.low, self.high = schedule, low, high

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(self.inner(torch.as_tensor(t)))

    def inner(self, t: Tensor) -> Tensor:
        """The whole schedule's time."""
        return self.low + t * (self.high - self.low)


class Limited(Denoiser):
    """A denoiser on a part of its schedule."""

    def __init__(self, denoiser: Denoiser, schedule: Within) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Posterior:
        return self.denoiser(x_t, self.schedule.inner(torch.as_tensor(t)), **kwargs)


class Network(Denoiser):
    """A trained denoiser and its card.

    Arguments:
        denoiser: An azula denoiser of pictures in [-1, 1].
        shape: (C, H, W) of its pictures.
        name: Its name in tables.
        card: Its architecture, settings and training; see `save`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, int, int],
        name: str = "network",
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise ValueError(
                f"a network is {type(denoiser).__name__}; expected an azula Denoiser: wrap a "
                "callable with Network.of"
            )
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        C, H, W = shape
        self.shape, self.name, self.card = (C, H, W), name, card or {}
        self._drawn = uuid.uuid4().bytes

    @classmethod
    def of(
        cls,
        f: Callable[..., Tensor],
        shape: tuple[int, int, int],
        prediction: str = "x0",
        schedule: Schedule | None = None,
        name: str = "network",
    ) -> Network:
        """From a callable f(x_t, t), such as a Module, that predicts "x0", "eps" or "v".

        See `Predicted`; schedule None: azula's VPSchedule().
        """
        return cls(Predicted(f, prediction, schedule or VPSchedule()), shape, name)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Posterior:
        weights = next(self.parameters(), x_t)
        if weights.device == x_t.device:
            return self.denoiser(x_t, t, **kwargs)
        there = x_t.to(weights.device), torch.as_tensor(t).to(weights.device)
        return DiracPosterior(mean=self.denoiser(*there, **kwargs).mean.to(x_t.device))

    def denoise(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """D(y, sigma), as `Machine.denoise`: y (B, C, H, W) = x + sigma eps.

        Raises:
            ValueError: As `Machine.denoise`, or for a noise level outside the network's schedule.
        """
        _, levels = checked(y, sigma, self.shape, f"the network {self.name!r} was made for")
        t = torch.tensor([self.time(float(s)) for s in levels], dtype=torch.float64).to(y.device)
        alpha, _ = self.schedule(t)
        x_t = alpha.to(y).reshape(-1, 1, 1, 1) * y
        parts = [self(x_t[k : k + BATCH], t[k : k + BATCH]).mean for k in range(0, len(y), BATCH)]
        return torch.cat(parts).to(y) if parts else y.clone()

    def draw(self, count: int, steps: int = 20, seed: int = 0, sampler: str = "ddim") -> Tensor:
        """New pictures, (count, C, H, W): from `scoremachine.generate`, or samples of a VAE."""
        if isinstance(self.denoiser, Autoencoder):
            return self.denoiser.draw(count, seed)
        network, steps = self.on_noise_levels(steps)
        with torch.no_grad():
            return generate(network, count, steps, seed, sampler, shape=self.shape).float()

    def check_corpus(self, corpus: Corpus) -> None:
        """ValueError unless a corpus has pictures of its shape."""
        if corpus.shape != self.shape:
            C, H, W = self.shape
            how = f"size={H if H == W else (H, W)}" if corpus.shape[1:] != (H, W) else ""
            if corpus.shape[0] != C:
                gray = "grayscale=True" if C == 1 else f"pictures of {C} channels"
                how = f"{how} and {gray}" if how else gray
            raise ValueError(
                f"the network {self.name!r} was made for pictures of shape {self.shape}, and "
                f"{corpus.name!r} has {corpus.shape}: open the corpus with {how}"
            )

    def time(self, sigma: float) -> float:
        """The time of a noise level."""
        t = time_of(self.schedule, sigma)
        alpha, sigma_t = self.schedule(torch.tensor(t, dtype=torch.float64))
        reached = float(sigma_t / alpha)
        if not abs(reached / sigma - 1) <= 1e-3:
            raise ValueError(
                f"the schedule of the network {self.name!r} has no noise level {sigma:g}; the "
                f"nearest is {reached:.4g}"
            )
        return t

    def under(self, schedule: Schedule | None) -> Network:
        """The same network under another schedule; None: its own."""
        if schedule is None:
            return self
        return Network(Under(self, schedule), self.shape, self.name, self.card)

    def on_noise_levels(self, steps: int) -> tuple[Network, int]:
        """The network on the part of its schedule with finite sigma / alpha > 0, and its steps.

        A published schedule may end at sigma = 0, where there is no noise, and begin at alpha = 0,
        where there is no signal: then a trajectory of `steps` times stops at the last level above
        0, and begins at sigma / alpha = 1,000 (`MOST`).
        """
        least, largest = self.levels()
        low, high = 0.0, 1.0
        if not largest <= 10 * MOST:
            high = time_of(self.schedule, MOST)
        if not least > 0:
            steps = max(1, steps - 1)
            low = high / max(2, steps)
        if (low, high) == (0.0, 1.0):
            return self, steps
        part = Within(self.schedule, low, high)
        return Network(Limited(self, part), self.shape, self.name, self.card), steps

    @property
    def key(self) -> str:
        """A digest of all that determines D: weights, card, prediction and schedule.

        A network without weights is identified by a random number.
        """
        weights = self.state_dict()
        digest = hashlib.sha256(b"" if weights else self._drawn)
        for name, value in sorted(weights.items()):
            whole = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + whole.numpy().tobytes())
        prediction = getattr(self.denoiser, "prediction", type(self.denoiser).__name__)
        ends = torch.linspace(0, 1, 9, dtype=torch.float64)
        levels = [v.tolist() for v in self.schedule(ends)]
        known = [self.card.get(name) for name in ("architecture", "settings")]
        training = self.card.get("training", {})
        known += [training.get(name) for name in ("corpus_digest", "held_out")]
        digest.update(json.dumps([prediction, levels, known], default=str).encode())
        return digest.hexdigest()[:16]

    def levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level sigma / alpha of its schedule."""
        alpha, sigma = self.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
        least, largest = (sigma / alpha).tolist()
        return least, largest

    @property
    def parameters_count(self) -> int:
        """The number of its parameters."""
        return sum(p.numel() for p in self.parameters())

    def unseen(self, corpus: Corpus) -> np.ndarray | None:
        """Positions of the images of a corpus that it has not been trained on; None: unknown."""
        training = self.card.get("training", {})
        if training.get("corpus_digest") != corpus.digest:
            return None
        return np.asarray(training["held_out"], dtype=np.int64)

    @classmethod
    def made(cls, name: str, shape: tuple[int, int, int], **settings: Any) -> Network:
        """A network of `ARCHITECTURES`, untrained; denoisers are preconditioned as in EDM."""
        module, chosen = architecture(name, shape, **settings)
        # faster for convolutions
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        card = {"layout": LAYOUT, "architecture": name, "shape": list(shape), "settings": chosen,
                "schedule": "cosine"}  # fmt: skip
        if isinstance(module, VAE):
            return cls(Autoencoder(module), shape, name, card)
        return cls(KarrasDenoiser(module, CosineSchedule()), shape, name, card)

    def save(self, folder: str | Path) -> None:
        """Writes network.safetensors and network.json, the card."""
        if "architecture" not in self.card:
            raise ValueError(
                f"{self.name!r} has no card to rebuild it from; only networks of Network.made have"
            )
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.backbone.state_dict().items()}
        with written(Path(folder) / WEIGHTS) as temporary:
            save_file(tensors, temporary)
        write_text(Path(folder) / CARD, json.dumps(self.card, indent=1) + "\n")

    @property
    def backbone(self) -> nn.Module:
        """The module inside azula's preconditioning."""
        return self.denoiser.backbone

    @classmethod
    def load(cls, name: str | Path) -> Network:
        """A network from a folder that `save` or diffusers wrote, or a bundled one.

        It computes on the GPU if there is one, on whichever device its input is.

        Arguments:
            name: A folder that `save` wrote, or of a UNet2DModel of diffusers or its pipeline, with
                safetensors; or, if there is no such folder, one of `built_in()`.

        Raises:
            ValueError: If there is no such network, or it is damaged, or a pickle.
        """
        folder = Path(name)
        plugin = str(name).removeprefix("azula:")
        known = plugin.split(":")[0] in (*PICKLES, *LATENT) and not folder.exists()
        if plugin != str(name) or known:
            refuse_plugin(plugin)
        if not folder.is_dir() and name in built_in():
            folder = BUILT_IN / name
        if not (folder / CARD).exists() and is_diffusers(folder):
            return cls._of_diffusers(folder)
        card = read_json(folder / CARD, NO_NETWORK.format(", ".join(built_in()) or "none"))
        if card.get("layout") != LAYOUT or "architecture" not in card:
            raise ValueError(
                f"{folder / CARD} is no card of a network (layout {card.get('layout')!r}; expected "
                f"{LAYOUT}): train one with scoremachine train"
            )
        try:
            network = cls.made(card["architecture"], tuple(card["shape"]), **card["settings"])
            network.backbone.load_state_dict(load_file(folder / WEIGHTS))
            network.schedule = network.denoiser.schedule = SCHEDULES[card["schedule"]]()
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"{folder} holds a network that cannot be read ({str(error).splitlines()[0]}): "
                "the file is cut short, or the card is another network's"
            ) from None
        network.card, network.name = card, folder.resolve().name
        return network.eval().requires_grad_(False).to(where())

    @classmethod
    def _of_diffusers(cls, folder: Path) -> Network:
        module, prediction, schedule, shape = read_diffusers(folder)
        denoiser = Predicted(module, prediction, schedule, schedule.step)
        return cls(denoiser, shape, folder.resolve().name).to(where())


def built_in() -> list[str]:
    """The names of the bundled networks."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CARD}"))
