"""Where images come from: built-in sets, folders, zips, arrays, torch and Hugging Face data sets.

Each kind of source becomes a `Source`: what identifies its content cheaply, so that what is cached
is found at once, and a way to look at its `Contents`: names, classes, a function that reads one
image. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.data.content import Hashed, of_file
from scoremachine.runtime.validation import unknown

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
LARGEST_ENTRY = 2**30  # bytes of one file inside a zip


@dataclass
class Contents:
    """The images of a source, not read yet.

    Attributes:
        ids: A name for every image.
        read: Image i as a PIL image or a uint8 array (C, H, W). Whatever it raises means that the
            image is bad, unless it is `pixels.Refused`.
        labels: Its class, as a position in `class_names`.
        class_names: The classes.
        array: All images at once, uint8 (N, C, H, W), where they lie in one array already.
    """

    ids: Sequence[str]
    read: Callable[[int], Any]
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    array: np.ndarray | None = None


@dataclass
class Source:
    """Where images come from.

    Attributes:
        name: What to call it in messages.
        identity: What tells this content from another, as JSON can hold it; None where only
            reading it all would tell.
        contents: Finds what it holds.
        hashed: The files that it is read from, where there are some.
    """

    name: str
    identity: Any
    contents: Callable[[], Contents]
    hashed: Hashed | None = None


def find(source: Any) -> Source:
    """The source behind whatever `Corpus.open` takes.

    Raises:
        FileNotFoundError: For a missing path or an unknown name.
        ValueError: For a source that holds no images, or must not be read.
    """
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if not text.strip():
            raise ValueError(
                "the name of the images is empty; expected a built-in set, a folder, a .zip, an "
                ".npy or .npz file, or hf:NAME (. is the folder that you are in)"
            )
        if text.startswith("hf:"):
            return hugging_face(text)
        path = Path(text)
        if text in BUILT_IN and isinstance(source, str) and not ("/" in text and path.exists()):
            return built_in(text)
        if path.is_dir():
            return folder(path)
        if path.suffix.lower() == ".zip" and path.is_file():
            return archive(path)
        if path.suffix.lower() in (".npy", ".npz") and path.is_file():
            return array_file(path)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            return files(path.name, path.parent, [path.name])
        if path.exists():
            raise ValueError(
                f"{text} is no source of images; expected a folder, a .zip, an .npy or .npz file, "
                "or one picture"
            )
        raise FileNotFoundError(_unknown(text))
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return dataset(source)
    raise ValueError(
        f"a corpus cannot be opened from {type(source).__name__}; expected a name, a path, "
        "hf:NAME, an array or a torch Dataset"
    )


def _unknown(text: str) -> str:
    path = Path(text)
    beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return unknown(f"no file, folder or built-in set is called {text!r}", text, BUILT_IN, beside)


# ---------------------------------------------------------------------------------------------
# Images that come inside dependencies


def _digits() -> tuple[np.ndarray, Any]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images[:, None] * (255 / 16)), bunch.target


def _faces() -> tuple[np.ndarray, Any]:
    from skimage.data import lfw_subset

    return np.rint(lfw_subset()[:100, None] * 255), None  # the other hundred are no faces


def _skimage(name: str) -> Callable[[], tuple[np.ndarray, Any]]:
    def load() -> tuple[np.ndarray, Any]:
        from skimage import data

        picture = getattr(data, name)()
        return np.atleast_3d(picture).transpose(2, 0, 1)[None], None

    return load


def _sklearn(name: str) -> Callable[[], tuple[np.ndarray, Any]]:
    def load() -> tuple[np.ndarray, Any]:
        from sklearn.datasets import load_sample_image

        return load_sample_image(name).transpose(2, 0, 1)[None], None

    return load


BUILT_IN: dict[str, Callable[[], tuple[np.ndarray, Any]]] = {
    "digits": _digits,
    "faces": _faces,
    **{f"texture/{name}": _skimage(name) for name in ("brick", "grass", "gravel")},
    **{f"photo/{name}": _skimage(name) for name in ("astronaut", "chelsea", "coffee", "rocket")},
    "photo/hubble": _skimage("hubble_deep_field"),
    **{f"photo/{name}": _sklearn(f"{name}.jpg") for name in ("china", "flower")},
}


def built_in(name: str) -> Source:
    """A built-in set: digits (8 x 8), faces (25 x 25), or one texture or photo."""
    images, target = BUILT_IN[name]()
    array = images.astype(np.uint8)
    classes = None if target is None else tuple(map(str, np.unique(target)))
    labels = None if target is None else target.tolist()
    ids = [f"{name}/{i}" for i in range(len(array))]
    contents = Contents(ids, array.__getitem__, labels, classes, array)
    digest = hashlib.sha256(array.tobytes()).hexdigest()  # of this version of the dependency
    return Source(name, ["built-in", name, digest], lambda: contents)


# ---------------------------------------------------------------------------------------------
# Files


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts 2 before 10."""
    pieces = re.split(r"(\d+)", text)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]


