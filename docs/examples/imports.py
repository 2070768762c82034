"""Draws which parts of the package import which: the picture in docs/design.md.

    python docs/examples/imports.py --out docs/pictures/imports.png

Rows are layers, the lowest at the bottom. An arrow points from who imports to what is imported;
imports that only a type checker sees are left out. `--src` draws another checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS = [
    "runtime",
    "core",
    "data",
    "engines",
    "sources",
    "calibration",
    "machines",
    "provenance",
    "sampling",
    "lab",
    "app",
]


def imports(src: Path) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Imports between the children of the package, and the lines of code of each."""
    sys.path.insert(0, str(src))
    graph = grimp.build_graph("scoremachine", exclude_type_checking_imports=True, cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    lines: Counter[str] = Counter()
    for module in graph.modules:
        part = module.split(".")
        if len(part) == 1:
            continue
        path = src.joinpath(*part)
        file = path.with_suffix(".py") if not path.is_dir() else path / "__init__.py"
        lines[part[1]] += len(file.read_text(encoding="utf-8").splitlines())
        for other in graph.find_modules_directly_imported_by(module):
            to = other.split(".")
            if len(to) > 1 and to[1] != part[1]:
                found[part[1], to[1]] += 1
    return found, lines


def levels(found: Counter[tuple[str, str]], names: list[str]) -> dict[str, int]:
    """A row for each name: its layer, or how far it is from what imports nothing."""
    if set(names) <= {*LAYERS, "pixels", "_version", "__main__"}:
        return {name: LAYERS.index(name) if name in LAYERS else -1 for name in names}
    level = dict.fromkeys(names, 0)
    for _ in names:  # circles are cut by the number of rounds
        for (a, b), _n in found.items():
            if a in level and b in level and level[a] <= level[b] < 12:
                level[a] = level[b] + 1
    return level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/imports.png"))
    parser.add_argument("--src", type=Path, default=Path("src"))
    options = parser.parse_args()
    found, lines = imports(options.src.resolve())
    names = sorted(n for n in lines if n not in ("_version", "__main__", "pixels"))
    level = levels(found, names)
    rows: dict[int, list[str]] = {}
    for name in names:
        rows.setdefault(level[name], []).append(name)
    at = {}
    for row, members in rows.items():
        for k, name in enumerate(members):
            bend = 0.9 * (row % 2) if len(members) == 1 else 0.0
            at[name] = ((k - (len(members) - 1) / 2) * 2.2 + bend - 0.45 * (len(members) == 1), row)
    fig, axes = plt.subplots(figsize=(9, 8))
    for (a, b), n in found.items():
        if a not in at or b not in at:
            continue
        up = at[a][1] <= at[b][1]
        axes.annotate(
            "", at[b], at[a],
            arrowprops={
                "arrowstyle": "->", "color": "#c0392b" if up else "#7f8c8d",
                "lw": min(3.0, 0.5 + 0.12 * n), "alpha": 0.9 if up else 0.5,
                "connectionstyle": "arc3,rad=0.18", "shrinkA": 14, "shrinkB": 14,
            },
        )  # fmt: skip
    for name, (x, y) in at.items():
        box = {"boxstyle": "round,pad=0.35", "fc": "#eaf2f8", "ec": "#34495e"}
        axes.text(x, y, f"{name}\n{lines[name]:,} lines", ha="center", va="center", bbox=box)
    axes.set_xlim(min(x for x, _ in at.values()) - 2, max(x for x, _ in at.values()) + 2)
    axes.set_ylim(-0.7, max(y for _, y in at.values()) + 0.7)
    axes.axis("off")
    upward = sum(at[a][1] <= at[b][1] for a, b in found if a in at and b in at)
    title = f"{len(names)} parts; {upward} imports upward or within a row (red)"
    axes.set_title(title)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(options.out, dpi=80, bbox_inches="tight")
    print(f"{title}: {options.out}")


if __name__ == "__main__":
    main()
