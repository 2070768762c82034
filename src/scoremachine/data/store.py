"""The store: all that is kept on disk from one run to the next, in one folder.

    ROOT/KIND/KEY/entry.json    an entry's label; its time stamp is when the entry was last used
    ROOT/KIND/KEY/...           the entry's files
    ROOT/KIND/KEY.lock          held by who makes, mends or removes the entry

Keys are hashes of content. Three rules keep processes out of each other's way:

- An entry appears under its name only when it is whole: it is made in a folder beside, and renamed.
- It is made under its lock; who comes second finds it made. Where a file system has no locks, the
  rename decides, and the loser discards its own copy.
- Nobody removes an entry that a process uses: users hold a shared lock on its label while they map
  its files. The system frees the locks of a process that ends, however it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from scoremachine.runtime.files import full_disk, full_disk_told, umask, write_text
from scoremachine.runtime.parsing import bytes_of
from scoremachine.runtime.progress import say

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is mapped
    fcntl = None  # type: ignore[assignment]

KINDS = {
    "corpora": "pixels",
    "records": "calibrations and other records",
    "moments": "mean and covariance",
    "indexes": "search indexes",
    "code": "compiled code",
    "hashes": "hashes of files",
    "damaged": "damaged, set aside",
}
LABEL = "entry.json"
KEY = re.compile(r"[0-9a-f]{32}")
LIMIT = 50 * 10**9  # bytes, or half of a smaller disk
SMALL = 2**20  # bytes: smaller entries are evicted last, since they make no room
LARGE = 2 * 10**9  # bytes: who will write more says so first
PATIENCE = 2.0  # seconds of waiting for another process before it is told
STALE = 86_400  # seconds after which what a killed process left is removed
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

T = TypeVar("T")


class Damaged(ValueError):  # noqa: N818
    """An entry that is there and not whole."""


def cache_root() -> Path:
    """The folder of the store: $SCOREMACHINE_CACHE, or ~/.cache/scoremachine."""
    try:
        return Path(os.environ.get("SCOREMACHINE_CACHE") or "~/.cache/scoremachine").expanduser()
    except RuntimeError:
        raise OSError(
            "there is no home folder to keep a cache in: set SCOREMACHINE_CACHE to a folder"
        ) from None


def limit() -> int:
    """How many bytes the store may have: $SCOREMACHINE_CACHE_LIMIT, or 50 GB or half the disk.

    Raises:
        ValueError: For a variable that holds no size.
    """
    if text := os.environ.get("SCOREMACHINE_CACHE_LIMIT", "").strip():
        return bytes_of(text, "SCOREMACHINE_CACHE_LIMIT")
    return min(LIMIT, shutil.disk_usage(_existing(cache_root())).total // 2)


def key_of(*parts: Any) -> str:
    """A key from whatever JSON can hold: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------
# Entries


