"""An index of patches on disk: built once, resumable after an interruption, then memory-mapped.

An index is a folder: the arrays of `distances.Tree`, one file each, its embedding, and a record of
the images it was built from. During a build the folder has another name, and a journal with a line
for every piece whose bytes are on disk. A build that resumes after an interruption truncates the
files to the sizes of the last line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from scoremachine.core.collection import Class, Collection, Patches, classes
from scoremachine.data import store
from scoremachine.data.corpus import Corpus
from scoremachine.engines.chunks import fill, side_by_side
from scoremachine.engines.search import tree
from scoremachine.engines.search.distances import FAR, Tree
from scoremachine.engines.search.embedding import ROUNDING, Embedding, sampled
from scoremachine.engines.search.floats import LANES
from scoremachine.engines.search.patches import Windows, count_equal, extract, hashes
from scoremachine.engines.search.tree import LEAF, NODE
from scoremachine.runtime.files import write_text, written
from scoremachine.runtime.progress import Bar, bar, say

VERSION = 5  # of the format; indexes of other versions are built again
BUCKET = 12_000  # patches that are arranged together
MEMORY = 2**28  # bytes of patches in memory at once
SHORT = 300  # values of a patch up to which few components suffice
LONG = 1_200  # values from which on more components are kept, since such patches are fewer
SPARE = 64  # bytes of padding behind the images, since up to 64 bytes are read at a time
LARGEST = 2**32 - 1  # the most patches of an index
ARRAYS: dict[str, Any] = {
    "codes": np.uint8,
    "boxes": np.uint8,
    "ids": np.uint32,
    "times": np.uint32,
    "frames": np.float32,
    "radii": np.float32,
}


def check_number(patches: Patches, N: int) -> None:
    """ValueError if N images have more patches than an index can have."""
    n = N * patches.per_image
    if n > LARGEST:
        raise ValueError(
            f"an index holds at most {LARGEST:,} patches, and {N:,} images have {n:,} of "
            f"{patches.size[0]} x {patches.size[1]}: use limit, or search='exact'"
        )


def components(patches: Patches, channels: int) -> int:
    """The number of components in an index: more make it larger and a search shorter."""
    D = patches.numbers(channels)
    if min(patches.tops[1], patches.lefts[1]) == 1:  # along a side
        return min(D, 32 if D < LONG / 2 else 60)
    if D > SHORT:
        return 60 if D < LONG else 92
    return min(D, 52, max(27, 8 * math.ceil(0.72 * math.sqrt(D / 3))))


def indexed(collection: Collection) -> list[Class]:
    """The classes that are searched: those with several positions in an image, not corners."""
    return [c for c in classes(collection) if collection.wraps or c.patches.per_image > 1]


@dataclass(frozen=True, eq=False)
class Source:
    """The images of an index, laid out for comparing patches.

    Attributes:
        pixels: uint8, shape (N, H, W, C).
        flat: The same bytes, followed by `SPARE` zeros.
        key: A hash that identifies them.
        folder: The folder of their indexes.
    """

    pixels: np.ndarray
    flat: np.ndarray
    key: str
    folder: Path

    @classmethod
    def of(cls, corpus: Corpus, index: np.ndarray) -> Source:
        """The images at `index` of a corpus, laid out for comparing patches."""
        N, C, H, W = len(index), *corpus.shape
        whole = len(corpus) == N and bool((index == np.arange(N)).all())
        key = corpus.key
        if not whole:
            key = hashlib.sha256(key.encode() + index.tobytes()).hexdigest()[:32]
        folder = store.entry("indexes", key).opened(corpus.name)
        path = folder / "pixels.u8"
        size = N * H * W * C
        if not path.exists() or path.stat().st_size != size + SPARE:
            with written(path) as temporary, open(temporary, "wb") as file:
                for rows in np.array_split(index, max(1, size // MEMORY)):
                    file.write(corpus.images[rows].transpose(0, 2, 3, 1).tobytes())
                file.write(bytes(SPARE))
        flat = store.mapped(path, np.uint8)
        return cls(flat[:size].reshape(N, H, W, C), flat, key, folder)

    def identity(self, patches: Patches) -> dict[str, Any]:
        """The identifying record of an index of some patches of these images."""
        shape = list(self.pixels.shape)
        return {"version": VERSION, "images": self.key, "shape": shape, "patches": patches.name}

    def windows(self, patches: Patches, middle: tuple[int, int] = (0, 0)) -> Windows:
        """Patches of the images whose value is their pixel `middle`, for compiled code."""
        _, H, W, C = self.pixels.shape
        size, tops, lefts = patches
        return Windows(self.flat, (H, W, C), tops, lefts, size, middle)


@dataclass(frozen=True, eq=False)
class Index:
    """An index of patches, open.

    Attributes:
        embedding: The map e.
        tree: The arrays, mapped from disk.
        furthest: The largest |s - mean| of its patches.
        total: The number of its patches, copies counted.
    """

    embedding: Embedding
    tree: Tree
    furthest: float
    total: int

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Index:
        """Opens the index in a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of other images, of another version, or truncated.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"there is no index in {folder}") from None
        except ValueError as error:
            raise ValueError(f"the index in {folder} has a damaged record ({error})") from None
        for what, expected in identity.items():
            if meta.get(what) != expected:
                raise ValueError(
                    f"the index in {folder} is for {what} {meta.get(what)!r}, not {expected!r}"
                )
        try:
            with np.load(folder / "embedding.npz", allow_pickle=False) as saved:
                embedding = Embedding(saved["mean"], saved["V"], int(meta["kept"]))
            shapes = _shapes(meta["nodes"], embedding)
            arrays: dict[str, np.ndarray] = {}
            for name, size in _sizes(meta["nodes"], embedding).items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
                arrays[name] = store.mapped(folder / name, ARRAYS[name], shapes[name])
            upper = _upper(arrays, embedding.first)
            flat = {name: np.asarray(a).reshape(-1) for name, a in (arrays | upper).items()}
            t = Tree(embedding.m, embedding.first, **flat)
            return cls(embedding, t, float(meta["furthest"]), int(meta["total"]))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"the index in {folder} is damaged: {error}") from None


