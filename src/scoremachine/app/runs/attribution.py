"""What `attribute` and `risk` do on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scoremachine.app import figures as drawing
from scoremachine.data.corpus import Corpus
from scoremachine.provenance.attribute import Attribution, attribute
from scoremachine.provenance.audit import path_of
from scoremachine.provenance.risk import Risk, risk
from scoremachine.runtime.files import check_folder, csv_text, write_text


def attribute_pictures(
    images: str,
    corpus: Corpus,
    out: Path,
    machines: Sequence[str],
    sigmas: Sequence[float],
    scales: Sequence[int],
    top: int,
) -> Attribution:
    """Writes attribute.csv, and attribute.png: pictures beside what explains most of them."""
    check_folder(out)
    found = attribute(images, corpus, list(machines), list(sigmas), tuple(scales))
    write_text(out / "attribute.csv", found.csv(top))
    drawing.save_png(found.sheet(min(top, 8)), out / "attribute.png")
    return found


def risk_of(corpus: Corpus, out: Path) -> Risk:
    """Writes risk.csv (every image), copies.csv (pairs) and copies.png (groups)."""
    check_folder(out)
    found = risk(corpus)
    write_text(out / "risk.csv", found.csv())
    rows: list[Sequence[object]] = [("image", "copy", "difference")]
    for (a, b), d in zip(found.pairs.tolist(), found.difference.tolist(), strict=True):
        rows.append((path_of(corpus, a), path_of(corpus, b), f"{d:.4f}"))
    write_text(out / "copies.csv", csv_text(rows))
    drawing.save_png(found.sheet(), out / "copies.png")
    return found