def classes_of(paths: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Labels from folders: the path below what all images share names the class."""
    folders = [posixpath.dirname(path) for path in paths]
    shared = posixpath.commonpath(set(folders)) if all(folders) else ""
    below = len(shared) + 1 if shared else 0
    names = [folder[below:] for folder in folders]
    if not all(names):
        return None, None
    classes = tuple(sorted(set(names), key=natural))
    place = {name: k for k, name in enumerate(classes)}
    return [place[name] for name in names], classes


def folder(root: Path) -> Source:
    """All images below a folder; links are followed, loops refused."""
    found: list[str] = []

    def visit(here: Path, above: tuple[Path, ...], below: str = "") -> None:
        real = here.resolve()
        if real in above:
            raise ValueError(
                f"{here} is a link back to {real}, a loop: remove the link or open the folder "
                "that it points to"
            )
        for entry in sorted(os.scandir(here), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                visit(Path(entry.path), (*above, real), f"{below}{entry.name}/")
            elif entry.name[entry.name.rfind(".") :].lower() in SUFFIXES:
                found.append(below + entry.name)

    try:
        visit(root, ())
    except OSError as error:
        if error.errno == 40:  # ELOOP: a link that points to itself
            raise ValueError(f"{error.filename} is a loop of links: remove it") from None
        raise
    if not found:
        raise ValueError(
            f"the folder {root} holds no images; expected files such as .png or .jpg in it or in "
            "folders below it"
        )
    return files(root.name or str(root), root, found)


def files(name: str, root: Path, paths: list[str]) -> Source:
    """Image files below `root`."""
    hashed = Hashed(root, paths)

    def contents() -> Contents:
        from scoremachine.data.decoding import decoded

        ids = sorted(paths, key=natural)

        def read(i: int) -> Any:
            return decoded((root / ids[i]).read_bytes(), ids[i])

        return Contents(ids, read, *classes_of(ids))

    return Source(name, ["files", *paths[:1], hashed.digest], contents, hashed)


def archive(path: Path) -> Source:
    """The images in a zip; its dataset.json, where there is one, names their classes."""
    try:
        opened = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no readable zip ({error}); it may be truncated: fetch it again"
        ) from None
    hashed = of_file(path)
    return Source(path.name, ["zip", hashed.digest], lambda: _entries(path, opened), hashed)


def _entries(path: Path, opened: zipfile.ZipFile) -> Contents:
    from scoremachine.data.decoding import decoded

    entries = {}
    for info in opened.infolist():
        place = info.filename.replace("\\", "/")
        if place.startswith("/") or ".." in place.split("/") or re.match(r"[A-Za-z]:", place):
            raise ValueError(
                f"{path} holds an entry that points outside, {info.filename!r}: do not trust this "
                "file; pack the images again"
            )
        if info.file_size > LARGEST_ENTRY:
            raise ValueError(
                f"{path} holds {place!r}, which unpacks to {info.file_size:,} bytes; expected at "
                f"most {LARGEST_ENTRY:,}: it may be a decompression bomb"
            )
        hidden = any(part.startswith((".", "__MACOSX")) for part in place.split("/"))
        if info.is_dir() or hidden or posixpath.splitext(place)[1].lower() not in SUFFIXES:
            continue
        entries[place] = info
    if not entries:
        raise ValueError(f"{path} holds no images; expected entries such as .png or .jpg")
    ids = sorted(entries, key=natural)
    labels, classes = classes_of(ids)
    if "dataset.json" in opened.namelist():
        labels, classes = _edm_labels(path, opened.read("dataset.json"), ids)

    def read(i: int) -> Any:
        return decoded(opened.read(entries[ids[i]]), ids[i])

    return Contents(ids, read, labels, classes)


def _edm_labels(
    path: Path, text: bytes, names: list[str]
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Labels of the EDM data set layout: {"labels": [[name, class], ...] or null}."""
    try:
        listed = json.loads(text)["labels"]
        if listed is None:
            return None, None
        label = {name.replace("\\", "/"): int(value) for name, value in listed}
        labels = [label[name] for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the dataset.json in {path} gives no class to every image ({error!r}); expected "
            '{"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}'
        ) from None
    return labels, tuple(str(k) for k in range(max(labels) + 1))


# ---------------------------------------------------------------------------------------------
# Arrays and data sets


def array_file(path: Path) -> Source:
    """An .npy or .npz file of uint8 images (N, C, H, W), (N, H, W, C) or (N, H, W)."""
    labels = None
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            array = loaded
        else:
            with loaded:
                array = _member(path, loaded, ("images", "x", "data", "arr_0"))
                given = [k for k in ("labels", "label", "y") if k in loaded.files]
                labels = loaded[given[0]] if given else None
    except (ValueError, EOFError, zipfile.BadZipFile, OSError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as plain arrays ({error}); pickles are refused: save uint8 "
            "images with numpy.save or numpy.savez"
        ) from None
    array = channels_first(array, str(path))
    if labels is not None:
        if labels.shape != (len(array),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"{path} holds labels that are {labels.dtype} of shape {labels.shape}; expected "
                f"{len(array)} whole numbers from 0 up, one for each image"
            )
        labels = labels.tolist()
    classes = None if labels is None else tuple(str(k) for k in range(max(labels) + 1))
    hashed = of_file(path)
    ids = [str(i) for i in range(len(array))]
    contents = Contents(ids, array.__getitem__, labels, classes, array)
    return Source(path.name, ["array", hashed.digest], lambda: contents, hashed)


def _member(path: Path, loaded: Any, wanted: tuple[str, ...]) -> np.ndarray:
    for name in wanted:
        if name in loaded.files:
            return loaded[name]
    pictures = [k for k in loaded.files if loaded[k].dtype == np.uint8 and loaded[k].ndim in (3, 4)]
    if len(pictures) == 1:
        return loaded[pictures[0]]
    raise ValueError(f"no array called {' or '.join(wanted)}; it has {', '.join(loaded.files)}")


def channels_first(array: np.ndarray, what: str) -> np.ndarray:
    """uint8 images as (N, C, H, W), from that, (N, H, W, C) or (N, H, W); else a ValueError."""
    if array.dtype != np.uint8:
        raise ValueError(
            f"{what} holds {array.dtype}; expected uint8 from 0 to 255: multiply images in [0, 1] "
            "by 255 and round"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3, 4) and array.shape[3] in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"{what} has shape {array.shape}; expected (N, C, H, W), (N, H, W, C) or (N, H, W) "
            "with 1, 3 or 4 channels and at least one image"
        )
    return array


