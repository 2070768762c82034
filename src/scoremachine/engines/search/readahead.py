"""Reading ahead: indexes are read from disk before a search needs them."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

STEP = 2**21  # bytes of one request


class Readahead:
    """Groups of files that are needed one after the other.

    A search has random access to mapped files, and waits for the disk whenever a page is not in
    memory. Reading ahead is only a hint: no result depends on it.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[Path, ...]] = []
        self._now: tuple[Path, ...] = ()

    def expect(self, folders: list[Path]) -> None:
        """Announces that the files in these folders will be needed after those announced before."""
        if tuple(folders) not in self._groups:
            self._groups.append(tuple(folders))

    def reached(self, folders: list[Path]) -> None:
        """Starts reading the files in these folders, which are needed now, and the next ones."""
        now = tuple(folders)
        if now == self._now or not hasattr(os, "posix_fadvise"):
            return
        self._now = now
        at = self._groups.index(now) if now in self._groups else len(self._groups)
        soon = [*now, *(folder for group in self._groups[at + 1 : at + 2] for folder in group)]
        Thread(target=_prefetch, args=(soon,), daemon=True).start()


def _prefetch(folders: list[Path]) -> None:
    """Requests all files in some folders, the largest of each first."""
    for folder in folders:
        try:
            for path in sorted(folder.iterdir(), key=lambda file: -file.stat().st_size):
                with open(path, "rb") as file:
                    for start in range(0, path.stat().st_size, STEP):
                        os.posix_fadvise(file.fileno(), start, STEP, os.POSIX_FADV_WILLNEED)
        except OSError:  # the code that needs them will raise
            return
