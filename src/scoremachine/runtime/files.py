"""Files: none half-written ever has its final name; UTF-8; errors that say where and what to do."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scoremachine.runtime.progress import say

FULL = {errno.ENOSPC, errno.EDQUOT}  # the error numbers of a full disk and of a used-up quota
ELSEWHERE = "write elsewhere (--out; SCOREMACHINE_CACHE for what is kept between runs)"
REMEDIES = {
    errno.EROFS: ELSEWHERE,
    errno.EACCES: f"ask for permission, or {ELSEWHERE}",
    errno.EPERM: f"ask for permission, or {ELSEWHERE}",
    errno.ENOENT: "check the path, which nothing has",
    errno.EISDIR: "give the path of a file, since that is a folder",
    errno.ENOTDIR: "give a path whose folders are folders",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "check the disk, then try again",
}


def sentence_of(error: OSError) -> str:
    """A system's error as a sentence: where it was met, what it is, and what to do."""
    if error.errno is None:  # written by hand
        return str(error)
    if error.errno in FULL:
        folder = Path(error.filename).absolute().parent if error.filename else Path.cwd()
        return str(full_disk(folder))
    what = (error.strerror or os.strerror(error.errno)).lower()
    places = [str(path) for path in (error.filename, error.filename2) if path is not None]
    where = " and ".join(places) or "a file"
    return f"{where} cannot be read or written ({what}): " + REMEDIES.get(
        error.errno, f"mend that, or {ELSEWHERE}"
    )


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """For what only saves time later: where it cannot be written, says so once and goes on."""
    try:
        yield
    except OSError as error:
        say(f"going on without a record in {path.parent}: {sentence_of(error)}", path.parent)


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renames it to `path` if the block ends well.

    The temporary name keeps the suffix, since many writers choose a format by it. Folders above
    `path` are made. On any exception, Ctrl-C included, the temporary file is removed.

    Raises:
        OSError: Where the disk is full; it says where, and what to do.
    """
    path = Path(path)
    make_folder(path.parent)
    with full_disk_told(path.parent):
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
            )
        except OSError as error:
            error.filename = str(path)  # no name of a temporary file, which nobody knows
            raise
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename in (None, name):
                error.filename = str(path)
            elif "(os error 28)" in str(error):  # as safetensors says it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


@contextmanager
def full_disk_told(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turns the error of a full disk into a sentence; `needed` is how many bytes were to come."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(folder, needed) from None


def full_disk(folder: Path, needed: int = 0) -> OSError:
    """What says that a disk, or a quota on it, is full: where, how much, and what to do."""
    try:
        left = f" ({shutil.disk_usage(folder).free / 1e9:,.2f} GB are free)"
    except OSError:
        left = ""
    wanted = f", and about {needed / 1e9:,.2f} GB are to be written" if needed else ""
    return OSError(
        f"the disk of {folder} is full or your quota is used up{left}{wanted}: make room there, as "
        "with `scoremachine cache prune --to 10GB`, or set SCOREMACHINE_CACHE to a folder on "
        "another disk; a command that has --resume goes on with it"
    )


def make_folder(folder: Path) -> None:
    """Makes a folder that is not there; an OSError that says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise full_disk(folder.parent) from None
        why = "a file has that name" if os.path.lexists(folder) else (error.strerror or "").lower()
        raise type(error)(f"the folder {folder} cannot be made: {why}") from None


def check_folder(folder: Path) -> None:
    """OSError where nothing could be written to a folder, before there is anything to write."""
    place = Path(folder).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if os.path.lexists(place) and not place.is_dir():
        raise NotADirectoryError(f"the folder {folder} cannot be made: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as comma-separated values; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text whole."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_text(path: Path, text: str) -> None:
    """Writes a text that only saves time later; see `optional`."""
    with optional(path):
        write_text(path, text)


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """An object from a JSON file; a ValueError that says what was expected where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no {path}; {expected}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {expected}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON; {expected}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; {expected}")
    return found


def umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
