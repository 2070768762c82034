"""The store: keys by content, processes side by side, room, damage, compiled code."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import scoremachine
from scoremachine.calibration.heldout import kept_by_level
from scoremachine.data import content, corpus, moments, store
from scoremachine.data.content import Hashed
from scoremachine.data.corpus import Corpus
from scoremachine.runtime.files import written
from scoremachine.runtime.parsing import bytes_of
from scoremachine.runtime.progress import Bar
from test_corpus import images, save

PACKAGE = Path(scoremachine.__file__).parent
OLD = -1e18  # in place of `content.COARSE`: every file counts as old


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_told", set())


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """A store that cannot be written, whoever runs the tests: a file has its name."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "file"))


def folder_of(root, seed=0, N=4):
    for k, pixels in enumerate(images(N, seed=seed)):
        save(root / str(k % 2) / f"{k}.bmp", pixels)
    return root


def an_entry(name, size=10, used=None, kind="moments"):
    entry = store.entry(kind, name)
    with entry.locked(), entry.made(name) as fresh:
        (fresh / "data").write_bytes(bytes(size))
    if used is not None:
        os.utime(entry.label, (used, used))
    return entry


def python(code, *given, **environment):
    """A process that runs some code on the package that is tested."""
    path = {"PYTHONPATH": str(PACKAGE.parent), **environment}
    command = [sys.executable, "-c", code, *map(str, given)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env={**os.environ, **path}, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


# ---------------------------------------------------------------------------------------------
# Keys by content

NAMES = st.sampled_from(["a.png", "b.png", "sub/a.png"])
FILES = st.dictionaries(NAMES, st.binary(max_size=3), min_size=2)


@given(FILES, FILES)
def test_folders_have_equal_digests_if_and_only_if_they_have_equal_files(
    tmp_path_factory, one, two
):
    digests = []
    for files in (one, two):
        root = tmp_path_factory.mktemp("set")
        for name, data in files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
        digests.append(Hashed(root, sorted(files)).digest)
    assert (digests[0] == digests[1]) == (one == two)


def test_a_folder_that_is_renamed_is_not_decoded_again(tmp_path, monkeypatch):
    first = Corpus.open(folder_of(tmp_path / "set"))
    (tmp_path / "set").rename(tmp_path / "other")
    monkeypatch.setattr(Image, "open", None)
    again = Corpus.open(tmp_path / "other")
    assert (again.key, again.digest, again.name) == (first.key, first.digest, "other")
    np.testing.assert_array_equal(again.images, first.images)
    assert again.class_names == ("0", "1")


@pytest.mark.parametrize("coarse", [OLD, content.COARSE])
def test_other_files_of_equal_names_sizes_and_times_are_another_corpus(
    tmp_path, monkeypatch, coarse
):
    monkeypatch.setattr(content, "COARSE", coarse)
    roots = [folder_of(tmp_path / f"set{seed}", seed) for seed in (0, 1)]
    for root in roots:
        for file in root.rglob("*.bmp"):
            os.utime(file, (315532800, 315532800))
    found = [Corpus.open(root) for root in roots]
    roots[0].rename(tmp_path / "away")
    roots[1].rename(roots[0])  # now at the path of the first
    found.append(Corpus.open(roots[0]))
    for opened, seed in zip(found, (0, 1, 1), strict=True):
        np.testing.assert_array_equal(opened.images, images(4, seed=seed)[[0, 2, 1, 3]])


@pytest.mark.parametrize("coarse", [OLD, content.COARSE])
def test_a_file_that_is_rewritten_in_place_with_its_old_time_is_read_again(
    tmp_path, monkeypatch, coarse
):
    monkeypatch.setattr(content, "COARSE", coarse)
    root = folder_of(tmp_path / "set")
    before = Corpus.open(root)
    file = root / "0" / "0.bmp"
    found, other = file.stat(), folder_of(tmp_path / "other", 1) / "0" / "0.bmp"
    time.sleep(0.05)  # the coarsest step of a Linux clock is 10 ms
    with open(file, "r+b") as same:
        same.write(other.read_bytes())
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_size) == (found.st_ino, found.st_size)
    after = Corpus.open(root)
    assert after.key != before.key
    np.testing.assert_array_equal(after.images[0], images(4, seed=1)[0])


