"""Figures: grids of pictures, animations of the reverse process, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from scoremachine.data.pixels import to_uint8
from scoremachine.runtime.files import written

if TYPE_CHECKING:
    from scoremachine.calibration.heldout import Calibration
    from scoremachine.calibration.stacking import Stacking
    from scoremachine.core.schedules import LevelSchedule
    from scoremachine.lab.ablation import Trial
    from scoremachine.lab.comparison.bias import Bias
    from scoremachine.lab.comparison.cells import Row
    from scoremachine.lab.comparison.parts import Comparison
    from scoremachine.lab.denoising_error import Errors
    from scoremachine.lab.sensitivity import Sensitivity
    from scoremachine.lab.sizes import Sizes

GAP = 4  # pixels between pictures
LABEL = 150  # pixels for the names of machines
WIDTH = 640  # pixels: small pictures are enlarged until the grid is about this wide


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Pictures uint8 (n, C, H, W) side by side, small ones enlarged by whole factors."""
    n, C, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, round((WIDTH / columns - GAP) / W))
    enlarged = images.repeat(factor, axis=2).repeat(factor, axis=3)
    high, wide = H * factor + GAP, W * factor + GAP
    canvas = np.full((rows * high + GAP, columns * wide + GAP, C), 255, dtype=np.uint8)
    for k, image in enumerate(enlarged):
        top, left = GAP + k // columns * high, GAP + k % columns * wide
        canvas[top : top + H * factor, left : left + W * factor] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas[..., 0] if C == 1 else canvas)


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG, which gets its final name only when it is complete."""
    with written(path) as temporary:
        image.save(temporary, optimize=True)


def save_film(frames: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Writes a GIF of frames uint8 (T, n, C, H, W), each drawn as a grid; the last is held."""
    save_gif([grid(frame, columns) for frame in frames], path, 150, 2000)


def save_gif(frames: Sequence[Image.Image], path: Path, each: int, last: int) -> None:
    """Writes a GIF whose frames are shown for `each` milliseconds, and the last one for `last`."""
    with written(path) as temporary:
        frames[0].save(
            temporary,
            save_all=True,
            append_images=frames[1:],
            duration=[each] * (len(frames) - 1) + [last],
            loop=0,
        )


