"""The base class of all machines: an azula denoiser D(y, sigma) made from a corpus alone."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule, VPSchedule
from torch import Tensor

from scoremachine import engines
from scoremachine.calibration.heldout import automatic_bandwidth, automatic_locality
from scoremachine.core.derivatives import (
    check_untracked,
    mapped,
    regrouped,
    uncompiled,
    values,
)
from scoremachine.core.noise import PictureNoise
from scoremachine.core.processes import Process
from scoremachine.core.schedules import (
    LOCALITIES,
    BandwidthSchedule,
    LevelSchedule,
    check_bandwidth,
)
from scoremachine.core.shares import Shares
from scoremachine.core.windows import Variant
from scoremachine.data.corpus import Corpus
from scoremachine.runtime.lru import LRUCache
from scoremachine.sources import source_of
from scoremachine.sources.source import Source

Label = int | str | Tensor | np.ndarray | Sequence[int | str] | None
Bandwidth = float | BandwidthSchedule | str
LEAST, MOST = 1e-100, 1e100  # noise levels whose squares and inverse squares float64 can hold


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of a machine's `mean`: noisy pictures.

    Attributes:
        y: float64 on the CPU, shape (B, C, H, W).
        sigma: sqrt(noise level^2 + h^2) with the bandwidth h, float64 (B,).
        level: The noise levels at which settings are looked up, float64 (B,).
        index: Positions of the images that are the source, int64 (n,).
        noise: The random noise for a machine that perturbs pictures; None: the machine's own.
    """

    y: Tensor
    sigma: Tensor
    level: Tensor
    index: np.ndarray
    noise: PictureNoise | None = None

    def at(self, members: Tensor) -> Batch:
        """Some of the pictures, by a mask or by positions."""
        if members.dtype == torch.bool:
            members = torch.nonzero(members)[:, 0]
        noise = None if self.noise is None else self.noise.of(members)
        return replace(
            self, y=self.y[members], sigma=self.sigma[members], level=self.level[members],
            noise=noise,
        )  # fmt: skip


MACHINES: dict[str, type[Machine]] = {}  # by name; filled as their modules are imported


