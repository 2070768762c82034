"""Measures how well `audit` finds copies, and how often it raises false alarms.

    python benchmarks/copies.py [--only cifair,planted,alarms,samples] [--images 50000]

cifair: CIFAR-10 test images that people judged copies of a training image (ciFAIR, Barz & Denzler
2020, and others found by hand), among test images in which nobody has seen one. A threshold that
lets 1% or 0.1% of the others pass finds the share of copies shown. Half of the copies were used
while the score was made; the table is of the other half.

planted: parts of training images, altered, in unrelated pictures (test images without a copy).

alarms: how many held-out real images have p at most 0.01, with images and pictures of any data set
drawn at random (--data mnist-train.zip --images 4000 --pictures 400).

samples: what is said of pictures that machines and the bundled network make.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import scoremachine as sm
import setting
from scoremachine.provenance.alignment import resized
from scoremachine.provenance.audit import p_values, reference_scores
from scoremachine.provenance.originals import Found, Originals
from scoremachine.runtime.progress import bar

QUERIES = setting.CIFAR10.parent / "cifair-queries.zip"
PAIRS = setting.CIFAR10.parent / "cifair-pairs.csv"
# of the "others", by eye copies too: the same shot, cropped, mirrored, framed or recoloured
SEEN = (
    "00529", "00873", "00875", "02118", "02183", "02457", "02642", "03502", "03628", "03740",
    "04020", "04630", "05436", "05869", "06573", "07495", "07662", "07681", "08584", "08860",
    "09368", "09407", "09761",
)  # fmt: skip
SIDES = (8, 12, 16, 24, 32)
KINDS = (
    "exact", "moved", "mirrored", "brighter", "darker", "more contrast", "less contrast", "JPEG 75",
    "scaled 0.8", "scaled 1.25", "noise 5%",
)  # fmt: skip


def queries() -> tuple[list[str], np.ndarray]:
    """Names and pixels of the test images, the kind of each being its folder."""
    with zipfile.ZipFile(QUERIES) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        images = [
            np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names
        ]
    return names, np.stack(images).transpose(0, 3, 1, 2)


def found_of(originals: Originals, pictures: np.ndarray, what: str) -> list[Found]:
    with bar(what, total=len(pictures)) as progress:
        found = []
        for each in originals.find(pictures):
            found.append(each)
            progress.advance()
    return found


SCORES = {
    "score": lambda f: f.score,
    "explained share": lambda f: f.share,
    "votes of windows": lambda f: f.votes,
    "d1 (nearest image)": lambda f: -f.distance,
    "d1 / mean of 50": lambda f: -f.ratio_50,
    "d1 / d2": lambda f: -f.ratio,
}


def cifair(originals: Originals, half: int, others: int) -> Table:
    names, images = queries()
    kind = np.array([name.split("/")[0] for name in names])
    kind[[name.startswith("others") and name[7:12] in SEEN for name in names]] = "seen"
    with PAIRS.open(encoding="utf-8") as file:
        original = {row["query"]: row["train"] for row in csv.DictReader(file)}
    kept = np.random.default_rng(0).permutation(np.flatnonzero(kind == "others"))[:others]
    for which in ("copies", "found"):
        kept = np.concatenate([kept, np.flatnonzero(kind == which)[half::2]])
    start = time.perf_counter()
    found = found_of(originals, images[kept], "Test images")
    seconds = (time.perf_counter() - start) / len(kept)
    kind = kind[kept]
    right = np.array([
        original.get(names[i]) is not None and f.placement is not None
        and original[names[i]] in originals.corpus.ids[f.placement.image]
        for i, f in zip(kept, found, strict=True)
    ])  # fmt: skip
    named = " and ".join(f"{right[kind == which].mean():.2f}" for which in ("copies", "found"))
    title = f"Found at 1% (0.1%) false alarms; {seconds:.2f} s a picture; right image: {named}"
    table = Table(title=title)
    for head in ("detector", "ciFAIR's copies", "other copies"):
        table.add_column(head)
    for name, score in SCORES.items():
        values = np.array([score(f) for f in found])
        row = [name]
        limits = [np.quantile(values[kind == "others"], q) for q in (0.99, 0.999)]
        for which in ("copies", "found"):
            a, b = ((values[kind == which] > limit).mean() for limit in limits)
            row.append(f"{a:.2f} ({b:.2f})")
        table.add_row(*row)
    worst = np.argsort(-np.array([f.score for f in found]))
    for i in [i for i in worst if kind[i] == "others"][:24]:
        at = found[i].placement
        image = "" if at is None else originals.corpus.ids[at.image]
        print(f"{names[kept[i]]} {found[i].score:.2f} {image}")
    return table


def altered(kind: str, part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part uint8 (C, h, w) of a training image, altered."""
    x = part.astype(np.float64)
    if kind == "mirrored":
        return part[..., ::-1]
    if kind in ("brighter", "darker"):
        x = x + (25.5 if kind == "brighter" else -25.5)
    if kind in ("more contrast", "less contrast"):
        x = x.mean() + (1.1 if kind == "more contrast" else 0.9) * (x - x.mean())
    if kind == "JPEG 75":
        buffer = io.BytesIO()
        Image.fromarray(part.transpose(1, 2, 0)).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer)).transpose(2, 0, 1)
    if kind.startswith("scaled"):
        large = resized(torch.from_numpy(x)[None].float(), float(kind.split()[1]))[0].numpy()
        return np.clip(large, 0, 255).round().astype(np.uint8)
    if kind == "noise 5%":
        x = x + rng.normal(0, 12.75, x.shape)
    return np.clip(x, 0, 255).round().astype(np.uint8)


