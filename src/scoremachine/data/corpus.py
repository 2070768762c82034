"""Images on disk: open, validate, map into memory, slice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoremachine.data import store
from scoremachine.data.store import key_of
from scoremachine.runtime.validation import unknown

if TYPE_CHECKING:
    from scoremachine.data.contents import Contents, Source
    from scoremachine.data.reading import Kept

LAYOUT = 2  # of the kept pixels; another number is another key
LARGEST_SIDE = 16_384  # pixels that `size` may ask for


class Corpus:
    """A finite set of images: uint8, shape (N, C, H, W), usually mapped from disk.

    Arguments:
        images: uint8 array or tensor, shape (N, C, H, W), N >= 1, with 1, 3 or 4 channels.
        labels: Class of each image, integers >= 0, shape (N,); None: no classes.
        class_names: Name of class k at place k.
        name: What to call the corpus in messages and records.
        key: What identifies its content; None: a hash of pixels and labels.
        ids: Where each image came from.

    Raises:
        ValueError: For another dtype or shape, or labels that do not fit.
    """

    has_images = True  # some of which can be held out; a mixture in its place has none

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
        split: str | None = None,
        array: str | None = None,
    ) -> Corpus:
        """Opens images, reading them once into a cache from which they are mapped ever after.

        Classes are those of label files (EDM's dataset.json; metadata.csv, .jsonl or .parquet
        with file_name and label), otherwise of folders; folders of splits (train, test, ...) and
        shards (00000, ...) are no classes. EXIF rotation is applied and alpha flattened on white.
        Every page of a TIFF and every frame of an animation is an image. Gray values of other than
        8 bits are scaled by one factor for the whole corpus: floats must be in [0, 1]; integers
        are taken for 8, 12 or 16 bits, the fewest that hold the largest. Whatever had to be
        decided is told in a warning of one sentence.

        Arguments:
            source: A built-in name ("digits", "faces", "texture/brick", "photo/chelsea", ...; also
                "built-in:NAME"), a folder, a .zip of images, an .npy or .npz file, one picture, a
                list of paths of pictures, "hf:NAME[:SPLIT]", an array, a torch Dataset or a
                datasets.Dataset.
            size: Resize every image to cover this side, or (height, width), and crop its centre.
            grayscale: Read colour images as one channel.
            limit: Use at most so many images, evenly spread over the source.
            strict: Refuse a source with unreadable images instead of skipping them.
            split: The split of a folder, a .zip, an .npz or a Hugging Face data set; None: train,
                where there are several.
            array: Which array of an .npz has the images, or which column of a Hugging Face data
                set.

        Raises:
            FileNotFoundError: For a missing path or an unknown name.
            ValueError: For no images, images of several sizes without `size`, values in a range
                that nothing tells, images that must not be read (too large, pointing outside),
                several splits or arrays of which none is asked for, a name that is a built-in set
                and a path too, or senseless arguments.
            OSError: Where the cache cannot be written.
        """
        from scoremachine.data import readers as sources

        size = _checked_size(size)
        whole = isinstance(limit, int | np.integer) and not isinstance(limit, bool)
        if limit is not None and (not whole or limit < 1):
            raise ValueError(f"limit is {limit!r}; expected a whole number above 0")
        if isinstance(source, str | Path) and str(source).endswith(".safetensors"):
            raise ValueError(
                f"{source} is a mixture, and no corpus of images: open it with Mixture.load"
            )
        if isinstance(source, Corpus):
            if any(given is not None for given in (size, split, array)) or grayscale:
                raise ValueError(
                    f"{source.name!r} is open already, so size, grayscale, split and array cannot "
                    "change; expected limit alone: give them where it is opened first"
                )
            chosen = _chosen(len(source), limit)
            return source if len(chosen) == len(source) else source.subset(chosen)
        if isinstance(source, np.ndarray) or type(source).__module__ == "torch":
            sources.refuse("an array", split=split, array=array)
            given = cls(source)
            images = given.images
            ids = [str(i) for i in range(len(given))]
            contents = sources.Contents(ids, images.__getitem__, array=images)
            found = sources.Source("array", ["pixels", given.key], lambda: contents)
        else:
            found = sources.find(source, split, array)
        if found.identity is None:
            found.identity = ["content", _content(found.contents())]
        entry = store.entry("corpora", _key(found.identity, size, grayscale, limit))
        corpus: Corpus | None = None
        with suppress(FileNotFoundError, store.Damaged):
            corpus = cls._kept(entry, found.name, strict)
        if corpus is None:
            contents = found.contents()
            if contents.array is not None and _as_it_is(contents.array, size, grayscale):
                corpus = cls._of_array(found, contents, limit)
            else:
                with entry.locked(f"reads {found.name}"):
                    try:
                        corpus = cls._kept(entry, found.name, strict)
                    except FileNotFoundError:
                        pass
                    except store.Damaged as damage:
                        entry.set_aside(str(damage))
                    if corpus is None:  # no other process was faster
                        _build(entry, found, contents, (limit, size, grayscale), strict)
                        corpus = cls._kept(entry, found.name, strict)
        if found.hashed is not None:
            found.hashed.keep()
        return corpus

    @classmethod
    def _of_array(cls, found: Source, contents: Contents, limit: int | None) -> Corpus:
        _tell(contents.notes)
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
    def _kept(cls, entry: store.Entry, name: str, strict: bool) -> Corpus:
        """What the store holds; FileNotFoundError if nothing, `store.Damaged` if nothing whole."""
        try:
            meta = json.loads((entry.folder / "meta.json").read_text(encoding="utf-8"))
            shape = tuple(meta["shape"])
            if (entry.folder / "images.u8").stat().st_size != np.prod(shape):
                raise store.Damaged("the file of pixels has another length")
            corpus = cls(
                store.mapped(entry.folder / "images.u8", np.uint8, shape),
                meta["labels"],
                class_names=meta["class_names"],
                name=name,
                ids=meta["ids"],
            )
            corpus.digest = meta["digest"]
            skipped, notes = list(meta["skipped"]), list(meta.get("notes", []))
        except FileNotFoundError:
            if entry.label.exists():
                raise store.Damaged("a file is missing") from None
            raise
        except NotADirectoryError as error:  # building tells that the store is none
            raise FileNotFoundError(str(error)) from None
        except (ValueError, KeyError, TypeError) as error:
            raise store.Damaged(str(error)) from None
        _tell_skipped(skipped, name, strict)
        _tell(notes)
        return corpus

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
        """What identifies the content, as 32 hexadecimal digits, cheaply.

        Corpora of one key have the same pixels and labels. The reverse holds for what is opened
        from folders and zips; a part of a corpus is identified by the whole and how it was taken.
        """
        if self._key is not None:
            return self._key
        if self.labels is None:
            return self.digest
        return key_of(self.digest, self.labels.tolist(), self.class_names)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the pixels: the same however they were come by."""
        return _digest(self.images)

    def entry(self, kind: str) -> store.Entry:
        """Where the store keeps a kind of thing about this corpus; see `store.KINDS`."""
        return store.entry(kind, self.key)

    def record(self, name: str, asked: Any) -> store.Record:
        """The record of what was found, by a digest of what was asked, which JSON can hold."""
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        return store.Record(self.entry("records"), f"{name}-{digest}", self.name)

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
        return Corpus(
            means,
            self.labels,
            class_names=self.class_names,
            name=f"{self.name}, {H // side} x {W // side}",
            key=key_of(self.key, "block means", side),
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
        key = key_of(self.key, "crops", side)
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
        return Corpus(
            self.images[rows],
            None if self.labels is None else self.labels[rows],
            class_names=self.class_names,
            name=self.name,
            key=key_of(self.key, "subset", hashlib.sha256(indices).hexdigest()),
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
    from scoremachine.data.reading import spread

    return spread(N, limit)


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


def _digest(images: np.ndarray) -> str:
    """A hash of pixels (N, C, H, W). The bundled networks' cards hold such: it never changes."""
    content = hashlib.sha256(repr(images.shape).encode())
    for image in images:
        content.update(image)
    return content.hexdigest()[:32]


def _key(identity: Any, *options: Any) -> str:
    """The key of the pixels that are read from a source with some options."""
    return key_of(LAYOUT, identity, *options)


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
        stacklevel=4,
    )


def _tell(notes: Sequence[str]) -> None:
    """Warns of what was decided about a source."""
    for note in notes:
        warnings.warn(note, stacklevel=4)


def _build(
    entry: store.Entry,
    found: Source,
    contents: Contents,
    options: tuple[int | None, tuple[int, int] | None, bool],
    strict: bool,
) -> None:
    """Reads the images into an entry of the store; `options` are limit, size and grayscale.

    Raises:
        ValueError: Where no image can be read, or files change while they are read.
    """
    name, (limit, size, grayscale) = found.name, options
    contents, expected = _expected(contents, limit, size, grayscale)
    store.announce(f"reading {name}", expected)
    with entry.made(name, expected) as fresh:
        path = fresh / "images.u8"
        kept = _read(path, name, contents, size, grayscale, limit)
        if not kept.places:
            raise ValueError(
                f"none of the {len(kept.skipped)} images in {name} can be read: "
                f"{', '.join(kept.skipped[:3])}; expected files that Pillow can open"
            )
        if strict:
            _tell_skipped(kept.skipped, name, strict)
        if found.hashed is not None and found.hashed.changed():
            raise ValueError(
                f"files of {name} changed while they were read: open it again when nothing "
                "writes there any more"
            )
        labels = contents.labels
        meta = {
            "shape": [len(kept.places), *kept.shape],
            "labels": None if labels is None else [labels[i] for i in kept.places],
            "class_names": contents.class_names,
            "ids": kept.ids,
            "skipped": kept.skipped,
            "notes": [*contents.notes, *kept.notes],
            "digest": _digest(
                np.memmap(path, np.uint8, "r", shape=(len(kept.places), *kept.shape))
            ),
        }
        (fresh / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _expected(
    contents: Contents, limit: int | None, size: tuple[int, int] | None, grayscale: bool
) -> tuple[Contents, int]:
    """About how many bytes the pixels will have, by the first image that can be read.

    That image comes with the contents, so that it is not decoded twice.
    """
    from scoremachine.data.decoding import is_gray

    chosen = _chosen(len(contents.ids), limit)
    for i in map(int, chosen[:10]):
        try:
            first = contents.read(i)
            channels = 1 if grayscale or is_gray(first) else 3
        except Exception:  # `_read` tells or skips it
            continue
        H, W = first.shape[1:] if isinstance(first, np.ndarray) else first.size[::-1]
        H, W = size or (H, W)
        return _with_first(contents, {i: first}), len(chosen) * channels * H * W
    return contents, 0


def _with_first(contents: Contents, ready: dict[int, Any]) -> Contents:
    """The same contents, some of which are read already."""

    def read(i: int) -> Any:
        return ready.pop(i) if i in ready else contents.read(i)

    return dataclasses.replace(contents, read=read)


def _read(
    path: Path,
    name: str,
    contents: Contents,
    size: tuple[int, int] | None,
    grayscale: bool,
    limit: int | None,
) -> Kept:
    """Writes the pixels to `path`; Pillow is imported here, when something is to be read."""
    from scoremachine.data import reading

    return reading.read(path, name, contents, size, grayscale, limit)
