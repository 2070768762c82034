"""Where images come from: built-in sets, folders, zips, lists of files, arrays and data sets.

Each kind of source becomes a `Source`: what identifies its content cheaply, so that what is cached
is found at once, and a way to look at its `Contents`: names, classes, a function that reads one
file. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.data.array_files import array_file
from scoremachine.data.content import Hashed, of_file
from scoremachine.data.contents import Contents, Source
from scoremachine.data.data_sets import (
    dataset,
    hugging_face,
    hugging_face_object,
    is_hugging_face,
)
from scoremachine.data.decoding import decoded, suffixes
from scoremachine.data.layout import EDM, METADATA, labelled, natural, of_split
from scoremachine.runtime.validation import unknown

LARGEST_ENTRY = 2**30  # bytes of one file inside a zip
BUILT_IN_PREFIX = "built-in:"
READING = 2  # of the rules by which files become images and classes; another number, another key
# what lies beside images and is no surprise: texts, tables, what systems leave, label formats
NO_IMAGES = {
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".xml", ".yaml", ".yml", ".toml",
    ".html", ".htm", ".parquet", ".log", ".ini", ".db", ".py", ".ipynb", ".sh", ".m", ".pdf",
    ".sha256", ".md5", ".caption", ".lnk", ".ds_store",
}  # fmt: skip
NO_SUFFIX = {
    "license",
    "licence",
    "readme",
    "copying",
    "notice",
    "authors",
    "makefile",
    "changelog",
}
INSTEAD = {  # what to do about other files
    ".tar": "unpack it and open the folder", ".gz": "unpack it and open the folder",
    ".tgz": "unpack it and open the folder", ".7z": "unpack it and open the folder",
    ".rar": "unpack it and open the folder", ".arrow": "open its folder as hf:PATH",
    ".parquet": "open its folder as hf:PATH", ".heic": "convert them to .png or .jpg",
    ".pt": "save its images as uint8 with numpy.save", ".pth": "save its images as uint8 with "
    "numpy.save", ".pkl": "pickles are refused: save its images as uint8 with numpy.save",
    ".mat": "save its images as uint8 with numpy.save", ".h5": "save its images as uint8 with "
    "numpy.save", ".mp4": "extract its frames as .png", ".safetensors": "give its path itself",
}  # fmt: skip


def find(source: Any, split: str | None = None, array: str | None = None) -> Source:
    """The source behind whatever `Corpus.open` takes.

    Raises:
        FileNotFoundError: For a missing path or an unknown name.
        ValueError: For a source that holds no images, must not be read, or has no such split or
            array; for a name that is a built-in set and a path too.
    """
    if isinstance(source, str | os.PathLike):
        return _named(source, os.fspath(source), split, array)
    if is_hugging_face(source):
        return hugging_face_object(source, None, split, array)
    refuse(type(source).__name__, split=split, array=array)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        if _holds_paths(source):
            return listed([os.fspath(path) for path in source])
        return dataset(source)
    instead = ""
    if isinstance(source, Iterable):
        instead = ": make a list of it"
    if hasattr(source, "dataset"):
        instead = ": give its .dataset"
    raise ValueError(
        f"a corpus cannot be opened from {type(source).__name__}; expected a name, a path, a list "
        f"of paths, hf:NAME, an array or a torch Dataset{instead}"
    )


def refuse(name: str, **options: Any) -> None:
    """ValueError for an option (split, array) that a source does not have."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} has no {option}s, so {option}={value!r} means nothing: leave it out"
            )


