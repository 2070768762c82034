"""Opening images: what is read, how it is labelled, and what the cache gives back."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scoremachine.data.corpus import Corpus
from scoremachine.data.store import cache_root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "cache"))


def images(N=6, C=3, H=8, W=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (N, C, H, W), dtype=np.uint8)


def save(path, pixels, **options):
    """Writes pixels (C, H, W) as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(picture)).save(path, **options)


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(data, "png")
    return data.getvalue()


def pack(path, entries):
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
    return path


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


# ---------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("C", [1, 3, 4])
def test_an_array_and_a_tensor_are_the_same_corpus(C):
    u = images(C=C)
    a, b = Corpus(u, [0, 1, 2, 0, 1, 2]), Corpus(torch.from_numpy(u), torch.arange(6) % 3)
    assert a.shape == (C, 8, 8)
    assert a.key == b.key
    assert a.labels.dtype == np.int64
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)


def test_a_key_tells_pixels_and_shapes_apart():
    u = images()
    v = u.copy()
    v[-1, -1, -1, -1] ^= 1
    keys = {Corpus(u).key, Corpus(v).key, Corpus(u.reshape(6, 3, 4, 16)).key}
    assert len(keys) == 3
    assert all(set(key) <= set("0123456789abcdef") for key in keys)


def test_a_corpus_has_a_folder_for_records_that_is_not_made_yet():
    corpus = Corpus(images())
    assert corpus.entry("records").folder == cache_root() / "records" / corpus.key
    assert not corpus.entry("records").folder.exists()


def test_the_repr_says_what_it_holds():
    assert repr(Corpus.open("digits")) == "Corpus('digits', 1797 images, 1 x 8 x 8, 10 classes)"
    assert repr(Corpus(images())) == "Corpus('array', 6 images, 3 x 8 x 8)"


def test_indices_are_the_positions_of_a_class():
    corpus = Corpus(images(), [2, 0, 2, 0, 0, 2], class_names=["cat", "dog", "fox"])
    np.testing.assert_array_equal(corpus.indices(), np.arange(6))
    np.testing.assert_array_equal(corpus.indices("fox"), [0, 2, 5])
    np.testing.assert_array_equal(corpus.indices(0), [1, 3, 4])
    assert corpus.indices("cat").dtype == np.int64


def test_a_subset_of_consecutive_images_is_a_view_and_any_other_a_copy():
    corpus = Corpus(images(), np.arange(6), ids=list("abcdef"))
    view, copy = corpus.subset([2, 3, 4]), corpus.subset([4, 1])
    assert np.shares_memory(view.images, corpus.images)
    assert not np.shares_memory(copy.images, corpus.images)
    np.testing.assert_array_equal(copy.images, corpus.images[[4, 1]])
    np.testing.assert_array_equal(copy.labels, [4, 1])
    assert list(copy.ids) == ["e", "b"]
    assert len({corpus.key, view.key, copy.key}) == 3


# ---------------------------------------------------------------------------------------------
# Built-in sets


@pytest.mark.parametrize(
    ("name", "N", "shape"),
    [
        ("digits", 1797, (1, 8, 8)),
        ("faces", 100, (1, 25, 25)),
        ("texture/brick", 1, (1, 512, 512)),
        ("texture/grass", 1, (1, 512, 512)),
        ("texture/gravel", 1, (1, 512, 512)),
        ("photo/chelsea", 1, (3, 300, 451)),
        ("photo/astronaut", 1, (3, 512, 512)),
        ("photo/coffee", 1, (3, 400, 600)),
        ("photo/rocket", 1, (3, 427, 640)),
        ("photo/coins", 1, (1, 303, 384)),
        ("photo/tissue", 1, (3, 512, 512)),
        ("photo/hubble", 1, (3, 872, 1000)),
        ("photo/china", 1, (3, 427, 640)),
        ("photo/flower", 1, (3, 427, 640)),
    ],
)
def test_built_in_sets_open(name, N, shape):
    corpus = Corpus.open(name)
    assert (len(corpus), corpus.shape, corpus.name) == (N, shape, name)
    assert corpus.images.max() > 127


def test_digits_use_the_whole_range_and_have_classes():
    from sklearn.datasets import load_digits

    corpus, bunch = Corpus.open("digits"), load_digits()
    np.testing.assert_array_equal(corpus.images[:, 0], np.rint(bunch.images * 255 / 16))
    np.testing.assert_array_equal(corpus.labels, bunch.target)
    assert corpus.class_names == tuple("0123456789")


def test_options_apply_to_built_in_sets():
    assert Corpus.open("photo/chelsea", size=(10, 12), grayscale=True).shape == (1, 10, 12)
    assert len(Corpus.open("digits", limit=7)) == 7


# ---------------------------------------------------------------------------------------------
# Folders and zips


