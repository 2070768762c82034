"""Files: none half-written ever has its final name, and JSON that says what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT}  # the error numbers of a full disk and of a used-up quota


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
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
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


def write_text(path: str | Path, text: str) -> None:
    """Writes a text whole."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
