"""Small reference networks b(x, log sigma), built from azula's blocks where possible.

Each is determined by the shape (C, H, W) of the pictures and a few settings, which are stored in
its card (`lab.networks.network`), so that it can be rebuilt from the card.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from azula.nn.dit import DiTBlock
from azula.nn.layers import SineEncoding
from azula.nn.unet import UNet
from azula.nn.vit import ViT
from torch import Tensor, nn

from scoremachine.lab.networks.vae import VAE
from scoremachine.runtime.validation import check_name, unknown

Shape = tuple[int, int, int]

RANGE = 4.0  # factor of log sigma before its encoding: wavelengths of 1.6 and longer


class Level(nn.Module):
    """An embedding of the noise level in `features` dimensions, which modulates a network."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            SineEncoding(features, omega=100.0),
            nn.Linear(features, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
        )

    def forward(self, log_sigma: Tensor) -> Tensor:
        return self.layers(RANGE * log_sigma)


class ResNet(nn.Module):
    """Residual 3 x 3 convolutions only: no normalisation, no attention, no downsampling.

    The receptive field has a side of 2 depth + 5 pixels, which includes the first and the last
    convolution. This is the kind of network that Kamb & Ganguli (2412.20292) explain best.

    Arguments:
        shape: (C, H, W) of the pictures.
        width: Hidden channels.
        depth: Residual convolutions.
        padding: "zeros", which makes the output depend on the distance from the border, or
            "circular".
        normalised: Whether groups of 8 channels are normalised before each convolution, which makes
            every output pixel depend on all input pixels.
    """

    def __init__(
        self,
        shape: Shape,
        width: int = 64,
        depth: int = 6,
        padding: str = "zeros",
        normalised: bool = False,
    ) -> None:
        super().__init__()
        check_name("padding", padding, ("zeros", "circular"))
        self.level = Level(width)

        def convolution(a: int, b: int) -> nn.Conv2d:
            return nn.Conv2d(a, b, 3, padding=1, padding_mode=padding)  # type: ignore[arg-type]

        self.first, self.last = convolution(shape[0], width), convolution(width, shape[0])
        self.shifts = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.layers = nn.ModuleList([convolution(width, width) for _ in range(depth)])
        groups = max(1, width // 8)
        self.norms = nn.ModuleList(
            [nn.GroupNorm(groups, width) if normalised else nn.Identity() for _ in range(depth)]
        )
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        level = self.level(log_sigma.expand(len(x)))
        x = self.first(x)
        for norm, shift, layer in zip(self.norms, self.shifts, self.layers, strict=True):
            x = x + layer(nn.functional.silu(norm(x) + shift(level)[..., None, None]))
        return self.last(x)


class Attention(nn.Module):
    """Self-attention between all positions of a picture, as in the bottleneck of a U-Net."""

    def __init__(self, width: int, features: int, heads: int) -> None:
        super().__init__()
        self.block = DiTBlock(
            width, features, ffn_factor=2, attention_heads=heads, pos_channels=2, rope=True
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        rows, columns = torch.arange(H).to(x), torch.arange(W).to(x)
        tokens = self.block(x.flatten(2).mT, level, torch.cartesian_prod(rows, columns))
        return tokens.mT.unflatten(-1, (H, W))


class Modulated(nn.Module):
    """One of azula's networks, modulated by the noise level."""

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network, self.level = network, Level(features)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        return self.network(x, self.level(log_sigma.expand(len(x))))


def unet(
    shape: Shape, width: int = 32, levels: int = 3, blocks: int = 2, attention: int = 0
) -> nn.Module:
    """azula's U-Net with `levels` resolutions, each half the one before with `width` more channels.

    `attention`: heads of self-attention at the smallest size; 0: none.
    """
    check_sides(shape, 2 ** (levels - 1), f"a U-Net of {levels} sizes halves {levels - 1} times")
    wide = [width * (k + 1) for k in range(levels)]
    features = 2 * width
    made = UNet(shape[0], shape[0], hid_channels=wide, hid_blocks=[blocks] * levels,
                norm="group", groups=8, mod_features=features)  # fmt: skip
    if attention:
        made.bottleneck = Attention(wide[-1], features, attention)
    return Modulated(made, features)


def unet_attention(
    shape: Shape, width: int = 32, levels: int = 3, blocks: int = 2, attention: int = 4
) -> nn.Module:
    """`unet` with self-attention at its lowest resolution."""
    return unet(shape, width, levels, blocks, attention)


def check_sides(shape: Shape, factor: int, why: str) -> None:
    """Raises ValueError unless both sides are multiples of `factor`."""
    H, W = shape[1:]
    if H % factor or W % factor:
        raise ValueError(
            f"{why}, and pictures of {H} x {W} cannot be: open the corpus with "
            f"size={factor * max(1, round(min(H, W) / factor))}"
        )


def dit(
    shape: Shape, width: int = 128, depth: int = 6, patch: int = 4, heads: int = 4
) -> nn.Module:
    """azula's vision transformer of patches: the DiT of Peebles & Xie 2212.09748."""
    check_sides(shape, patch, f"a DiT cuts into patches of {patch} x {patch}")
    made = ViT(shape[0], shape[0], mod_features=width, hid_channels=width, hid_blocks=depth,
               patch_size=patch, attention_heads=heads)  # fmt: skip
    return Modulated(made, width)


class MLP(nn.Module):
    """Residual fully connected layers over all pixels, without spatial structure."""

    def __init__(self, shape: Shape, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        D = math.prod(shape)
        self.level = Level(width)
        self.first, self.last = nn.Linear(D, width), nn.Linear(width, D)
        self.shifts = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        level = self.level(log_sigma.expand(len(x)))
        h = self.first(x.flatten(1)) / math.sqrt(x.shape[1])
        for shift, layer in zip(self.shifts, self.layers, strict=True):
            h = h + layer(nn.functional.silu(h + shift(level)))
        return self.last(h).reshape(x.shape)


ARCHITECTURES: dict[str, Any] = {
    "resnet": ResNet,
    "unet": unet,
    "unet-attention": unet_attention,
    "dit": dit,
    "mlp": MLP,
    "vae": VAE,
}


def check_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the network called `name` with their defaults.

    Raises:
        ValueError: For an unknown name, or settings that it does not have.
    """
    check_name("network", name, ARCHITECTURES)
    known = {
        p.name: p.default
        for p in inspect.signature(ARCHITECTURES[name]).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    for setting, value in settings.items():
        if setting not in known:
            raise ValueError(
                unknown(f"network {name!r} has no setting {setting!r}", setting, known)
            )
        if type(value) is not type(known[setting]):
            raise ValueError(f"{setting} is {value!r}; expected something like {known[setting]!r}")
        if type(value) is int and value < (0 if setting == "attention" else 1):
            raise ValueError(f"{setting} is {value!r}; expected a positive whole number")
    return known


def architecture(name: str, shape: Shape, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network called `name` for pictures of a shape (C, H, W), and all of its settings.

    Raises:
        ValueError: For an unknown name or setting, or pictures that do not fit.
    """
    known = check_settings(name, settings)
    chosen = {**known, **settings}
    try:
        return ARCHITECTURES[name](shape, **chosen), chosen
    except (AssertionError, RuntimeError) as error:
        raise _no_such(name, chosen, error) from None
    except ValueError as error:
        if "num_groups" in str(error):  # raised by torch
            raise _no_such(name, chosen, error) from None
        raise


def _no_such(name: str, chosen: dict[str, Any], error: Exception) -> ValueError:
    settings = ", ".join(f"{k}={v}" for k, v in chosen.items())
    why = f" ({error})" if str(error) else ""
    return ValueError(
        f"there is no network {name!r} with {settings}{why}: widths are even, multiples of 8 where "
        "they are normalised, and multiples of the heads of attention"
    )
