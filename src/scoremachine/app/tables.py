"""Tables: on the terminal, as CSV, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scoremachine.lab.denoising_error import Errors, ties

if TYPE_CHECKING:
    from rich.table import Table

    from scoremachine.calibration.heldout import Calibration, Exchange
    from scoremachine.calibration.stacking import Stacking
    from scoremachine.core.schedules import LevelSchedule
    from scoremachine.lab.ablation import Trial
    from scoremachine.lab.sensitivity import Sensitivity
    from scoremachine.lab.sizes import Sizes

TRUTH = "the clean picture"


def print_calibration(
    c: Calibration, reference: LevelSchedule | None = None, target: str = TRUTH
) -> None:
    """Prints a row per noise level: the choice, and its error to `target` on test images."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{c.machine}: {c.source:,} images, {c.held_out} held out to choose, "
        f"{len(c.errors[0])} others to report; mean squared error to {target}"
    )
    table.add_column("sigma", justify="right")
    if c.setting is not None and c.chosen:
        table.add_column(c.setting.replace("_", " "), justify="right")
    if reference is not None:
        table.add_column(reference.name, justify="right")
    table.add_column("bandwidth", justify="right")
    table.add_column("error, h = 0", justify="right")
    table.add_column("error", justify="right")
    for k, sigma in enumerate(c.sigmas):
        row = [f"{sigma:.4g}"]
        if c.chosen:
            row.append(f"{c.chosen[k]:g}")
        if reference is not None:
            row.append(str(reference(sigma)))
        row.append(f"{c.chosen_bandwidths[k]:g}")
        row += [_mean_with_error(c.plain_errors[k]), _mean_with_error(c.errors[k])]
        table.add_row(*row)
    Console().print(table)


def print_stacking(s: Stacking, target: str = TRUTH) -> None:
    """Prints a row per noise level: the weights, and errors of composite and best machine."""
    from rich.table import Table

    table = Table(
        title=f"composite: {s.source:,} images, {s.held_out} held out to weigh, "
        f"{len(s.errors[0])} others to report; mean squared error to {target}"
    )
    heads = ["sigma", *s.machines, "y", "error", "of the best machine", "times that"]
    for head in heads:
        table.add_column(head, justify="right")
    for k, sigma in enumerate(s.sigmas):
        w, means = s.weights[k], [float(np.mean(e)) for e in s.member_errors[k]]
        best = int(np.argmin(means))
        table.add_row(
            f"{sigma:.4g}",
            *(f"{each:.2f}" for each in [*w, 1 - sum(w)]),
            _mean_with_error(s.errors[k]),
            f"{_mean_with_error(s.member_errors[k][best])} {s.machines[best]}",
            f"{float(np.mean(s.errors[k])) / means[best]:.3f}",
        )
    show(table, 60 + 14 * len(heads))


