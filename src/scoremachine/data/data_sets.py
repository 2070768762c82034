"""Data sets of torch and of the datasets library (Hugging Face)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.data.array_files import channels_first
from scoremachine.data.contents import Contents, Source
from scoremachine.data.decoding import Refused
from scoremachine.data.layout import LABEL_COLUMNS, chosen_split
from scoremachine.runtime.validation import unknown

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "x")


def dataset(source: Any) -> Source:
    """A torch Dataset (or a list) of images, (image, label) pairs or {"image": ..., "label": ...}.

    Its content is its identity.

    Raises:
        ValueError: If it is empty.
    """
    name = type(source).__name__
    if len(source) == 0:
        raise ValueError(f"the data set {name} is empty; expected images")

    def item(i: int) -> tuple[Any, Any]:
        got = source[i]
        if isinstance(got, Mapping):
            image = next((got[k] for k in IMAGE_COLUMNS if k in got), None)
            if image is None:
                raise Refused(
                    f"an item of {name} has the names {', '.join(map(str, got))}; expected the "
                    "image to be called image"
                )
            return image, next((got[k] for k in LABEL_COLUMNS if k in got), None)
        return (got[0], got[1]) if isinstance(got, tuple | list) else (got, None)

    notes: list[str] = []
    labels = None
    if item(0)[1] is not None:
        labels = _labels([item(i)[1] for i in range(len(source))], name, notes)
    classes = getattr(source, "classes", None)
    if labels is not None and classes is None:
        classes = tuple(str(k) for k in range(max(labels) + 1))

    def read(i: int) -> Any:
        return picture(item(i)[0])

    names = None if labels is None or classes is None else tuple(map(str, classes))
    ids = [str(i) for i in range(len(source))]
    return Source(name, None, lambda: Contents(ids, read, labels, names, notes=notes))


def _labels(given: list[Any], name: str, notes: list[str]) -> list[int] | None:
    """Class numbers, or None where not all are; then `notes` says so."""
    try:
        labels = [int(label) for label in given]
        if any(a != b for a, b in zip(labels, given, strict=True)):
            raise ValueError
        if min(labels) >= 0:
            return labels
        why = f"a label is {min(labels)}"
    except (ValueError, TypeError, RuntimeError):
        why = "its labels are no whole numbers"
    notes.append(f"{name} is opened without classes, since {why}")
    return None


def picture(image: Any) -> Any:
    """A data set's image as a PIL image or a uint8 array (C, H, W); floats are in [0, 1].

    Raises:
        Refused: For another dtype, range or shape: then the whole data set has it.
    """
    from PIL import Image

    if isinstance(image, Image.Image):  # a tensor has .mode and .size too
        return image
    array = np.asarray(image)
    if array.dtype.kind == "f" and array.size:
        if not (array.min() >= 0 and array.max() <= 1):
            raise Refused(
                f"a data set's float images range from {array.min():.3g} to {array.max():.3g}; "
                "expected [0, 1]: leave normalization out of its transform, or scale by 1 / 255"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 2:
        array = array[None]
    try:
        return channels_first(array[None], "a data set's image")[0]
    except ValueError as error:
        raise Refused(str(error)) from None


def is_hugging_face(source: Any) -> bool:
    """Whether an object is of the datasets library, which need not be imported."""
    return any(kind.__module__.split(".")[0] == "datasets" for kind in type(source).__mro__)


def hugging_face(text: str, split: str | None = None, column: str | None = None) -> Source:
    """hf:NAME[:SPLIT], through the datasets library; NAME may be a folder of one.

    Raises:
        ValueError: If it cannot be loaded, or as `hugging_face_object`.
    """
    name, _, named = text.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"{text} names no data set; expected hf:NAME or hf:NAME:SPLIT")
    if named and split not in (None, named):
        raise ValueError(f"{text} names the split {named!r} already: leave split={split!r} out")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{text} needs the datasets library: pip install 'scoremachine[hf]'"
        ) from None
    try:
        if (Path(name) / "dataset_info.json").exists() or (
            Path(name) / "dataset_dict.json"
        ).exists():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the data set {name!r} cannot be loaded ({reason}): check its name, the connection, "
            "or give a folder that holds it"
        ) from None
    return hugging_face_object(loaded, text, named or split, column)


def hugging_face_object(
    loaded: Any, name: str | None = None, split: str | None = None, column: str | None = None
) -> Source:
    """A Dataset or DatasetDict of the datasets library.

    Labels are its first ClassLabel, or a column called label that holds whole numbers.

    Arguments:
        loaded: The object.
        name: What to call it.
        split: The split of a DatasetDict; None: train.
        column: The column of images; None: the first.

    Raises:
        ValueError: For a stream, no such split or column, or no images.
    """
    import datasets

    notes: list[str] = []
    name, chosen = name or type(loaded).__name__, None
    if isinstance(loaded, dict):
        chosen, sentence = chosen_split(name, list(loaded), split, "splits of the data set")
        notes += [sentence] if sentence else []
        loaded = loaded[chosen]
    elif split is not None and split != str(loaded.split):
        raise ValueError(
            f"{name} is one split ({loaded.split}), so split={split!r} means nothing: leave it out"
        )
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(
            f"{name} is a stream ({type(loaded).__name__}), whose images are not counted; expected "
            "a Dataset: load it without streaming=True"
        )
    if len(loaded) == 0:
        raise ValueError(f"the data set {name} is empty; expected images")
    columns = [k for k, f in loaded.features.items() if isinstance(f, datasets.Image)]
    if column is not None and column not in loaded.features:
        raise ValueError(unknown(f"{name} has no column {column!r}", column, loaded.features))
    if column is None and not columns:
        raise ValueError(f"{name} has no column of images; it has {', '.join(loaded.features)}")
    if column is None and len(columns) > 1:
        notes.append(
            f"{name} has several columns of images, of which {columns[0]} is opened; for another "
            f"say array={columns[1]!r}, or --array {columns[1]}"
        )
    images = column or columns[0]
    labels, classes = _hugging_face_labels(loaded, name, notes)

    def read(i: int) -> Any:
        return picture(loaded[i][images])

    ids = [str(i) for i in range(len(loaded))]
    contents = Contents(ids, read, labels, classes, notes=notes)
    identity = ["hf", loaded._fingerprint, images, split, chosen]
    return Source(name, identity, lambda: contents)


def _hugging_face_labels(
    loaded: Any, name: str, notes: list[str]
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    import datasets

    plain = loaded.with_format(None)  # labels as they are stored, whatever transform is set
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            labels = _labels(list(plain[column]), name, notes)
            return labels, None if labels is None else tuple(feature.names)
    whole = str(getattr(loaded.features.get("label"), "dtype", "")).lstrip("u").startswith("int")
    labels = _labels(list(plain["label"]), name, notes) if whole else None
    return labels, None if labels is None else tuple(str(k) for k in range(max(labels) + 1))
