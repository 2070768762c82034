"""What the paths of a data set say: its splits, its label files, its classes.

A file that gives labels wins over folders. Two layouts of such files are read: EDM's dataset.json,
and metadata.csv, .jsonl or .parquet as the datasets library's ImageFolder reads them. Otherwise a
folder is a class, unless it is a split (train, test, ...) or a shard (00000, 00001, ... through
which the numbers of the files run on).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scoremachine.runtime.validation import unknown

SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}  # the word for each split: the datasets library's
EDM = "dataset.json"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
MOST_CLASSES = 100_000  # whole numbers above are no positions of classes


@dataclass
class Layout:
    """Images and their classes.

    Attributes:
        paths: The images that are used, in order.
        labels: The class of each, as a position in `class_names`.
        class_names: The classes.
        notes: What was decided, one sentence each.
    """

    paths: list[str]
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts 2 before 10."""
    pieces = re.split(r"(\d+)", text)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]


# ---------------------------------------------------------------------------------------------
# Splits


def split_named(word: str) -> str | None:
    """The split that a word names: train, validation or test; None: none of them."""
    return SPLITS.get(word.casefold())


def chosen_split(name: str, there: Sequence[str], split: str | None, how: str) -> tuple[str, str]:
    """One of several splits, and a sentence that says so where nobody asked for it.

    Arguments:
        name: What to call the source.
        there: The names of its splits.
        split: The split that is asked for, by its name or another word for it (val for
            validation); None: train.
        how: What the splits are, as "folders".

    Raises:
        ValueError: If there is no such split, or none is asked for and none is train.
    """
    wanted = split or "train"
    same = [s for s in there if s == wanted] or [s for s in there if _same_split(wanted, s)]
    if len(same) == 1:
        if split is not None or len(there) == 1:
            return same[0], ""
        other = next(s for s in there if s != same[0])
        return same[0], (
            f"{name} has the splits {', '.join(there)} ({how}), of which {same[0]} is opened; for "
            f"another say split={other!r}, or --split {other}"
        )
    if split is not None:
        raise ValueError(unknown(f"{name} has no split {split!r}", split, there))
    raise ValueError(
        f"{name} has the splits {', '.join(there)} ({how}); expected one to be asked for: say "
        f"split={there[0]!r}, or --split {there[0]}"
    )


def of_split(name: str, paths: Sequence[str], split: str | None) -> tuple[list[str], list[str]]:
    """The images of one split, and sentences that say what was decided.

    The folders in which all images lie are passed; the folders below are splits if two of them
    have names of splits, or one has and another holds folders of the same names.

    Raises:
        ValueError: For a split that is not there, or several of which none is asked for.
    """
    root, passed = "", []
    while True:
        rests = [path[len(root) :] for path in paths]
        heads = Counter(rest.split("/")[0] for rest in rests if "/" in rest)
        if len(heads) != 1 or heads.total() < len(paths):
            break
        (head,) = heads
        passed.append(head)
        root += head + "/"
    there = sorted(heads, key=natural)
    if split is None and not _are_splits(rests):
        return list(paths), []
    if split is not None and not any(_same_split(split, head) for head in there):
        if any(_same_split(split, head) for head in passed):
            return list(paths), []
        known = there if _are_splits(rests) else [head for head in passed if split_named(head)]
        met = unknown(f"{name} has no split {split!r}", split, known)
        raise ValueError(met if known else f"{met}: leave split out")
    chosen, sentence = chosen_split(name, there, split, "folders")
    notes = [sentence] if sentence else []
    if outside := len(paths) - heads.total():
        notes.append(
            f"left out {outside:,} of the images in {name}, which are in none of its splits"
        )
    return [path for path in paths if path.startswith(f"{root}{chosen}/")], notes


def _same_split(split: str, folder: str) -> bool:
    named = split_named(split)
    return split == folder or (named is not None and named == split_named(folder))


def _are_splits(rests: Sequence[str]) -> bool:
    below: dict[str, set[str]] = defaultdict(set)  # the folders in each folder
    for parts in (rest.split("/") for rest in rests):
        if len(parts) > 1:
            below[parts[0]].update(parts[1:-1][:1])
    named = [head for head in below if split_named(head)]
    if len(named) == 1:
        others = set().union(*(below[head] for head in below if head != named[0]))
        return bool(below[named[0]] & others)
    return len(named) > 1


# ---------------------------------------------------------------------------------------------
# Classes


