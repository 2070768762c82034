"""Images in .npy and .npz files."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.data.content import of_file
from scoremachine.data.contents import Contents, Source
from scoremachine.data.layout import chosen_split, numbered, split_named
from scoremachine.runtime.validation import unknown

WHOLE = ("images", "x", "data", "arr_0")  # names of the one array of images, the likeliest first
IMAGE_WORDS = {"image", "images", "img", "imgs", "x", "data", "pixels", "arr", "0"}
LABEL_WORDS = ("labels", "label", "y", "targets", "target", "classes")


def array_file(path: Path, split: str | None = None, name: str | None = None) -> Source:
    """An .npy or .npz file of uint8 images (N, C, H, W), (N, H, W, C) or (N, H, W).

    Of an .npz, `name` is the array; otherwise it is the one called images, x, data or arr_0, or
    the only one of uint8 images, or that of a split ("train" unless asked), as in x_train and
    train_images. Labels are in the array of the same name with labels, label or y in it.

    Raises:
        ValueError: For what holds no such arrays, or several of which none is meant; for pickles.
    """
    notes: list[str] = []
    labels: list[int] | None = None
    classes: tuple[str, ...] | None = None
    numbers: np.ndarray | None = None
    try:
        if path.suffix.lower() == ".npy":
            _only_for_npz(path, split, name)
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is an .npy with another suffix: rename it")
            with loaded:
                headers = _headers(loaded)
                name, sentence = _chosen(path.name, headers, split, name)
                notes += [sentence] if sentence else []
                array = loaded[name]
                alone = len(_images(headers)) < 2
                if labelled := _labels_of(name, headers, alone):
                    numbers = loaded[labelled]
    except _ExplainedError as error:
        raise ValueError(str(error)) from None
    except (ValueError, EOFError, zipfile.BadZipFile, OSError, TypeError, RuntimeError) as error:
        raise ValueError(_unreadable(path, error)) from None
    if array.ndim == 3 and numbers is not None and numbers.shape[:1] == array.shape[:1]:
        array = array[:, None]  # as many gray images as labels, whatever their width
    array = channels_first(array, str(path) if name is None else f"{name} in {path}", notes)
    if numbers is not None:
        labels, classes = _classes(path, numbers, len(array), notes)
    hashed = of_file(path)
    identity = ["array", hashed.digest, name, split]
    ids = [str(i) for i in range(len(array))]
    contents = Contents(ids, array.__getitem__, labels, classes, array, notes)
    return Source(path.name, identity, lambda: contents, hashed)


class _ExplainedError(ValueError):
    """An error that says all there is to say."""


def _only_for_npz(path: Path, split: str | None, name: str | None) -> None:
    for option, value in (("split", split), ("array", name)):
        if value is not None:
            raise _ExplainedError(
                f"{path} holds one array, so {option}={value!r} means nothing: leave it out"
            )


def _unreadable(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        begin = file.read(6)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "encrypted" in text:
        return f"{path} is encrypted: unpack it with its password, and open what comes out of it"
    if begin[:2] != b"PK" and begin != b"\x93NUMPY":
        return (
            f"{path} is no array file of numpy, and pickles are refused; expected uint8 images "
            "saved with numpy.save or numpy.savez"
        )
    if "allow_pickle" in text or "Python objects" in text:
        text += "; pickles are refused"
    return (
        f"{path} cannot be read as plain arrays ({text}); expected uint8 images saved with "
        "numpy.save or numpy.savez"
    )


def _headers(loaded: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array in an .npz, whose numbers are not read."""
    headers = {}
    for name in loaded.files:
        member = name if name in loaded.zip.namelist() else f"{name}.npy"
        with loaded.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        headers[name] = shape, dtype
    return headers


