"""What `grow` does on disk: pictures, and a record by which they can be made again."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scoremachine.core.noise import PictureNoise
from scoremachine.data.store import key_of
from scoremachine.provenance.pictures import tiled
from scoremachine.provenance.places import colours, identity, largest, pieces, share_of_large
from scoremachine.runtime.files import check_folder, write_text, written
from scoremachine.runtime.progress import Bar, bar, say
from scoremachine.runtime.records import versions
from scoremachine.runtime.validation import check_integer, check_seed
from scoremachine.sampling.grow import Grower, Progress, alike, grower_of, photograph

LARGEST = 2**26  # pixels, beyond which a picture is only made with --yes
MEMORY = 430  # bytes a pixel, about
SECONDS = 6e-5  # a pixel, about, on two cores
CIRCLE = 2 * math.pi
STRUCTURE = 0.5  # what `keep` is for --structure, unless given


@dataclass(frozen=True)
class GrowOptions:
    """What is asked of `grow`.

    Attributes:
        photos: Paths or names.
        size: (H, W) or None.
        count, seed: How many pictures, and which.
        keep, patch_size, tile, symmetry: Of `Growth`.
        start: A picture to start from; None: the photograph.
        structure: Whether it is a photograph whose layout is taken, in the colours of the other.
        mask: A picture that is white where the photograph is to be filled.
        extend: Pixels beyond each border: top, right, bottom, left.
        upscale: A factor above 1, or None.
        frames: Frames of an animation; 0: pictures.
        explain: Whether the sources of pixels are written.
        yes: Whether very large pictures are made.
    """

    photos: tuple[str, ...]
    size: tuple[int, int] | None = None
    count: int = 1
    seed: int = 0
    keep: float | None = None
    patch_size: int = 7
    tile: bool = False
    symmetry: str | None = None
    start: str | None = None
    structure: bool = False
    mask: str | None = None
    extend: tuple[int, ...] | None = None
    upscale: float | None = None
    frames: int = 0
    explain: bool = False
    yes: bool = False

    def __post_init__(self) -> None:
        check_integer("count", self.count)
        check_seed(self.seed)
        asked = [
            name
            for name, given in (
                ("--mask", self.mask), ("--extend", self.extend), ("--upscale", self.upscale),
                ("--from or --structure", self.start),
            )
            if given is not None
        ]  # fmt: skip
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are asked for together; expected one of them")
        if self.size is not None and asked and asked != ["--from or --structure"]:
            raise ValueError(f"{asked[0]} says the size of the picture already: leave --size out")
        if self.upscale is not None and not 1 < self.upscale <= 8:
            raise ValueError(f"--upscale is {self.upscale}; expected a factor above 1, at most 8")
        if self.frames == 1 or self.frames < 0:
            raise ValueError(f"--frames is {self.frames}; expected at least 2")
        if self.explain and self.frames:
            raise ValueError("--explain is of pictures: leave it or --frames out")


def grower(o: GrowOptions, turn: float | None = None) -> Grower:
    """What the options say."""
    known: dict[str, Any] = {"patch_size": o.patch_size, "tile": o.tile, "symmetry": o.symmetry}
    photo, size = photograph(o.photos[0]), o.size
    if o.keep is not None:
        known["keep"] = o.keep
    elif o.tile:
        known["keep"] = 0.0  # no layout of a photograph goes on beyond its borders
    if o.start is not None:
        start = alike(photograph(o.start), photo)
        if o.structure:
            from skimage.exposure import match_histograms

            start = match_histograms(start, photo, channel_axis=2).astype(np.float32)
            known.setdefault("keep", STRUCTURE)
            known["structure"] = True
        size = size or (start.shape[0], start.shape[1])
        known["start"] = _bytes(start)
    if o.mask is not None:
        known["mask"] = mask_of(o.mask, photo.shape[:2])
    if o.extend is not None:
        known["known"], known["mask"] = extended(photo, o.extend)
        size = known["mask"].shape
    if o.upscale is not None:
        size = round(photo.shape[0] * o.upscale), round(photo.shape[1] * o.upscale)
        known["enlarge"] = True
    size = size or (photo.shape[0], photo.shape[1])
    if math.prod(size) > LARGEST and not o.yes:
        gigabytes = math.prod(size) * MEMORY / 2**30
        minutes = math.prod(size) * SECONDS / 60
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels takes about {gigabytes:.0f} GiB of memory "
            f"and {minutes:.0f} minutes: say --yes to make it"
        )
    return grower_of(list(o.photos), size, turn=turn, **known)


def _bytes(x: np.ndarray) -> np.ndarray:
    """A picture (H, W, C) as uint8 (C, H, W)."""
    return np.ascontiguousarray(
        ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(2, 0, 1)
    )


def mask_of(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask: True where a picture is white."""
    white = photograph(path).mean(2) > 0
    if white.shape != shape:
        raise ValueError(
            f"the mask {path} has {white.shape[0]} x {white.shape[1]} pixels, and the photograph "
            f"{shape[0]} x {shape[1]}; expected the same"
        )
    if not white.any():
        raise ValueError(f"the mask {path} is black everywhere; expected white where to fill")
    return white