def test_files_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "COARSE", OLD)
    np.savez(tmp_path / "u.npz", images=images())
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder_of(tmp_path / "set"))
    sources = [tmp_path / name for name in ("set", "packed.zip", "u.npz")]
    keys = [Corpus.open(source).key for source in sources]
    monkeypatch.setattr(content, "_hash", None)
    assert [Corpus.open(source).key for source in sources] == keys


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    root = folder_of(tmp_path / "set")
    Corpus.open(root)
    assert not list(store.cache_root().glob("hashes/*/*"))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "\x00"])
def test_what_is_remembered_of_files_may_be_damaged(tmp_path, monkeypatch, text):
    monkeypatch.setattr(content, "COARSE", OLD)
    first = Corpus.open(folder_of(tmp_path / "set"))
    for file in store.cache_root().glob("hashes/*/*s.json"):
        file.write_text(text)
    for file in store.cache_root().glob("hashes/*/whole.json"):
        file.write_text(text)
    assert Corpus.open(tmp_path / "set").key == first.key


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    root, read = folder_of(tmp_path / "set"), corpus._read

    def changed_meanwhile(*given, **named):
        found = read(*given, **named)
        save(root / "0" / "0.bmp", images(1, seed=5)[0])
        return found

    monkeypatch.setattr(corpus, "_read", changed_meanwhile)
    with pytest.raises(ValueError, match="changed while they were read"):
        Corpus.open(root)
    assert not list(store.cache_root().glob("corpora/*"))


def test_what_is_derived_of_equal_content_has_equal_keys(tmp_path):
    first, again = (Corpus.open(folder_of(tmp_path / name)) for name in ("one", "two"))
    for made in (
        lambda c: c.subset([2, 0]),
        lambda c: c.subset([0, 1]),
        lambda c: c.crops(4),
        lambda c: c.block_means(2),
    ):
        assert made(first).key == made(again).key
    ways = [first, first.subset([2, 0]), first.subset([0, 2]), first.crops(4), first.crops(2)]
    assert len({c.key for c in (*ways, first.block_means(2), first.block_means(4))}) == 7


def test_labels_are_part_of_a_key_and_not_of_a_digest():
    u = images()
    plain, some, others = Corpus(u), Corpus(u, [0, 1] * 3), Corpus(u, [1, 0] * 3)
    assert len({plain.key, some.key, others.key}) == 3
    assert len({plain.digest, some.digest, others.digest}) == 1


def test_the_digest_of_pixels_keeps_its_value(tmp_path):
    u = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    assert Corpus(u).digest == "d2cde08110b2eab124d71816a413fd85"
    for k, pixels in enumerate(u):
        save(tmp_path / "set" / f"{k}.png", pixels)
    assert Corpus.open(tmp_path / "set").digest == Corpus(u).digest


# ---------------------------------------------------------------------------------------------
# Processes side by side

OPENS = """
import sys
from scoremachine.data.corpus import Corpus
print("ready", flush=True)
sys.stdin.readline()
corpus = Corpus.open(sys.argv[1])
print(corpus.key, corpus.digest, flush=True)
sys.stdin.readline()
"""


def test_processes_that_open_a_new_folder_at_once_all_succeed(tmp_path):
    folder_of(tmp_path / "set", N=60)
    processes = [python(OPENS, tmp_path / "set") for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate("\n") for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert len({out for out, _ in told}) == 1
    assert len(list(store.cache_root().glob("corpora/*/images.u8"))) == 1
    assert not list(store.cache_root().glob("corpora/.*"))
    np.testing.assert_array_equal(
        np.sort(Corpus.open(tmp_path / "set").images, 0), np.sort(images(60), 0)
    )


def test_where_there_are_no_locks_the_slower_discards_its_own_copy(tmp_path, monkeypatch):
    def no_locks(*given, **named):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.FileLock, "acquire", no_locks)
    root, read, faster = folder_of(tmp_path / "set"), corpus._read, []

    def overtaken(*given, **named):
        if not faster:
            faster.append(None)
            faster[0] = opened = Corpus.open(root)
            opened.record("calibration", 1).write({"found": 1})
        return read(*given, **named)

    monkeypatch.setattr(corpus, "_read", overtaken)
    slower = Corpus.open(root)
    assert slower.images.base.filename == faster[0].images.base.filename
    assert os.path.exists(faster[0].images.base.filename)
    assert slower.record("calibration", 1).read(dict) == {"found": 1}
    assert not list(store.cache_root().glob("*/.*"))


