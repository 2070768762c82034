"""What all machines share: an azula denoiser D(y, sigma) made of a corpus alone."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule, VPSchedule
from torch import Tensor

from scoremachine import engines as kernels
from scoremachine.calibration.heldout import automatic_bandwidth, automatic_locality
from scoremachine.core.derivatives import (
    check_untracked,
    mapped,
    regrouped,
    uncompiled,
    values,
)
from scoremachine.core.processes import Process
from scoremachine.core.schedules import (
    LOCALITIES,
    BandwidthSchedule,
    ByLevel,
    LevelSchedule,
    check_bandwidth,
)
from scoremachine.data.corpus import Corpus
from scoremachine.data.moments import Moments, moments
from scoremachine.sources.mixture import Mixture

Label = int | str | Tensor | np.ndarray | Sequence[int | str] | None


@dataclass(frozen=True)
class View:
    """The images as a forward process shows them at a time.

    Attributes:
        process, t: The process x_t = A_t x + sigma_t eps, and the time.
        images: A_t x of every image, float32 (N, C, H, W).
        scale: The largest gain: sigma_t / scale is the noise level at which settings are looked up.
    """

    process: Process
    t: float
    images: np.ndarray
    scale: float


class Machine(Denoiser):
    """A training-free denoiser: D(y, sigma) = E[x | y] under what it takes the corpus to say.

    Images x are in [-1, 1]; y = x + sigma eps, in float, shape (B, C, H, W). D is differentiable
    by y, once: autograd, forward mode and `torch.func` take exact products with the Jacobian. With
    a bandwidth h every source is a Gaussian N(s, h^2 I) instead of a point:

        D = (sigma^2 D_0(y, sqrt(sigma^2 + h^2)) + h^2 y) / (sigma^2 + h^2)

    where D_0 is the machine with h = 0. A machine is an azula `Denoiser`: `machine(x_t, t).mean`
    is E[x | x_t] for x_t = alpha_t x + sigma_t eps under `machine.schedule`.

    Arguments:
        corpus: The images.
        bandwidth: h >= 0 in units of x, a `BandwidthSchedule`, or "auto" (held-out calibration).
        kernel: "auto", "numba", "torch" or "reference"; all give the same answers.
        schedule: azula's noise schedule for `forward`; None: `VPSchedule()`.

    Raises:
        ValueError: For arguments that cannot work, with a sentence that says what would.
    """

    name: str
    equivariant = False  # whether its source is every position
    locality: str | None = None  # the setting that says how far it sees, where it has one
    relative_cost: float = 1.0  # about how much dearer a source is than one of a plain box
    accepts_mixtures = False  # whether its source may be a mixture of Gaussians
    view: View | None = None  # where pictures are compared with other than the images themselves
    smooth_in_sigma = False  # whether D has a derivative by sigma: nothing is looked up at it

    def __init__(
        self,
        corpus: Corpus,
        bandwidth: float | BandwidthSchedule | str = 0.0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(corpus, Corpus):
            raise ValueError(
                f"a machine is made of a Corpus, not of {type(corpus).__name__}: "
                "use Corpus.open(source) or Corpus(images)"
            )
        if isinstance(corpus, Mixture) and not self.accepts_mixtures:
            raise ValueError(
                f"{self.name} needs images, and a mixture is the source of ideal, ls and els "
                "alone: use one of them, or the images that were compressed"
            )
        self.corpus = corpus
        self.bandwidth = check_bandwidth(bandwidth)
        self.kernel_name = kernel
        self.kernel = kernels.choose(kernel)
        if not (schedule is None or callable(schedule)):
            raise ValueError(f"schedule is {schedule!r}; expected an azula Schedule or None")
        self.schedule = VPSchedule() if schedule is None else schedule

    @abstractmethod
    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        """D with h = 0 of valid float64 pictures, the images at `index` being the source.

        `level` is the noise level at which settings are looked up: sigma without the bandwidth.
        """

    @uncompiled
    def denoise(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """D(y, sigma), an estimate of E[x | y].

        Arguments:
            y: Noisy pictures x + sigma eps, floats, shape (B, C, H, W).
            sigma: Their noise level, > 0: a number, or one for each picture, shape (B,).
            label: The class (position or name) whose images alone are the source; or one for
                each picture; None: all images.

        Returns:
            D, with y's shape, dtype and device.

        Raises:
            ValueError: For a wrong shape, dtype or channel count, NaN pixels, sigma <= 0 or NaN,
                or a label with no images.
            NotImplementedError: For a derivative that there is none of: by sigma, of machines
                other than `ideal` and `gaussian` with a constant bandwidth; of a second one.
        """
        pictures, levels = self.check(y, sigma)
        if len(y) == 0:
            return y.clone()
        groups = self.by_label(label, len(pictures))
        parts = [self.denoise_from(pictures[m], levels[m], index) for m, index in groups]
        D = regrouped([m for m, _ in groups], parts)
        return D.to(dtype=y.dtype, device=y.device)

    def denoise_from(self, y: Tensor, sigma: Tensor, index: np.ndarray) -> Tensor:
        """D of valid float64 pictures, the images at `index` being the source."""
        h = self.bandwidths(sigma)
        return apply_bandwidth(self.mean(y, torch.sqrt(sigma**2 + h**2), index, sigma), y, sigma, h)

    @uncompiled
    def denoise_through(
        self, process: Process, x_t: Tensor, t: float, label: Label = None
    ) -> Tensor:
        """E[x | x_t] under another forward process, x_t = A_t x + sigma_t eps.

        Logits compare x_t with A_t s, and what is averaged is s.

        Arguments:
            process: The process.
            x_t: Noisy pictures, floats, shape (B, C, H, W).
            t: The time in [0, 1].
            label: As in `denoise`.

        Returns:
            D, with x_t's shape, dtype and device.

        Raises:
            ValueError: As `denoise`, and for a machine with a bandwidth.
        """
        check_untracked("t", t, "under a forward process D has one by x_t alone")
        pictures, _ = self.check(x_t, 1.0)
        process.check(pictures.shape[2:])
        _, sigma = process(torch.tensor(t, dtype=torch.float64))
        viewed = self.through(process, t)
        assert viewed.view is not None
        sigmas = sigma.double().expand(len(pictures))
        scale, groups = viewed.view.scale, self.by_label(label, len(pictures))
        parts = [viewed.mean(pictures[m], sigmas[m], n, sigmas[m] / scale) for m, n in groups]
        D = regrouped([m for m, _ in groups], parts)
        return D.to(dtype=x_t.dtype, device=x_t.device)

    def check_process(self) -> None:
        """ValueError where the machine runs under no other forward process."""
        if isinstance(self.corpus, Mixture):
            raise ValueError("a mixture knows no other forward process: use the images")
        if self.bandwidth != 0.0:
            raise ValueError(
                f"bandwidth is {self.bandwidth!r}, and a forward process that damps some "
                "frequencies more than others makes no round Gaussian of one: use bandwidth 0"
            )

    def through(self, process: Process, t: float) -> Self:
        """The machine that compares with A_t s; the last one is kept."""
        known = self.__dict__.get("_through")
        if known is not None and known[0] is process and known[1] == t:
            return known[2]
        self.check_process()
        self.prepare()
        gains, _ = process(torch.tensor(t, dtype=torch.float64))
        other = copy.copy(self)
        for cached in ("_known", "_through"):
            other.__dict__.pop(cached, None)
        images = process.seen(self.corpus.images, t)
        other.view = View(process, t, images, float(gains.max()))
        self.__dict__["_through"] = process, t, other
        return other

    @property
    def compared(self) -> np.ndarray:
        """What pictures are compared with: the images, or what a process shows of them."""
        return self.corpus.images if self.view is None else self.view.images

    @property
    def answers(self) -> np.ndarray | None:
        """What the compared images answer with, where that is something else."""
        return None if self.view is None else self.corpus.images

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """Mean and covariance of what pictures are compared with, in units of `View.scale`."""
        found = moments(self.corpus, index, low_rank)
        if self.view is None:
            return found
        view, shape = self.view, self.corpus.shape
        return found.seen(
            lambda x: view.process.apply(x.reshape(-1, *shape), view.t).flatten(1) / view.scale
        )

    def score(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """The score (D - y) / sigma^2 of the noisy density, with y's shape."""
        D = self.denoise(y, sigma, label)
        levels = torch.as_tensor(sigma, dtype=D.dtype, device=D.device)
        return (D - y) / levels.reshape(-1, 1, 1, 1) ** 2

    def log_density(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """log p(y) in nats, float64, shape (B,), where the machine is a density's."""
        raise ValueError(
            f"{self.name} has no density: its sites' posteriors belong to no common one. "
            "Use 'ideal' or 'gaussian'"
        )

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> DiracPosterior:
        """azula's form: E[x | x_t] for x_t = alpha_t x + sigma_t eps.

        Arguments:
            x_t: Noisy pictures, shape (B, C, H, W).
            t: The time in [0, 1], shape () or (B,).
            label: As in `denoise`.
        """
        alpha, sigma = (
            torch.as_tensor(v, dtype=torch.float64, device="cpu")
            for v in self.schedule(torch.as_tensor(t))
        )
        y = x_t / alpha.to(x_t).reshape(-1, 1, 1, 1)
        return DiracPosterior(mean=self.denoise(y, sigma / alpha, label))

    def check(self, y: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """`y` and `sigma` as float64 on the CPU, shapes (B, C, H, W) and (B,); or ValueError."""
        whose = (
            f"the corpus {self.corpus.name!r} has: resize the pictures or open the corpus with "
            "size="
        )
        return checked(y, sigma, self.shape_for(y), whose, self.smooth_in_sigma)

    def shape_for(self, y: Tensor) -> tuple[int, int, int]:
        """(C, H, W) that pictures should have, given those that there are: as the images."""
        return self.corpus.shape

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError unless the machine draws pictures of that shape (C, H, W)."""
        if tuple(shape) != self.corpus.shape:
            raise ValueError(
                f"{self.name} knows where in an image it is, and so draws pictures of the images' "
                f"shape {self.corpus.shape}, not {tuple(shape)}: use els, or open the corpus with "
                "size="
            )

    def by_label(self, label: Label, B: int) -> list[tuple[Tensor, np.ndarray]]:
        """Groups the pictures of a batch by label: (their places, their source's images)."""
        if isinstance(label, Tensor | np.ndarray):
            if label.ndim > 1:
                shape = tuple(label.shape)
                raise ValueError(f"labels have shape {shape}; expected one, or one a picture")
            label = label.tolist()
        if label is None or isinstance(label, int | str):
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

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> None:
        """Does what is done once: choices that "auto" stands for, measurements of the corpus.

        `levels`: the noise levels that will be asked for, as far as they are known.
        """
        self.bandwidth_at(1.0)

    def begin(self, x: Tensor | None) -> None:
        """Hears that a sampler starts from pictures x (B, C, H, W), or (None) that it has ended."""

    def bandwidth_at(self, sigma: float) -> float:
        """The bandwidth h at noise level `sigma`."""
        if self.bandwidth == "auto":
            self.bandwidth = automatic_bandwidth(self.clone_with(self.corpus, bandwidth=0.0))
        if isinstance(self.bandwidth, BandwidthSchedule):
            return self.bandwidth(sigma)
        assert isinstance(self.bandwidth, float)
        return self.bandwidth

    def bandwidths(self, sigma: Tensor) -> Tensor:
        """The bandwidth h at each of some noise levels, float64 (B,)."""
        if isinstance(self.bandwidth, float):  # also where sigma has no one value, as under vmap
            return torch.full(sigma.shape, self.bandwidth, dtype=torch.float64)
        return torch.tensor([self.bandwidth_at(float(s)) for s in sigma], dtype=torch.float64)

    def arguments(self) -> dict[str, Any]:
        """What the machine was made with, apart from its corpus."""
        return {
            "bandwidth": self.bandwidth,
            "kernel": self.kernel_name,
            "schedule": self.schedule,
        }

    def clone_with(self, corpus: Corpus, **changes: Any) -> Machine:
        """The same kind of machine with other images, or other arguments."""
        return type(self)(corpus, **{**self.arguments(), **changes})

    def smaller(self, corpus: Corpus) -> Machine:
        """The same kind of machine of smaller images: how far it sees is chosen anew."""
        return self.clone_with(corpus)

    def candidates(self) -> list[Any]:
        """The values of its locality that calibration tries: none, without a locality."""
        return []

    def supports(self, value: Any) -> bool:
        """Whether there is such a machine with this value of its locality."""
        return False

    def settings(self) -> dict[str, object]:
        """What distinguishes this machine, for the record of a run."""
        return {
            "machine": self.name,
            "corpus": self.corpus.name,
            "corpus_key": self.corpus.key,
            "bandwidth": plain(self.bandwidth),
            "kernel": kernels.name_of(self.kernel),
        }


class LocalMachine(Machine):
    """A machine with a setting that says, per noise level, how far it sees.

    Arguments:
        corpus: The images.
        local: A number, a schedule, the name of a published one, the path of a calibration.json,
            or "auto" (held-out calibration).
        bandwidth, kernel, schedule: See `Machine`.
    """

    locality: str  # the setting's name

    def __init__(
        self,
        corpus: Corpus,
        local: Any,
        bandwidth: float | BandwidthSchedule | str = 0.0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(corpus, bandwidth, kernel, schedule)
        if isinstance(corpus, Mixture) and isinstance(local, str) and local == "auto":
            raise ValueError(
                f"a mixture has no images to hold out, so {self.locality} cannot be 'auto': give a "
                "number or a schedule, as that of the machine of the images"
            )
        if not (isinstance(local, str) and local == "auto"):
            local = LOCALITIES[self.locality].of(local)
            for value in local.values:
                self.check_local(value.item())
        self.local = local

    def check_local(self, value: Any) -> None:
        """Raises ValueError where no machine of this kind can have that value."""

    def supports(self, value: Any) -> bool:
        try:
            self.check_local(value)
        except ValueError:
            return False
        return True

    def choose(self) -> LevelSchedule:
        """What "auto" stands for."""
        return automatic_locality(self.clone_with(self.corpus, bandwidth=0.0))

    def smaller(self, corpus: Corpus) -> Machine:
        return self.clone_with(corpus, **{self.locality: "auto"})

    def local_at(self, sigma: float) -> Any:
        """The setting's value at noise level `sigma`."""
        if isinstance(self.local, str):
            self.local = self.choose()
        return self.local(sigma)

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> None:
        self.local_at(1.0)
        super().prepare(label, levels)

    def bandwidth_at(self, sigma: float) -> float:
        if self.bandwidth == "auto":  # chosen for the locality that the machine has
            self.local_at(sigma)
        return super().bandwidth_at(sigma)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), self.locality: self.local}

    def settings(self) -> dict[str, object]:
        return {**super().settings(), self.locality: plain(self.local)}


def checked(
    y: Tensor,
    sigma: float | Tensor,
    shape: tuple[int, int, int],
    whose: str,
    smooth_in_sigma: bool = False,
) -> tuple[Tensor, Tensor]:
    """`y` and `sigma` as float64 on the CPU, shapes (B, *shape) and (B,).

    Raises:
        ValueError: For anything else; `whose` says what the shape is of, as in "as ...".
        NotImplementedError: For a derivative by sigma of what is not `smooth_in_sigma`.
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
    met = values(levels)
    if not (torch.isfinite(met).all() and (met > 0).all()):
        raise ValueError(f"sigma is {met.tolist()}; expected a finite number above 0")
    if not smooth_in_sigma:  # settings are looked up at its numbers
        why = "by sigma and t, ideal and gaussian of images have one, with a constant bandwidth"
        check_untracked("sigma", levels, why)
        if mapped(levels):
            raise ValueError(
                "sigma is one of many that torch.func.vmap maps over, and settings are looked up "
                "at its value: give a batch of pictures with a noise level each, shape (B,)"
            )
    return pictures, levels.expand(len(y)).contiguous()


def apply_bandwidth(D: Tensor, y: Tensor, sigma: Tensor, h: Tensor) -> Tensor:
    """D of sources that are Gaussians of bandwidth h, from D_0(y, sqrt(sigma^2 + h^2))."""
    a = (sigma**2 / (sigma**2 + h**2))[:, None, None, None]
    return torch.where(a == 1, D, a * D + (1 - a) * y)


def plain(value: object) -> object:
    """A setting as what JSON can hold."""
    return value.plain() if isinstance(value, ByLevel) else value


def gaussian_constant(D: int, variance: Tensor) -> Tensor:
    """log of the density of N(0, variance I) in D dimensions at 0."""
    return -0.5 * D * (math.log(2 * math.pi) + torch.log(variance))