def _named(source: Any, text: str, split: str | None, array: str | None) -> Source:
    if not text.strip():
        raise ValueError(
            "the name of the images is empty; expected a built-in set, a folder, a .zip, an "
            ".npy or .npz file, or hf:NAME (. is the folder that you are in)"
        )
    if text.startswith("hf:"):
        return hugging_face(text, split, array)
    path, suffix = Path(text), Path(text).suffix.lower()
    if path.is_file() and suffix in (".npy", ".npz"):
        return array_file(path, split, array)
    refuse(text, array=array)
    if isinstance(source, str) and (text in BUILT_IN or text.startswith(BUILT_IN_PREFIX)):
        refuse(text, split=split)
        if text in BUILT_IN and os.path.lexists(text):
            raise ValueError(
                f"{text} is a built-in set, and a path too; say ./{text} for the path, or "
                f"{BUILT_IN_PREFIX}{text} for the built-in set"
            )
        return built_in(text.removeprefix(BUILT_IN_PREFIX))
    if path.is_dir():
        return folder(path, split)
    if suffix == ".zip" and path.is_file():
        return archive(path, split)
    refuse(text, split=split)
    if suffix in suffixes() and path.is_file():
        return files(path.name, path.parent, [path.name])
    if path.exists():
        instead = INSTEAD.get(suffix)
        raise ValueError(
            f"{text} is no source of images; expected a folder, a .zip, an .npy or .npz file, "
            f"or one picture{': ' + instead if instead else ''}"
        )
    raise FileNotFoundError(_unknown(text))


def _holds_paths(source: Any) -> bool:
    """Whether all items are paths; an item that is no path may be an image."""
    if len(source) == 0 or not isinstance(source, Sequence):
        return False
    return all(isinstance(item, str | os.PathLike) for item in source)


def _unknown(text: str) -> str:
    if text in BUILT_IN:  # a Path, which is never a built-in set
        return f"there is no file or folder {text}; the built-in set is {BUILT_IN_PREFIX}{text}"
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
    **{
        f"photo/{name}": _skimage(name)
        for name in ("astronaut", "chelsea", "coffee", "coins", "rocket")
    },
    "photo/hubble": _skimage("hubble_deep_field"),
    "photo/tissue": _skimage("immunohistochemistry"),
    **{f"photo/{name}": _sklearn(f"{name}.jpg") for name in ("china", "flower")},
}


def built_in(name: str) -> Source:
    """A built-in set: digits (8 x 8), faces (25 x 25), or one texture or photo.

    Raises:
        FileNotFoundError: For another name.
    """
    if name not in BUILT_IN:
        raise FileNotFoundError(unknown(f"no built-in set is called {name!r}", name, BUILT_IN))
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


@dataclass
class Listing:
    """The files of a folder or a zip, by what they are good for; paths with / in them.

    Attributes:
        images: Files of suffixes that Pillow reads.
        label_files: Files that may give labels (`layout`).
        others: How many others there are by suffix, those apart that are no surprise.
        known: How many there are of those that are no surprise.
    """

    images: list[str] = field(default_factory=list)
    label_files: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, paths: Iterable[str], name: str) -> Listing:
        """Sorts files; ValueError if there are no images among them."""
        listing, read = cls(), suffixes()
        for path in paths:
            base = posixpath.basename(path)
            suffix = posixpath.splitext(base)[1].lower()
            if suffix in read:
                listing.images.append(path)
            elif base == EDM or base in METADATA:
                listing.label_files.append(path)
            elif suffix in NO_IMAGES or base.lower() in NO_SUFFIX:
                listing.known[suffix] += 1
            else:
                listing.others[suffix] += 1
        if not listing.images:
            raise ValueError(listing._no_images(name))
        listing.images.sort(key=natural)
        return listing

    def _no_images(self, name: str) -> str:
        there = self.others or self.known
        sentence = (
            f"{name} holds no images; expected files such as .png or .jpg in it or in folders "
            "below it"
        )
        if there:
            sentence += f"; it holds {_counted(there)}"
        instead = [INSTEAD[suffix] for suffix, _ in there.most_common() if suffix in INSTEAD]
        return f"{sentence}: {instead[0]}" if instead else sentence

    def notes(self, name: str) -> list[str]:
        """A sentence about files that are surprisingly no images, if there are any."""
        if not self.others:
            return []
        return [f"left out what is no image that can be read in {name}: {_counted(self.others)}"]


