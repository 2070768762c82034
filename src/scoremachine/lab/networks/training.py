"""Reproducible training of small reference networks, which may be interrupted and resumed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.engines.pytorch import where
from scoremachine.lab.networks.network import Network
from scoremachine.runtime.files import optional, write_text, written
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.records import differing, other_versions, versions
from scoremachine.runtime.validation import check_integer, check_name, check_seed

CHECKPOINT = "training.safetensors"
EVERY = 60.0  # seconds between checkpoints
LOSSES = 50  # steps that are averaged for a point of the loss curve
WARM_UP = 200  # steps
AVERAGE = 6.94  # power of the average of weights: a width of 10% of the steps (2312.02696, eq. 125)
HELD_OUT = 256  # images that are held out, at most a tenth
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass
class Training:
    """The settings of a training; all but `steps` and `seconds` affect the result of every step.

    Attributes:
        steps: Training stops after this number of steps,
        seconds: or after this many seconds of training, whichever comes first.
        batch: Pictures per step.
        rate: Learning rate of Adam, constant after a warm-up; weights are averaged instead of a
            decay.
        seed: Of weights, pictures, times and noise.
        held_out: The number of images held out for comparisons, at most a tenth; or their
            positions; None: 256, at most a tenth.
        precision: Of products: "float32", "bfloat16", or "auto": bfloat16 if it is fast.
        device: "cpu", "cuda", or "auto".
    """

    steps: int | None = None
    seconds: float | None = 600.0
    batch: int = 64
    rate: float = 1e-3
    seed: int = 0
    held_out: int | Sequence[int] | None = None
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_integer("batch", self.batch)
        if isinstance(self.held_out, int | np.integer) and self.held_out < 0:
            raise ValueError(f"held_out is {self.held_out}; expected how many images, 0 or more")
        check_name("precision", self.precision, PRECISIONS)
        check_name("device", self.device, ("auto", "cpu", "cuda"))
        if self.steps is not None:
            check_integer("steps", self.steps)
        if self.steps is None and self.seconds is None:
            raise ValueError("training without steps or seconds never ends; give one of them")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds are {self.seconds!r}; expected a number above 0")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate!r}; expected a learning rate in (0, 1)")
        check_seed(self.seed)
        if self.device == "auto":
            self.device = where().type
        elif self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', and PyTorch finds no such device; use 'cpu'")
        if self.precision == "auto":
            self.precision = "bfloat16" if _bfloat16_is_fast(self.device) else "float32"

    def left_out(self, N: int) -> np.ndarray:
        """Positions of the images, of N, that are not trained on."""
        if self.held_out is not None and not isinstance(self.held_out, int | np.integer):
            positions = np.unique(np.asarray(self.held_out, dtype=np.int64))
            if len(positions) and not 0 <= positions[0] <= positions[-1] < N:
                raise ValueError(f"held_out names images outside 0 to {N - 1}")
            return positions
        count = min(HELD_OUT if self.held_out is None else self.held_out, N // 10)
        return np.sort(np.random.default_rng(self.seed).permutation(N)[:count])

    def settings(self) -> dict[str, Any]:
        """The settings that affect the result of a step."""
        return {
            "batch": self.batch,
            "rate": self.rate,
            "seed": self.seed,
            "precision": self.precision,
            "device": self.device,
        }


def _bfloat16_is_fast(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    has = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(has and has())


@dataclass
class State:
    """The state of a training."""

    network: Network
    average: Network
    optimizer: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of LOSSES steps each
    recent: list[float] = field(default_factory=list)  # of the steps after these
    begun_with: list[dict[str, str]] = field(default_factory=list)  # earlier, other versions

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        found = {f"network.{k}": v for k, v in self.network.backbone.state_dict().items()}
        found |= {f"average.{k}": v for k, v in self.average.backbone.state_dict().items()}
        for k, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{k}.{name}": v for name, v in moments.items()}
        return {k: v.detach().cpu().contiguous() for k, v in found.items()}

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Writes a checkpoint."""
        note = {"asked": asked, "versions": versions(), "begun_with": self.begun_with,
                "step": self.step, "seconds": self.seconds, "losses": self.losses,
                "recent": self.recent}  # fmt: skip
        with written(path) as temporary:
            save_file(self.tensors(), temporary, metadata={"training": json.dumps(note)})

    def load(self, path: Path, asked: dict[str, Any]) -> None:
        """Resumes from a checkpoint.

        Raises:
            ValueError: If it is of another training, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads(file.metadata()["training"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({str(error).splitlines()[0]}): remove it and train again"
            ) from None
        if others := differing(asked, note["asked"]):
            raise ValueError(
                f"{path.parent} holds a training with another {', '.join(others)}; resume needs "
                "the same settings: repeat the command, or choose another --out"
            )
        self.begun_with = note.get("begun_with", [])
        if others_ran := other_versions(note.get("versions")):
            say(
                f"resuming a training that was begun with {others_ran}: its result is not bit for "
                "bit that of an uninterrupted one"
            )
            self.begun_with = [*self.begun_with, note.get("versions", {})]

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.network.backbone.load_state_dict(part("network."))
        self.average.backbone.load_state_dict(part("average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("adam.").items():
            k, which = name.split(".")
            moments.setdefault(int(k), {})[which] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.step, self.seconds, self.losses = note["step"], note["seconds"], note["losses"]
        self.recent = note.get("recent", [])


def train(
    corpus: Corpus,
    architecture: str = "resnet",
    out: str | Path | None = None,
    training: Training | None = None,
    resume: bool = False,
    **settings: Any,
) -> Network:
    """Trains a small reference network on a corpus.

    It minimises the mean squared error of D, weighted as in EDM (Karras et al. 2206.00364), at
    times spread evenly over azula's CosineSchedule, and returns the network with averaged weights
    (Karras et al. 2312.02696). All random numbers of step k come from (seed, k), so on a CPU a
    training that was interrupted and resumed gives bit for bit the result of an uninterrupted one.

    Arguments:
        corpus: The images; some are held out, see `Training`.
        architecture: "resnet", "unet", "unet-attention", "dit", "mlp", or "vae", which is no
            denoiser.
        out: A folder for network.safetensors, network.json (its card), loss.csv and a checkpoint;
            None: nothing is written.
        training: Its settings; None: 600 seconds.
        resume: Whether to resume from the folder's checkpoint.
        settings: Of the network, such as width and depth.

    Raises:
        ValueError: For an unknown name or setting, a corpus that is held out entirely, or a
            checkpoint of another training, or of more steps.
    """
    how = training or Training()
    N = len(corpus)
    unseen = how.left_out(N)
    seen = np.setdiff1d(np.arange(N), unseen)
    if not len(seen):
        raise ValueError(f"all {N} images are held out; leave some to train on")
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        network = Network.made(architecture, corpus.shape, **settings)
    network = network.to(how.device)
    average = deepcopy(network).requires_grad_(False)
    # the learning rate is set at every step
    state = State(network, average, torch.optim.Adam(network.parameters(), lr=how.rate))
    asked = {"architecture": architecture, "settings": network.card["settings"],
             "corpus": corpus.digest, "images": N, "held_out": unseen.tolist(),
             **how.settings()}  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None and resume and (folder / CHECKPOINT).exists():
        state.load(folder / CHECKPOINT, asked)
        if how.steps is not None and state.step > how.steps:
            raise ValueError(
                f"{folder} holds a training of {state.step:,} steps; ask for as many or more, or "
                "choose another --out"
            )
    kept = time.monotonic()

    def keep() -> None:
        if folder is not None:
            state.save(folder / CHECKPOINT, asked)

    try:
        for _ in _steps(state, how, corpus, seen):
            if time.monotonic() - kept > EVERY:
                _check(state, how)
                with optional(Path(out or ".") / CHECKPOINT):  # training continues without one
                    keep()
                kept = time.monotonic()
    except KeyboardInterrupt:
        keep()
        raise
    _check(state, how)
    keep()
    result = state.average.eval()
    result.card["training"] = {
        **how.settings(), "corpus": corpus.name, "corpus_digest": corpus.digest,
        "images": len(seen), "held_out": unseen.tolist(), "steps": state.step,
        "seconds": round(state.seconds, 1),
        "loss": state.losses[-1] if state.losses else None,
        "parameters": result.parameters_count, "versions": versions(),
    }  # fmt: skip
    if state.begun_with:
        result.card["training"]["begun_with"] = state.begun_with
    if folder is not None:
        result.save(folder)
        _write_losses(state.losses, how.batch, folder)
    return result


def _steps(state: State, how: Training, corpus: Corpus, seen: np.ndarray) -> Iterator[None]:
    """Trains step by step until it is time to stop."""
    by_time = how.steps is None
    total = how.seconds if by_time else how.steps
    with bar("Training", total=total) as progress:
        progress.advance(state.seconds if by_time else state.step)
        while not (
            (how.steps is not None and state.step >= how.steps)
            or (how.seconds is not None and state.seconds >= how.seconds)
        ):
            start = time.perf_counter()
            with _whole():
                state.recent.append(float(_step(state, how, corpus, seen)))
                state.step += 1
                if state.step % LOSSES == 0:
                    state.losses.append(float(np.mean(state.recent)))
                    state.recent.clear()
                    _check(state, how)
                took = time.perf_counter() - start
                state.seconds += took
            progress.advance(took if by_time else 1)
            yield


def _check(state: State, how: Training) -> None:
    latest = [*state.losses[-1:], *state.recent]
    if not all(map(math.isfinite, latest)):
        raise ValueError(
            f"the loss is {latest[-1]} at step {state.step}: train again with a rate lower "
            f"than {how.rate}"
        )


@contextmanager
def _whole() -> Iterator[None]:
    """Delays Ctrl-C until the block is finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *frame: interrupts.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _step(state: State, how: Training, corpus: Corpus, seen: np.ndarray) -> Tensor:
    """One step; all its random numbers come from (seed, step)."""
    words = np.random.SeedSequence([how.seed, state.step]).generate_state(2, np.uint64)
    picks = seen[np.random.default_rng(words[0]).integers(0, len(seen), how.batch)]
    x = torch.from_numpy(np.array(corpus.images[picks])).to(how.device).float() / 127.5 - 1
    x = x.to(memory_format=torch.channels_last)
    low = torch.autocast(how.device, torch.bfloat16, enabled=how.precision == "bfloat16")
    with torch.random.fork_rng(), low:
        torch.manual_seed(int(words[1] >> 1))
        # stratified times: one random time in each of `batch` equal intervals
        t = (torch.arange(how.batch) + torch.rand(how.batch)) / how.batch
        loss = state.network.denoiser.loss(x, t.to(how.device))
    for group in state.optimizer.param_groups:
        group["lr"] = how.rate * min(1, (state.step + 1) / WARM_UP)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    share = 1 - (1 - 1 / (state.step + 1)) ** (AVERAGE + 1)
    with torch.no_grad():
        means, latest = (list(each.parameters()) for each in (state.average, state.network))
        torch._foreach_lerp_(means, latest, share)
    return loss.detach()


def _write_losses(losses: list[float], batch: int, folder: Path) -> None:
    steps = [(k + 1) * LOSSES for k in range(len(losses))]
    lines = [f"{k},{k * batch},{v:.6g}" for k, v in zip(steps, losses, strict=True)]
    write_text(folder / "loss.csv", "\n".join(["step,images,loss", *lines]) + "\n")


def losses_of(folder: str | Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a training, from the loss.csv that it wrote to a folder."""
    lines = (Path(folder) / "loss.csv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split(",") for line in lines]
    return [int(row[0]) for row in rows], [float(row[2]) for row in rows]