@dataclass(frozen=True)
class Entry:
    """A folder of files about one thing, named by its kind and key. It may not exist yet."""

    folder: Path

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.folder.parent.name

    @property
    def label(self) -> Path:
        """The file that says what the entry is of."""
        return self.folder / LABEL

    @property
    def lock_path(self) -> Path:
        """The file that is locked while the entry is made or removed."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    @contextmanager
    def locked(self, doing: str = "makes it") -> Iterator[None]:
        """Holds the entry's lock; waits for another process, saying after a while what it is doing.

        Raises:
            OSError: Where the store cannot be written.
        """
        lock = FileLock(self.lock_path)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                say(f"waiting for another process, which {doing}")
                lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _unwritable(self.folder.parent, error) from None
        try:
            yield
        finally:
            if not self.folder.exists():  # nothing was made: nothing is left
                with suppress(OSError):
                    self.lock_path.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def made(self, of: str, size: int = 0) -> Iterator[Path]:
        """A temporary folder that becomes the entry if the block ends well, and is removed if not.

        Arguments:
            of: What the entry is of, for the list of entries.
            size: About how many bytes will be written.

        Raises:
            OSError: Where the store cannot be written, or the disk is full.
        """
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(parent)
            fresh = Path(tempfile.mkdtemp(prefix=".reading-", dir=parent))
        except OSError as error:
            raise _unwritable(parent, error) from None
        lease = None
        try:
            with full_disk_told(parent, size):
                _write_label(fresh, of)
                lease = Lease(fresh / LABEL)  # nobody takes it for what a killed process left
                yield fresh
                for path in fresh.rglob("*"):
                    _flush(path)
                os.chmod(fresh, 0o777 & ~umask())
                self._put(fresh)
        finally:
            del lease
            shutil.rmtree(fresh, ignore_errors=True)
        make_room(0)

    def _put(self, fresh: Path) -> None:
        """Renames a finished folder; discards it where another process was faster."""
        for _ in range(2):
            try:
                fresh.rename(self.folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self.label.exists():
                return
            self.set_aside("it has no label")

    def opened(self, of: str) -> Path:
        """The folder of an entry whose files come one by one; made where there is none."""
        if not self.label.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write_label(self.folder, of)
            except OSError as error:
                raise _unwritable(self.folder, error) from None
        self.touch()
        return self.folder

    def touch(self) -> None:
        """Notes that the entry is used now."""
        with suppress(OSError):  # a store that cannot be written
            os.utime(self.label)

    def set_aside(self, why: str) -> None:
        """Renames a damaged entry, so that it can be made again; the caller holds the lock."""
        aside = entry("damaged", uuid.uuid4().hex)
        try:
            aside.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(aside.folder)
        except FileNotFoundError:  # another process has done it
            return
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        warnings.warn(
            f"{self.folder} ({KINDS[self.kind]}) is damaged ({why}): it is set aside in "
            f"{aside.folder} and made again",
            stacklevel=4,
        )

    def remove(self) -> bool:
        """Removes the entry unless a process uses it or makes it; whether it is gone."""
        lock = FileLock(self.lock_path)
        try:
            lock.acquire(timeout=0)
        except OSError as error:  # held, or a store that cannot be written
            if error.errno not in NO_LOCKS:
                return False
        try:
            if _in_use(self.label):
                return False
            gone = self.folder.with_name(f".removed-{uuid.uuid4().hex}")
            self.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            with suppress(OSError):
                self.lock_path.unlink()
            return True
        except OSError:
            return False
        finally:
            lock.release()


def entry(kind: str, key: str) -> Entry:
    """The entry of a kind under a key, which is hashed unless it is one of `key_of`."""
    return Entry(cache_root() / kind / (key if KEY.fullmatch(key) else key_of(key)))


def _write_label(folder: Path, of: str) -> None:
    write_text(folder / LABEL, json.dumps({"of": of, "made": time.time()}))


def _flush(path: Path) -> None:
    """Has the system write a file to the disk, so that no crash leaves it empty."""
    if path.is_file():
        with open(path, "rb") as file, suppress(OSError):
            os.fsync(file.fileno())


def _unwritable(folder: Path, error: OSError) -> OSError:
    """What says that the store cannot be written."""
    if error.errno is None:  # it is a sentence already
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full_disk(_existing(folder))
    return OSError(
        f"the cache {folder} cannot be written ({error.strerror}): set SCOREMACHINE_CACHE to a "
        "folder that can"
    )


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def _remove_stale(parent: Path) -> None:
    """Removes what killed processes left more than a day ago."""
    for pattern in (".reading-*", ".removed-*"):
        for folder in parent.glob(pattern):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > STALE and not _in_use(folder / LABEL):
                    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Use


class Lease:
    """A shared lock on an entry's label, held while this object lives.

    Raises:
        FileNotFoundError: Where there is no such entry, or it is being removed.
    """

    def __init__(self, label: Path) -> None:
        self.fd = -1
        self.fd = os.open(label, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if fcntl is not None:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileNotFoundError(errno.ENOENT, "it is being removed", str(label)) from None
            except OSError:  # a file system without locks: what is mapped survives its removal
                pass
        if not self.holds(label):
            raise FileNotFoundError(errno.ENOENT, "it was removed", str(label))

    def holds(self, label: Path) -> bool:
        """Whether the file that is locked still has that name."""
        mine, named = os.fstat(self.fd), os.stat(label)
        return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_leases: weakref.WeakValueDictionary[Path, Lease] = weakref.WeakValueDictionary()
_leasing = Lock()


def hold(folder: Path) -> Lease | None:
    """A lease of the entry that a folder is, or is in: nobody evicts it while the lease lives.

    None for a folder that is in no entry, and so is not evicted.

    Raises:
        FileNotFoundError: Where there is no such entry.
    """
    label = next((p / LABEL for p in (folder, *folder.parents) if KEY.fullmatch(p.name)), None)
    if label is None:
        return None
    with _leasing:
        lease = _leases.get(label)
        if lease is None or not lease.holds(label):
            lease = _leases[label] = Lease(label)
    with suppress(OSError):
        os.utime(label)
    return lease


def mapped(path: Path, dtype: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A file, mapped for reading; the entry that it is in, if any, is in use while the array lives.

    Raises:
        FileNotFoundError: Where there is no such entry or file.
        ValueError: For a file that is too short.
    """
    lease = hold(path.parent)
    array = np.memmap(path, dtype, "r", shape=shape)
    mapping: Any = array
    while isinstance(mapping, np.ndarray):  # views outlive the array, so the lease is the mapping's
        mapping = mapping.base
    weakref.finalize(mapping, _released, lease)
    return array


def _released(lease: Lease | None) -> None:
    """The last user of a lease is gone."""