def test_what_a_living_process_uses_is_not_evicted(tmp_path):
    process = python(OPENS, folder_of(tmp_path / "set"))
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    process.stdout.readline()
    store.prune(0)
    assert [each.entry.kind for each in store.listed()] == ["corpora"]
    assert store.listed()[0].in_use
    process.send_signal(signal.SIGKILL)  # whose lock the system frees
    process.communicate()
    assert store.prune(0) > 0
    assert store.listed() == []


def test_a_view_of_the_images_keeps_them_in_use(tmp_path):
    opened = Corpus.open(folder_of(tmp_path / "set"))
    view = opened.images[1:2]
    del opened
    gc.collect()
    assert store.prune(0) == 0
    np.testing.assert_array_equal(view, images(4)[[2]])
    del view
    gc.collect()
    assert store.prune(0) > 0


def test_an_entry_that_is_being_made_is_not_removed():
    entry = store.entry("moments", "a")
    with entry.locked(), entry.made("a") as fresh:
        os.utime(fresh, (0, 0))  # as if it took years
        an_entry("b")
        assert fresh.exists()
    assert entry.label.exists()


# ---------------------------------------------------------------------------------------------
# Room


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GB", 20e9), ("1.5 TB", 1.5e12), ("500mb", 5e8), ("7kB", 7e3), ("9", 9), (" 3 B ", 3)],
)
def test_a_limit_is_a_number_of_bytes_or_a_size(monkeypatch, text, expected):
    monkeypatch.setenv("SCOREMACHINE_CACHE_LIMIT", text)
    assert store.limit() == bytes_of(text, "it") == expected


@pytest.mark.parametrize("text", ["much", "-1GB", "GB", "nan", "inf", "1 GiB"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("SCOREMACHINE_CACHE_LIMIT", text)
    with pytest.raises(ValueError, match=r"SCOREMACHINE_CACHE_LIMIT is .* expected bytes"):
        store.limit()


def test_a_limit_that_is_none_is_met_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE_LIMIT", "much")
    monkeypatch.setattr(corpus, "_read", None)
    with pytest.raises(ValueError, match="SCOREMACHINE_CACHE_LIMIT"):
        Corpus.open(folder_of(tmp_path / "set"))


def test_the_limit_is_at_most_half_the_disk(tmp_path):
    assert 0 < store.limit() <= min(store.LIMIT, shutil.disk_usage(tmp_path).total // 2)


@given(
    st.lists(st.tuples(st.integers(1, 9_000), st.integers(1, 99)), min_size=1, max_size=6),
    st.integers(0, 30_000),
)
def test_the_least_recently_used_go_until_the_limit_is_kept(tmp_path_factory, sizes, to):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCOREMACHINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(store, "SMALL", 0)
        for k, (size, used) in enumerate(sizes):
            an_entry(f"entry {k}", size, used)
        before = store.listed()
        gone = store.prune(to)
        after = store.listed()
    assert [each.entry for each in after] == [each.entry for each in before[len(before) :]] or (
        [each.entry for each in after]
        == [each.entry for each in before[len(before) - len(after) :]]
    )
    assert sum(each.size for each in after) <= to
    assert gone == sum(each.size for each in before) - sum(each.size for each in after)
    if len(after) < len(before):  # no more than needed
        last = before[len(before) - len(after) - 1]
        assert sum(each.size for each in after) + last.size > to


def test_records_which_make_no_room_go_last(monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1000)
    record = an_entry("record", 10, used=1, kind="records")
    large = an_entry("large", 10_000, used=2)
    damaged = an_entry("damaged", 10_000, used=3, kind="damaged")
    store.prune(10_500)
    assert (damaged.label.exists(), large.label.exists()) == (False, True)
    store.prune(500)
    assert (large.label.exists(), record.label.exists()) == (False, True)


def test_what_is_made_evicts_what_is_older_and_not_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 0)
    old = an_entry("old", 5000, used=1)
    monkeypatch.setenv("SCOREMACHINE_CACHE_LIMIT", "1")
    opened = Corpus.open(folder_of(tmp_path / "set"))
    assert not old.folder.exists()
    np.testing.assert_array_equal(Corpus.open(tmp_path / "set").images, opened.images)


def test_using_an_entry_makes_it_recent(tmp_path):
    Corpus.open(folder_of(tmp_path / "set"))
    gc.collect()
    (pixels,) = [each.entry for each in store.listed() if each.entry.kind == "corpora"]
    os.utime(pixels.label, (1, 1))
    Corpus.open(tmp_path / "set")
    assert time.time() - pixels.label.stat().st_mtime < 60


def test_only_folders_that_the_store_has_made_are_entries():
    mine = store.cache_root() / "records" / "my own files"
    mine.mkdir(parents=True)
    (mine / "data").write_text("x")
    store.prune(0)
    assert (mine / "data").exists()


def test_a_run_that_writes_much_says_so_first(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e12, 0, 9e12))
    store.announce("reading photos", 10**9)
    assert capsys.readouterr().err == ""
    store.announce("reading photos", 7 * 10**9)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"reading photos will write about 7\.0 GB to .*cache", line)
    store.announce("indexing", 70 * 10**9)
    assert "the cache may have 50.0 GB" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Damage, full disks, stores that cannot be written