def extended(photo: np.ndarray, by: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The photograph within a larger picture, and where that is new."""
    if min(by) < 0 or max(by) == 0:
        raise ValueError(f"--extend is {by}; expected numbers of pixels, one of them above 0")
    top, right, bottom, left = by
    pads = (top, bottom), (left, right)
    known = np.pad(photo, (*pads, (0, 0)), mode="edge")
    return known, np.pad(np.zeros(photo.shape[:2], dtype=bool), pads, constant_values=True)


def grow_into(out: Path, o: GrowOptions) -> list[Path]:
    """Grows the pictures; a scale that is finished is kept, and the same command goes on there."""
    check_folder(out)
    began = time.perf_counter()
    turns: list[float | None] = [CIRCLE * k / o.frames for k in range(o.frames)] or [None]
    first = grower(o, turns[0])
    pictures = [(i, turn) for i in range(o.count) for turn in turns]
    unfinished = out / ".unfinished" / _key(first, o)
    written_, omitted, frames, copies = [], [], [], []
    with bar("Growing", total=first.work() * len(pictures)) as progress:
        for n, (i, turn) in enumerate(pictures):
            each = first if turn == turns[0] else grower(o, turn)
            last = _finished(each, PictureNoise(o.seed, [i]), unfinished / str(n), progress)
            omitted += last.omitted.tolist()
            frames.append(_image(last.x))
            if turn is None:
                name = "grown" if o.count == 1 else f"grown-{i:03d}"
                with written(out / f"{name}.png") as path:
                    frames.pop().save(path, format="PNG")
                written_.append(out / f"{name}.png")
                copies.append(_copies(last, first, o.photos))
                if o.explain:
                    written_ += _explained(out, name.replace("grown", "sources"), last, first)
            elif len(frames) == o.frames:
                name = "grown.gif" if o.count == 1 else f"grown-{i:03d}.gif"
                _animated(out / name, frames)
                written_.append(out / name)
                frames = []
    record = {
        **{name: value for name, value in vars(o).items() if name != "yes"},
        "size": first.growth.size,
        "keep": first.growth.keep,
        "seconds": round(time.perf_counter() - began, 1),
        "omitted_mass": round(float(np.mean(omitted)), 4) if omitted else 0.0,
        "copies": copies,
        "versions": versions(),
    }
    write_text(out / "grow.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out / ".unfinished", ignore_errors=True)
    return written_


def _copies(last: Progress, grower: Grower, photos: tuple[str, ...]) -> dict[str, Any]:
    """What of a picture is in its photograph as it is; also said in a line."""
    of, sizes = pieces(last.x, last.origins, grower.photographs)
    piece = largest(of, sizes, last.origins)
    if piece is None:
        say("no pixel is copied from the photograph as it is")
        return {"large_share": 0.0, "largest": None}
    top, left, bottom, right = piece.box
    n, row, column = piece.source
    share = share_of_large(sizes)
    say(
        f"the largest piece copied as it is has {piece.pixels:,} pixels, within {bottom - top} x "
        f"{right - left} from row {row}, column {column} of {photos[n]}; "
        f"{share:.0%} of the picture lies in pieces of more than 21 x 21 pixels"
    )
    return {
        "large_share": round(share, 4),
        "largest": {
            "pixels": piece.pixels,
            "box": piece.box,
            "photograph": photos[n],
            "row": row,
            "column": column,
        },
    }


def _explained(out: Path, name: str, last: Progress, grower: Grower) -> list[Path]:
    """Writes the source of each pixel: as numbers, and as a map beside that of the photograph."""
    with written(out / f"{name}.npz") as path:
        n, row, column = np.moveaxis(last.origins, -1, 0)
        np.savez_compressed(path, photographs=n, rows=row, columns=column, shares=last.share)
    photograph = grower.photographs[0]
    tiles = (
        (_rgb(photograph), "the photograph"),
        (colours(identity(photograph), grower.photographs), "a colour for each place in it"),
        (_rgb(last.x), "grown"),
        (colours(last.origins, grower.photographs), "where its pixels come from"),
    )
    canvas = tiled(tiles, 2)
    with written(out / f"{name}.png") as path:
        canvas.save(path, format="PNG")
    return [out / f"{name}.png", out / f"{name}.npz"]


def _rgb(x: np.ndarray) -> np.ndarray:
    return np.asarray(_image(x).convert("RGB"))


def _key(grower: Grower, o: GrowOptions) -> str:
    photographs = [x.tobytes().hex()[:64] for x in grower.photographs]
    return key_of([str(v) for k, v in vars(o).items() if k != "yes"], photographs)


def _finished(grower: Grower, noise: PictureNoise, folder: Path, progress: Bar) -> Progress:
    """A finished picture, after the last scale that is kept in a folder."""
    kept: Progress | None = None
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            kept = Progress(int(path.stem), *(file[name] for name in Progress._fields[1:]))
        break  # the finest
    if kept is not None and kept.scale == 0:
        return kept
    after = kept
    for kept in grower.run(noise, progress, after):
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / f"{kept.scale:02d}.npz") as path:
            arrays = {name: getattr(kept, name) for name in Progress._fields[1:]}
            np.savez(path, **arrays)
        for older in folder.glob("*.npz"):
            if int(older.stem) > kept.scale:
                older.unlink()
    assert kept is not None
    return kept


def _image(x: np.ndarray) -> Image.Image:
    pixels = _bytes(x).transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _animated(path: Path, frames: list[Image.Image]) -> None:
    with written(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=80, loop=0
        )
