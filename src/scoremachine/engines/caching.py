"""A disk cache of compiled code, whose key is a digest of everything that it is compiled from.

numba keeps a compiled function beside its source and checks only the file that contains it, so it
does not notice an edit of a function that is called from there. Here the key is a digest of every
source in `engines`, of the versions of numba and LLVM and of the processor, so that any edit,
upgrade or other processor compiles anew, and two copies of the same sources share compiled code.
If $NUMBA_CACHE_DIR is set, it is used instead of the store.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from filelock import FileLock
from numba.core import config, sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _Cache, _CacheLocator

from scoremachine.data import store

SOURCES = Path(__file__).parent
SWITCHES = ("OPT", "BOUNDSCHECK", "ENABLE_AVX", "LOOP_VECTORIZE", "SLP_VECTORIZE", "CPU_NAME",
            "CPU_FEATURES")  # fmt: skip


def sources_digest() -> str:
    """A digest of what compiled code depends on: sources, compiler, processor.

    Empty if there are no source files, as in a frozen program.
    """
    stamps = []
    for path in sorted(SOURCES.rglob("*.py")):
        found = path.stat()
        stamps.append((str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return _digest(tuple(stamps)) if stamps else ""


@functools.lru_cache(4)
def _digest(stamps: tuple[tuple[str, int, int, int], ...]) -> str:
    content = hashlib.sha256()
    for path, *_ in stamps:
        content.update(Path(path).relative_to(SOURCES).as_posix().encode() + b"\0")
        content.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return store.key_of(
        content.hexdigest(),
        [sys.version, numba.__version__, llvmlite.__version__],
        [llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()],
        [getattr(config, switch, None) for switch in SWITCHES],
    )


_FIRST = sources_digest()  # of the sources at the time of their import


class _InStore(_CacheLocator):
    """The place where numba reads and writes the compiled code of a function of this package."""

    def __init__(self, function: Callable, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        self._module = function.__module__

    def get_cache_path(self) -> str:
        return str(code_folder())

    def ensure_cache_path(self) -> None:
        """Creates the folder."""
        folder = code_folder()
        if _users():
            folder.mkdir(parents=True, exist_ok=True)
        else:
            store.Entry(folder).opened(f"numba {numba.__version__}")

    def get_source_stamp(self) -> str:
        return _FIRST

    def get_disambiguator(self) -> str:
        return f"{self._module}-{self._lineno}"

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _InStore:
        return cls(py_func, py_file)


class _InStoreImpl(CompileResultCacheImpl):
    _locator_classes = [_InStore]  # noqa: RUF012


class _Files(FunctionCache):
    _impl_class = _InStoreImpl


def _users() -> str:
    """The folder for compiled code that the user has chosen, or an empty string."""
    return getattr(config, "CACHE_DIR", "") or ""


def code_folder() -> Path:
    """The folder of the compiled code of these sources."""
    if _users():
        return Path(_users()) / f"scoremachine-{_FIRST}"
    return store.entry("code", _FIRST).folder


class Kept(_Cache):
    """The cached compiled code of a function, by signature, for numba's dispatcher.

    Code that cannot be read is compiled, and code that cannot be written is not cached.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function
        # if sources were edited meanwhile, some modules were imported from others
        self._enabled = sources_digest() == _FIRST != ""
        self._files: dict[str, _Files] = {}

    @property
    def cache_path(self) -> str:
        """The folder of the cache."""
        return str(code_folder())

    def _now(self) -> _Files:
        """numba's cache files in the folder that the environment currently specifies."""
        return self._files.setdefault(self.cache_path, _Files(self._function))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature; None if it must be compiled."""
        if not self._enabled:
            return None
        try:
            found = self._now().load_overload(sig, target_context)
        except OSError:
            return None
        except Exception as error:  # unpickling a truncated file may raise anything
            self._forget(error)
            return None
        if found is not None:
            _hold(self.cache_path)
            if tuple(found.signature.args) != tuple(sigutils.normalize_signature(sig)[0]):
                return None
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Caches a compiled function, unless its sources have changed since their import."""
        if not self._enabled or sources_digest() != _FIRST:
            return
        try:
            files = self._now()
            files._impl.locator.ensure_cache_path()
            with FileLock(Path(self.cache_path) / "code.lock"):  # names are unique
                files.save_overload(sig, data)
            _hold(self.cache_path)
        except OSError as error:
            why = error if error.errno is None else f"{self.cache_path}: {error.strerror}"
            store.say_once(
                f"compiled code cannot be kept, so every run compiles for about a minute: {why}",
                "code",
            )

    def _forget(self, error: Exception) -> None:
        """Removes damaged code."""
        warnings.warn(
            f"the compiled code in {self.cache_path} is damaged ({error!r}): it is compiled anew",
            stacklevel=2,
        )
        with suppress(OSError):
            self.flush()

    def enable(self) -> None:
        """Enables reading and writing."""
        self._enabled = True

    def disable(self) -> None:
        """Disables reading and writing."""
        self._enabled = False

    def flush(self) -> None:
        """Removes the function's code."""
        with FileLock(Path(self.cache_path) / "code.lock"):
            self._now().flush()


_held: dict[str, store.Lease | None] = {}


def _hold(folder: str) -> None:
    """Protects the code in this folder from eviction while this process runs."""
    if folder not in _held:
        with suppress(OSError):
            _held[folder] = store.hold(Path(folder))


def njit(function: Callable | None = None, *, cache: bool = False, **options: Any) -> Any:
    """numba.njit, which caches compiled code in the store if `cache` is set."""

    def compiled(f: Callable) -> Any:
        dispatcher = numba.njit(**options)(f)
        if cache and hasattr(dispatcher, "enable_caching"):  # else NUMBA_DISABLE_JIT is set
            dispatcher._cache = Kept(f)
        return dispatcher

    return compiled if function is None else compiled(function)