def test_a_flat_folder_has_no_labels_and_a_natural_order(tmp_path):
    u = images(3)
    for name, pixels in zip(["10.png", "2.png", "1.png"], u, strict=True):
        save(tmp_path / "set" / name, pixels)
    corpus = Corpus.open(tmp_path / "set")
    assert list(corpus.ids) == ["1.png", "2.png", "10.png"]
    assert corpus.labels is None
    assert corpus.class_names is None
    np.testing.assert_array_equal(corpus.images, u[::-1])


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["train/cat/1.png", "train/dog/1.png"], ("cat", "dog")),
        (["a/b/1.png", "c/d/1.png"], ("a/b", "c/d")),
        (["10/1.png", "9/1.png"], ("9", "10")),
        (["a/1.png", "1.png"], None),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_are_classes(tmp_path, places, names, packed):
    if packed:
        entries = {place: png(images(1)[0]) for place in places}
        source = pack(tmp_path / "set.zip", entries)
    else:
        source = tmp_path / "set"
        for place in places:
            save(source / place, images(1)[0])
    corpus = Corpus.open(source)
    assert corpus.class_names == names
    if names is None:
        assert corpus.labels is None
        return
    for place, label in zip(corpus.ids, corpus.labels, strict=True):
        assert names[label] in place


def test_a_zip_leaves_out_what_macos_and_editors_add(tmp_path):
    kept = png(images(1)[0])
    entries = {"a.png": kept, "__MACOSX/._a.png": b"x", ".b.png": b"x", "notes.txt": b"x"}
    assert list(Corpus.open(pack(tmp_path / "set.zip", entries)).ids) == ["a.png"]


@pytest.mark.parametrize("labels", [True, False])
def test_edm_zips_name_their_classes_in_dataset_json(tmp_path, labels):
    u = images(2)
    names = ["00000/img00000000.png", "00000/img00000001.png"]
    listed = [[names[1], 6], [names[0], 2]] if labels else None
    entries = {name: png(pixels) for name, pixels in zip(names, u, strict=True)}
    entries["dataset.json"] = json.dumps({"labels": listed}).encode()
    corpus = Corpus.open(pack(tmp_path / "edm.zip", entries))
    np.testing.assert_array_equal(corpus.images, u)
    if labels:
        np.testing.assert_array_equal(corpus.labels, [2, 6])
    else:
        assert corpus.labels is None


# ---------------------------------------------------------------------------------------------
# Pixels


def test_exif_rotation_is_honoured(tmp_path):
    u = images(1, H=4, W=6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    save(tmp_path / "set" / "a.png", u, exif=exif)
    corpus = Corpus.open(tmp_path / "set")
    np.testing.assert_array_equal(corpus.images[0], np.rot90(u, -1, axes=(1, 2)))


def test_alpha_is_flattened_on_white(tmp_path):
    clear = np.zeros((4, 5, 5), np.uint8)
    save(tmp_path / "set" / "clear.png", clear)
    assert (Corpus.open(tmp_path / "set").images == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    (tmp_path / "set").mkdir()
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 0 to 65535
    Image.fromarray(ramp).save(tmp_path / "set" / "ramp.png")
    corpus = Corpus.open(tmp_path / "set")
    np.testing.assert_array_equal(corpus.images[0, 0], ramp // 257)


def test_one_colour_image_makes_the_corpus_coloured_and_grayscale_undoes_it(tmp_path):
    save(tmp_path / "set" / "a.png", images(1, C=1)[0])
    assert Corpus.open(tmp_path / "set").shape == (1, 8, 8)
    save(tmp_path / "set" / "b.png", images(1, C=3)[0])
    assert Corpus.open(tmp_path / "set").shape == (3, 8, 8)
    assert Corpus.open(tmp_path / "set", grayscale=True).shape == (1, 8, 8)


def test_size_covers_and_crops_the_centre(tmp_path):
    wide = np.zeros((1, 8, 24), np.uint8)
    wide[:, :, 8:16] = 200
    save(tmp_path / "set" / "wide.png", wide)
    save(tmp_path / "set" / "tall.png", wide.transpose(0, 2, 1))
    assert (Corpus.open(tmp_path / "set", size=8).images == 200).all()
    assert Corpus.open(tmp_path / "set", size=(4, 6)).shape == (1, 4, 6)


def test_limit_spreads_over_the_classes_and_decodes_no_more(tmp_path, monkeypatch):
    for k in range(3):
        for i in range(10):
            save(tmp_path / "set" / str(k) / f"{i}.png", images(1, seed=i)[0])
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    corpus = Corpus.open(tmp_path / "set", grayscale=True, limit=6)
    assert len(corpus) == 6
    assert set(corpus.labels) == {0, 1, 2}
    assert len(opened) == 6


# ---------------------------------------------------------------------------------------------
# Array files and data sets


@pytest.mark.parametrize(
    ("saved", "shape"),
    [((6, 3, 8, 8), (3, 8, 8)), ((6, 8, 9, 3), (3, 8, 9)), ((6, 8, 9), (1, 8, 9))],
)
def test_npy_files_may_be_channels_first_last_or_without(tmp_path, saved, shape):
    np.save(tmp_path / "u.npy", np.zeros(saved, np.uint8))
    assert Corpus.open(tmp_path / "u.npy").shape == shape


def test_an_npy_that_needs_no_change_is_mapped_as_it_is(tmp_path):
    np.save(tmp_path / "u.npy", images())
    corpus = Corpus.open(tmp_path / "u.npy")
    assert is_mapped(corpus.images)
    assert not list(cache_root().glob("corpora/*/images*"))


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "label")])
def test_npz_files_hold_images_and_labels(tmp_path, names):
    u, labels = images(), [3, 1, 0, 1, 2, 3]
    np.savez(tmp_path / "u.npz", **dict(zip(names, (u, labels), strict=True)))
    corpus = Corpus.open(tmp_path / "u.npz")
    np.testing.assert_array_equal(corpus.images, u)
    np.testing.assert_array_equal(corpus.labels, labels)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("kind", ["pil", "bytes", "float", "channels last"])