def test_a_damaged_entry_is_set_aside(tmp_path):
    opened = Corpus.open(folder_of(tmp_path / "set"))
    home = Path(opened.images.base.filename).parent
    (home / "images.u8").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"damaged .* set aside in .* made again"):
        Corpus.open(tmp_path / "set")
    (aside,) = store.cache_root().glob("damaged/*/images.u8")
    assert aside.read_bytes() == b"x"


@pytest.mark.parametrize("file", ["images.u8", "meta.json", store.LABEL])
def test_an_entry_that_lacks_a_file_is_made_again(tmp_path, file):
    opened = Corpus.open(folder_of(tmp_path / "set"))
    (Path(opened.images.base.filename).parent / file).unlink()
    with pytest.warns(UserWarning, match="damaged"):
        np.testing.assert_array_equal(Corpus.open(tmp_path / "set").images, opened.images)


@pytest.mark.parametrize("text", ["", "[]", '{"machine": 1}', "\x00", '{"machine"'])
def test_a_damaged_record_is_set_aside(text):
    record = Corpus(images()).record("calibration", [1])
    record.write({"found": 1})
    record.path.write_text(text)
    with pytest.warns(UserWarning, match="is damaged .* set aside"):
        assert record.read(lambda found: found["found"]) is None
    assert record.path.with_suffix(".damaged").read_text() == text
    assert record.read(lambda found: found["found"]) is None


def test_damaged_moments_are_made_again(monkeypatch):
    monkeypatch.setattr(moments, "KEPT", 1)
    given = Corpus(images()), np.arange(6)

    def found():
        monkeypatch.setattr(moments, "_known", moments.LRUCache(1))
        return moments.moments(*given)

    first = found()
    (file,) = store.cache_root().glob("moments/*/moments.safetensors")
    assert (found().eigenvalues == first.eigenvalues).all()
    file.write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"):
        assert (found().eigenvalues == first.eigenvalues).all()
    assert file.stat().st_size > 1


FULL = OSError(errno.ENOSPC, "No space left on device")
SENTENCE = r"is full .*GB are free.*cache prune.*SCOREMACHINE_CACHE.*--resume"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_where_something_is_written(tmp_path, number):
    with pytest.raises(OSError, match=SENTENCE), written(tmp_path / "picture.png"):
        raise OSError(number, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(corpus, "_read", None)
    with pytest.raises(OSError, match=SENTENCE):
        Corpus.open(folder_of(tmp_path / "set"))


def test_a_full_disk_is_told_by_the_command_line(tmp_path, monkeypatch, capsys):
    from scoremachine.app import cli

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.png"))

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit):
        cli.main()
    assert re.search(SENTENCE, capsys.readouterr().err)