def dataset(source: Any) -> Source:
    """A torch Dataset of images, or of (image, label) pairs. Its content is its identity."""

    def item(i: int) -> tuple[Any, Any]:
        got = source[i]
        return (got[0], got[1]) if isinstance(got, tuple | list) else (got, None)

    if len(source) == 0:
        raise ValueError(f"the data set {type(source).__name__} is empty; expected images")
    labels = None
    if item(0)[1] is not None:
        labels = [int(item(i)[1]) for i in range(len(source))]
    classes = getattr(source, "classes", None)
    if labels is not None and classes is None:
        classes = tuple(str(k) for k in range(max(labels) + 1))

    def read(i: int) -> Any:
        return picture(item(i)[0])

    names = None if labels is None or classes is None else tuple(map(str, classes))
    ids = [str(i) for i in range(len(source))]
    return Source(type(source).__name__, None, lambda: Contents(ids, read, labels, names))


def picture(image: Any) -> Any:
    """A data set's image as a PIL image or a uint8 array (C, H, W); floats are in [0, 1]."""
    from PIL import Image

    if isinstance(image, Image.Image):  # a tensor has .mode and .size too
        return image
    array = np.asarray(image)
    if array.dtype.kind == "f":
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"a data set's float images range from {array.min():.3g} to {array.max():.3g}; "
                "expected [0, 1]: leave normalization out of its transform"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 2:
        array = array[None]
    return channels_first(array[None], "a data set's image")[0]


def hugging_face(text: str) -> Source:
    """hf:NAME[:SPLIT], through the datasets library; NAME may be a folder of one."""
    name, _, split = text.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"{text} names no data set; expected hf:NAME or hf:NAME:SPLIT")
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
    if isinstance(loaded, dict):
        split = split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise ValueError(f"{name!r} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    columns = [k for k, f in loaded.features.items() if isinstance(f, datasets.Image)]
    if not columns:
        raise ValueError(f"{name!r} has no column of images; it has {', '.join(loaded.features)}")
    labels = classes = None
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            labels, classes = [int(k) for k in loaded[column]], tuple(feature.names)
            break

    def read(i: int) -> Any:
        return loaded[i][columns[0]]

    ids = [str(i) for i in range(len(loaded))]
    contents = Contents(ids, read, labels, classes)
    return Source(text, ["hf", loaded._fingerprint], lambda: contents)
