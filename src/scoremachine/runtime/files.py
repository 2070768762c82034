"""Files: none half-written ever has its final name, and JSON that says what is wrong with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renames it to `path` if the block ends well.

    The temporary name keeps the suffix, since many writers choose a format by it. Folders above
    `path` are made. On any exception, Ctrl-C included, the temporary file is removed.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder that is not there; an OSError that says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file has that name" if os.path.lexists(folder) else (error.strerror or "").lower()
        raise type(error)(f"the folder {folder} cannot be made: {why}") from None


def write_text(path: str | Path, text: str) -> None:
    """Writes a text whole."""
    with written(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """An object from a JSON file; a ValueError that says what was expected where there is none."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no {path}; {expected}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {expected}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON; {expected}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; {expected}")
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
