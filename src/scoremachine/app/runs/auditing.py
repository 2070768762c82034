"""What `audit` does on disk: a page of the pictures that look most like copies, and all numbers."""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.app import tables
from scoremachine.app.explain_page import png
from scoremachine.data.corpus import Corpus
from scoremachine.data.store import key_of
from scoremachine.provenance import pictures as drawing
from scoremachine.provenance.audit import (
    FEWEST,
    REFERENCES,
    VERSION,
    Audit,
    Region,
    path_of,
    pictures_of,
    reference_scores,
)
from scoremachine.provenance.originals import Found, Originals
from scoremachine.runtime.files import check_folder, csv_text, write_text, written
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.validation import check_integer, check_seed

SHOWN = 60  # pictures on the page
CHUNK = 16  # pictures after which what was found is kept
RED = (214, 39, 40)
HEADER = (
    "picture", "score", "p_value", "q_value", "identical", "training_image", "mirrored", "scale",
    "row", "column", "explained_share", "region_share", "top", "left", "bottom", "right", "nearest",
    "distance", "d1_d2", "d1_mean50",
)  # fmt: skip
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }}
.case {{ display: flex; gap: 1em; margin: 1em 0; padding-bottom: 1em; }}
.case img {{ image-rendering: pixelated; width: 160px; height: auto; display: block; }}
.case figure {{ margin: 0; }} figcaption {{ font-size: 13px; color: #555; max-width: 160px; }}
small {{ color: #666; }} b.copy {{ color: #d62728; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class AuditOptions:
    """What is asked of an audit.

    Attributes:
        reference: A folder of real images that are no copies; None: images of the corpus itself.
        references: How many of them at most.
        seed: Which of them.
    """

    reference: str | None = None
    references: int = REFERENCES
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("references", self.references)
        check_seed(self.seed)


def audit_folder(images: Any, corpus: Corpus, out: Path, options: AuditOptions) -> Audit:
    """Audits pictures; what is finished is kept, and the same command goes on after it."""
    check_folder(out)
    names, pictures = pictures_of(images, corpus)
    key = key_of(VERSION, corpus.key, Corpus(pictures).digest)
    unfinished = Path(out) / ".unfinished" / key
    originals = Originals.of(corpus)
    found: list[Found] = []
    with bar("Auditing", total=len(pictures)) as progress:
        for first in range(0, len(pictures), CHUNK):
            some = pictures[first : first + CHUNK]
            path = unfinished / f"{first:07d}.npz"
            if not path.exists():
                unfinished.mkdir(parents=True, exist_ok=True)
                _keep(list(originals.find(some)), path)
            found += _kept(path, len(some))
            progress.advance(len(some))
    scores, copies = reference_scores(
        originals, options.reference, options.references, options.seed
    )
    report = Audit(names, pictures, corpus, found, scores, copies)
    write(report, Path(out))
    shutil.rmtree(Path(out) / ".unfinished", ignore_errors=True)
    return report


def _keep(found: Sequence[Found], path: Path) -> None:
    arrays = {f"{i}.{k}": v for i, each in enumerate(found) for k, v in each.arrays().items()}
    with written(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def _kept(path: Path, n: int) -> list[Found]:
    with np.load(path, allow_pickle=False) as file:
        names = {name.partition(".")[2] for name in file.files}
        return [Found.of_arrays({k: file[f"{i}.{k}"] for k in names}) for i in range(n)]


def write(report: Audit, out: Path) -> None:
    """audit.csv, audit.json and audit.html."""
    rows = rows_of(report)
    write_text(out / "audit.csv", csv_text([HEADER, *rows]))
    enough = len(report.reference) >= FEWEST
    record = {
        "corpus": report.corpus.name,
        "corpus_key": report.corpus.key,
        "images": len(report.corpus),
        "pictures": len(report),
        "held_out": len(report.reference),
        "held_out_copies_left_out": report.left_out,
        "alarms": {str(p): int((report.p_value <= p).sum()) for p in (0.001, 0.01, 0.05)}
        if enough
        else None,
        "made": time.strftime("%Y-%m-%d"),
        "rows": [dict(zip(HEADER, row, strict=True)) for row in rows],
    }
    write_text(out / "audit.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "audit.html", page(report))


def rows_of(report: Audit) -> list[list[Any]]:
    """A row for each picture, the most alike first, as the columns of `HEADER`."""
    enough = len(report.reference) >= FEWEST
    none = np.full(len(report), np.nan)
    p, q = (report.p_value, report.q_value) if enough else (none, none)
    score, nearest, identical, regions = (
        report.score, report.nearest, report.identical, report.regions,
    )  # fmt: skip
    rows: list[list[Any]] = []
    for i in report.order().tolist():
        each, region = report.found[i], regions[i]
        at = each.placement
        place = (
            [None] * 4 if at is None else [at.mirrored, at.scale, round(at.row), round(at.column)]
        )
        rows.append([
            report.names[i], round(float(score[i]), 4), _number(p[i]), _number(q[i]),
            bool(identical[i]), path_of(report.corpus, int(nearest[i])), *place,
            round(each.share, 4), round(region.share, 4), *region.box,
            path_of(report.corpus, each.nearest), round(each.distance, 4), round(each.ratio, 4),
            round(each.ratio_50, 4),
        ])  # fmt: skip
    return rows


def _number(p: float) -> float | None:
    return None if np.isnan(p) else round(float(p), 5)


def page(report: Audit) -> str:
    """The pictures that look most like copies, each beside its source, outlines drawn."""
    corpus = report.corpus
    title = f"{len(report):,} pictures against the {len(corpus):,} images of {corpus.name}"
    enough = len(report.reference) >= FEWEST
    regions, identical, nearest = report.regions, report.identical, report.nearest
    body = [_summary(report)]
    p, q = (report.p_value, report.q_value) if enough else (None, None)
    limit = np.quantile(report.reference, 0.99) if enough else np.inf
    for rank, i in enumerate(report.order()[:SHOWN].tolist(), 1):
        each, region = report.found[i], regions[i]
        source = np.asarray(report.corpus.images[nearest[i]])
        verdict = "identical to a training image, pixel by pixel" if identical[i] else ""
        if p is not None and q is not None:
            copy = ' class="copy"' if p[i] <= 0.01 else ""
            verdict += f"<b{copy}>p = {p[i]:.2g}</b> (q = {q[i]:.2g})"
        verdict += f"<br>score {each.score:.3g}"
        verdict += f"; 1 in 100 held-out images reach {limit:.2g}" if enough else ""
        aligned = (each.aligned.clamp(0, 1) * 255).round().byte().numpy()
        figures = [
            (_outlined(report.images[i], region.mask), html.escape(report.names[i])),
            (_boxed(source, region), html.escape(path_of(report.corpus, int(nearest[i])))),
            (
                drawing.enlarged(aligned)[0],
                "the training image, moved and relit as is most like the picture",
            ),
            (
                drawing.heat(each.shares.numpy()),
                "the share of each pixel that it explains better than others: 0 is black, 1 white",
            ),
        ]
        cells = "".join(
            f'<figure><img alt="" src="{png(image)}"><figcaption>{text}</figcaption></figure>'
            for image, text in figures
        )
        body.append(
            f'<div class="case"><div style="width:13em"><b>{rank}.</b> {verdict}<br>'
            f"<small>This image explains {each.share:.0%} of the picture; the outlined part is "
            f"{region.share:.0%} of it{_how(each)}.<br>Distances, pixel by pixel: nearest image / "
            f"second nearest {each.ratio:.2f}, / mean of 50 nearest {each.ratio_50:.2f}</small>"
            f"</div>{cells}</div>"
        )
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def _summary(report: Audit) -> str:
    if len(report.reference) < FEWEST:
        return (
            f"<p>There are only {len(report.reference)} held-out images to compare with, so there "
            f"are no p-values: at least {FEWEST} are needed. The pictures are in the order of how "
            "much they look like copies.</p>"
        )
    p = report.p_value
    alarms, expected = int((p <= 0.01).sum()), 0.01 * len(p)
    copies, held = report.left_out, f"{len(report.reference):,} held-out real images"
    left_out = f"; {copies} more look like copies themselves and are left out" if copies else ""
    return (
        f"<p><b>{alarms} of {len(p):,} pictures</b> look more like a copy of a training image than "
        f"99 in 100 real images that are no copies (p at most 0.01). If none of them were a copy, "
        f"about {expected:.2g} would do so by chance. They may be copies as a whole or in a part: "
        f"look at the outlines, and at the score, which is larger the more of a picture one image "
        f"explains.</p><p>The p-value of a picture is the share of {held} that look at least as "
        f"much like a copy. Unless they were given as a reference, they are training images "
        f"themselves, each compared with all the others{left_out}. It is never "
        f"below {1 / (len(report.reference) + 1):.2g}, which every picture gets that looks more "
        "like a copy than all of these: more held-out images tell such pictures apart. The q-value "
        "is the share of false alarms to expect among this picture and all above it. The "
        f"{min(SHOWN, len(p))} pictures that look most like copies come first: each beside its "
        "training image, with the largest part outlined that this image explains. All of them are "
        "in audit.csv.</p>"
    )


def _how(each: Found) -> str:
    at = each.placement
    if at is None:
        return ""
    words = ["mirrored"] if at.mirrored else []
    if at.scale != 1:
        words.append(f"resized by {at.scale:g}")
    if round(at.row) or round(at.column):
        words.append(f"moved by {round(at.row)} down, {round(at.column)} to the right")
    return "; the image is " + ", ".join(words) if words else ""


def _outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    canvas, f = drawing.enlarged(np.asarray(image))
    return drawing.outlined(canvas, mask, f, RED) if mask.any() else canvas


def _boxed(image: np.ndarray, region: Region) -> np.ndarray:
    top, left, bottom, right = region.source
    mask = np.zeros(image.shape[1:], dtype=bool)
    mask[top:bottom, left:right] = True
    return _outlined(image, mask)


def tell(report: Audit, out: Path) -> None:
    """Prints the ten pictures that look most like copies."""
    from rich.table import Table

    shown = Table(title=f"Most like copies, of {len(report):,} pictures")
    for name in ("picture", "p", "training image", "explained"):
        shown.add_column(name)
    for row in rows_of(report)[:10]:
        p = "" if row[2] is None else f"{row[2]:.3g}"
        shown.add_row(str(row[0]), p, str(row[5]), f"{row[10]:.0%}")
    tables.show(shown, 100)
    if len(report.reference) < FEWEST:
        say(
            f"no p-values: {len(report.reference)} held-out images are too few, and {FEWEST} are "
            "needed (give more with --reference)"
        )
    print(f"{out / 'audit.html'}")