def _chosen(
    file: str, headers: dict[str, Any], split: str | None, name: str | None
) -> tuple[str, str]:
    """The array of images, and a sentence that says so where it was one of several."""
    if name is not None:
        if split is not None:
            raise _ExplainedError(
                f"array={name!r} names the array already: leave split={split!r} out"
            )
        if name not in headers:
            raise _ExplainedError(unknown(f"{file} has no array {name!r}", name, headers))
        return name, ""
    images = _images(headers)
    splits = {k: _split_of(k) for k in images}
    by_split = {s: k for k, s in splits.items() if s is not None}
    if split is None:
        for whole in WHOLE:
            if whole in headers:
                return whole, ""
        if len(images) == 1:
            return images[0], ""
    if by_split and len(by_split) == sum(s is not None for s in splits.values()):
        try:
            chosen, sentence = chosen_split(file, list(by_split), split, ", ".join(images))
        except ValueError as error:
            raise _ExplainedError(str(error)) from None
        return by_split[chosen], sentence
    there = ", ".join(f"{k} ({dtype}, {shape})" for k, (shape, dtype) in headers.items())
    if split is not None and not by_split:
        raise _ExplainedError(f"{file} has no split {split!r}; it has the arrays {there}")
    if not images:
        raise _ExplainedError(
            f"{file} has no array of uint8 images (N, C, H, W), (N, H, W, C) or (N, H, W); it has "
            f"{there}: multiply images in [0, 1] by 255 and round"
        )
    raise _ExplainedError(
        f"{file} has several arrays that may be images; expected one to be asked for, as "
        f"array={images[0]!r} or --array {images[0]}; it has {there}"
    )


def _images(headers: dict[str, Any]) -> list[str]:
    """The arrays that may be images."""
    return [k for k, (shape, dtype) in headers.items() if dtype == np.uint8 and len(shape) > 2]


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _split_of(name: str) -> str | None:
    found = [word for word in _words(name) if split_named(word)]
    return found[0] if len(found) == 1 else None


def _labels_of(name: str, names: Iterable[str], alone: bool) -> str | None:
    """The array of labels for an array of images: its name, with another word for images.

    For the only array of images (`alone`) also that called labels, label or y.
    """
    rest = set(_words(name)) - IMAGE_WORDS
    for meant in (rest, set()) if alone else (rest,):
        for word in LABEL_WORDS:
            for other in names:
                words = set(_words(other))
                if word in words and words - set(LABEL_WORDS) == meant and other != name:
                    return other
    return None


def _classes(
    path: Path, labels: np.ndarray, N: int, notes: list[str]
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == N:
        notes.append(
            f"{path.name} has {labels.shape[1]} labels for each image, so it is opened without "
            "classes"
        )
        return None, None
    if labels.dtype.kind in "US" and labels.shape == (N,):
        return numbered([str(k) for k in labels.astype(np.str_)])
    if labels.shape != (N,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"{path} holds labels that are {labels.dtype} of shape {labels.shape}; expected "
            f"{N} whole numbers from 0 up, one for each image"
        )
    return labels.tolist(), tuple(str(k) for k in range(int(labels.max()) + 1))


def channels_first(array: np.ndarray, what: str, notes: list[str] | None = None) -> np.ndarray:
    """uint8 images as (N, C, H, W), from that, (N, H, W, C), (N, H, W) or one (H, W, C).

    Arguments:
        array: The images.
        what: What to call them.
        notes: Gains a sentence where an array (H, W, 3) or (H, W, 4) is read as one image.

    Raises:
        ValueError: For another dtype or shape, and for (3, H, W) and (4, H, W), which may be gray
            images or one in colour.
    """
    if array.dtype != np.uint8:
        convert = "multiply images in [0, 1] by 255 and round"
        if array.dtype.kind in "iu":
            convert = "if that is their range, convert them with .astype(numpy.uint8)"
        raise ValueError(f"{what} holds {array.dtype}; expected uint8 from 0 to 255: {convert}")
    if array.ndim == 3 and array.shape[2] in (3, 4):
        if notes is not None:
            notes.append(
                f"{what} has shape {array.shape}: it is read as one colour image (H, W, C)"
            )
        array = array[None]
    elif array.ndim == 3 and array.shape[0] in (3, 4):
        n, *sides = array.shape
        raise ValueError(
            f"{what} has shape {array.shape}, which may be {n} gray images or one of {n} channels; "
            f"expected {(n, 1, *sides)} or {(1, n, *sides)}: reshape it"
        )
    elif array.ndim == 3:
        array = array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3, 4) and array.shape[3] in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"{what} has shape {array.shape}; expected (N, C, H, W), (N, H, W, C) or (N, H, W) "
            "with 1, 3 or 4 channels and at least one image"
        )
    return array