def test_a_torch_data_set_is_read(kind):
    u = images()
    convert = {
        "pil": lambda p: Image.fromarray(np.ascontiguousarray(p.transpose(1, 2, 0))),
        "bytes": torch.from_numpy,
        "float": lambda p: torch.from_numpy(p) / 255,
        "channels last": lambda p: p.transpose(1, 2, 0),
    }[kind]
    corpus = Corpus.open(Pairs([(convert(p), i % 2) for i, p in enumerate(u)]))
    np.testing.assert_array_equal(corpus.images, u)
    np.testing.assert_array_equal(corpus.labels, [0, 1, 0, 1, 0, 1])
    assert is_mapped(corpus.images)


def test_a_torch_data_set_may_lack_labels():
    corpus = Corpus.open(Pairs(list(torch.from_numpy(images()))))
    np.testing.assert_array_equal(corpus.images, images())
    assert corpus.labels is None


def test_data_sets_with_other_labels_are_other_corpora():
    u = torch.from_numpy(images(2))
    first = Corpus.open(Pairs([(u[0], 0), (u[1], 1)]))
    other = Corpus.open(Pairs([(u[0], 1), (u[1], 0)]))
    np.testing.assert_array_equal(first.labels, [0, 1])
    np.testing.assert_array_equal(other.labels, [1, 0])


def test_a_local_hugging_face_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    u = images(4)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [Image.fromarray(p.transpose(1, 2, 0)) for p in u], "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "hf")
    corpus = Corpus.open(f"hf:{tmp_path / 'hf'}")
    np.testing.assert_array_equal(corpus.images, u)
    np.testing.assert_array_equal(corpus.labels, [0, 1, 1, 0])
    assert corpus.class_names == ("cat", "dog")


def test_an_open_corpus_opens_as_itself():
    corpus = Corpus(images())
    assert Corpus.open(corpus) is corpus
    assert len(Corpus.open(corpus, limit=2)) == 2


# ---------------------------------------------------------------------------------------------
# The cache


def test_a_second_open_gives_the_same_mapped_from_disk(tmp_path, monkeypatch):
    for k, pixels in enumerate(images()):
        save(tmp_path / "set" / str(k % 2) / f"{k}.png", pixels)
    first = Corpus.open(tmp_path / "set")
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded again
    second = Corpus.open(tmp_path / "set")
    for corpus in (first, second):
        assert is_mapped(corpus.images)
        assert not corpus.images.flags.writeable
        assert corpus.images.flags.c_contiguous
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert list(first.ids) == list(second.ids)
    assert (first.key, first.name, first.class_names) == (
        second.key,
        second.name,
        second.class_names,
    )


def test_a_changed_file_is_another_key(tmp_path):
    path = tmp_path / "set" / "a.png"
    save(path, images(1)[0])
    before = Corpus.open(tmp_path / "set")
    save(path, images(1, seed=1)[0])
    os.utime(path, ns=(1, 1))
    after = Corpus.open(tmp_path / "set")
    assert before.key != after.key
    np.testing.assert_array_equal(after.images, images(1, seed=1))


def test_options_are_part_of_the_key(tmp_path):
    for k, pixels in enumerate(images()):
        save(tmp_path / "set" / f"{k}.png", pixels)
    options = [{}, {"size": 4}, {"size": (4, 5)}, {"grayscale": True}, {"limit": 3}]
    assert len({Corpus.open(tmp_path / "set", **o).key for o in options}) == len(options)


def test_importing_the_corpus_is_cheap():
    import subprocess
    import sys

    heavy = "{'PIL', 'torch', 'sklearn', 'skimage', 'datasets'}"
    code = f"import sys, scoremachine.data.corpus; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