def _in_use(label: Path) -> bool:
    """Whether a living process holds a lease."""
    if fcntl is None:
        return False
    try:
        fd = os.open(label, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # what cannot be written is not removed either
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(fd)
    return False


# ---------------------------------------------------------------------------------------------
# Records: what a run can do without


@dataclass(frozen=True)
class Record:
    """A JSON file of what was found, which a run can do without."""

    entry: Entry
    name: str
    of: str

    @property
    def path(self) -> Path:
        """The file, which may not exist yet."""
        return self.entry.folder / f"{self.name}.json"

    def read(self, understood: Callable[[Any], T]) -> T | None:
        """What is kept, as `understood` makes it of JSON; None where there is nothing.

        A file that is no JSON, or that `understood` raises a ValueError, TypeError, KeyError or
        AttributeError over, is set aside.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        try:
            found = understood(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(
                f"the record {self.path} is damaged ({error}): it is set aside and made again",
                stacklevel=3,
            )
            with suppress(OSError):
                self.path.replace(self.path.with_suffix(".damaged"))
            return None
        self.entry.touch()
        return found

    def write(self, found: Any) -> None:
        """Keeps what was found; where that cannot be, says so once and goes on."""
        with optional(f"what was found about {self.of}"):
            self.entry.opened(self.of)
            write_text(self.path, json.dumps(found))

    def remove(self) -> None:
        """Forgets it."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @property
    def unfinished(self) -> Record:
        """The record of a part of it, while the rest is being found."""
        return Record(self.entry, f"{self.name}-unfinished", self.of)


_told: set[str] = set()


def say_once(sentence: str, about: str) -> None:
    """Says a sentence unless one about the same was said before by this process."""
    if about not in _told:
        _told.add(about)
        say(sentence)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Goes on where `what`, which a run can do without, cannot be kept; says so once."""
    try:
        yield
    except OSError as error:
        root = os.environ.get("SCOREMACHINE_CACHE", "")
        reason = error.strerror or error
        say_once(f"{what} is not kept, so the next run will not find it: {reason}", f"kept {root}")


# ---------------------------------------------------------------------------------------------
# Room


@dataclass(frozen=True)
class Listed:
    """An entry as the list shows it.

    Attributes:
        entry: The entry.
        of: What it is of.
        size: Bytes.
        used: When it was last used, in seconds since 1970.
    """

    entry: Entry
    of: str
    size: int
    used: float

    @property
    def in_use(self) -> bool:
        """Whether a process uses it now."""
        return _in_use(self.entry.label)


def listed() -> list[Listed]:
    """All entries, the least recently used first."""
    found = []
    for kind in KINDS:
        try:
            names = os.listdir(cache_root() / kind)
        except OSError:
            continue
        for name in filter(KEY.fullmatch, names):
            with suppress(OSError):  # removed meanwhile
                found.append(_listed(Entry(cache_root() / kind / name)))
    return sorted(found, key=lambda each: each.used)


def _listed(entry: Entry) -> Listed:
    try:
        used = entry.label.stat().st_mtime
        of = str(json.loads(entry.label.read_text(encoding="utf-8"))["of"])
    except (OSError, ValueError, KeyError, TypeError):  # as older versions kept it
        used, of = entry.folder.stat().st_mtime, "?"
    return Listed(entry, of, _size(entry.folder), used)


def _size(folder: str | Path) -> int:
    size = 0
    with os.scandir(folder) as inside:
        for each in inside:
            if each.is_dir(follow_symlinks=False):
                size += _size(each.path)
            else:
                size += each.stat(follow_symlinks=False).st_size
    return size


def prunable(to: int) -> list[Listed]:
    """What must go so that at most so many bytes are left; what is in use stays.

    What is damaged goes first, then the least recently used; entries under 1 MB go last, since they
    make no room and may have taken hours.
    """
    every = listed()
    left, found = sum(each.size for each in every), []
    ranked = sorted(
        every, key=lambda each: (each.entry.kind != "damaged", each.size < SMALL, each.used)
    )
    for each in ranked:
        if left <= to:
            break
        if not each.in_use:
            found.append(each)
            left -= each.size
    return found


def prune(to: int) -> int:
    """Removes what must go so that at most so many bytes are left; how many are gone."""
    return sum(each.size for each in prunable(to) if each.entry.remove())


def make_room(needed: int) -> None:
    """Evicts entries until the store's limit leaves room for so many bytes."""
    prune(max(0, limit() - needed))


def announce(what: str, needed: int) -> None:
    """Makes room for what will be written, and says so in a line if it is much.

    Raises:
        OSError: Where the disk has less room.
    """
    root = _existing(cache_root())
    make_room(needed)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise full_disk(root, needed)
    if needed > LARGE:
        much = ""
        if needed > (most := limit()):
            much = (
                f"; the cache may have {most / 1e9:.1f} GB, so that this goes when something else "
                "is kept, unless you raise SCOREMACHINE_CACHE_LIMIT"
            )
        say(
            f"{what} will write about {needed / 1e9:.1f} GB to {cache_root()}, where "
            f"{free / 1e9:.1f} GB are free{much}"
        )
