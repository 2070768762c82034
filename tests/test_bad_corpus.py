"""Bad input: refused in a sentence, and nothing of it kept."""

from __future__ import annotations

import os
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from scoremachine.data.corpus import Corpus
from scoremachine.data.data_sets import picture
from scoremachine.data.store import cache_root
from test_corpus import Pairs, images, pack, png, save


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "cache"))


def assert_nothing_kept():
    assert not [p for p in cache_root().rglob("*") if p.is_file()]
    assert not list(cache_root().glob("corpora/*"))


def kept(corpus):
    """The folder that its pixels are mapped from."""
    return Path(corpus.images.base.filename).parent


def good_folder(root, N=4):
    for k, pixels in enumerate(images(N)):
        save(root / f"{k}.png", pixels)
    return root


def bomb_png(width, height):
    """A PNG that promises width x height pixels and holds none."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------
# Arrays and arguments


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), "float32.*uint8.*multiply"),
        (np.zeros((2, 4, 4), np.uint8), r"\(N, C, H, W\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "transpose"),
        (np.zeros((0, 1, 4, 4), np.uint8), "at least one"),
        (torch.zeros(2, 1, 4, 4), "float32.*uint8"),
    ],
)
def test_images_of_another_dtype_or_shape_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Corpus(given)


@pytest.mark.parametrize("labels", [[0], [0, -1], [0.5, 1.0], [[0], [1]]])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels.*expected"):
        Corpus(images(2), labels)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", (8,), (8, 0), 20_000, True])
def test_a_senseless_size_is_refused(size):
    with pytest.raises(ValueError, match="size is"):
        Corpus.open("digits", size=size)


@pytest.mark.parametrize("limit", [0, -3, 2.5, "3", True])
def test_a_senseless_limit_is_refused(limit):
    with pytest.raises(ValueError, match="limit is"):
        Corpus.open("digits", limit=limit)


def test_indices_of_no_class_an_unknown_and_an_empty_one_are_refused():
    with pytest.raises(ValueError, match="has no classes"):
        Corpus(images(2)).indices("cat")
    corpus = Corpus(images(2), [0, 2], class_names=["cat", "dog", "horse"])
    with pytest.raises(ValueError, match="did you mean 'horse'"):
        corpus.indices("horze")
    with pytest.raises(ValueError, match="cat, horse"):
        corpus.indices(7)
    with pytest.raises(ValueError, match=r"no image.*'dog'"):
        corpus.indices("dog")


@pytest.mark.parametrize("indices", [[], [2], [1, 2], [-3]])
def test_a_subset_of_nothing_or_beyond_is_refused_in_a_sentence(indices):
    with pytest.raises(ValueError, match="positions"):
        Corpus(images(2)).subset(indices)


def test_a_mask_is_not_taken_for_positions():
    corpus = Corpus(images(3))
    try:
        chosen = corpus.subset(np.array([False, True, True]))
    except ValueError:
        return
    np.testing.assert_array_equal(chosen.images, corpus.images[1:])


# ---------------------------------------------------------------------------------------------
# Nothing there


def test_an_unknown_name_suggests_the_built_in_one():
    with pytest.raises(FileNotFoundError, match=r"'digit'.*did you mean 'digits'"):
        Corpus.open("digit")


def test_a_missing_path_suggests_its_neighbour(tmp_path):
    good_folder(tmp_path / "birds")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*birds'"):
        Corpus.open(tmp_path / "brids")


def test_a_source_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    for source in (tmp_path / "empty", tmp_path / "notes", pack(tmp_path / "a.zip", {"a.txt": ""})):
        with pytest.raises(ValueError, match=r"no images; expected"):
            Corpus.open(source)
    assert_nothing_kept()


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Corpus.open(Pairs([]))


# ---------------------------------------------------------------------------------------------
# Bad images among good ones


@pytest.mark.parametrize("packed", [False, True])
def test_bad_images_are_skipped_and_told_at_every_open(tmp_path, packed):
    u = images(4)
    whole = {f"{k}.png": png(p) for k, p in enumerate(u)}
    bad = {"cut.png": whole["0.png"][:60], "text.jpg": b"this is no picture"}
    if packed:
        source = pack(tmp_path / "set.zip", whole | bad)
    else:
        source = tmp_path / "set"
        source.mkdir()
        for name, data in (whole | bad).items():
            (source / name).write_bytes(data)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"skipped 2 .*cut\.png \(.*trunc.*\), text\.jpg \(not an"
        ):
            corpus = Corpus.open(source)
        np.testing.assert_array_equal(corpus.images, u)
        with pytest.raises(ValueError, match=r"cut\.png"):
            Corpus.open(source, strict=True)


def test_strict_refuses_before_anything_is_kept(tmp_path):
    (good_folder(tmp_path / "set") / "bad.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"bad\.png"):
        Corpus.open(tmp_path / "set", strict=True)
    assert_nothing_kept()


def test_only_bad_images_are_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1"):
        Corpus.open(tmp_path / "set")
    assert_nothing_kept()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_bad_file(tmp_path):
    (good_folder(tmp_path / "set") / "0.png").chmod(0)
    with pytest.warns(UserWarning, match=r"skipped 1 .*0\.png"):
        assert len(Corpus.open(tmp_path / "set")) == 3


def test_several_sizes_are_refused_with_a_proposal(tmp_path):
    good_folder(tmp_path / "set")
    save(tmp_path / "set" / "z.png", images(1, H=6, W=9)[0])
    with pytest.raises(ValueError, match=r"8 x 8 \(4\), 6 x 9 \(1\).*size=6"):
        Corpus.open(tmp_path / "set")
    assert_nothing_kept()


# ---------------------------------------------------------------------------------------------
# Input that must not be read


@pytest.mark.parametrize("sides", [(60_000, 10), (10, 60_000), (60_000, 60_000)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bomb_is_refused_by_its_header(tmp_path, sides, packed):
    bomb = bomb_png(*sides)
    if packed:
        source = pack(tmp_path / "set.zip", {"a.png": png(images(1)[0]), "bomb.png": bomb})
    else:
        source = good_folder(tmp_path / "set")
        (source / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb\.png"):
        Corpus.open(source)
    assert_nothing_kept()


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_a_zip_that_points_outside_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="points outside"):
        Corpus.open(pack(tmp_path / "set.zip", {"a.png": png(images(1)[0]), name: b"x"}))
    assert_nothing_kept()


@pytest.mark.parametrize("name", ["b.png", "dataset.json"])
def test_a_zip_entry_above_a_gibibyte_is_refused(tmp_path, monkeypatch, name):
    path = pack(tmp_path / "set.zip", {"a.png": png(images(1)[0]), name: b'{"labels": null}'})
    real = zipfile.ZipFile.infolist

    def swollen(self):
        for info in real(self):
            if info.filename == name:
                info.file_size = 2**30 + 1
        return real(self)

    monkeypatch.setattr(zipfile.ZipFile, "infolist", swollen)
    with pytest.raises(ValueError, match="unpacks to"):
        Corpus.open(path)
    assert_nothing_kept()


def test_a_loop_of_links_is_refused(tmp_path):
    good_folder(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match=r"again.*loop"):
        Corpus.open(tmp_path / "set")
    (tmp_path / "set" / "a" / "again").unlink()
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set" / "self")
    with pytest.raises(ValueError, match=r"self.*loop"):
        Corpus.open(tmp_path / "set")


def test_a_link_to_another_folder_is_followed(tmp_path):
    good_folder(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    assert len(Corpus.open(tmp_path / "set")) == 4


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_what_is_no_whole_zip_is_refused(tmp_path, cut):
    path = pack(tmp_path / "set.zip", {"a.png": png(images(1)[0])})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"set\.zip is no readable zip"):
        Corpus.open(path)


def test_pickles_are_refused(tmp_path):
    objects = np.array([{"a": 1}, None], dtype=object)
    np.save(tmp_path / "u.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "u.npz", images=objects)
    for name in ("u.npy", "u.npz"):
        with pytest.raises(ValueError, match="pickles are refused"):
            Corpus.open(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16, bool])
def test_array_files_of_another_dtype_are_refused(tmp_path, dtype):
    np.save(tmp_path / "u.npy", np.zeros((2, 1, 4, 4), dtype))
    with pytest.raises(ValueError, match="expected uint8"):
        Corpus.open(tmp_path / "u.npy")


def test_labels_of_an_npz_must_be_whole_numbers_one_for_each_image(tmp_path):
    for labels in ([0], [0.5, 1.5], [-1, 0]):
        np.savez(tmp_path / "u.npz", images=images(2), labels=labels)
        with pytest.raises(ValueError, match="labels"):
            Corpus.open(tmp_path / "u.npz")


# ---------------------------------------------------------------------------------------------
# The cache


def test_a_truncated_cache_is_built_again(tmp_path):
    corpus = Corpus.open(good_folder(tmp_path / "set"))
    expected, home = corpus.images.copy(), kept(corpus)
    del corpus
    (pixels,) = home.glob("images.*")
    os.truncate(pixels, pixels.stat().st_size // 2)
    with pytest.warns(UserWarning, match="damaged"):
        again = Corpus.open(tmp_path / "set")
    np.testing.assert_array_equal(again.images, expected)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shape": 3}', "\x00"])
def test_a_foreign_meta_file_is_built_again(tmp_path, text):
    corpus = Corpus.open(good_folder(tmp_path / "set"))
    (kept(corpus) / "meta.json").write_text(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert len(Corpus.open(tmp_path / "set")) == 4


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, SystemExit])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, monkeypatch, stop):
    from scoremachine.data import decoding as pixels

    real, met = pixels.to_pixels, []

    def stops(*given):
        met.append(given)
        if len(met) == 3:
            raise stop
        return real(*given)

    monkeypatch.setattr(pixels, "to_pixels", stops)
    with pytest.raises(stop):
        Corpus.open(good_folder(tmp_path / "set"))
    assert_nothing_kept()


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    old, new = (cache_root() / "corpora" / f".reading-{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)
    Corpus.open(good_folder(tmp_path / "set"))
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_made_is_told_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set SCOREMACHINE_CACHE"):
        Corpus.open(good_folder(tmp_path / "set"))


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scoremachine.data.corpus._read", full)
    with pytest.raises(OSError, match="SCOREMACHINE_CACHE"):
        Corpus.open(good_folder(tmp_path / "set"))
    assert_nothing_kept()


def test_a_cache_that_is_deleted_is_built_again(tmp_path):
    first = Corpus.open(good_folder(tmp_path / "set"))
    shutil.rmtree(cache_root())
    np.testing.assert_array_equal(Corpus.open(tmp_path / "set").images, first.images)


def test_a_missing_datasets_library_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises((ValueError, ImportError), match=r"pip install 'scoremachine\[hf\]'"):
        Corpus.open("hf:anything")


def test_float_images_outside_the_unit_range_are_refused():
    with pytest.raises(ValueError, match="range from"):
        picture(torch.full((3, 4, 4), -1.0))
