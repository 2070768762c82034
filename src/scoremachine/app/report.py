"""Writes results to disk: JSON, CSV, curves, pictures, and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.app import figures as drawing
from scoremachine.app import tables
from scoremachine.data.pixels import to_uint8
from scoremachine.lab.comparison.agreement import Summary
from scoremachine.lab.comparison.bias import Bias
from scoremachine.lab.comparison.cells import Row, markdown_rows
from scoremachine.lab.comparison.parts import LEFT_OUT, SHOWN, Comparison
from scoremachine.lab.comparison.quality import Quality
from scoremachine.runtime.files import write_text

COLUMNS = 8  # pictures in a row
TITLES = {
    "forward": "Forward: held-out images with noise",
    "reverse": "Reverse: every x_t of the network's sampling trajectory",
    "samples": "Samples: each denoiser's own trajectory from the same noise",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} small {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write(found: Comparison, out: Path, page: bool = False) -> list[Path]:
    """Writes compare.json, .csv, .md and .png, samples.png and trajectory.png, and report.html.

    Returns what was written, the page last if it was asked for.
    """
    files = [out / name for name in ("compare.csv", "compare.png", "samples.png", "trajectory.png")]
    write_text(files[0], csv(found))
    write_text(out / "compare.md", markdown(found))
    drawing.save_comparison(found, files[1])
    drawing.save_zoo(rows(found), files[2])
    drawing.save_trajectory(found, files[3])
    if page:
        files.append(out / "report.html")
        write_text(files[-1], html_page(found, files[1:4]))
    write_text(out / "compare.json", json.dumps(as_json(found), indent=1) + "\n")
    return [*files[:4], out / "compare.md", out / "compare.json", *files[4:]]


def quality_table(found: Sequence[Quality]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of `write_quality`."""
    header = [
        "", "kernel distance", "to nearest training image", "explained by one", "variety",
        "seconds a picture",
    ]  # fmt: skip
    rows = []
    for q in found:
        far = Summary.of(q.nearest)
        took = q.seconds / len(q.pictures)
        rows.append([
            q.label, f"{1e3 * q.kernel_distance:.2f} ± {1e3 * q.spread:.2f}",
            f"{far.median:.3f} ({far.low:.3f} to {far.high:.3f})", _share(q.explained),
            f"{q.variety:.2f}",
            f"{took:.2f}" if math.isfinite(took) else "",
        ])  # fmt: skip
    return header, rows


def write_quality(found: Sequence[Quality], out: Path) -> list[Path]:
    """Writes quality.md, quality.json and quality.png; returns what was written."""
    header, rows = quality_table(found)
    note = (
        "Kernel distances times 1,000; to nearest: median and quartiles; explained by one: the "
        "mean share of a picture that its most alike training image explains, aligned."
    )
    write_text(out / "quality.md", "\n".join([*tables.markdown(header, rows), "", note, ""]))
    record = [
        {k: plain(v.tolist() if isinstance(v, np.ndarray) else v)
         for k, v in vars(q).items() if k != "pictures"} for q in found
    ]  # fmt: skip
    write_text(out / "quality.json", json.dumps(record, indent=1) + "\n")
    n = min(COLUMNS, *(len(q.pictures) for q in found))
    drawing.save_rows([(q.label, q.pictures[:n]) for q in found], [""] * n, out / "quality.png")
    return [out / "quality.md", out / "quality.json", out / "quality.png"]


QUESTIONS = {
    "images": "How many images it was trained on",
    "steps": "How long it was trained",
    "network": "What kind of network it is",
}


