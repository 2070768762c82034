"""Hashes of files' content, remembered so that a file that has not changed is not read again.

What is remembered of a file is a hint: it holds while the file's path, size, time stamps, inode and
device are the same. A file's ctime is set by the system at every change and by nobody else, so that
equal sizes and forged mtimes mislead nobody. Time stamps are coarse, however: a file that was
changed in the last two seconds may change again without a sign, and is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scoremachine.data import store
from scoremachine.runtime.files import write_text
from scoremachine.runtime.progress import Bar, bar

COARSE = 2e9  # nanoseconds: the coarsest time stamps that file systems have
LARGEST = 2**63 - 1
MEGABYTE = 10**6
PIECE = 2**20  # bytes that are read at a time

Signs = tuple[int, int, int, int, int]  # of a change: size, mtime, ctime, inode, device


class Hashed:
    """Files below a folder, and a hash of their content.

    Arguments:
        root: The folder.
        paths: The files, as paths below it.

    Attributes:
        digest: A hash of the paths below the folder and of all bytes; of a single file, of its
            bytes alone. The folder's own name is no part of it.
    """

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths
        self._began = time.time_ns()
        self._signs = [_signs(path) for path in self._places()]
        self._hashes: list[str] = []  # of the files, where they were not all known at once
        kept = self._remembered("whole.json")
        if kept.get("stamp") == self._stamp() and isinstance(kept.get("digest"), str):
            self.digest: str = kept["digest"]
        else:
            self._hash_all()

    def _places(self) -> list[str]:
        """The paths of the files."""
        root = os.path.join(self.root, "")
        return [root + path for path in self.paths]

    def _hash_all(self) -> None:
        """Hashes what is not remembered file by file."""
        known = self._remembered("files.json")
        content = hashlib.sha256()
        total = sum(signs[0] for signs in self._signs if signs) / MEGABYTE
        with bar("Hashing files, MB", total=total) as progress:
            for i, place in enumerate(self._places()):
                row, signs = known.get(self.paths[i]), self._signs[i]
                if signs is not None and row and row[:-1] == list(signs):
                    self._hashes.append(str(row[-1]))
                    progress.advance(signs[0] / MEGABYTE)
                else:
                    hashed, self._signs[i] = _hash(place, progress)
                    self._hashes.append(hashed)
                if len(self.paths) > 1:
                    content.update(self.paths[i].encode("utf-8", "surrogateescape") + b"\0")
                content.update(self._hashes[i].encode())
        self.digest = content.hexdigest()

    @property
    def _entry(self) -> store.Entry:
        """Where the hashes are remembered: by path, since no two files have the same."""
        only = self.paths[0] if len(self.paths) == 1 else ""
        return store.entry("hashes", store.key_of(os.path.realpath(self.root), only))

    def _remembered(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._entry.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _stamp(self) -> str:
        """A hash of all files' paths and signs; nothing where a file may change without a sign."""
        numbers = array("q")
        for signs in self._signs:
            if signs is None or signs[2] > self._began - COARSE:
                return ""
            numbers.extend(signs)
        names = "\0".join(self.paths).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names + b"\0" + numbers.tobytes()).hexdigest()

    def changed(self) -> bool:
        """Whether a file has changed since it was hashed."""
        for i, place in enumerate(self._places()):
            signs = self._signs[i]
            if signs is None or signs[2] > self._began - COARSE or _signs(place) != signs:
                return Hashed(self.root, self.paths).digest != self.digest
        return False

    def keep(self) -> None:
        """Remembers the hashes for the next time."""
        if not self._hashes:
            self._entry.touch()
            return
        rows = zip(self.paths, self._signs, self._hashes, strict=True)
        sure = self._began - COARSE
        known = {path: [*signs, h] for path, signs, h in rows if signs and signs[2] <= sure}
        if not known:
            return
        with store.optional(f"which files of {self.root} were read"):
            folder = self._entry.opened(str(self.root))
            write_text(folder / "files.json", json.dumps(known))
            if stamp := self._stamp():
                whole = {"stamp": stamp, "digest": self.digest}
                write_text(folder / "whole.json", json.dumps(whole))


def of_file(path: Path) -> Hashed:
    """One file, by its content alone."""
    return Hashed(path.parent, [path.name])


def _signs(path: str) -> Signs | None:
    """The signs of a file; None for what is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return _of(found)


def _of(found: os.stat_result) -> Signs:
    which = found.st_ino & LARGEST, found.st_dev & LARGEST
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, *which


def _hash(path: str, progress: Bar) -> tuple[str, Signs | None]:
    """A hash of a file's bytes, and its signs while it was read; None where they changed."""
    content = hashlib.sha256()
    with suppress(OSError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no file", None
        with open(path, "rb", buffering=0) as file:
            before = _of(os.fstat(file.fileno()))
            while piece := file.read(PIECE):
                content.update(piece)
                progress.advance(len(piece) / MEGABYTE)
            after = _of(os.fstat(file.fileno()))
        return content.hexdigest(), before if before == after else None
    return "unreadable", None