def save_calibration(
    calibration: Calibration,
    path: Path,
    reference: LevelSchedule | None = None,
    target: str = "the clean picture",
) -> None:
    """Draws error against size and against bandwidth, a curve per noise level, and the choices.

    `target` is what the errors are to; `reference` is another choice.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    c = calibration
    panels = 3 if c.values else 1
    setting = (c.setting or "").replace("_", " ")
    figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    colours = colormaps["viridis"](np.linspace(0, 0.95, len(c.sigmas)))
    if c.values:
        left, middle = axes[:2]
        for row, size, sigma, colour in zip(
            c.value_errors, c.chosen, c.sigmas, colours, strict=True
        ):
            left.plot(c.values, row, color=colour, lw=1.2, label=f"{sigma:.3g}")
            left.plot(size, min(row), "o", color=colour, ms=4)
        left.set(
            xlabel=setting,
            ylabel=f"mean squared error of D to {target}",
            yscale="log",
            title=f"{c.machine}: error by {setting}",
        )
        left.legend(title="sigma", fontsize=6, title_fontsize=7, ncols=2)
        middle.step(c.sigmas, c.chosen, where="mid", marker="o", ms=4, label=f"nearest to {target}")
        if reference is not None:
            middle.step(
                c.sigmas,
                [reference(s) for s in c.sigmas],
                where="mid",
                marker="x",
                ms=4,
                ls="--",
                label=reference.name,
            )
        middle.set(
            xlabel="noise level sigma", ylabel=f"chosen {setting}", xscale="log", title="Choice"
        )
        middle.legend()
    last = axes[-1]
    for row, h, colour in zip(c.bandwidth_errors, c.chosen_bandwidths, colours, strict=True):
        last.plot(c.bandwidths, np.array(row) / row[0], color=colour, lw=1.2)
        last.plot(h, min(row) / row[0], "o", color=colour, ms=4)
    last.set(xlabel="bandwidth h", ylabel="error relative to h = 0", title="Error by bandwidth")
    if max(max(row) / row[0] for row in c.bandwidth_errors) > 3:
        last.set_ylim(0, 3)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save_stacking(s: Stacking, path: Path, target: str = "the clean picture") -> None:
    """Draws a composite's weights by noise level, and each machine's error over the composite's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    w, mixed = np.array(s.weights), np.mean(s.errors, 1)
    for m, label in enumerate(s.machines):
        (line,) = left.plot(s.sigmas, w[:, m], marker="o", ms=4, label=label)
        alone = np.array([np.mean(e[m]) for e in s.member_errors])
        right.plot(s.sigmas, alone / mixed, marker="o", ms=4, color=line.get_color(), label=label)
    left.plot(s.sigmas, 1 - w.sum(1), color="gray", ls="--", label="y, the noisy picture")
    left.axhline(0, color="black", lw=0.6)
    left.set(xlabel="noise level sigma", ylabel="weight", xscale="log", title="Weights")
    right.axhline(1, color="black", lw=1.2, label="composite")
    right.set(
        xlabel="noise level sigma", xscale="log", yscale="log", title="Error",
        ylabel=f"mean squared error to {target}, composite = 1",
    )  # fmt: skip
    right.set_ylim(0.9, 4)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save_ablation(trials: Sequence[Trial], path: Path) -> None:
    """Draws error against patch size: a row for every set of images, a column per noise level."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys((t.corpus, t.shape) for t in trials))
    levels = list(dict.fromkeys(t.sigma for t in trials))
    names = list(dict.fromkeys(t.machine for t in trials))
    figure = Figure(figsize=(2.4 * len(levels), 1.9 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), len(levels), squeeze=False)
    for row, (corpus, shape) in zip(axes, sets, strict=True):
        for axis, sigma in zip(row, levels, strict=True):
            here = [t for t in trials if (t.corpus, t.shape, t.sigma) == (corpus, shape, sigma)]
            for name in names:
                own = [t for t in here if t.machine == name]
                sizes, errors = [t.patch_size for t in own], [t.error for t in own]
                axis.plot(sizes, errors, marker="o", ms=2, lw=1, label=name)
            axis.set(xscale="log", yscale="log")
            tried = sorted({t.patch_size for t in here})
            axis.set_xticks(tried[::2], tried[::2])
            axis.set_xticks([], minor=True)
            axis.tick_params(labelsize=5, which="both")
        row[0].set_ylabel(f"{corpus}\n{shape[1]} x {shape[2]}", fontsize=6)
    for axis, sigma in zip(axes[0], levels, strict=True):
        axis.set_title(f"sigma {sigma:g}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("patch size", fontsize=6)
    axes[0, 0].legend(fontsize=5)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save_sizes(s: Sizes, path: Path) -> None:
    """Draws error relative to the exact machine against bytes: a curve per noise level."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 0.95, len(s.sigmas)))
    for k, (sigma, colour) in enumerate(zip(s.sigmas, colours, strict=True)):
        axis.plot(s.nbytes, s.ratios[:, k], color=colour, marker="o", ms=3, label=f"{sigma:.3g}")
    axis.axhspan(0, 1.05, color="black", alpha=0.06)
    axis.set(
        xlabel="bytes", xscale="log", title=f"{s.machine}: how small can it be?",
        ylabel="held-out error, exact = 1", ylim=(0.4, 2.6),
    )  # fmt: skip
    axis.legend(
        title="sigma", fontsize=6, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    with written(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save_zoo(rows: list[tuple[str, np.ndarray, np.ndarray]], path: Path) -> None:
    """Draws rows of (label, samples, nearest training images), uint8 (n, C, H, W), one below other.

    A column is a seed; below each sample, smaller, is the training image nearest to it. 256 colours
    keep the file small.
    """
    from PIL import ImageDraw, ImageFont

    n, _, H, W = rows[0][1].shape
    factor = max(1, round(64 / W))
    small = max(1, factor // 2)
    wide, high = W * factor + GAP, (factor + small) * H + 4 * GAP
    canvas = Image.new("RGB", (LABEL + n * wide + GAP, len(rows) * high + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for r, (label, samples, nearest) in enumerate(rows):
        top = GAP + r * high
        draw.multiline_text((GAP, top + GAP), label, fill="black", font=font, spacing=2)
        for k, sample in enumerate(samples):
            canvas.paste(_enlarged(sample, factor), (LABEL + k * wide, top))
        for k, image in enumerate(nearest):
            left = LABEL + k * wide + (factor - small) * W // 2
            canvas.paste(_enlarged(image, small), (left, top + factor * H + GAP))
    save_png(canvas.quantize(256, dither=Image.Dither.NONE), path)


def _enlarged(image: np.ndarray, factor: int) -> Image.Image:
    """A picture uint8 (C, H, W), enlarged."""
    pixels = image.repeat(factor, axis=1).repeat(factor, axis=2).transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save_errors(all_errors: list[Errors], path: Path) -> None:
    """Draws held-out denoising error against noise level, and relative to the best of all."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(e.machine for e in all_errors))
    colours = dict(zip(names, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    best = np.min([e.mean for e in all_errors], axis=0)
    for e in all_errors:
        style = ":" if e.choice.startswith("published") else "-" if e.with_bandwidth else "--"
        for axes, scale in ((left, 1.0), (right, best)):
            low, high = (bound / scale for bound in e.interval())
            line = {"color": colours[e.machine], "lw": 1.3, "ls": style}
            axes.plot(e.sigmas, e.mean / scale, label=e.label, **line)
            axes.fill_between(e.sigmas, low, high, color=line["color"], alpha=0.08, lw=0)
    left.set(yscale="log", ylabel="held-out mean squared error of D")
    right.set(ylim=(0.9, 4), ylabel="error / that of the best")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="noise level sigma")
        axes.grid(alpha=0.2)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=100)


def save_losses(steps: list[int], losses: list[float], path: Path) -> None:
    """Draws the loss curve of a training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, lw=1)
    axes.set(xlabel="step", ylabel="loss")
    if losses and min(losses) > 0:
        axes.set(yscale="log")
    axes.grid(alpha=0.2, which="both")
    with written(path) as temporary:
        figure.savefig(temporary, dpi=100)


def save_comparison(found: Comparison, path: Path) -> None:
    """Draws how well machines agree with a network: medians and quartiles by noise level."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    colours = dict(zip(found.labels, colormaps["tab10"].colors * 3, strict=False))  # type: ignore[attr-defined]
    whats = (("R2", "R² of D with the network's"), ("mse", "mean squared error to the network"))
    for across, (measure, what) in zip(panels, whats, strict=True):
        for axes, part in zip(across, ("forward", "reverse"), strict=True):
            for p in found.of(part):
                low, middle, high = np.nanquantile(p.measures[measure], [0.25, 0.5, 0.75], axis=1)
                axes.plot(p.sigmas, middle, label=p.label, color=colours[p.label], lw=1.4)
                axes.fill_between(p.sigmas, low, high, color=colours[p.label], alpha=0.12, lw=0)
            axes.set(xscale="log", xlabel="noise level sigma", ylabel=what)
            axes.set_title({"forward": "held-out images with noise",
                            "reverse": "the network's trajectory"}[part], fontsize=10)  # fmt: skip
            axes.grid(alpha=0.2)
            if measure == "R2":
                axes.set_ylim(min(0.0, max(-0.5, axes.get_ylim()[0])), 1.02)
            else:
                axes.set_yscale("log")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=90)


def save_trajectory(found: Comparison, path: Path) -> None:
    """Draws D along the network's trajectory: a column is a noise level, the first row y.

    Every second level at most, so that pictures stay large enough to look at.
    """
    sigmas = found.of("reverse")[0].sigmas
    steps = np.unique(np.linspace(0, len(sigmas) - 1, min(len(sigmas), 10)).round().astype(int))
    rows = []
    for label, D in found.path.items():
        x, name = D[steps], label
        if label == "y":
            x = x / np.sqrt(1 + np.asarray(sigmas)[steps, None, None, None] ** 2)
            name = "what is denoised"
        rows.append((name, to_uint8(x)))
    save_rows(rows, [f"{sigmas[k]:.3g}" for k in steps], path)


def save_rows(rows: list[tuple[str, np.ndarray]], heads: list[str], path: Path) -> None:
    """Draws rows of (label, pictures uint8 (n, C, H, W)) below column heads."""
    from PIL import ImageDraw, ImageFont

    n, _, H, W = rows[0][1].shape
    factor = max(1, round(64 / W))
    wide, high = W * factor + GAP, H * factor + GAP
    top = 5 * GAP
    canvas = Image.new("RGB", (LABEL + n * wide + GAP, top + len(rows) * high + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for k, head in enumerate(heads):
        draw.text((LABEL + k * wide, GAP), head, fill="black", font=font)
    for r, (label, pictures) in enumerate(rows):
        draw.multiline_text((GAP, top + r * high + GAP), label, fill="black", font=font)
        for k, picture in enumerate(pictures):
            canvas.paste(_enlarged(picture, factor), (LABEL + k * wide, top + r * high))
    save_png(canvas.quantize(256, dither=Image.Dither.NONE), path)


def save_sensitivities(found: list[Sensitivity], path: Path) -> None:
    """Draws sensitivity maps: a row per denoiser, a column per noise level, each scaled to 1.

    A square marks the width.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    K = len(found[0].sigmas)
    figure = Figure(figsize=(1.5 * K + 0.6, 1.75 * len(found) + 0.3), layout="constrained")
    panels = figure.subplots(len(found), K, squeeze=False)
    for r, s in enumerate(found):
        for k, axes in enumerate(panels[r]):
            root = np.sqrt(s.maps[k])  # a gradient, not its square
            axes.imshow(root / max(root.max(), 1e-30), cmap="magma", interpolation="nearest")
            width, (high, wide) = s.width(k), root.shape
            corner = (wide - width) / 2 - 0.5, (high - width) / 2 - 0.5
            axes.add_patch(Rectangle(corner, width, width, fill=False, ec="white", lw=0.8))
            head = f"sigma {s.sigmas[k]:.2g}\n" if r == 0 else ""
            axes.set_title(f"{head}width {width}", fontsize=8)
            axes.set(xticks=[], yticks=[])
        panels[r][0].set_ylabel(s.label, fontsize=9)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=90)


def save_bias(found: Bias, path: Path) -> None:
    """Draws the size and similarity of differences to the ideal denoiser, by noise level."""
    from matplotlib.figure import Figure

    K, n = len(found.sigmas), len(found.labels)
    side = 1.3 + 0.42 * n
    figure = Figure(figsize=(4.5 + side * min(K, 3), side * math.ceil(K / 3) + 0.6),
                    layout="constrained")  # fmt: skip
    widths = 4.5, side * min(K, 3)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)[0]
    axes = left.subplots()
    for k, label in enumerate(found.labels):
        style = "-" if k < found.networks else "--"
        axes.plot(found.sigmas, found.sizes[k].mean(1), style, label=label, lw=1.3)
    axes.set(xscale="log", xlabel="noise level sigma", ylabel="root mean square of D - D_ideal")
    axes.set_xticks(found.sigmas, [f"{sigma:.3g}" for sigma in found.sigmas])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    axes.grid(alpha=0.2)
    panels = right.subplots(math.ceil(K / 3), min(K, 3), squeeze=False).ravel()
    for k, axes in enumerate(panels):
        if k >= K:
            axes.set_visible(False)
            continue
        axes.imshow(found.cosines[k], vmin=-1, vmax=1, cmap="RdBu_r")
        for a in range(n):
            for b in range(n):
                value = found.cosines[k, a, b]
                colour = "white" if abs(value) > 0.7 else "black"
                axes.text(b, a, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_title(f"sigma {found.sigmas[k]:.3g}", fontsize=8)
        axes.set_xticks(range(n), found.labels, rotation=90, fontsize=6)
        axes.set_yticks(range(n), found.labels if k % 3 == 0 else [""] * n, fontsize=6)
    right.suptitle("cosine between differences", fontsize=9)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=90)


def save_study(rows: Sequence[Row], path: Path) -> None:
    """Draws r^2 of samples with its interval: by images, by steps, by kind of network."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    machines = list(dict.fromkeys(row.machine for row in rows))
    colours = dict(zip(machines, colormaps["tab10"].colors * 3, strict=False))  # type: ignore[attr-defined]
    for axes, group in zip(panels, ("images", "steps", "network"), strict=True):
        for m, machine in enumerate(machines):
            some = [r for r in rows if r.cell.group == group and r.machine == machine]
            if not some:
                continue
            middle = np.array([r.r2.median for r in some])
            ends = np.abs(np.array([r.r2.interval for r in some]).T - middle)
            shown: dict[str, Any] = {"color": colours[machine], "label": machine, "capsize": 2}
            if group == "network":
                places = np.arange(len(some)) + 0.12 * (m - (len(machines) - 1) / 2)
                axes.errorbar(places, middle, ends, fmt="o", ms=4, **shown)
                names = [r.cell.label for r in some]
                axes.set_xticks(range(len(some)), names, rotation=35, ha="right", fontsize=7)
            else:
                places = np.array([getattr(r.cell, group) for r in some])
                axes.errorbar(places, middle, ends, marker="o", ms=4, lw=1.2, **shown)
                axes.set_xscale("log")
                axes.set_xticks(places, [f"{place:,}" for place in places], fontsize=7)
                axes.minorticks_off()
        what = {"images": "training images", "steps": "steps of training", "network": ""}
        axes.set(ylim=(0, 1.02), xlabel=what[group], ylabel="r² of samples with the machine's")
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right")
    with written(path) as temporary:
        figure.savefig(temporary, dpi=90)