def test_a_run_goes_on_without_a_record_that_cannot_be_kept(no_cache, capsys):
    record = Corpus(images(), name="mine").record("calibration", [1])
    for _ in range(2):
        record.write({"found": 1})
    assert record.read(dict) is None
    record.remove()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("what was found about mine is not kept.*SCOREMACHINE_CACHE", line)
    found = kept_by_level(record, np.array([2.0, 1.0]), lambda s: {"at": s}, "at", Bar("", 2), 1)
    assert found == [{"at": 2.0}, {"at": 1.0}]


def test_a_run_goes_on_without_moments_that_cannot_be_kept(no_cache, capsys, monkeypatch):
    monkeypatch.setattr(moments, "KEPT", 1)
    monkeypatch.setattr(moments, "_known", moments.LRUCache(1))
    assert len(moments.moments(Corpus(images(), name="mine"), np.arange(6)).eigenvalues) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "the covariance of mine is not kept" in line


def test_built_in_images_need_no_store(no_cache):
    assert len(Corpus.open("digits", limit=10)) == 10


def test_records_are_read_whatever_the_locale(tmp_path):
    code = """
from scoremachine.data.corpus import Corpus
import sys
print(ascii(Corpus.open(sys.argv[1]).class_names))
"""
    for k in range(2):
        save(tmp_path / "set" / f"été{k}" / "a.png", images(2)[k])
    for locale in ("C.UTF-8", "POSIX"):
        process = python(code, tmp_path / "set", LC_ALL=locale, PYTHONCOERCECLOCALE="0")
        out, err = process.communicate()
        assert "t\\xe9" in out, err


# ---------------------------------------------------------------------------------------------
# Compiled code

CALLER = """
from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import tripled

@njit(cache=True)
def found(x):
    return tripled(x) + 1
"""
CALLED = """

@njit
def tripled(x):
    return 3 * x
"""
CALLS = """
import sys, numba
from scoremachine.engines.caller import found
value, stats = found(5), found.stats
print(value, sum(stats.cache_hits.values()), stats.cache_path)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package with a small compiled function that calls one of another file."""
    home = tmp_path / "src"
    without = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(PACKAGE, home / "scoremachine", ignore=without)
    engines = home / "scoremachine" / "engines"
    (engines / "__init__.py").write_text("")  # which would import PyTorch
    (engines / "caller.py").write_text(CALLER)
    with open(engines / "compiled.py", "a") as file:
        file.write(CALLED)
    return home


def called(home, code=CALLS, **environment):
    """What a process with a package says: the value, how much was found compiled, stderr."""
    environment = {"NUMBA_CACHE_DIR": "", "PYTHONPATH": str(home), **environment}
    out, err = python(code, **environment).communicate(timeout=300)
    assert out, err
    value, hits, path = out.split()
    return int(value), int(hits), Path(path), err


def test_no_machine_code_outlives_the_source_that_it_is_of(package):
    assert called(package)[:2] == (16, 0)
    assert called(package)[:2] == (16, 1)
    source = package / "scoremachine" / "engines" / "compiled.py"
    stamp = source.stat()
    source.write_text(source.read_text().replace("3 * x", "7 * x"))
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert called(package)[:2] == (36, 0)
    assert not list(package.rglob("*.nb?"))


def test_two_copies_of_equal_sources_share_machine_code(package, tmp_path):
    called(package)
    shutil.copytree(package, tmp_path / "other")
    value, hits, path, _ = called(tmp_path / "other")
    assert (value, hits) == (16, 1)
    assert path.parent == store.cache_root() / "code"


def test_processes_that_compile_at_once_find_what_each_has_compiled(package):
    kinds = ["5", "5.0", "5j + 5"]
    codes = [CALLS.replace("found(5)", f"found({kind})") for kind in kinds]
    codes = [code.replace("print(value", "print(int(abs(value))") for code in codes]
    own = {"NUMBA_CACHE_DIR": "", "PYTHONPATH": str(package)}
    processes = [python(code, **own) for code in codes * 2]
    told = [process.communicate(timeout=300) for process in processes]
    values = [16, 16, 21]  # of 3 x + 1
    assert [int(out.split()[0]) for out, _ in told] == values * 2
    for code, value in zip(codes, values, strict=True):
        assert called(package, code)[:2] == (value, 1)


def test_damaged_machine_code_is_compiled_again(package):
    _, _, path, _ = called(package)
    for file in path.glob("*.nb?"):
        file.write_bytes(b"damaged")
    value, hits, _, err = called(package)
    assert (value, hits) == (16, 0)
    assert "is damaged" in err
    assert called(package)[:2] == (16, 1)


