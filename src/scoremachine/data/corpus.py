"""Images on disk: open, validate, map into memory, slice."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import unknown

if TYPE_CHECKING:
    from scoremachine.data.readers import Contents, Source

LAYOUT = 1  # of the cache; another number is another key
LARGEST_SIDE = 16_384  # pixels that `size` may ask for


def cache_root() -> Path:
    """Where things are kept: $SCOREMACHINE_CACHE, or ~/.cache/scoremachine."""
    return Path(os.environ.get("SCOREMACHINE_CACHE") or "~/.cache/scoremachine").expanduser()


class Corpus:
    """A finite set of images: uint8, shape (N, C, H, W), usually mapped from disk.

    Arguments:
        images: uint8 array or tensor, shape (N, C, H, W), N >= 1, with 1, 3 or 4 channels.
        labels: Class of each image, integers >= 0, shape (N,); None: no classes.
        class_names: Name of class k at place k.
        name: What to call the corpus in messages and records.
        key: What identifies its content; None: a hash of the pixels.
        ids: Where each image came from.

    Raises:
        ValueError: For another dtype or shape, or labels that do not fit.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        name: str = "array",
        key: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        images = images if isinstance(images, np.ndarray) else np.asarray(images)
        if images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype}; expected uint8 from 0 to 255: multiply images in "
                "[0, 1] by 255 and round"
            )
        if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or 0 in images.shape:
            raise ValueError(
                f"images have shape {images.shape}; expected (N, C, H, W) with at least one image "
                "and 1, 3 or 4 channels: for (N, H, W) use images[:, None], for (N, H, W, C) "
                "images.transpose(0, 3, 1, 2)"
            )
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"labels are {labels.dtype} of shape {labels.shape}; expected integers of "
                    f"shape ({len(images)},), one for each image"
                )
            if labels.min() < 0:
                raise ValueError(f"labels go down to {labels.min()}; expected 0 or more")
            labels = labels.astype(np.int64)
        self.images = np.ascontiguousarray(images)
        self.labels = labels
        self.class_names = None if class_names is None else tuple(class_names)
        self.name = name
        self.ids = ids
        self._key = key

    @classmethod
    def open(
        cls,
        source: Any,
        size: int | tuple[int, int] | None = None,
        grayscale: bool = False,
        limit: int | None = None,
        *,
        strict: bool = False,
    ) -> Corpus:
        """Opens images, reading them once into a cache from which they are mapped ever after.

        Arguments:
            source: A built-in name ("digits", "faces", "texture/brick", "photo/chelsea", ...), a
                folder (folders below it are classes), a .zip of images (also with EDM's
                dataset.json), an .npy or .npz file, one picture, "hf:NAME[:SPLIT]", an array, a
                torch Dataset, or the .safetensors of a mixture (`compress`). EXIF rotation is
                honoured; alpha is flattened on white.
            size: Resize every image to cover this side, or (height, width), and crop its centre.
            grayscale: Read colour images as one channel.
            limit: Use at most so many images, evenly spread over the source.
            strict: Refuse a source with unreadable images instead of skipping them.

        Raises:
            FileNotFoundError: For a missing path or an unknown name.
            ValueError: For no images, images of several sizes without `size`, images that must
                not be read (too large, pointing outside), or senseless arguments.
            OSError: Where the cache cannot be written.
        """
        from scoremachine.data import readers as sources

        size = _checked_size(size)
        whole = isinstance(limit, int | np.integer) and not isinstance(limit, bool)
        if limit is not None and (not whole or limit < 1):
            raise ValueError(f"limit is {limit!r}; expected a whole number above 0")
        if isinstance(source, str | Path) and str(source).endswith(".safetensors"):
            from scoremachine.sources.mixture import Mixture

            if (size, limit) != (None, None) or grayscale:
                raise ValueError(
                    f"{source} is a mixture, which is as it was compressed; expected neither size, "
                    "grayscale nor limit"
                )
            return Mixture.load(source)
        if isinstance(source, Corpus):
            if size is not None or grayscale:
                raise ValueError(
                    f"{source.name!r} is open already, so size and grayscale cannot change; "
                    "expected limit alone: give them where it is opened first"
                )
            chosen = _chosen(len(source), limit)
            return source if len(chosen) == len(source) else source.subset(chosen)
        if isinstance(source, np.ndarray) or type(source).__module__ == "torch":
            given = cls(source)
            images = given.images
            ids = [str(i) for i in range(len(given))]
            contents = sources.Contents(ids, images.__getitem__, array=images)
            found = sources.Source("array", ["pixels", given.key], lambda: contents)
        else:
            found = sources.find(source)
        if found.identity is None:
            found.identity = ["content", _content(found.contents())]
        key = _key(found.identity, size, grayscale, limit)
        home = cache_root() / "corpora" / key
        corpus = cls._cached(home, key, strict)
        if corpus is None:
            contents = found.contents()
            if contents.array is not None and _as_it_is(contents.array, size, grayscale):
                return cls._of_array(found, contents, limit)
            _build(home, found.name, contents, limit, size, grayscale, strict)
            corpus = cls._cached(home, key, strict)
        assert corpus is not None
        return corpus

    @classmethod
    def _of_array(cls, found: Source, contents: Contents, limit: int | None) -> Corpus:
        whole = cls(
            contents.array,
            contents.labels,
            class_names=contents.class_names,
            name=found.name,
            key=_key(found.identity, None, False, None),
            ids=contents.ids,
        )
        chosen = _chosen(len(whole), limit)
        return whole if len(chosen) == len(whole) else whole.subset(chosen)

    @classmethod
    def _cached(cls, home: Path, key: str, strict: bool) -> Corpus | None:
        """What the cache holds under a key; None if nothing, or nothing whole."""
        try:
            meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
            shape = tuple(meta["shape"])
            if (home / "images.u8").stat().st_size != np.prod(shape):
                raise ValueError("the file of pixels has another length")
        except OSError:  # nothing there, or nothing that may be read: building tells which
            return None
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the cache at {home} is damaged ({error}): reading again", stacklevel=4)
            shutil.rmtree(home, ignore_errors=True)
            return None
        _tell_skipped(meta["skipped"], meta["name"], strict)
        return cls(
            np.memmap(home / "images.u8", dtype=np.uint8, mode="r", shape=shape),
            meta["labels"],
            class_names=meta["class_names"],
            name=meta["name"],
            key=key,
            ids=meta["ids"],
        )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        C, H, W = self.shape
        classes = "" if self.labels is None else f", {len(np.unique(self.labels))} classes"
        return f"Corpus({self.name!r}, {len(self)} images, {C} x {H} x {W}{classes})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, C, H, W = self.images.shape
        return C, H, W

    @functools.cached_property
    def key(self) -> str:
        """What identifies the content, as hexadecimal digits: cheap where it comes from a file."""
        return self.digest if self._key is None else self._key

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the pixels: the same however they were come by."""
        content = hashlib.sha256(repr(self.images.shape).encode())
        for image in self.images:
            content.update(image)
        return content.hexdigest()[:32]

    @property
    def cache_path(self) -> Path:
        """The folder for what is kept about this corpus; it may not exist yet."""
        return cache_root() / "corpora" / self.key

    def record_path(self, name: str, asked: Any) -> Path:
        """Where a JSON file of what was found is kept, by a digest of what was asked."""
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        return self.cache_path / f"{name}-{digest}.json"

    def indices(self, label: int | str | None = None) -> np.ndarray:
        """The positions of the images with a label, int64, rising; of all images for None.

        Arguments:
            label: A class's name, or its number.

        Raises:
            ValueError: If there are no classes, no such class, or no images in it.
        """
        if label is None:
            return np.arange(len(self))
        if self.labels is None:
            raise ValueError(
                f"the corpus {self.name!r} has no classes, so none is {label!r}: leave the label "
                "out, or open a source with a folder for each class"
            )
        number = self._class_number(label)
        found = np.flatnonzero(self.labels == number)
        if len(found) == 0:
            raise ValueError(
                unknown(f"no image of {self.name!r} has the label {label!r}", "", self._present())
            )
        return found

    def _class_number(self, label: int | str) -> int:
        names = self.class_names or ()
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, int | np.integer) and not isinstance(label, bool):
            return int(label)
        if isinstance(label, str) and label.isdecimal() and not names:
            return int(label)
        raise ValueError(
            unknown(f"{self.name!r} has no class {label!r}", label, self._present(), names)
        )

    def _present(self) -> list[str]:
        numbers = [] if self.labels is None else np.unique(self.labels).tolist()
        names = self.class_names or ()
        return [names[k] if k < len(names) else str(k) for k in numbers]

    def block_means(self, side: int) -> Corpus:
        """The corpus of means of blocks of side x side pixels, rounded to whole gray levels.

        Raises:
            ValueError: If the blocks do not fill the images.
        """
        C, H, W = self.shape
        if side < 1 or H % side or W % side:
            raise ValueError(f"blocks of {side} x {side} pixels do not fill {H} x {W} images")
        means = np.empty((len(self), C, H // side, W // side), dtype=np.uint8)
        for n in range(0, len(self), 4096):
            blocks = self.images[n : n + 4096].reshape(-1, C, H // side, side, W // side, side)
            means[n : n + 4096] = np.round(blocks.mean((3, 5), dtype=np.float32))
        key = hashlib.sha256(f"{self.key} block means {side}".encode()).hexdigest()[:32]
        return Corpus(
            means,
            self.labels,
            class_names=self.class_names,
            name=f"{self.name}, {H // side} x {W // side}",
            key=key,
            ids=self.ids,
        )

    def crops(self, side: int) -> Corpus:
        """The corpus of all side x side crops beside each other, from the upper left corner on.

        Raises:
            ValueError: If the images are smaller.
        """
        C, H, W = self.shape
        if not 1 <= side <= min(H, W):
            raise ValueError(f"no {side} x {side} crop fits into {H} x {W} images")
        rows, columns = H // side, W // side
        cut = self.images[:, :, : rows * side, : columns * side]
        cut = cut.reshape(len(self), C, rows, side, columns, side).transpose(0, 2, 4, 1, 3, 5)
        key = hashlib.sha256(f"{self.key} crops {side}".encode()).hexdigest()[:32]
        return Corpus(cut.reshape(-1, C, side, side), name=self.name, key=key)

    def subset(self, indices: Any) -> Corpus:
        """The corpus of some images: a view where they are consecutive, otherwise a copy.

        Arguments:
            indices: Positions from 0 to N - 1, at least one, or a mask of N truth values.

        Raises:
            ValueError: For none, or others.
        """
        indices = np.asarray(indices)
        if indices.dtype == bool and indices.shape == (len(self),):
            indices = np.flatnonzero(indices)
        right = indices.ndim == 1 and len(indices) > 0 and indices.dtype.kind in "iu"
        if not right or indices.min() < 0 or indices.max() >= len(self):
            raise ValueError(
                f"a subset of {indices.size} positions was asked for; expected one or more whole "
                f"numbers from 0 to {len(self) - 1}, the positions of the images in {self.name!r}"
            )
        indices = indices.astype(np.int64)
        first, n = int(indices[0]), len(indices)
        rows: Any = indices
        if np.array_equal(indices, np.arange(first, first + n)):
            rows = slice(first, first + n)
        part = hashlib.sha256(self.key.encode() + indices.tobytes()).hexdigest()[:32]
        return Corpus(
            self.images[rows],
            None if self.labels is None else self.labels[rows],
            class_names=self.class_names,
            name=self.name,
            key=part,
            ids=None if self.ids is None else [self.ids[i] for i in indices],
        )


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    for side in sides:
        whole = isinstance(side, int | np.integer) and not isinstance(side, bool)
        if len(sides) != 2 or not whole or not 1 <= side <= LARGEST_SIDE:
            raise ValueError(
                f"size is {size!r}; expected a side from 1 to {LARGEST_SIDE:,}, or (height, width)"
            )
    return int(sides[0]), int(sides[1])


def _as_it_is(array: np.ndarray, size: tuple[int, int] | None, grayscale: bool) -> bool:
    """Whether an array of images needs no reading at all."""
    fits = size is None or size == array.shape[2:]
    return fits and array.flags.c_contiguous and (not grayscale or array.shape[1] == 1)


def _chosen(N: int, limit: int | None) -> np.ndarray:
    """At most `limit` of N places, evenly spread."""
    n = N if limit is None else min(limit, N)
    return np.unique(np.linspace(0, N - 1, n).astype(np.int64))


def _content(contents: Contents) -> str:
    """A hash of images, labels and names that can be told apart only by reading them."""
    content = hashlib.sha256(json.dumps([contents.labels, contents.class_names]).encode())
    for i in range(len(contents.ids)):
        try:
            image = np.asarray(contents.read(i))
        except Exception:  # a bad image, which `_read` skips and tells
            content.update(b"bad")
            continue
        content.update(repr(image.shape).encode() + image.tobytes())
    return content.hexdigest()


def _key(identity: Any, size: Any, grayscale: bool, limit: Any) -> str:
    text = json.dumps([LAYOUT, identity, size, grayscale, limit], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tell_skipped(skipped: list[str], name: str, strict: bool) -> None:
    """Warns of images that could not be read, or refuses them."""
    if not skipped:
        return
    some = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
    if strict:
        raise ValueError(
            f"{len(skipped)} of the images in {name} cannot be read ({some}): mend or remove them, "
            "or leave strict out to skip them"
        )
    warnings.warn(
        f"skipped {len(skipped)} of the images in {name}, which cannot be read: {some}",
        stacklevel=5,
    )


class _ColourMet(Exception):  # noqa: N818
    """A colour image among what began as grayscale."""


def _build(
    home: Path,
    name: str,
    contents: Contents,
    limit: int | None,
    size: tuple[int, int] | None,
    grayscale: bool,
    strict: bool,
) -> None:
    """Reads the images into a folder beside `home` and renames it when it is whole."""
    with _new_folder(home) as fresh:
        path = fresh / "images.u8"
        try:
            kept, skipped, shape = _read(path, name, contents, limit, size, 1, force=grayscale)
        except _ColourMet:
            kept, skipped, shape = _read(path, name, contents, limit, size, 3, force=True)
        if not kept:
            raise ValueError(
                f"none of the {len(skipped)} images in {name} can be read "
                f"({', '.join(skipped[:3])}): check that they are whole"
            )
        if strict:
            _tell_skipped(skipped, name, strict)
        labels = contents.labels
        meta = {
            "name": name,
            "shape": [len(kept), *shape],
            "labels": None if labels is None else [labels[i] for i in kept],
            "class_names": contents.class_names,
            "ids": [contents.ids[i] for i in kept],
            "skipped": skipped,
        }
        (fresh / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@contextmanager
def _new_folder(home: Path) -> Iterator[Path]:
    """A temporary folder that becomes `home` if the block ends well, and is removed if not."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(home.parent)
        fresh = Path(tempfile.mkdtemp(prefix=".reading-", dir=home.parent))
    except OSError as error:
        raise OSError(
            f"the cache {home.parent} cannot be written ({error.strerror}): set "
            "SCOREMACHINE_CACHE to a folder that can"
        ) from None
    try:
        yield fresh
        shutil.rmtree(home, ignore_errors=True)
        try:
            fresh.rename(home)
        except OSError:
            if not (home / "meta.json").exists():  # else another process was faster
                raise
    except OSError as error:
        if error.errno in (28, 122):  # no space, no quota
            raise OSError(
                f"the cache {home.parent} is full: make room, or set SCOREMACHINE_CACHE to "
                "another folder"
            ) from None
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Removes what killed processes left more than a day ago."""
    for folder in parent.glob(".reading-*"):
        if time.time() - folder.stat().st_mtime > 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def _read(
    path: Path,
    name: str,
    contents: Contents,
    limit: int | None,
    size: tuple[int, int] | None,
    channels: int,
    force: bool,
) -> tuple[list[int], list[str], tuple[int, ...]]:
    """Writes the pixels one image after the other; returns what was kept, skipped, (C, H, W).

    Raises:
        _ColourMet: At the first colour image, where one channel was tried and is not forced.
    """
    from scoremachine.data.decoding import Refused, is_gray, to_pixels

    kept: list[int] = []
    skipped: list[str] = []
    shapes: Counter[tuple[int, ...]] = Counter()
    chosen = _chosen(len(contents.ids), limit)
    with open(path, "wb") as out, bar(f"Reading {name}", total=len(chosen)) as progress:
        for i in map(int, chosen):
            progress.advance()
            try:
                image = contents.read(i)
                if not force and not is_gray(image):
                    raise _ColourMet
                pixels = to_pixels(image, size, channels)
            except (_ColourMet, Refused, MemoryError):
                raise
            except Exception:  # whatever a decoder raises over a bad file
                skipped.append(contents.ids[i])
                continue
            kept.append(i)
            shapes[pixels.shape] += 1
            if len(shapes) == 1:
                out.write(pixels.data)
    if len(shapes) > 1:
        some = ", ".join(f"{H} x {W} ({n:,})" for (_, H, W), n in shapes.most_common(3))
        raise ValueError(
            f"the images in {name} have {len(shapes)} sizes, such as {some}; give one to "
            f"resize and crop them to, such as size={min(min(s[1:]) for s in shapes)}"
        )
    return kept, skipped, next(iter(shapes), (0, 0, 0))