def _shapes(nodes: int, embedding: Embedding) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays for a number of nodes."""
    m, first = embedding.m, embedding.first
    return {
        "codes": (nodes, NODE // LEAF, m, LEAF),
        "boxes": (nodes, 2, first, NODE // LEAF),
        "ids": (nodes, NODE),
        "times": (nodes, NODE),
        "frames": (nodes, 2, m),
        "radii": (nodes,),
    }


def _sizes(nodes: int, embedding: Embedding) -> dict[str, int]:
    """The sizes in bytes of the arrays for a number of nodes."""
    shapes = _shapes(nodes, embedding)
    return {name: math.prod(shapes[name]) * np.dtype(ARRAYS[name]).itemsize for name in ARRAYS}


def _upper(arrays: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
    """The upper levels: boxes of nodes and super-nodes, and the numbers of their patches."""
    frames = arrays["frames"]
    counts = arrays["times"].reshape(-1, NODE // LEAF, LEAF).sum(2, dtype=np.float32)
    in_nodes = _in_sixteens(counts.sum(1)[:, None], np.float32(0))[..., 0]
    in_supers = _in_sixteens(in_nodes.sum(1)[:, None], np.float32(0))[..., 0]
    low = frames[:, 0, :first]
    high = low + np.float32(255) * frames[:, 1, :first]
    node_low, node_high = _in_sixteens(low, FAR), _in_sixteens(high, FAR)
    none = _in_sixteens(high, -FAR)
    super_low = _in_sixteens(node_low.min(1), FAR)
    super_high = _in_sixteens(none.max(1), FAR)
    return {
        "node_boxes": np.ascontiguousarray(np.stack([node_low, node_high], 1).swapaxes(2, 3)),
        "super_boxes": np.ascontiguousarray(np.stack([super_low, super_high], 1).swapaxes(2, 3)),
        "widest": _in_sixteens(arrays["radii"][:, None], np.float32(0))[..., 0].max(1),
        "leaf_counts": counts,
        "node_counts": in_nodes,
        "super_counts": in_supers,
    }


def _in_sixteens(a: np.ndarray, missing: np.float32) -> np.ndarray:
    """(n, k) -> (n / 16 rounded up, 16, k), padded with `missing`."""
    n, k = a.shape
    full = np.full((-(-n // LANES) * LANES, k), missing, np.float32)
    full[:n] = a
    return full.reshape(-1, LANES, k)


def estimate(patches: Patches, N: int, channels: int) -> tuple[int, float]:
    """The approximate bytes of an index, and seconds to build it on two cores."""
    n, D = N * patches.per_image, patches.numbers(channels)
    size = n * (components(patches, channels) + 20)
    return size, n * (5e-7 + 1.2e-9 * D) + 1.7e-7 * D**2


def build(source: Source, patches: Patches, folder: Path, progress: Bar | None = None) -> None:
    """Builds an index in a folder, or resumes a build that was interrupted.

    Memory needed: 4 bytes for every patch and about 1 GB.

    Raises:
        ValueError: For more patches than an index can have.
        OSError: If the disk is full.
    """
    n = len(source.pixels) * patches.per_image
    check_number(patches, len(source.pixels))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        try:  # another process may have been faster
            Index.open(folder, source.identity(patches))
            return
        except FileNotFoundError:
            pass
        except ValueError:  # damaged; `Bounded` has reported it
            shutil.rmtree(folder, ignore_errors=True)
        part = folder.with_name(folder.name + ".part")
        if not _begun(part, source.identity(patches), n):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _plan(source, patches, part)
        embedding, starts = _planned(part)
        nodes, furthest = _write(source, patches, part, embedding, starts, progress)
        with written(part / "embedding.npz") as temporary:
            np.savez(temporary, mean=embedding.mean, V=embedding.V)
        meta = source.identity(patches) | {
            "nodes": nodes,
            "kept": embedding.kept,
            "furthest": furthest,
            "total": n,
        }
        write_text(part / "meta.json", json.dumps(meta))
        for name in ("plan.npz", "order", "journal"):
            (part / name).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def _begun(part: Path, identity: dict[str, Any], n: int) -> bool:
    """Whether a folder has a complete plan of this index of n patches."""
    try:
        with np.load(part / "plan.npz", allow_pickle=False) as plan:
            same = json.loads(str(plan["identity"])) == identity
        return same and (part / "order").stat().st_size == 4 * n
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _plan(source: Source, patches: Patches, part: Path) -> None:
    """The first step of a build: the embedding, and the patches sorted into buckets."""
    w, C = source.windows(patches), source.pixels.shape[3]
    n, D = len(source.pixels) * patches.per_image, patches.numbers(C)
    depth = max(0, math.ceil(math.log2(n / BUCKET)))
    rng = np.random.default_rng(0)
    count = min(n, max(sampled(n), 64 * 2**depth))
    sample = np.unique(rng.integers(0, n, count)) if count < n else np.arange(n)
    some = np.empty((min(len(sample), sampled(n)), D))
    chosen = np.sort(rng.permutation(sample)[: len(some)])
    fill(extract, (w, chosen, some))
    embedding = Embedding.of(some, components(patches, C))
    E, _ = embedding.of_patches(w, sample)
    axes = np.zeros(max(1, 2**depth - 1), np.int64)
    values = np.zeros(len(axes), np.float32)
    tree.top_of(E, embedding.leading, depth, axes, values)
    bucket = np.empty(n, np.uint32 if depth > 16 else np.uint16)
    V = embedding.V[:, : embedding.leading]

    def assign(piece: slice) -> None:
        z = embedding.centred(w, np.arange(piece.start, piece.stop, dtype=np.uint32)) @ V
        tree.descend(z.astype(np.float32), depth, axes, values, bucket[piece])

    side_by_side(assign, embedding.pieces(n))
    starts = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=2**depth))])
    order = np.memmap(part / "order", np.uint32, "w+", shape=(n,))
    tree.grouped(bucket, starts[:-1].copy(), order)
    order.flush()
    with written(part / "plan.npz") as temporary:
        np.savez(
            temporary,
            mean=embedding.mean,
            V=embedding.V,
            kept=embedding.kept,
            starts=starts,
            identity=json.dumps(source.identity(patches)),
        )


def _planned(part: Path) -> tuple[Embedding, np.ndarray]:
    with np.load(part / "plan.npz", allow_pickle=False) as plan:
        return Embedding(plan["mean"], plan["V"], int(plan["kept"])), plan["starts"]


def _write(
    source: Source,
    patches: Patches,
    part: Path,
    embedding: Embedding,
    starts: np.ndarray,
    progress: Bar | None,
) -> tuple[int, float]:
    """Writes the arrays, bucket after bucket, from the end of the journal on."""
    order = np.memmap(part / "order", np.uint32, "r")
    buckets, nodes, furthest = _resume(part, embedding)
    if progress is not None:
        progress.advance(int(starts[buckets]))
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(part / name, "ab")) for name in ARRAYS}
        journal = stack.enter_context(open(part / "journal", "a", encoding="utf-8"))
        most = max(NODE, MEMORY // (16 * embedding.m))  # patches
        while buckets < len(starts) - 1:
            end = buckets + 1
            while end < len(starts) - 1 and starts[end + 1] - starts[buckets] <= most:
                end += 1
            piece = order, starts[buckets : end + 1]
            arrays, reach = _encoded(source.windows(patches), embedding, *piece)
            for name, file in files.items():
                arrays[name].tofile(file)
                file.flush()
                os.fsync(file.fileno())
            nodes, furthest = nodes + len(arrays["radii"]), max(furthest, reach)
            if progress is not None:
                progress.advance(int(starts[end] - starts[buckets]))
            buckets = end
            journal.write(json.dumps([buckets, nodes, furthest]) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
    return nodes, furthest


def _resume(part: Path, embedding: Embedding) -> tuple[int, int, float]:
    """Truncates the files to the journal's last entry: (buckets, nodes, furthest patch)."""
    buckets, nodes, furthest = 0, 0, 0.0
    journal = part / "journal"
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole:
        buckets, nodes, furthest = json.loads(whole.splitlines()[-1])
    if any(_length(part / name) < size for name, size in _sizes(nodes, embedding).items()):
        whole, buckets, nodes, furthest = "", 0, 0, 0.0  # the disk lost what was written
    journal.write_text(whole, encoding="utf-8")
    for name, size in _sizes(nodes, embedding).items():
        with open(part / name, "ab") as file:
            file.truncate(size)
    return buckets, nodes, furthest


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _encoded(
    w: Windows,
    embedding: Embedding,
    order: np.ndarray,
    starts: np.ndarray,
) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of some buckets' nodes, and the largest |s - mean|."""
    places, times, pieces = [], [], [0]
    everyone = np.array(order[starts[0] : starts[-1]])
    h = np.empty(len(everyone), np.uint64)
    fill(hashes, (w, everyone, h))
    for start, stop in zip(starts[:-1] - starts[0], starts[1:] - starts[0], strict=True):
        sorted_ = start + np.argsort(h[start:stop], kind="stable")
        unique, count = np.empty(stop - start, np.uint32), np.empty(stop - start, np.uint32)
        n = count_equal(w, everyone, sorted_, h, unique, count)
        if n:
            places.append(unique[:n])
            times.append(count[:n])
            pieces.append(pieces[-1] + n)
    nodes = np.concatenate([[0], np.cumsum(-(-np.diff(pieces) // NODE))]).astype(np.int64)
    shapes = _shapes(int(nodes[-1]), embedding)
    arrays = {name: np.empty(shapes[name], dtype) for name, dtype in ARRAYS.items()}
    if not places:
        return arrays, 0.0
    place, count = np.concatenate(places), np.concatenate(times)
    E, squares = embedding.of_patches(w, place)
    furthest = math.sqrt(squares.max())
    rank = np.arange(len(E))
    piece = np.array(pieces, np.int64)
    fill(tree.arrange, (E, piece, embedding.first, rank))
    rounding = np.float32(ROUNDING * furthest + 1e-9)
    made = tuple(arrays[name] for name in ARRAYS)
    fill(tree.encode, (E, rank, place, count, piece, nodes, embedding.first, rounding, *made))
    return arrays, furthest


def build_all(source: Source, missing: list[Patches]) -> None:
    """Builds several indexes with one progress bar."""
    N, C = len(source.pixels), source.pixels.shape[3]
    if missing:
        needed = sum(estimate(p, N, C)[0] for p in missing)
        store.announce(f"indexing {N:,} images", needed)
    total = sum(N * p.per_image for p in missing)
    with bar("Indexing patches", total=total) as progress:
        try:
            for p in missing:
                build(source, p, source.folder / p.name, progress)
        except KeyboardInterrupt:
            say("the finished part of the index is kept: the same command resumes from there")
            raise
