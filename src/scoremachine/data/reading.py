"""All images of a source, decoded into one file of uint8 pixels by one rule for the whole corpus.

Whether the corpus is gray, how deep its pixels are and how many pages its files have is met while
reading: then it begins again with what is known now, at most once for each of the three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.data import decoding
from scoremachine.data.contents import Contents
from scoremachine.runtime.progress import bar

DARKEST = 15  # of 255: 12 bits stored in the lower part of 16 reach no more


@dataclass
class Kept:
    """What was read.

    Attributes:
        places: The file each image comes from, as a position in `Contents.ids`.
        ids: A name for each image: the file's, with [page] (from 0) where it has several.
        shape: (C, H, W).
        skipped: What could not be read, with the decoder's reason.
        notes: What was decided, one sentence each.
    """

    places: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = (0, 0, 0)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Rule:
    """How every image is read.

    Attributes:
        files: The files to read, and of each the pages (None: all of them).
        size: (H, W), or None.
        channels: 1 or 3.
        any_colour: Whether colour images are read with so many channels too.
        whites: What becomes 255, by `decoding.depth`; None: not known yet.
        expand: Whether files with several pages may be met.
    """

    files: dict[int, Sequence[int] | None]
    size: tuple[int, int] | None
    channels: int
    any_colour: bool
    expand: bool
    whites: dict[str, float] | None = None


class _ColourMet(Exception):  # noqa: N818
    """A colour image among what began as grayscale."""


class _DepthMet(Exception):  # noqa: N818
    """An image of other than 8 bits before the range of values is known."""


class _PagesMet(Exception):  # noqa: N818
    """A file with several pages where not all images are asked for."""


def spread(N: int, limit: int | None) -> np.ndarray:
    """At most `limit` of N places, evenly spread."""
    n = N if limit is None else min(limit, N)
    return np.unique(np.linspace(0, N - 1, n).astype(np.int64))


def read(
    path: Path,
    name: str,
    contents: Contents,
    size: tuple[int, int] | None = None,
    grayscale: bool = False,
    limit: int | None = None,
) -> Kept:
    """Writes the pixels to `path`, one image after the other.

    Every page or frame of a file is an image. Values of other than 8 bits are scaled by one factor
    for the whole corpus (`decoding.white_of`).

    Arguments:
        path: The file to write, of uint8, the images in order, each (C, H, W).
        name: What to call the source in messages.
        contents: What to read.
        size: Resize to cover (H, W), and crop the centre.
        grayscale: One channel.
        limit: Read at most so many images, evenly spread.

    Raises:
        ValueError: For images of several sizes, or with values of a range that nothing tells.
        decoding.Refused: For an image that must not be read.
    """
    files: dict[int, Sequence[int] | None]
    files = dict.fromkeys(map(int, spread(len(contents.ids), limit)))
    rule = _Rule(files, size, 1, grayscale, expand=limit is None)
    notes: list[str] = []
    while True:
        try:
            kept = _attempt(path, name, contents, rule)
        except _ColourMet:
            rule = replace(rule, channels=3, any_colour=True)
        except _DepthMet:
            whites, notes = _whites(name, contents, rule)
            rule = replace(rule, whites=whites)
        except _PagesMet:
            rule = replace(rule, files=_spread_pages(contents, limit), expand=True, whites=None)
        else:
            kept.notes = notes + kept.notes
            return kept


def _attempt(path: Path, name: str, contents: Contents, rule: _Rule) -> Kept:
    kept = Kept()
    shapes: Counter[tuple[int, ...]] = Counter()
    brightest: list[int] = []  # of images with colour in 16 bits
    several = 0
    with open(path, "wb") as out, bar(f"Reading {name}", total=len(rule.files)) as progress:
        for i in rule.files:
            progress.advance()
            found = 0
            for page, image in _images(contents, i, rule, kept):
                label = contents.ids[i] if page is None else f"{contents.ids[i]}[{page}]"
                try:
                    pixels = _pixels(image, rule, brightest)
                except (_ColourMet, _DepthMet, decoding.Refused, MemoryError):
                    raise
                except Exception as error:  # whatever a decoder raises over a bad file
                    kept.skipped.append(f"{label} ({decoding.reason(error)})")
                    continue
                found += page is not None
                kept.places.append(i)
                kept.ids.append(label)
                shapes[pixels.shape] += 1
                if len(shapes) == 1:
                    out.write(pixels.data)
            several += found > 0
    if len(shapes) > 1:
        some = ", ".join(f"{H} x {W} ({n:,})" for (_, H, W), n in shapes.most_common(3))
        raise ValueError(
            f"the images in {name} have {len(shapes)} sizes, such as {some}; give one to "
            f"resize and crop them to, such as size={min(min(s[1:]) for s in shapes)}"
        )
    if brightest and max(brightest) <= DARKEST:
        raise ValueError(
            f"the colour images in {name} store 16 bits, but their values fit in the lower 12, "
            "and only the upper 8 are read: multiply the values by 16, or save 8 bits"
        )
    if several:
        files = "a file" if several == 1 else f"{several:,} files"
        kept.notes.append(
            f"{name} has {files} with several pages or frames: each is an image of its own"
        )
    kept.shape = next(iter(shapes), (0, 0, 0))
    return kept


def _images(
    contents: Contents, i: int, rule: _Rule, kept: Kept
) -> Iterator[tuple[int | None, Any]]:
    """The page (None: the file has one) and image of one file; tells `kept` what is bad."""
    label = contents.ids[i]
    try:
        image = contents.read(i)
        chosen = rule.files[i]
        every = decoding.pages(image)
        if len(every) == 1:
            yield None, image
            return
        if not rule.expand:
            raise _PagesMet
    except (_PagesMet, decoding.Refused, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises over a bad file
        kept.skipped.append(f"{label} ({decoding.reason(error)})")
        return
    for page in every if chosen is None else chosen:
        try:
            image.seek(page)
            decoding.check_sides(image, f"{label}[{page}]")
        except (decoding.Refused, MemoryError):
            raise
        except Exception as error:
            kept.skipped.append(f"{label}[{page}] ({decoding.reason(error)})")
            continue
        yield page, image


def _pixels(image: Any, rule: _Rule, brightest: list[int]) -> np.ndarray:
    deep = decoding.is_deep_colour(image)  # before its pixels are loaded
    kind = decoding.depth(image)
    if kind is not None and rule.whites is None:
        raise _DepthMet
    if not rule.any_colour and not decoding.is_gray(image):
        raise _ColourMet
    white = None if kind is None else (rule.whites or {}).get(kind)
    pixels = decoding.to_pixels(image, rule.size, rule.channels, white)
    if deep:
        bands = zip(image.getbands(), np.atleast_2d(image.getextrema()), strict=True)
        brightest.append(max(int(high) for band, (_, high) in bands if band != "A"))
    return pixels


def _whites(name: str, contents: Contents, rule: _Rule) -> tuple[dict[str, float], list[str]]:
    """What becomes white, by depth, from the values of all images; and sentences that say so."""
    ranges: dict[str, tuple[float, float]] = {}
    rule = replace(rule, expand=True)
    with bar(f"Measuring {name}", total=len(rule.files)) as progress:
        for i in rule.files:
            progress.advance()
            for _, image in _images(contents, i, rule, Kept()):
                kind = decoding.depth(image)
                if kind is None:
                    continue
                try:
                    low, high = decoding.extremes(image)
                except MemoryError:
                    raise
                except Exception:  # a bad image, which `_attempt` skips and tells
                    continue
                least, largest = ranges.get(kind, (low, high))
                ranges[kind] = min(low, least), max(high, largest)
    found = {kind: decoding.white_of(kind, *ranges[kind], name) for kind in ranges}
    whites = {kind: white for kind, (white, _) in found.items()}
    return whites, [sentence for _, sentence in found.values()]


def _spread_pages(contents: Contents, limit: int | None) -> dict[int, Sequence[int] | None]:
    """At most `limit` pages, evenly spread over those of all files."""
    every: list[tuple[int, int]] = []
    for i in range(len(contents.ids)):
        try:
            found = decoding.pages(contents.read(i))
        except (decoding.Refused, MemoryError):
            raise
        except Exception:  # a bad file, which `_attempt` skips and tells
            found = [0]
        every += [(i, page) for page in found]
    chosen: dict[int, list[int]] = {}
    for place in spread(len(every), limit):
        i, page = every[int(place)]
        chosen.setdefault(i, []).append(page)
    return dict(chosen)