class Frozen(ABCMeta):
    """The metaclass of machines, which do not change after they are made."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        machine = super().__call__(*args, **kwargs)
        machine.__dict__["_frozen"] = True
        return machine


class Machine(Denoiser, metaclass=Frozen):
    """A training-free denoiser: D(y, sigma), an estimate of E[x | y] in closed form.

    Images x are in [-1, 1]; y = x + sigma eps, in float, shape (B, C, H, W). D is differentiable
    by y, once: autograd, forward mode and `torch.func` compute exact products with the Jacobian.
    With a bandwidth h every source is a Gaussian N(s, h^2 I) instead of a point:

        D = (sigma^2 D_0(y, sqrt(sigma^2 + h^2)) + h^2 y) / (sigma^2 + h^2)

    where D_0 is the machine with h = 0. A machine is an azula `Denoiser`: `machine(x_t, t).mean`
    is E[x | x_t] for x_t = alpha_t x + sigma_t eps under `machine.schedule`.

    A machine never changes: what varies is an argument, and other settings (`clone_with`) or the
    resolution of "auto" (`resolved`) make a new machine. Any number of threads may share a machine;
    it can be pickled and copied.

    Arguments:
        corpus: The images.
        bandwidth: h >= 0 in units of x, a `BandwidthSchedule`, or "auto" (held-out calibration).
        kernel: "auto", "numba", "torch" or "reference"; all give the same results.
        schedule: azula's noise schedule for `forward`; None: `VPSchedule()`.

    Raises:
        ValueError: For invalid arguments, with a message that says which would be valid.
    """

    name: str
    equivariant = False  # whether its source is every position
    locality: str | None = None  # the name of the setting for its locality, if it has one
    relative_cost: float = 1.0  # approximate cost of a source, relative to one of a plain box
    accepts_mixtures = False  # whether its source may be a mixture of Gaussians
    has_sources = True  # whether D is a weighted mean of training images
    smooth_in_sigma = False  # whether D has a derivative by sigma: no setting depends on sigma

    def __init__(
        self,
        corpus: Corpus,
        bandwidth: Bandwidth = 0.0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.corpus, self.kernel = corpus, kernel
        self.source: Any = self.make_source(corpus, kernel)
        if not (self.source.has_images or self.accepts_mixtures):
            raise ValueError(
                f"{self.name} needs images; a mixture is the source of ideal, ls and els only: "
                "use one of them, or the images that were compressed"
            )
        self.bandwidth = check_bandwidth(bandwidth)
        if not (schedule is None or callable(schedule)):
            raise ValueError(f"schedule is {schedule!r}; expected an azula Schedule or None")
        self.schedule = VPSchedule() if schedule is None else schedule
        self._memo: LRUCache[Any] = LRUCache(2)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            MACHINES[cls.name] = cls

    def __setattr__(self, name: str, value: Any) -> None:
        torchs = name == "training" or (name.startswith("_") and name not in self.__dict__)
        if self.__dict__.get("_frozen") and not torchs:
            known = self.__dict__.get(name)
            same = type(known) is type(value) and isinstance(value, str | float) and known == value
            if not same:
                raise AttributeError(
                    f"{self.name} does not change after it is made, so {name} cannot be set: make "
                    f"another with clone_with({name}=...), or pass it as an argument"
                )
        super().__setattr__(name, value)

    def make_source(self, corpus: Any, kernel: str) -> Source:
        """The source that pictures are compared with."""
        return source_of(corpus, kernel)

    @abstractmethod
    def mean(self, batch: Batch) -> Tensor:
        """D with h = 0 of valid pictures, float64 (B, C, H, W)."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants in which every image is a source."""
        return (Variant(),)

    @property
    def removal_is_exact(self) -> bool:
        """Whether D without an image follows from D and the shares of the image.

        So it is where each pixel is the mean of one posterior, and windows do not depend on the
        images.
        """
        return False

    def shares(self, batch: Batch, k: int) -> Shares:
        """D with h = 0 of valid pictures, and the k leading sources of every pixel.

        Raises:
            ValueError: Where the machine does not know.
        """
        raise ValueError(
            f"{self.name} does not say where its pixels come from: use another machine"
        )

    @uncompiled
    def denoise(
        self,
        y: Tensor,
        sigma: float | Tensor,
        label: Label = None,
        bandwidth: Bandwidth | None = None,
        noise: PictureNoise | None = None,
    ) -> Tensor:
        """D(y, sigma), an estimate of E[x | y].

        Arguments:
            y: Noisy pictures x + sigma eps, floats, shape (B, C, H, W).
            sigma: Their noise level, > 0: a number, or one for each picture, shape (B,).
            label: The class (position or name) to which the source is restricted; or one for each
                picture; None: all images.
            bandwidth: h, as in `Machine`; None: the machine's own.
            noise: The random noise for a machine that perturbs pictures (`smoothed`); None: noise
                from its own seed.

        Returns:
            D, with y's shape, dtype and device.

        Raises:
            ValueError: For a wrong shape, dtype or channel count, NaN pixels, sigma <= 0 or NaN,
                or a label with no images.
            NotImplementedError: For a second derivative, or a derivative by sigma of machines other
                than `ideal` and `gaussian` with a constant bandwidth.
        """
        pictures, levels = self.check(y, sigma, bandwidth)
        if len(y) == 0:
            return y.clone()
        groups, parts = self.by_label(label, len(pictures)), []
        for members, index in groups:
            some = None if noise is None else noise.of(members)
            asked = pictures[members], levels[members], index
            parts.append(self.denoise_from(*asked, bandwidth, some))
        D = regrouped([members for members, _ in groups], parts)
        return D.to(dtype=y.dtype, device=y.device)

    def denoise_from(
        self,
        y: Tensor,
        sigma: Tensor,
        index: np.ndarray,
        bandwidth: Bandwidth | None = None,
        noise: PictureNoise | None = None,
    ) -> Tensor:
        """D of valid float64 pictures, the images at `index` being the source."""
        machine = self.resolved()
        h = machine.bandwidths(sigma, bandwidth)
        batch = Batch(y, torch.sqrt(sigma**2 + h**2), sigma, index, noise)
        return apply_bandwidth(machine.mean(batch), y, sigma, h)

    @uncompiled
    def denoise_through(
        self,
        process: Process,
        x_t: Tensor,
        t: float,
        label: Label = None,
        bandwidth: Bandwidth | None = None,
        noise: PictureNoise | None = None,
    ) -> Tensor:
        """E[x | x_t] under another forward process, x_t = A_t x + sigma_t eps.

        Logits compare x_t with A_t s, and the mean is taken over s.

        Arguments:
            process: The process.
            x_t: Noisy pictures, floats, shape (B, C, H, W).
            t: The time in [0, 1].
            label, bandwidth, noise: As in `denoise`.

        Returns:
            D, with x_t's shape, dtype and device.

        Raises:
            ValueError: As `denoise`, and for a bandwidth other than 0.
        """
        check_untracked("t", t, "under a forward process D has one by x_t only")
        pictures, _ = self.check(x_t, 1.0)
        process.check(pictures.shape[2:])
        _, sigma = process(torch.tensor(t, dtype=torch.float64))
        viewed = self.under_process(process, t, bandwidth)
        sigmas = sigma.double().expand(len(pictures))
        groups, parts = self.by_label(label, len(pictures)), []
        for members, index in groups:
            level = sigmas[members] / viewed.source.scale
            some = None if noise is None else noise.of(members)
            batch = Batch(pictures[members], sigmas[members], level, index, some)
            parts.append(viewed.mean(batch))
        D = regrouped([members for members, _ in groups], parts)
        return D.to(dtype=x_t.dtype, device=x_t.device)

    def check_process(self, bandwidth: Bandwidth | None = None) -> None:
        """ValueError if the machine cannot run under another forward process."""
        if not self.source.has_images:
            raise ValueError("a mixture supports no other forward process: use the images")
        h = self.bandwidth if bandwidth is None else bandwidth
        if h != 0.0:
            raise ValueError(
                f"bandwidth is {h!r}, and under a forward process that damps some frequencies more "
                "than others a source is no isotropic Gaussian: use bandwidth 0"
            )

    def under_process(
        self, process: Process, t: float, bandwidth: Bandwidth | None = None
    ) -> Machine:
        """The machine that compares pictures with A_t s; the last one is cached."""
        self.check_process(bandwidth)
        machine = (
            self.resolved() if bandwidth is None else self.clone_with(bandwidth=0.0).resolved()
        )
        return self._memo.get(("process", process, t), lambda: machine.seen_through(process, t))

    def seen_through(self, process: Process, t: float) -> Self:
        """A new machine for `under_process`."""
        return self.with_source(self.source.under_process(process, t))

    def with_source(self, source: Source) -> Self:
        """The same machine with another source."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, LRUCache):
                other.__dict__[name] = LRUCache(value.size)
        other.__dict__["source"] = source
        return other

    def score(
        self,
        y: Tensor,
        sigma: float | Tensor,
        label: Label = None,
        bandwidth: Bandwidth | None = None,
    ) -> Tensor:
        """The score (D - y) / sigma^2 of the noisy density, with y's shape and dtype.

        Raises:
            ValueError: As `denoise`, and where y's dtype cannot hold it.
        """
        pictures, levels = self.check(y, sigma, bandwidth)
        D = self.denoise(pictures, levels, label, bandwidth)
        score = (D - pictures) / levels[:, None, None, None] ** 2
        if y.dtype == torch.float16 and score.numel():
            largest = float(values(score).abs().max())
            if largest > torch.finfo(torch.float16).max:
                raise ValueError(
                    f"the score has entries of {largest:.3g}, more than float16 can hold: give y "
                    "in float32, float64 or bfloat16"
                )
        return score.to(dtype=y.dtype, device=y.device)

    def log_density(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """log p(y) in nats, float64, shape (B,), for machines that have a density."""
        raise ValueError(
            f"{self.name} has no density: the posteriors of its sites have no common density. "
            "Use 'ideal' or 'gaussian'"
        )

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        label: Label = None,
        bandwidth: Bandwidth | None = None,
        noise: PictureNoise | None = None,
    ) -> DiracPosterior:
        """The interface of azula: E[x | x_t] for x_t = alpha_t x + sigma_t eps.

        Arguments:
            x_t: Noisy pictures, shape (B, C, H, W).
            t: The time in [0, 1], shape () or (B,).
            label, bandwidth, noise: As in `denoise`.
        """
        alpha, sigma = (
            torch.as_tensor(v, dtype=torch.float64, device="cpu")
            for v in self.schedule(torch.as_tensor(t))
        )
        y = x_t / alpha.to(x_t).reshape(-1, 1, 1, 1)
        return DiracPosterior(mean=self.denoise(y, sigma / alpha, label, bandwidth, noise))

    def check(
        self, y: Tensor, sigma: float | Tensor, bandwidth: Bandwidth | None = None
    ) -> tuple[Tensor, Tensor]:
        """`y` and `sigma` as float64 on the CPU, shapes (B, C, H, W) and (B,); or ValueError."""
        h = self.bandwidth if bandwidth is None else bandwidth
        smooth = self.smooth_in_sigma and isinstance(h, int | float)
        whose = (
            f"the corpus {self.corpus.name!r} has: resize the pictures or open the corpus with "
            "size="
        )
        return checked(y, sigma, self.shape_for(y), whose, smooth)

    def shape_for(self, y: Tensor) -> tuple[int, int, int]:
        """The shape (C, H, W) expected of the pictures y: that of the images."""
        return self.corpus.shape

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError unless the machine generates pictures of that shape (C, H, W)."""
        if tuple(shape) != self.corpus.shape:
            raise ValueError(
                f"{self.name} depends on the position in an image, so it generates pictures of the "
                f"images' shape {self.corpus.shape}, not {tuple(shape)}: use els or epc, or open "
                "the corpus with size="
            )

    def by_label(self, label: Label, B: int) -> list[tuple[Tensor, np.ndarray]]:
        """Groups the pictures of a batch by label: (their positions, the images of the source)."""
        if isinstance(label, Tensor | np.ndarray):
            if label.ndim > 1:
                shape = tuple(label.shape)
                raise ValueError(f"labels have shape {shape}; expected one, or one per picture")
            label = label.tolist()
        if label is None or isinstance(label, int | np.integer | str):
            return [(torch.arange(B), self.corpus.indices(label))]
        if len(label) != B:
            raise ValueError(f"{len(label)} labels for {B} pictures; expected one for each")
        return [
            (
                torch.tensor([p for p in range(B) if label[p] == value], dtype=torch.int64),
                self.corpus.indices(value),
            )
            for value in dict.fromkeys(label)
        ]

    @property
    def is_resolved(self) -> bool:
        """Whether no setting is "auto"."""
        return self.bandwidth != "auto"

    def resolved(self) -> Self:
        """The machine with explicit settings instead of "auto".

        They are chosen once, on held-out images; see `scoremachine.calibration`. Other threads that
        need them wait.
        """
        return self if self.is_resolved else self._memo.get("resolved", self.resolve)

    def resolve(self) -> Self:
        """Chooses the settings that are "auto"; see `resolved`."""
        return self.clone_with(bandwidth=automatic_bandwidth(self.clone_with(bandwidth=0.0)))

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> Self:
        """Does all slow preparations, and returns the machine with explicit settings.

        Chooses the settings that are "auto", computes moments of the corpus, builds indexes.

        Arguments:
            label: As in `denoise`.
            levels: The noise levels that will be used, as far as they are known.
        """
        return self.resolved()

    def bandwidths(self, sigma: Tensor, bandwidth: Bandwidth | None = None) -> Tensor:
        """The bandwidth h at each noise level, float64 (B,): the machine's own, or a given one."""
        h = self.resolved().bandwidth if bandwidth is None else check_bandwidth(bandwidth)
        if isinstance(h, str):
            h = self.clone_with(bandwidth=h).resolved().bandwidth
        if isinstance(h, BandwidthSchedule):
            return torch.tensor([h(float(s)) for s in sigma], dtype=torch.float64)
        return torch.full(sigma.shape, float(h), dtype=torch.float64)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the machine was made with, without its corpus."""
        return {name: getattr(self, name) for name in setting_names(type(self))}

    def clone_with(self, corpus: Any = None, **changes: Any) -> Self:
        """A new machine of this kind, with another corpus or other arguments."""
        corpus = self.corpus if corpus is None else corpus
        return type(self)(corpus, **{**self.arguments(), **changes})

    def smaller(self, corpus: Corpus) -> Machine:
        """A machine of this kind on smaller images; its locality is chosen anew."""
        return self.clone_with(corpus)

    def candidates(self) -> list[Any]:
        """The values of its locality that calibration tries; empty if it has no locality."""
        return []

    def supports(self, value: Any) -> bool:
        """Whether the machine can have this value of its locality."""
        return False

    def settings(self) -> dict[str, object]:
        """All settings that identify this machine, for the record of a run, as JSON values."""
        named = {"machine": self.name, "corpus": self.corpus.name, "corpus_key": self.corpus.key}
        arguments = {k: v for k, v in self.arguments().items() if k != "schedule"}
        found = named | {name: plain(value) for name, value in arguments.items()}
        return found | {"kernel": engines.name_of(engines.choose(self.kernel))}


class LocalMachine(Machine):
    """A machine with a locality: a setting, per noise level, of how far its windows reach.

    Arguments:
        corpus: The images.
        local: A number, a schedule, the name of a published one, the path of a calibration.json,
            or "auto" (held-out calibration).
        settings: See `Machine`.
    """

    locality: str  # the setting's name

    def __init__(self, corpus: Corpus, local: Any, **settings: Any) -> None:
        super().__init__(corpus, **settings)
        automatic = isinstance(local, str) and local == "auto"
        if automatic and not self.source.has_images:
            raise ValueError(
                f"a mixture has no images to hold out, so {self.locality} cannot be 'auto': give a "
                "number or a schedule, such as that of a machine of the images"
            )
        if not automatic:
            local = LOCALITIES[self.locality].of(local)
            for value in local.values:
                self.check_local(value.item())
        setattr(self, self.locality, local)

    @property
    def local(self) -> Any:
        """The setting at each noise level, a `LevelSchedule`, or "auto"."""
        return getattr(self, self.locality)

    def check_local(self, value: Any) -> None:
        """Raises ValueError if no machine of this kind can have that value."""

    def supports(self, value: Any) -> bool:
        try:
            self.check_local(value)
        except ValueError:
            return False
        return True

    def choose(self) -> LevelSchedule:
        """The locality that "auto" resolves to."""
        return automatic_locality(self.clone_with(bandwidth=0.0))

    @property
    def is_resolved(self) -> bool:
        return super().is_resolved and not isinstance(self.local, str)

    def resolve(self) -> Self:
        if not isinstance(self.local, str):
            return super().resolve()
        return self.clone_with(**{self.locality: self.choose()}).resolved()

    def smaller(self, corpus: Corpus) -> Machine:
        return self.clone_with(corpus, **{self.locality: "auto"})

    def local_at(self, sigma: float) -> Any:
        """The setting's value at noise level `sigma`."""
        return self.resolved().local(sigma)