def labelled(
    name: str, paths: Sequence[str], label_files: Iterable[str], load: Callable[[str], bytes]
) -> Layout:
    """Images with their classes: of label files where there are some, otherwise of folders.

    Arguments:
        name: What to call the source.
        paths: The images.
        label_files: The paths of `EDM` and `METADATA` files. One speaks of the images in its
            folder and below; where several do, the nearest.
        load: The bytes of one of them.

    Raises:
        ValueError: For a label file that cannot be read, or gives no class to an image.
    """
    label_files = list(label_files)
    notes: list[str] = []
    edm = [path for path in label_files if posixpath.basename(path) == EDM]
    found = _of_edm(name, paths, edm, load, notes)
    if found is None:
        metadata = [path for path in label_files if posixpath.basename(path) in METADATA]
        found = _of_metadata(name, paths, metadata, load, notes)
    if found is None:
        found = _of_folders(name, paths, notes)
    found.notes = notes
    return found


def _above(path: str, files: dict[str, Any]) -> list[Any]:
    """What `files` (by folder) has for the folders above a path, the nearest first."""
    found = []
    folder = posixpath.dirname(path)
    while True:
        if folder in files:
            found.append(files[folder])
        if not folder:
            return found
        folder = posixpath.dirname(folder)


def _of_edm(
    name: str,
    paths: Sequence[str],
    files: Sequence[str],
    load: Callable[[str], bytes],
    notes: list[str],
) -> Layout | None:
    """Labels of the EDM data set layout: {"labels": [[name, class], ...] or null}."""
    if not files:
        return None
    listed: dict[str, dict[str, int] | None] = {}  # by folder
    for file in files:
        folder = posixpath.dirname(file)
        try:
            given = json.loads(load(file).decode("utf-8-sig"))
        except ValueError as error:
            raise _bad_edm(name, file, error) from None
        if not isinstance(given, dict) or "labels" not in given:
            notes.append(f'the {file} in {name} has no "labels": it is not used')
            continue
        try:
            listed[folder] = None if given["labels"] is None else {
                posixpath.join(folder, path.replace("\\", "/")): int(value)
                for path, value in given["labels"]
            }  # fmt: skip
        except (ValueError, TypeError, AttributeError) as error:
            raise _bad_edm(name, file, error) from None
    above = [_above(path, listed) for path in paths]
    if not any(above):
        return None
    tables = [found[0] if found else {} for found in above]
    if all(table is None for table in tables):
        return Layout(list(paths))
    try:
        labels = [table[path] for table, path in zip(tables, paths, strict=True)]
    except (KeyError, TypeError) as error:
        raise _bad_edm(name, EDM, error) from None
    if min(labels) < 0:
        raise _bad_edm(name, EDM, f"a class is {min(labels)}")
    return Layout(list(paths), labels, tuple(str(k) for k in range(max(labels) + 1)))


def _bad_edm(name: str, file: str, error: object) -> ValueError:
    return ValueError(
        f"the {file} in {name} gives no class to every image ({error!r}); expected "
        '{"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}'
    )


def _of_metadata(
    name: str,
    paths: Sequence[str],
    files: Sequence[str],
    load: Callable[[str], bytes],
    notes: list[str],
) -> Layout | None:
    """Labels of metadata files: a column file_name, and one of `LABEL_COLUMNS`."""
    tables: dict[str, dict[str, str]] = defaultdict(dict)  # by folder
    for file in files:
        rows = _rows(name, file, load(file))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        label = next((c for c in LABEL_COLUMNS if c in columns), None)
        if "file_name" not in columns or label is None:
            missing = "file_name" if "file_name" not in columns else "label"
            notes.append(
                f"the {file} in {name} has no column {missing} (it has {', '.join(columns)}): it "
                "is not used"
            )
            continue
        folder = posixpath.dirname(file)
        for row in rows:
            path, value = row.get("file_name"), row.get(label)
            if isinstance(value, list | dict):
                raise ValueError(
                    f"the {file} in {name} gives {value!r} as the label of {path}; expected one "
                    "name or number: leave the column out, or reduce it to one class"
                )
            if path is None or value is None or value == "":
                continue
            path = posixpath.normpath(posixpath.join(folder, str(path).replace("\\", "/")))
            tables[folder][path] = str(value)
    if not any(tables.values()):
        return None
    values = [next((t[p] for t in _above(p, tables) if p in t), None) for p in paths]
    kept = [path for path, value in zip(paths, values, strict=True) if value is not None]
    if not kept:
        notes.append(f"the metadata in {name} names none of its images: it is not used")
        return None
    if len(kept) < len(paths):
        notes.append(
            f"{len(paths) - len(kept):,} of the images in {name} have no label in its metadata: "
            "they are left out"
        )
    if missing_files := len(set().union(*tables.values()) - set(kept)):
        notes.append(f"the metadata in {name} names {missing_files:,} images that are not there")
    labels, names = numbered([value for value in values if value is not None])
    return Layout(kept, labels, names)