def test_a_users_own_folder_for_compiled_code_is_used(package, tmp_path):
    _, _, path, _ = called(package, NUMBA_CACHE_DIR=str(tmp_path / "mine"))
    assert path.parent == tmp_path / "mine"
    assert list(path.glob("*.nbc"))


def test_functions_of_others_are_kept_where_numba_keeps_them(package):
    other = package / "others.py"
    other.write_text("import numba\n@numba.njit(cache=True)\ndef found(x):\n    return x\n")
    code = CALLS.replace("import sys", "import scoremachine.engines.caching, sys").replace(
        "scoremachine.engines.caller", "others"
    )
    assert called(package, code)[2] == package / "__pycache__"


READ_ONLY = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # strips root of its power


@pytest.mark.skipif(os.name == "nt", reason="permissions as POSIX has them")
@pytest.mark.parametrize("writable", [True, False])
def test_a_read_only_installation_runs(package, tmp_path, writable):
    """And keeps its machine code where the store can be written."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root can write anywhere, and there is no setpriv")
    home, cache = tmp_path / "home", tmp_path / "cache"
    for folder in (home, cache):
        folder.mkdir()
    closed = [package, home] if writable else [package, home, cache]
    for root in closed:
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(package),
        "HOME": str(home),
        "SCOREMACHINE_CACHE": str(cache),
    }
    command = [*(READ_ONLY if os.geteuid() == 0 else []), sys.executable, "-c", CALLS]
    try:
        for hits in (0, 1):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.split()[:2] == ["16", str(hits if writable else 0)]
            said = done.stderr.count("compiled code cannot be kept")
            assert said == (0 if writable else 1), done.stderr
    finally:
        for root in closed:
            for path in (root, *root.rglob("*")):
                path.chmod(path.stat().st_mode | 0o200)


def test_all_compiled_functions_that_are_kept_are_kept_in_the_store():
    for source in PACKAGE.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        if source.name != "caching.py" and "cache=True" in text and "njit" in text:
            assert "from scoremachine.engines.caching import njit" in text, source
            assert not re.search(r"from numba import .*\bnjit", text), source


# ---------------------------------------------------------------------------------------------
# Commands


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        from scoremachine.app import cli

        monkeypatch.setattr(sys, "argv", ["scoremachine", "cache", *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().out

    return run


def test_the_commands_list_and_prune(tmp_path, command, monkeypatch):
    assert command("path") == (0, f"{store.cache_root()}\n")
    Corpus.open(folder_of(tmp_path / "set"))
    gc.collect()
    an_entry("photographs", 2_500_000, used=time.time() - 90_000)
    _, out = command("list")
    assert re.search(r"pixels +set +\w{8} +[\d.]+ (kB|bytes) +(moments|\d minutes?) ago", out)
    assert re.search(r"mean and covariance +photographs +\w{8} +2\.5 MB +1 day ago", out)
    assert "2 entries, 2.5 MB of at most" in out
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert "nothing is removed" in command("prune", "--to", "1MB")[1]
    assert len(store.listed()) == 2
    assert "removed 1 entry, 2.5 MB" in command("prune", "--to", "1MB", "--yes")[1]
    assert "nothing to remove" in command("prune")[1]
    assert "removed 1 entry" in command("prune", "--all", "--yes")[1]
    assert store.listed() == []


def test_a_size_that_is_none_is_refused(command):
    assert command("prune", "--to", "much")[0] == 2
    assert command("prune", "--to", "1GB", "--all")[0] == 2


def test_what_is_in_use_is_listed_so_and_stays(tmp_path, command):
    opened = Corpus.open(folder_of(tmp_path / "set"))
    assert "in use" in command("list")[1]
    assert "nothing to remove" in command("prune", "--all", "--yes")[1]
    assert len(opened) == 4


def test_what_older_versions_kept_is_listed_and_pruned():
    old = store.cache_root() / "corpora" / ("0" * 32)
    old.mkdir(parents=True)
    (old / "meta.json").write_text(json.dumps({}))
    (each,) = store.listed()
    assert each.of == "?"
    assert store.prune(0) == each.size
    assert not old.exists()