def write_study(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes study.md, study.json and study.png; returns what was written."""
    lines: list[str] = []
    for group, title in QUESTIONS.items():
        header, cells = markdown_rows(rows, group)
        if cells:
            lines += [f"### {title}", "", *tables.markdown(header, cells), ""]
    write_text(out / "study.md", "\n".join(lines))
    record = [plain(asdict(row)) for row in rows]
    write_text(out / "study.json", json.dumps(record, indent=1) + "\n")
    drawing.save_study(rows, out / "study.png")
    return [out / "study.md", out / "study.json", out / "study.png"]


def write_bias(found: Bias, out: Path) -> list[Path]:
    """Writes bias.png, bias-pictures.png and bias.json; returns what was written."""
    drawing.save_bias(found, out / "bias.png")
    heads = [f"{sigma:.3g}" for sigma in found.sigmas]
    noisy, ideal, *differences = found.pictures
    noisy = noisy / np.sqrt(1 + np.asarray(found.sigmas)[:, None, None, None] ** 2)
    largest = np.abs(differences).max((0, 2, 3, 4))[:, None, None, None]
    shown = [("what is denoised", noisy), ("ideal", ideal)]
    shown += [
        (f"{name} - ideal", d / largest) for name, d in zip(found.labels, differences, strict=True)
    ]
    drawing.save_rows([(name, to_uint8(x)) for name, x in shown], heads, out / "bias-pictures.png")
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value
              for name, value in vars(found).items() if name != "pictures"}  # fmt: skip
    write_text(out / "bias.json", json.dumps(record, indent=1) + "\n")
    return [out / "bias.png", out / "bias-pictures.png", out / "bias.json"]


def print_bias(found: Bias) -> None:
    """Prints sizes, and how alike the differences are, by noise level."""
    from rich.table import Table

    table = Table(title="D - D_ideal: root mean square; mean cosine with that of the networks")
    table.add_column("")
    for sigma in found.sigmas:
        table.add_column(f"{sigma:.3g}", justify="right")
    for label, sizes in zip(found.labels, found.sizes, strict=True):
        table.add_row(f"{label}: size", *(f"{v:.3f}" for v in sizes.mean(1)))
    if found.networks > 1:
        table.add_row("networks: cosine of pairs", *(f"{v:.3f}" for v in found.among_networks()))
    for label, row in zip(found.labels[found.networks :], found.to_networks(), strict=True):
        table.add_row(f"{label}: cosine", *(f"{v:.3f}" for v in row))
    tables.show(table, 40 + 12 * len(found.sigmas))


def as_json(found: Comparison) -> dict[str, Any]:
    """Settings, and the measures: of every picture, and summarised; null if undefined."""
    parts = [
        {
            "part": p.part,
            "label": p.label,
            "sigmas": p.sigmas,
            "summaries": [{k: plain(vars(v)) for k, v in row.items()} for row in p.summaries],
            "pictures": {k: plain(v.tolist()) for k, v in p.measures.items()},
        }
        for p in found.parts
    ]
    nearest = {k: plain(v.tolist()) for k, v in found.distances.items()}
    explained = {k: plain(v.tolist()) for k, v in found.explained.items()}
    return {
        "settings": found.settings, "parts": parts, "distance_to_nearest": nearest,
        "explained_by_one": explained,
    }  # fmt: skip


def _share(explained: np.ndarray) -> str:
    return f"{explained.mean():.0%}" if len(explained) else "unknown"


def plain(value: Any) -> Any:
    """A value in a form that JSON can represent: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def csv(found: Comparison) -> str:
    """A line per part, machine, noise level and measure."""
    lines = ["part,machine,sigma,measure,median,quartile_low,quartile_high,low,high,pictures"]
    for part in found.parts:
        for sigma, row in zip(part.sigmas, part.summaries, strict=True):
            for name, s in row.items():
                numbers = (s.median, s.low, s.high, *s.interval)
                cells = ",".join(f"{v:.6g}" for v in numbers)
                lines.append(f"{part.part},{part.label},{sigma:.6g},{name},{cells},{s.count}")
    return "\n".join(lines) + "\n"


def rows(found: Comparison) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The samples of all denoisers, the network first, with the nearest training images."""
    of = {p.label: p.summaries[0] for p in found.of("samples")}
    made = []
    for label, x in found.samples.items():
        alike = f"\nr^2 {of[label]['r2'].median:.2f}" if label in of else ""
        far = f"\nto nearest {found.distances[label].mean():.2f}"
        far += f"\none explains {_share(found.explained[label])}"
        name = found.settings["network"] if label == "network" else label
        images = to_uint8(x[:COLUMNS])
        made.append((f"{name}{alike}{far}", images, found.nearest[label][:COLUMNS]))
    return made


def table(found: Comparison, part: str) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Header, a row for each machine, and which cells (machines, K) are the best or tied."""
    parts = found.of(part)
    if part == "samples":
        header = ["", "r²", "95% interval", "quartiles", "R²", "mean squared error", "cosine",
                  "to nearest image", "explained by one"]  # fmt: skip
        cells = []
        for p in parts:
            s = p.summaries[0]
            r2, far = s["r2"], found.distances[p.label].mean()
            cells.append([
                p.label, f"{r2.median:.3f}", f"{r2.interval[0]:.3f} to {r2.interval[1]:.3f}",
                f"{r2.low:.3f} to {r2.high:.3f}", f"{s['R2'].median:.3f}",
                f"{s['mse'].median:.4f}", f"{s['cosine'].median:.3f}", f"{far:.3f}",
                _share(found.explained[p.label]),
            ])  # fmt: skip
        return header, cells, found.best(part)
    header = ["", *(f"{sigma:.3g}" for sigma in parts[0].sigmas)]
    cells = [[p.label, *(f"{s['R2'].median:.3f}" for s in p.summaries)] for p in parts]
    return header, cells, found.best(part)


def markdown(found: Comparison) -> str:
    """The three tables in Markdown; bold as the captions say."""
    lines: list[str] = []
    for part, title in TITLES.items():
        header, cells, best = table(found, part)
        marked = [
            [f"`{row[0]}`", *_marked(row[1:], best[m], part, "**{}**")]
            for m, row in enumerate(cells)
        ]
        lines += [f"### {title}", "", _caption(found, part), "", *tables.markdown(header, marked)]
        lines.append("")
    return "\n".join(lines)


def _marked(cells: list[str], best: np.ndarray, part: str, mark: str) -> list[str]:
    if part == "samples":
        return [mark.format(cells[0]) if best[0] else cells[0], *cells[1:]]
    return [mark.format(c) if b else c for c, b in zip(cells, best, strict=True)]


def _caption(found: Comparison, part: str) -> str:
    n = len(next(iter(found.of(part)[0].measures.values()))[0])
    measure = {"R2": "R²", "r2": "r²"}[SHOWN[part]]
    marks = (
        f"medians; marked: the highest {measure}, or not statistically distinguishable from it "
        "(paired bootstrap)"
    )
    if part == "samples":
        return (
            f"{n} pictures; {marks}. To nearest image: root mean square, which is no evidence of "
            "novelty by itself, as it misses shifts: a copy shifted by two pixels each way is 0.36 "
            "away on CIFAR-10, and 0.80 on MNIST. Explained by one: the share of a picture that "
            "its most alike training image explains, aligned; of images left out it is "
            f"{_share(found.explained[LEFT_OUT])}."
        )
    return f"R² of D with the network's by noise level, {n} pictures; {marks}."


def print_tables(found: Comparison) -> None:
    """Prints the three tables."""
    from rich.table import Table

    for part, title in TITLES.items():
        header, cells, best = table(found, part)
        shown = Table(title=title, caption=_caption(found, part).replace("marked", "*"))
        for k, name in enumerate(header):
            shown.add_column(name, justify="right" if k else "left")
        for m, row in enumerate(cells):
            shown.add_row(row[0], *_marked(row[1:], best[m], part, "{}*"))
        tables.show(shown, 40 + 12 * len(header))


def html_page(found: Comparison, pictures: list[Path]) -> str:
    """One self-contained HTML page, which needs no other file and no internet."""
    curves, samples, followed = (_embedded(path) for path in pictures)
    body = [_about(found)]
    for part, title in TITLES.items():
        header, cells, best = table(found, part)
        body.append(f"<h2>{html.escape(title)}</h2><p><small>{_caption(found, part)}</small></p>")
        body.append("<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>")
        for m, row in enumerate(cells):
            shown = [html.escape(row[0]), *_marked(row[1:], best[m], part, "<b>{}</b>")]
            body.append("<tr>" + "".join(f"<td>{c}</td>" for c in shown) + "</tr>")
        body.append("</table>")
        body.append({"forward": curves, "reverse": followed, "samples": samples}[part])
    settings = html.escape(json.dumps(_brief(found.settings), indent=1))
    body.append(f"<details><summary>Every setting</summary><pre>{settings}</pre></details>")
    return PAGE.format(title=html.escape(_title(found)), body="\n".join(body))


def _title(found: Comparison) -> str:
    return f"{found.settings['network']} against {len(found.labels)} machines"


def _about(found: Comparison) -> str:
    s = found.settings
    trained = s["card"].get("training", {})
    how = (
        f", trained for {trained['steps']:,} steps on {trained['images']:,} images"
        if trained
        else ""
    )
    text = (
        f"The network {s['network']}{how}, against training-free machines made of "
        f"{s['corpus']}. {len(s['held_out'])} held-out images; {s['count']} samples of "
        f"{s['steps']} {s['sampler'].upper()} steps from the same noise."
    )
    return f"<p>{html.escape(text)}</p>"


def _brief(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without long lists of positions."""
    card = dict(settings["card"])
    if "training" in card:
        held = card["training"]["held_out"]
        card["training"] = card["training"] | {"held_out": f"{len(held)} images"}
    return settings | {"card": card, "held_out": f"{len(settings['held_out'])} images"}


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'
