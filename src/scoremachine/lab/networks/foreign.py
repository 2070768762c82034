"""Networks from other packages: folders of diffusers, and errors for azula's plug-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.noise import Schedule
from torch import Tensor, nn

from scoremachine.runtime.files import read_json
from scoremachine.runtime.progress import say

UNET, BINARY = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
PICKLES = ("adm", "edm", "eldm", "jit", "vdm")  # azula's plug-ins whose weights are pickles
LATENT = ("flux", "sana", "sd")  # those that denoise latents, not pixels


class DiscreteSchedule(Schedule):
    """The noise levels of a network of T steps: t in [0, 1] is the fractional step t (T - 1).

    alpha^2 is the cumulative product at a step; between steps, log(alpha^2 / sigma^2) is linear.
    """

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.log_ratios = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t)
        steps = np.arange(len(self.log_ratios))
        found = np.interp(self.step(t).double().cpu().numpy(), steps, self.log_ratios)
        ratio = torch.as_tensor(found, dtype=torch.float64, device=t.device)
        alpha, sigma = torch.sqrt(torch.sigmoid(ratio)), torch.sqrt(torch.sigmoid(-ratio))
        kind = t.dtype if t.is_floating_point() else torch.float64
        return alpha.to(kind), sigma.to(kind)

    def step(self, t: Tensor) -> Tensor:
        """The network's time argument (a step) for the time t."""
        return t * (len(self.log_ratios) - 1)


class Sample(nn.Module):
    """A model of diffusers that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, step: Tensor) -> Tensor:
        return self.model(x_t, step).sample


def refuse_plugin(name: str) -> None:
    """Raises a ValueError that says why azula's PLUGIN[:CARD] is not supported."""
    plugin = name.split(":")[0]
    if plugin in PICKLES:
        why = "its weights are a pickle, which can run any code when it is read"
    elif plugin in LATENT:
        why = "it denoises latents of an autoencoder, given a text, and machines denoise pixels"
    else:
        known = ", ".join(sorted(PICKLES + LATENT))
        raise ValueError(f"azula has no plug-in {plugin!r}; there are {known}")
    raise ValueError(
        f"azula's plug-in {plugin!r} is refused: {why}. In Python, any azula denoiser of pixels "
        "can be wrapped: Network(denoiser, shape)"
    )


def is_diffusers(folder: Path) -> bool:
    """Whether a folder looks like a model of diffusers."""
    return (folder / "model_index.json").exists() or (folder / "config.json").exists()


def read_diffusers(folder: Path) -> tuple[Sample, str, DiscreteSchedule, tuple[int, int, int]]:
    """A UNet2DModel from a folder of it or of its pipeline: module, prediction, schedule, shape.

    Nothing is fetched, and only safetensors are read.

    Raises:
        ValueError: For another class, weights that are a pickle, or without diffusers.
    """
    home = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    if not (home / "config.json").exists():
        raise ValueError(
            f"{folder} is a pipeline of diffusers without a unet; only UNet2DModel can be read"
        )
    config = read_json(home / "config.json", "expected the configuration of a UNet2DModel")
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(
            f"{home} holds a {kind} of diffusers; only an unconditional UNet2DModel can be read"
        )
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise ValueError(
            f"{home} holds a class-conditional network; only unconditional ones can be read"
        )
    C, outs, side = config["in_channels"], config["out_channels"], config.get("sample_size")
    if outs != C:
        raise ValueError(
            f"{home} holds a network that returns {outs} channels for {C}: one that also predicts "
            "a variance; only networks that predict just a mean can be read"
        )
    if side is None:
        raise ValueError(f"{home / 'config.json'} has no sample_size; add the side of its pictures")
    if not (home / UNET).exists():
        pickled = " but a pickle, which can run any code" if (home / BINARY).exists() else ""
        raise ValueError(
            f"{home} holds no {UNET}{pickled}: save it again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    scheduler_of, model_of = _classes()
    try:
        model = model_of.from_pretrained(home, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise ValueError(
            f"{home} holds a network that cannot be read ({str(error).splitlines()[0]})"
        ) from None
    noise = next(
        (path for path in (folder / "scheduler", folder, folder.parent / "scheduler")
         if (path / "scheduler_config.json").exists()), None
    )  # fmt: skip
    if noise is None:
        say(f"{folder} has no scheduler: assuming that of DDPM, and that it predicts the noise")
        scheduler = scheduler_of()
    else:
        known = read_json(noise / "scheduler_config.json", "expected a scheduler of diffusers")
        if known.get("_class_name") not in SCHEDULERS:
            raise ValueError(
                f"{noise} adds noise as {known.get('_class_name')} does; only schedulers with the "
                f"noise levels of DDPM can be read: {', '.join(SCHEDULERS)}"
            )
        try:
            scheduler = scheduler_of.from_config(known)
        except Exception as error:
            raise ValueError(f"{noise} holds no scheduler that can be read ({error})") from None
    prediction = PREDICTIONS.get(scheduler.config.prediction_type)
    if prediction is None:
        raise ValueError(
            f"{noise} predicts {scheduler.config.prediction_type!r}; expected one of "
            f"{', '.join(PREDICTIONS)}"
        )
    left = scheduler.alphas_cumprod
    if not bool(((left > 0) & (left < 1)).all()):
        raise ValueError(
            f"{noise} has a step of pure noise (zero terminal SNR), where D(y, sigma) is undefined"
        )
    H, W = (side, side) if isinstance(side, int) else side
    schedule = DiscreteSchedule(scheduler.alphas_cumprod.double().numpy())
    return Sample(model.eval().requires_grad_(False)), prediction, schedule, (C, H, W)


def _classes() -> tuple[Any, Any]:
    """diffusers' DDPMScheduler and UNet2DModel."""
    try:
        from diffusers.utils import import_utils
    except ImportError:
        raise ValueError(
            "networks of diffusers need diffusers: pip install 'scoremachine[diffusers]'"
        ) from None
    # neither needs torchvision, which may be made for another PyTorch and fail when imported
    known = import_utils._torchvision_available
    import_utils._torchvision_available = False
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    finally:
        import_utils._torchvision_available = known
    return DDPMScheduler, UNet2DModel