def setting_names(kind: type[Machine]) -> list[str]:
    """The names of a machine's settings: its constructor's arguments without the corpus."""
    names = [kind.locality] if kind.locality else []
    for each in reversed(kind.__mro__):
        if "__init__" in vars(each) and issubclass(each, Machine):
            for name, p in inspect.signature(each.__init__).parameters.items():
                named = p.kind is not inspect.Parameter.VAR_KEYWORD
                if named and name not in ("self", "corpus", "local", *names):
                    names.append(name)
    return names


def plain(value: Any) -> object:
    """A setting in a form that JSON can represent."""
    return value.plain() if hasattr(value, "plain") else value


def checked(
    y: Tensor,
    sigma: float | Tensor,
    shape: tuple[int, int, int],
    whose: str,
    smooth_in_sigma: bool = False,
) -> tuple[Tensor, Tensor]:
    """`y` and `sigma` as float64 on the CPU, shapes (B, *shape) and (B,).

    Raises:
        ValueError: For invalid ones; `whose` completes "expected shape ..., as {whose}".
        NotImplementedError: For a derivative by sigma if not `smooth_in_sigma`.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"y is {kind}; expected a floating-point torch.Tensor with pixels around [-1, 1]: "
            "for uint8 pictures use x / 127.5 - 1"
        )
    if y.ndim != 4 or tuple(y.shape[1:]) != tuple(shape):
        C, H, W = shape
        raise ValueError(f"y has shape {tuple(y.shape)}; expected (B, {C}, {H}, {W}), as {whose}")
    pictures = y.to(device="cpu", dtype=torch.float64).contiguous()
    if not torch.isfinite(values(pictures)).all():
        raise ValueError("y holds NaN or infinite pixels; expected finite numbers")
    try:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"sigma is {sigma!r}; expected a finite number above 0") from None
    if levels.ndim > 1 or (levels.ndim == 1 and len(levels) not in (1, len(y))):
        raise ValueError(
            f"sigma has shape {tuple(levels.shape)}; expected one noise level, or one for "
            f"each of the {len(y)} pictures"
        )
    given = values(levels)
    if not (torch.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"sigma is {given.tolist()}; expected a finite number above 0")
    if not ((given >= LEAST).all() and (given <= MOST).all()):
        raise ValueError(
            f"sigma is {given.tolist()}; expected a noise level from {LEAST:g} to {MOST:g}, whose "
            "square float64 can hold"
        )
    if not smooth_in_sigma:  # settings are looked up at its value
        why = "by sigma and t, ideal and gaussian of images have one, with a constant bandwidth"
        check_untracked("sigma", levels, why)
        if mapped(levels):
            raise ValueError(
                "sigma is one of many that torch.func.vmap maps over, and settings are looked up "
                "at its value: give a batch of pictures with a noise level each, shape (B,)"
            )
    return pictures, levels.expand(len(y)).contiguous()


def source_share(sigma: Tensor, h: Tensor) -> Tensor:
    """The share of the sources in D with a bandwidth h; the rest is the noisy picture's."""
    return sigma**2 / (sigma**2 + h**2)


def apply_bandwidth(D: Tensor, y: Tensor, sigma: Tensor, h: Tensor) -> Tensor:
    """D of sources with bandwidth h, from D = D_0(y, sqrt(sigma^2 + h^2)) of point sources."""
    a = source_share(sigma, h)[:, None, None, None]
    return torch.where(a == 1, D, a * D + (1 - a) * y)


def gaussian_constant(D: int, variance: Tensor) -> Tensor:
    """The log density of N(0, variance I) in D dimensions at 0."""
    return -0.5 * D * (math.log(2 * math.pi) + torch.log(variance))