def _rows(name: str, file: str, data: bytes) -> list[dict[str, Any]]:
    """The rows of a table, by column."""
    try:
        if file.endswith(".parquet"):
            try:
                from pyarrow import parquet
            except ImportError:
                raise ValueError("it needs pyarrow: pip install pyarrow") from None
            return parquet.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
        if file.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no object")
            return rows
        return [
            {k.strip(): v for k, v in row.items() if isinstance(k, str)}
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(
            f"the {file} in {name} cannot be read ({error}); expected a table in UTF-8 with the "
            "columns file_name and label"
        ) from None


def numbered(values: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Classes that are written as words, or as their numbers from 0: positions, and names."""
    if all(re.fullmatch(r"\d{1,6}", value) for value in values):
        labels = [int(value) for value in values]
        if max(labels) < MOST_CLASSES:
            return labels, tuple(str(k) for k in range(max(labels) + 1))
    names = tuple(sorted(set(values), key=natural))
    place = {name: k for k, name in enumerate(names)}
    return [place[value] for value in values], names


def _of_folders(name: str, paths: Sequence[str], notes: list[str]) -> Layout:
    """Labels from folders: the path below what all folders share names the class.

    What lies in a folder of a class belongs to it. A few images beside the folders of two or more
    classes are left out, since they have no class.
    """
    folders = [posixpath.dirname(path) for path in paths]
    if shards := _shards(folders, paths):
        notes.append(
            f"the folders {shards[0]} to {shards[-1]} of {name} are read as shards, since the "
            "numbers of their files run on, not as classes: for classes add a metadata.csv with "
            "the columns file_name and label"
        )
        folders = [posixpath.dirname(folder) for folder in folders]
    filled = {folder for folder in folders if folder}
    shared = posixpath.commonpath(filled) if filled else ""
    above = shared + "/" if shared else ""
    names = [folder[len(above) :] if folder.startswith(above) else "" for folder in folders]
    nearest = {name: _outermost(name, set(names)) for name in set(names)}
    names = [nearest[name] for name in names]
    classes = set(names) - {""}
    stray = names.count("")
    if len(classes) < 2 and stray:
        return Layout(list(paths))
    if 2 * stray >= len(paths):
        notes.append(
            f"{name} has {stray:,} images outside of its {len(classes)} folders, so it is opened "
            "without classes: move them into folders for classes"
        )
        return Layout(list(paths))
    kept = [(path, label) for path, label in zip(paths, names, strict=True) if label]
    if stray:
        first = paths[names.index("")]
        notes.append(
            f"left out {stray:,} of the images in {name}, which are in no class, as {first}: move "
            "them into the folder of a class"
        )
    order = tuple(sorted(classes, key=natural))
    place = {label: k for k, label in enumerate(order)}
    return Layout([path for path, _ in kept], [place[label] for _, label in kept], order)


def _outermost(folder: str, folders: set[str]) -> str:
    """The outermost folder above (or itself) that holds images."""
    parts = folder.split("/")
    above = ("/".join(parts[:k]) for k in range(1, len(parts)))
    return next((a for a in above if a in folders), folder)


def _shards(folders: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The innermost folders' names if they are shards, rising; empty if they are classes.

    Shards have names of as many digits, three or more, and the numbers of their files run on from
    one to the next (EDM, FFHQ, img2dataset); in classes they begin again, or are mixed.
    """
    numbers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for folder, path in zip(folders, paths, strict=True):
        if not folder:
            continue
        above, leaf = posixpath.split(folder)
        digits = re.findall(r"\d+", posixpath.splitext(posixpath.basename(path))[0])
        if not re.fullmatch(r"[0-9]{3,}", leaf) or not digits:
            return []
        numbers[above][leaf].append(int(digits[-1]))
    leaves = sorted({leaf for shards in numbers.values() for leaf in shards})
    if len({len(leaf) for leaf in leaves}) != 1 or all(len(s) < 2 for s in numbers.values()):
        return []
    for shards in numbers.values():
        order = sorted(shards)
        if any(max(shards[a]) >= min(shards[b]) for a, b in itertools.pairwise(order)):
            return []
    return leaves