def _counted(suffixes: Counter[str]) -> str:
    return ", ".join(
        f"{n:,} {suffix or 'without a suffix'}" for suffix, n in suffixes.most_common(5)
    )


def folder(root: Path, split: str | None = None) -> Source:
    """All images below a folder, of one split; links are followed, loops refused."""

    def visit(here: Path, above: tuple[Path, ...], below: str = "") -> Iterator[str]:
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
                yield from visit(Path(entry.path), (*above, real), f"{below}{entry.name}/")
            else:
                yield below + entry.name

    try:
        listing = Listing.of(visit(root, ()), f"the folder {root}")
    except OSError as error:
        if error.errno == 40:  # ELOOP: a link that points to itself
            raise ValueError(f"{error.filename} is a loop of links: remove it") from None
        raise
    name = root.name or str(root)
    paths, notes = of_split(name, listing.images, split)
    hashed = Hashed(root, [*paths, *listing.label_files])
    identity = ["files", READING, hashed.digest, split, sorted(listing.others.items())]

    def contents() -> Contents:
        def load(path: str) -> bytes:
            return (root / path).read_bytes()

        return _labelled(name, paths, listing, load, notes)

    return Source(name, identity, contents, hashed)


def _labelled(
    name: str,
    paths: Sequence[str],
    listing: Listing,
    load: Callable[[str], bytes],
    notes: Sequence[str],
) -> Contents:
    """The contents of a folder or a zip, of which `load` gives the bytes of one file."""
    found = labelled(name, paths, listing.label_files, load)

    def read(i: int) -> Any:
        return decoded(load(found.paths[i]), found.paths[i])

    notes = [*listing.notes(name), *notes, *found.notes]
    return Contents(found.paths, read, found.labels, found.class_names, notes=notes)


def files(name: str, root: Path, paths: list[str]) -> Source:
    """Image files below `root`, in their order, without classes."""

    def read(i: int) -> Any:
        return decoded((root / paths[i]).read_bytes(), paths[i])

    hashed = Hashed(root, paths)
    identity = ["files", READING, *paths[:1], hashed.digest]
    return Source(name, identity, lambda: Contents(paths, read), hashed)


def listed(paths: list[str]) -> Source:
    """A list of image files, in its order. Folders give no classes here.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is a folder.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            raise FileNotFoundError(
                f"the list of {len(paths):,} paths has {path!r}, which cannot be read "
                f"({error.strerror}); expected image files"
            ) from None
        if stat.S_ISDIR(mode):
            raise ValueError(
                f"the list of {len(paths):,} paths has {path!r}, a folder; expected image files: "
                "open a folder by its name alone"
            )
    return files(f"{len(paths):,} files", Path(), paths)


def archive(path: Path, split: str | None = None) -> Source:
    """The images in a zip, of one split."""
    try:
        opened = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no readable zip ({error}); it may be truncated: fetch it again"
        ) from None
    hashed = of_file(path)
    identity = ["zip", READING, hashed.digest, split]
    return Source(path.name, identity, lambda: _entries(path, opened, split), hashed)


def _entries(path: Path, opened: zipfile.ZipFile, split: str | None) -> Contents:
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
        if info.flag_bits & 1:
            raise ValueError(
                f"{path} is encrypted; expected a zip without a password: unpack it with its "
                "password and open the folder"
            )
        hidden = any(part.startswith((".", "__MACOSX")) for part in place.split("/"))
        if not info.is_dir() and not hidden:
            entries[place] = info
    listing = Listing.of(entries, str(path))
    paths, notes = of_split(path.name, listing.images, split)
    return _labelled(path.name, paths, listing, lambda p: opened.read(entries[p]), notes)