def show(table: Table, width: int) -> None:
    """Prints a table; without a terminal, as wide as it needs to be."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=width)).print(table)


def print_exchange(e: Exchange) -> None:
    """Prints the cost of calibrating to the truth instead of to a network, and vice versa."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="chosen by the clean picture, or by the network: what each costs the other")
    for column in (
        "sigma", "by truth", "by network", "error to network, by truth / by network",
        "error to truth, by network / by truth",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    rows = zip(e.sigmas, e.by_truth, e.by_network, e.to_network, e.to_truth, strict=True)
    for sigma, truth, network, to_network, to_truth in rows:
        ratios = f"{to_network:.2f}", f"{to_truth:.2f}"
        table.add_row(f"{sigma:.4g}", f"{truth:g}", f"{network:g}", *ratios)
    Console().print(table)


def _mean_with_error(values: list[float]) -> str:
    """The mean and, for more than one value, its standard error."""
    if len(values) == 1:
        return f"{values[0]:.5f}"
    return f"{np.mean(values):.5f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.5f}"


def ablation_markdown(trials: Sequence[Trial]) -> str:
    """A table for every set of images: the best patch size, its error and effective sources."""
    lines = []
    for corpus, shape in dict.fromkeys((t.corpus, t.shape) for t in trials):
        own = [t for t in trials if (t.corpus, t.shape) == (corpus, shape)]
        names = list(dict.fromkeys(t.machine for t in own))
        lines += [f"## {corpus}, {shape[1]} x {shape[2]}, {own[0].images:,} images", ""]
        rows = []
        for sigma in dict.fromkeys(t.sigma for t in own):
            here = [[t for t in own if (t.machine, t.sigma) == (n, sigma)] for n in names]
            best = [min(tried, key=lambda t: t.error) for tried in here]
            least = min(t.error for t in best)
            cells = [f"{t.error:.4f} ({t.patch_size}; {t.effective:.3g})" for t in best]
            rows.append(
                [f"{sigma:g}"]
                + [
                    f"**{cell}**" if t.error == least else cell
                    for t, cell in zip(best, cells, strict=True)
                ]
            )
        lines += [*markdown(["sigma", *(f"`{name}`" for name in names)], rows), ""]
    return "\n".join(lines)


def sizes_markdown(s: Sizes) -> str:
    """Error relative to the exact machine by size and noise level; the smallest good size."""
    header = ["size", "bytes", "clusters", "rank", *(f"{sigma:.3g}" for sigma in s.sigmas)]
    rows = [
        [size, f"{s.nbytes[k]:,}", f"{s.clusters[k]:,}", f"{s.ranks[k]}"]
        + [
            f"**{r:.2f}**" if good else f"{r:.2f}"
            for r, good in zip(s.ratios[k], s.good[k], strict=True)
        ]
        for k, size in enumerate(s.sizes)
    ]
    least = [s.sizes[k] for k in s.smallest()]
    return "\n".join(markdown(header, [*rows, ["smallest", "", "", "", *least]])) + "\n"


def sensitivities_csv(found: list[Sensitivity], sizes: dict[str, list[Any]]) -> str:
    """A line per denoiser and noise level: the widths of its map, and its own patch size."""
    lines = ["label,sigma,width_half,width,patch_size"]
    for s in found:
        for k, sigma in enumerate(s.sigmas):
            own = sizes[s.label][k] if s.label in sizes else ""
            lines.append(f"{s.label},{sigma:.6g},{s.width(k, 0.5)},{s.width(k)},{own}")
    return "\n".join(lines) + "\n"


def print_sensitivities(found: list[Sensitivity], sizes: dict[str, list[Any]]) -> None:
    """Prints a row per denoiser: the width of its map at each noise level, and its own size."""
    from rich.table import Table

    table = Table(
        title="what D at a pixel depends on: the side of the square that holds 90% of the squared "
        "gradient",
        caption="in brackets: the machine's own patch size",
    )
    table.add_column("")
    for sigma in found[0].sigmas:
        table.add_column(f"{sigma:.3g}", justify="right")
    for s in found:
        own = [f" ({v:g})" for v in sizes[s.label]] if s.label in sizes else [""] * len(s.sigmas)
        table.add_row(s.label, *(f"{s.width(k)}{own[k]}" for k in range(len(s.sigmas))))
    show(table, 30 + 12 * len(found[0].sigmas))


def errors_csv(found: list[Errors]) -> str:
    """A line per machine, choice and noise level: the mean error and its 95% interval."""
    lines = ["machine,choice,images,held_out,sigma,locality,bandwidth,error,low,high,best_or_tied"]
    for e, tied in zip(found, ties(found), strict=True):
        low, high = e.interval()
        for k, sigma in enumerate(e.sigmas):
            value = e.values[k] if e.values else ""
            numbers = f"{e.mean[k]:.6g},{low[k]:.6g},{high[k]:.6g},{int(tied[k])}"
            lines.append(
                f"{e.machine},{_choice(e)},{e.images},{e.errors.shape[1]},{sigma:.6g},{value},"
                f"{e.bandwidths[k]:g},{numbers}"
            )
    return "\n".join(lines) + "\n"


def print_errors(found: list[Errors]) -> None:
    """Prints a row per machine and choice, a column per noise level, the best and ties marked."""
    from rich.table import Table

    table = Table(
        title=f"held-out mean squared error of D by noise level, {found[0].errors.shape[1]} images",
        caption="*: the best at this level, or within the noise of the held-out images of it",
    )
    table.add_column("")
    for sigma in found[0].sigmas:
        table.add_column(f"{sigma:.3g}", justify="right")
    for e, tied in zip(found, ties(found), strict=True):
        cells = [f"{m:.2g}" + ("*" if t else " ") for m, t in zip(e.mean, tied, strict=True)]
        table.add_row(e.label, *cells)
    show(table, 40 + 12 * len(found[0].sigmas))


def errors_markdown(found: list[Errors]) -> str:
    """Three tables: the best at each noise level, the errors of all, and what each had chosen.

    In the second, bold marks the best at a level and what is within the noise of the images of it.
    """
    tied, labels = ties(found), [_name(e) for e in found]
    levels = [f"{sigma:.3g}" for sigma in found[0].sigmas]
    best = []
    for k, w in enumerate(np.argmin([e.mean for e in found], axis=0)):
        e = found[w]
        low, high = (bound[k] for bound in e.interval())
        others = dict.fromkeys(o.machine for o, t in zip(found, tied[:, k], strict=True) if t)
        others.pop(e.machine)  # the best is tied with itself
        value = _short(e.values[k]) if e.values else ""
        interval = f"{_rounded(low)} to {_rounded(high)}"
        h, error = _short(e.bandwidths[k]), _rounded(e.mean[k])
        names = ", ".join(f"`{name}`" for name in others)
        best.append([levels[k], labels[w], value, h, error, interval, names])
    columns = ["sigma", "best", "its setting", "bandwidth", "error", "95% interval"]
    errors = []
    for e, label, row in zip(found, labels, tied, strict=True):
        cells = [_rounded(m) for m in e.mean]
        errors.append([label, *(f"**{c}**" if t else c for c, t in zip(cells, row, strict=True))])
    chosen = [
        [label, *map(_short, e.values)]
        for e, label in zip(found, labels, strict=True)
        if e.values and not e.with_bandwidth
    ]
    bandwidths = [
        [label, *map(_short, e.bandwidths)]
        for e, label in zip(found, labels, strict=True)
        if e.with_bandwidth
    ]
    return "\n".join(
        [
            "## The best at each noise level",
            "",
            *markdown([*columns, "not statistically distinguishable from it"], best),
            "",
            "## All of them",
            "",
            *markdown(["", *levels], errors),
            "",
            "## What was chosen",
            "",
            *markdown(["", *levels], chosen),
            "",
            *markdown(["bandwidth", *levels], bandwidths),
            "",
        ]
    )


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _name(e: Errors) -> str:
    """Machine and choice, as in `ls`, calibrated and h."""
    return f"`{e.machine}`" + (f", {_choice(e)}" if e.choice else "")


def _choice(e: Errors) -> str:
    """The choice without a comma, as in calibrated and h."""
    return e.choice.replace(",", " and")


def _short(value: Any) -> str:
    return f"{value:g}"


def _rounded(error: float) -> str:
    """Two digits, without the zero that pads an exponent."""
    return f"{error:.2g}".replace("e-0", "e-")