def planted(originals: Originals, reference: np.ndarray, count: int) -> Table:
    names, images = queries()
    others = images[[
        i for i, name in enumerate(names)
        if name.startswith("others") and name[7:12] not in SEEN
    ]]  # fmt: skip
    rng, corpus = np.random.default_rng(0), originals.corpus
    table = Table(title=f"Planted copies found with p at most 0.01 ({count} each)")
    for head in ("altered", *(f"{side} x {side}" if side < 32 else "whole" for side in SIDES)):
        table.add_column(head)
    for kind in KINDS:
        row = [kind]
        for side in SIDES:
            pictures = []
            while len(pictures) < count:
                canvas = others[rng.integers(len(others))].copy()
                image = corpus.images[rng.integers(len(corpus))]
                i, j = rng.integers(0, 33 - side, 2)
                part = image[:, i : i + side, j : j + side]
                if part.std() < 20:  # nothing to be recognized by
                    continue
                part = altered(kind, part, rng)
                h, w = (min(32, n) for n in part.shape[1:])
                part = part[:, :h, :w]
                moves = kind == "moved" or side < 32
                a, b = (i, j) if not moves else rng.integers(0, 33 - np.array([h, w]))
                a, b = min(int(a), 32 - h), min(int(b), 32 - w)
                if kind == "moved" and side == 32:
                    canvas = np.roll(part, tuple(rng.integers(-3, 4, 2)), (1, 2))
                else:
                    canvas[:, a : a + h, b : b + w] = part
                pictures.append(canvas)
            found = found_of(originals, np.stack(pictures), f"{kind}, {side}")
            p = p_values(np.array([f.score for f in found]), reference)
            row.append(f"{(p <= 0.01).mean():.2f}")
        table.add_row(*row)
        print(row, flush=True)
    return table


def alarms(given: argparse.Namespace) -> Table:
    """Held-out images of a data set with p at most 0.01; the data set is split at random."""
    images, pictures = given.images or 4000, given.pictures
    everything = sm.Corpus.open(given.data, size=given.size)
    order = np.random.default_rng(0).permutation(len(everything))
    corpus = everything.subset(np.sort(order[:images]))
    held = np.sort(order[images : images + pictures])
    originals = Originals.of(corpus)
    found = found_of(originals, np.asarray(everything.images[held]), "Held-out images")
    reference, left_out = reference_scores(originals, None, given.references, 0)
    score = np.array([f.score for f in found])
    p = p_values(score, reference)
    table = Table(title=f"{len(held)} held-out images of {given.data.name} against {images:,}")
    for head in ("references", "left out", "p <= 0.01", "p <= 0.05", "p <= 0.01, none left out"):
        table.add_column(head)
    everyone = np.concatenate([reference, np.full(left_out, np.inf)])
    shares = ((p <= 0.01).mean(), (p <= 0.05).mean(), (p_values(score, everyone) <= 0.01).mean())
    table.add_row(str(len(reference)), str(left_out), *(f"{share:.4f}" for share in shares))
    for i in np.argsort(-score)[:24]:
        at = found[i].placement
        print(held[i], f"{score[i]:.2f}", "" if at is None else int(at.image))
    return table


SAMPLED = ("ideal", "ls", "els", "pspc", "pca", "smoothed", "cifar10-resnet")


def samples(originals: Originals, reference: np.ndarray, count: int) -> Table:
    corpus = originals.corpus
    table = Table(title=f"{count} samples each, against {len(corpus):,} training images")
    for head in ("sampler", "p <= 0.01", "median p", "share one image explains", "median d1"):
        table.add_column(head)
    for name in SAMPLED:
        if name.endswith("resnet"):
            made = sm.Network.load(name)
        else:
            source = corpus.subset(np.arange(1000)) if name == "els" else corpus
            made = sm.build(name, source, schedule=sm.EDMSchedule())
        x = sm.generate(made, count=count, steps=18)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        found = found_of(originals, pixels, f"Samples of {name}")
        p = p_values(np.array([f.score for f in found]), reference)
        share = np.median([f.share for f in found])
        d1 = np.median([f.distance for f in found])
        row = [name, f"{(p <= 0.01).mean():.2f}", f"{np.median(p):.3f}", f"{share:.2f}"]
        table.add_row(*row, f"{d1:.3f}")
        print(row, f"{d1:.3f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="cifair,planted")
    parser.add_argument("--data", type=Path, default=setting.CIFAR10)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--planted", type=int, default=24)
    parser.add_argument("--references", type=int, default=1000)
    parser.add_argument("--half", type=int, default=1)
    parser.add_argument("--others", type=int, default=1387)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    console = Console(width=140)
    if "alarms" in given.only:
        console.print(alarms(given))
        return
    corpus = sm.Corpus.open(given.data, limit=given.images)
    start = time.perf_counter()
    originals = Originals.of(corpus)
    print(f"index: {time.perf_counter() - start:.0f} s")
    if "cifair" in given.only:
        console.print(cifair(originals, given.half, given.others))
    if "planted" in given.only or "samples" in given.only:
        reference, _ = reference_scores(originals, None, given.references, 0)
    if "planted" in given.only:
        console.print(planted(originals, reference, given.planted))
    if "samples" in given.only:
        console.print(samples(originals, reference, given.samples))


if __name__ == "__main__":
    main()
