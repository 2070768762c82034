"""From files to pixels: ranges of values, pages, suffixes; and lists, arrays and data sets."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scoremachine.data import decoding
from scoremachine.data.corpus import Corpus
from scoremachine.data.readers import BUILT_IN
from test_corpus import Pairs, images, pack, png, save
from test_layout import opened


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "cache"))


def store(folder, *arrays, suffix="tif"):
    """Saves gray arrays as 0.tif, 1.tif, ..."""
    folder.mkdir(exist_ok=True)
    for k, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{k}.{suffix}")
    return folder


def ramp(high, dtype):
    return np.linspace(0, high, 64).reshape(8, 8).astype(dtype)


# ---------------------------------------------------------------------------------------------
# Ranges of values


@pytest.mark.parametrize(
    ("values", "white", "says"),
    [
        (ramp(1, np.float32), 1, r"floats in \[0, 1\]"),
        (ramp(0.25, np.float32), 1, r"floats in \[0, 1\]"),
        (ramp(255, np.int32), 255, "8 bits"),
        (ramp(100, np.uint16), 255, "8 bits"),
        (ramp(4095, np.uint16), 4095, "12 bits"),
        (ramp(300, np.uint16), 4095, "12 bits"),
        (ramp(4096, np.uint16), 65535, "16 bits"),
        (ramp(65535, np.int32), 65535, "16 bits"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_values_of_other_depths_are_scaled_by_a_rule_that_is_told(
    tmp_path, values, white, says, packed
):
    source = store(tmp_path / "set", values)
    if packed:
        source = pack(tmp_path / "set.zip", {"0.tif": (source / "0.tif").read_bytes()})
    for _ in range(2):
        with pytest.warns(UserWarning, match=says) as told:
            corpus = Corpus.open(source)
        assert len(told) == 1
        expected = np.rint(values.astype(np.float64) * 255 / white)
        np.testing.assert_array_equal(corpus.images[0, 0], expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (ramp(1400, np.float32), r"floats? .*0 to 1400; expected \[0, 1\].*divide"),
        (ramp(255, np.float32), r"0 to 255; expected \[0, 1\]"),
        (ramp(1, np.float32) - 0.5, r"-0.5 to 0.5; expected \[0, 1\]"),
        (ramp(70_000, np.int32), r"0 to 70,000; expected 0 to 65,535.*save"),
        (ramp(255, np.int32) - 5, r"-5 to 250; expected 0 to 65,535"),
    ],
)
def test_values_whose_range_nothing_tells_are_refused(tmp_path, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Corpus.open(store(tmp_path / "set", values))


def test_one_rule_holds_for_the_whole_corpus(tmp_path):
    dark, light, eight = ramp(100, np.uint16), ramp(65535, np.uint16), ramp(255, np.uint8)
    corpus, told = opened(store(tmp_path / "set", dark, light, eight))
    assert len(told) == 1
    for image, values, white in zip(
        corpus.images, (dark, light, eight), (65535, 65535, 255), strict=True
    ):
        np.testing.assert_array_equal(image[0], np.rint(values * (255 / white)))


def test_floats_and_integers_have_rules_of_their_own(tmp_path):
    corpus, told = opened(store(tmp_path / "set", ramp(1, np.float32), ramp(4095, np.uint16)))
    assert len(told) == 2
    np.testing.assert_array_equal(corpus.images[0], corpus.images[1])


def test_deep_gray_images_among_colour_ones_are_scaled_too(tmp_path):
    store(tmp_path / "set", ramp(4095, np.uint16))
    save(tmp_path / "set" / "colour.png", images(1)[0])
    corpus, _ = opened(tmp_path / "set")
    assert corpus.shape == (3, 8, 8)
    for channel in corpus.images[0]:
        np.testing.assert_array_equal(channel, np.rint(ramp(4095, np.uint16) * (255 / 4095)))


def test_a_float_image_that_is_not_finite_is_skipped_with_its_reason(tmp_path):
    bad = ramp(1, np.float32)
    bad[0, 0] = np.nan
    corpus, told = opened(store(tmp_path / "set", bad, ramp(1, np.float32)))
    assert list(corpus.ids) == ["1.tif"]
    assert any("0.tif (it holds values that are not finite)" in sentence for sentence in told)


def test_a_tiff_that_pillow_does_not_read_says_why(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "set").mkdir()
    tifffile.imwrite(tmp_path / "set" / "a.tif", np.ones((8, 8, 3), np.float32), photometric="rgb")
    with pytest.raises(ValueError, match=r"none of the 1 .*a\.tif .*float32 in several channels"):
        Corpus.open(tmp_path / "set")


@pytest.mark.parametrize(("high", "refused"), [(4095, True), (65535, False)])
def test_colour_of_twelve_bits_in_sixteen_is_refused(tmp_path, high, refused):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, high + 1, (8, 8, 3), dtype=np.uint16)
    (tmp_path / "set").mkdir()
    tifffile.imwrite(tmp_path / "set" / "a.tif", values, photometric="rgb")
    if refused:
        with pytest.raises(ValueError, match=r"store 16 bits.*multiply the values by 16"):
            Corpus.open(tmp_path / "set")
        return
    corpus = Corpus.open(tmp_path / "set")
    np.testing.assert_array_equal(corpus.images[0], (values >> 8).transpose(2, 0, 1))


@given(high=st.integers(1, 65535))
def test_the_largest_value_is_never_clipped_and_black_stays_black(high):
    white, _ = decoding.white_of("integer", 0, high, "set")
    pixels = decoding.to_pixels(Image.fromarray(np.array([[0, high]], np.uint16)), None, 1, white)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 0, 1] == np.rint(high * 255 / white) > 0
    assert white >= high


# ---------------------------------------------------------------------------------------------
# Pages and frames


def stack(path, N, seed=0, **options):
    """A file of N random gray pages; returns what Pillow reads of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [Image.fromarray(p[0]) for p in images(N, C=1, seed=seed)]
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    with Image.open(path) as file:
        found = []
        for k in range(N):
            file.seek(k)
            found.append(np.asarray(file.convert("L")))
    return np.stack(found)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
@pytest.mark.parametrize("alone", [False, True])
def test_every_page_and_frame_is_an_image_and_told(tmp_path, suffix, alone):
    path = tmp_path / "set" / f"s.{suffix}"
    pages = stack(path, 5, **({"lossless": True} if suffix == "webp" else {}))
    corpus, told = opened(path if alone else path.parent, grayscale=True)
    np.testing.assert_array_equal(corpus.images[:, 0], pages)
    assert list(corpus.ids) == [f"s.{suffix}[{k}]" for k in range(5)]
    assert len(told) == 1
    assert "pages" in told[0]


def test_gray_animations_are_gray(tmp_path):
    stack(tmp_path / "set" / "s.gif", 3)
    assert opened(tmp_path / "set")[0].shape == (1, 8, 8)


def test_pages_have_the_class_of_their_file(tmp_path):
    stack(tmp_path / "set" / "a" / "s.tif", 3)
    save(tmp_path / "set" / "b" / "s.tif", images(1, C=1)[0])
    corpus, _ = opened(tmp_path / "set")
    np.testing.assert_array_equal(corpus.labels, [0, 0, 0, 1])


def test_limit_spreads_over_pages(tmp_path):
    stack(tmp_path / "set" / "a.tif", 9)
    save(tmp_path / "set" / "b.tif", images(1, C=1)[0])
    corpus, _ = opened(tmp_path / "set", limit=4)
    assert list(corpus.ids) == ["a.tif[0]", "a.tif[3]", "a.tif[6]", "b.tif"]
    assert len(opened(tmp_path / "set" / "a.tif", limit=2)[0]) == 2


def test_a_reduced_copy_in_a_tiff_is_no_image(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    u = images(2, C=1)[:, 0]
    (tmp_path / "set").mkdir()
    with tifffile.TiffWriter(tmp_path / "set" / "a.tif") as file:
        file.write(u[0], metadata=None)
        file.write(u[1][::2, ::2], metadata=None, subfiletype=1)
    corpus, told = opened(tmp_path / "set")
    np.testing.assert_array_equal(corpus.images[0, 0], u[0])
    assert len(corpus) == 1
    assert told == []


def test_a_preview_in_a_camera_jpeg_is_no_image(tmp_path):
    (tmp_path / "set").mkdir()
    first, preview = (Image.fromarray(p.transpose(1, 2, 0)) for p in images(2))
    first.save(tmp_path / "set" / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    corpus, told = opened(tmp_path / "set")
    assert list(corpus.ids) == ["a.jpg"]
    assert told == []


def test_deep_pages_are_scaled_by_one_rule_for_all(tmp_path):
    dark, light = ramp(100, np.uint16), ramp(4095, np.uint16)
    pages = [Image.fromarray(values) for values in (dark, light)]
    (tmp_path / "set").mkdir()
    pages[0].save(tmp_path / "set" / "s.tif", save_all=True, append_images=pages[1:])
    for limit in (None, 2):
        corpus, _ = opened(tmp_path / "set", limit=limit)
        for image, values in zip(corpus.images[:, 0], (dark, light), strict=True):
            np.testing.assert_array_equal(image, np.rint(values * (255 / 4095)))


def test_a_bad_page_is_skipped_and_the_others_stay(tmp_path):
    pages = stack(tmp_path / "set" / "s.tif", 3, compression="tiff_lzw")
    path = tmp_path / "set" / "s.tif"
    with Image.open(path) as file:
        file.seek(1)
        (start,) = file.tag_v2[273]
    data = bytearray(path.read_bytes())
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    corpus, told = opened(tmp_path / "set")
    assert list(corpus.ids) == ["s.tif[0]", "s.tif[2]"]
    np.testing.assert_array_equal(corpus.images[:, 0], pages[[0, 2]])
    assert any("s.tif[1] (" in sentence for sentence in told)


def test_a_page_too_large_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "set").mkdir()
    with tifffile.TiffWriter(tmp_path / "set" / "a.tif") as file:
        file.write(np.zeros((8, 8), np.uint8), metadata=None)
        file.write(np.zeros((16_385, 1), np.uint8), metadata=None)
    with pytest.raises(ValueError, match=r"a\.tif\[1\] is .*16,385"):
        Corpus.open(tmp_path / "set")


# ---------------------------------------------------------------------------------------------
# Suffixes


@pytest.mark.parametrize(
    "suffix", ["jfif", "jpe", "JPG", "jp2", "tga", "pnm", "qoi", "avif", "dib"]
)
def test_suffixes_are_those_that_pillow_reads(tmp_path, suffix):
    kind = Image.registered_extensions()[f".{suffix.lower()}"]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    save(tmp_path / "set" / f"a.{suffix}", images(1)[0], format=kind)
    corpus, told = opened(tmp_path / "set")
    assert list(corpus.ids) == [f"a.{suffix}"]
    assert told == []


def test_formats_that_run_programs_or_have_no_reader_are_none():
    assert {".png", ".jpg", ".webp", ".gif", ".bmp", ".ppm"} <= decoding.suffixes()
    assert not {".eps", ".ps", ".h5", ".mpg", ".wmf", ".grib", ".pdf"} & decoding.suffixes()


@pytest.mark.parametrize("packed", [False, True])
def test_surprising_files_are_counted_in_one_line_and_others_are_not(tmp_path, packed):
    entries = {"a.png": png(images(1)[0]), "b.heic": b"x", "c.heic": b"x", "film.mp4": b"x"}
    usual = dict.fromkeys(
        ["notes.txt", "x.json", "x.csv", ".DS_Store", "Thumbs.db", "LICENSE"], b"x"
    )
    for number, there in enumerate((entries | usual, {"a.png": entries["a.png"]} | usual)):
        if packed:
            source = pack(tmp_path / f"{number}.zip", there)
        else:
            source = tmp_path / str(number)
            source.mkdir()
            for name, data in there.items():
                (source / name).write_bytes(data)
        corpus, told = opened(source)
        assert list(corpus.ids) == ["a.png"]
        assert len(told) == (number == 0)
        assert all("2 .heic, 1 .mp4" in sentence for sentence in told)


def test_a_folder_of_other_files_says_what_it_holds_and_what_to_do(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images; expected.*1 \.heic: convert"):
        Corpus.open(tmp_path / "set")


# ---------------------------------------------------------------------------------------------
# Names


def test_a_built_in_name_that_is_a_path_too_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "faces" / "a.png", images(1)[0])
    with pytest.raises(ValueError, match=r"say \./faces .*built-in:faces"):
        Corpus.open("faces")
    assert len(Corpus.open("./faces")) == 1
    assert len(Corpus.open(Path("faces"))) == 1
    assert len(Corpus.open("built-in:faces")) == 100


@pytest.mark.parametrize("name", ["digits", "photo/chelsea"])
def test_a_built_in_set_has_a_name_that_no_path_hides(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name in BUILT_IN
    np.testing.assert_array_equal(Corpus.open(f"built-in:{name}").images, Corpus.open(name).images)


def test_an_unknown_built_in_set_and_a_path_of_its_name_say_what_to_write():
    with pytest.raises(FileNotFoundError, match=r"did you mean 'digits'"):
        Corpus.open("built-in:digit")
    with pytest.raises(FileNotFoundError, match=r"built-in:photo/chelsea"):
        Corpus.open(Path("photo/chelsea"))


# ---------------------------------------------------------------------------------------------
# Lists of paths, data sets, arrays


def test_a_list_of_paths_is_a_corpus_in_its_order(tmp_path):
    u = images(3)
    paths = [tmp_path / name for name in ("c.png", "a.png", "b.png")]
    for path, pixels in zip(paths, u, strict=True):
        save(path, pixels)
    corpus = Corpus.open([paths[0], str(paths[1]), paths[2]])
    np.testing.assert_array_equal(corpus.images, u)
    assert list(corpus.ids) == [str(path) for path in paths]
    assert corpus.labels is None
    np.testing.assert_array_equal(Corpus.open(paths[::-1]).images, u[::-1])


def test_a_list_of_paths_with_a_missing_one_or_a_folder_is_refused(tmp_path):
    save(tmp_path / "a.png", images(1)[0])
    with pytest.raises(FileNotFoundError, match=r"list of 2 paths has '.*none\.png'"):
        Corpus.open([tmp_path / "a.png", tmp_path / "none.png"])
    with pytest.raises(ValueError, match="a folder; expected image files"):
        Corpus.open([tmp_path])
    with pytest.raises(ValueError, match="make a list of it"):
        Corpus.open(tmp_path.glob("*"))


def test_an_encrypted_zip_says_so(tmp_path):
    path = pack(tmp_path / "set.zip", {"a.png": png(images(1)[0])})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory of entries
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"set\.zip is encrypted; expected.*unpack it"):
        Corpus.open(path)


def test_a_normalized_data_set_says_so():
    with pytest.raises(ValueError, match=r"range from -1 to 1; expected \[0, 1\].*normalization"):
        Corpus.open(Pairs([(torch.linspace(-1, 1, 48).reshape(3, 4, 4), 0)] * 2))


def test_a_data_set_of_other_integers_says_so():
    with pytest.raises(ValueError, match=r"int64; expected uint8.*astype"):
        Corpus.open(Pairs([torch.zeros(1, 4, 4, dtype=torch.int64)]))


@pytest.mark.parametrize("label", ["cat", torch.zeros(40), -1, 0.5, {"box": 1}])
def test_a_data_set_whose_labels_are_no_classes_opens_without_and_tells(label):
    corpus, told = opened(Pairs([(torch.from_numpy(p), label) for p in images(2)]))
    assert corpus.labels is None
    assert len(told) == 1
    assert "without classes" in told[0]


def test_a_data_set_of_mappings_is_read():
    corpus = Corpus.open([{"image": p, "label": k} for k, p in enumerate(images(3))])
    np.testing.assert_array_equal(corpus.images, images(3))
    np.testing.assert_array_equal(corpus.labels, [0, 1, 2])
    with pytest.raises(ValueError, match="expected the image to be called image"):
        Corpus.open([{"photo": p} for p in images(3)])


def test_a_loader_says_to_give_its_data_set():
    loader = torch.utils.data.DataLoader(Pairs(list(torch.from_numpy(images()))))
    with pytest.raises(ValueError, match=r"give its \.dataset"):
        Corpus.open(loader)


@pytest.fixture
def hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def make(seed=0, labels=(0, 1, 1, 0)):
        pictures = [Image.fromarray(p.transpose(1, 2, 0)) for p in images(4, seed=seed)]
        rows = {"image": pictures, "label": list(labels)}
        return datasets.Dataset.from_dict(rows, features=features)

    return make


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_hugging_face_object_opens_with_its_classes(hugging_face, form):
    corpus = Corpus.open(hugging_face().with_format(form))
    np.testing.assert_array_equal(corpus.images, images(4))
    np.testing.assert_array_equal(corpus.labels, [0, 1, 1, 0])
    assert corpus.class_names == ("cat", "dog")


def test_a_hugging_face_test_split_without_labels_has_no_classes(hugging_face):
    corpus, told = opened(hugging_face(labels=(-1, -1, -1, -1)))
    assert corpus.labels is None
    assert len(told) == 1


def test_splits_of_hugging_face_objects_and_of_folders_of_them(hugging_face, tmp_path):
    import datasets

    both = datasets.DatasetDict(train=hugging_face(), test=hugging_face(seed=1))
    both.save_to_disk(tmp_path / "hf")
    for source in (both, f"hf:{tmp_path / 'hf'}"):
        corpus, told = opened(source)
        np.testing.assert_array_equal(corpus.images, images(4))
        assert len(told) == 1
        assert "train is opened" in told[0]
        corpus, told = opened(source, split="test")
        np.testing.assert_array_equal(corpus.images, images(4, seed=1))
        assert told == []
        with pytest.raises(ValueError, match="no split 'val'"):
            Corpus.open(source, split="val")
    assert len(Corpus.open(f"hf:{tmp_path / 'hf'}:test")) == 4
    with pytest.raises(ValueError, match="already"):
        Corpus.open(f"hf:{tmp_path / 'hf'}:test", split="train")


def test_a_hugging_face_stream_says_what_to_do(hugging_face):
    with pytest.raises(ValueError, match="streaming=True"):
        Corpus.open(hugging_face().to_iterable_dataset())


@pytest.mark.parametrize(
    ("train", "test"),
    [("train_images", "test_images"), ("x_train", "x_test"), ("X_train", "X_test")],
)
def test_an_npz_of_splits_opens_train_or_what_is_asked_for(tmp_path, train, test):
    u, v = images(5), images(3, seed=1)
    labels = [
        name.replace("images", "labels").replace("x", "y").replace("X", "y")
        for name in (train, test)
    ]
    arrays = {train: u, test: v, labels[0]: np.arange(5)[:, None] % 2, labels[1]: np.arange(3)}
    np.savez(tmp_path / "set.npz", **arrays)
    corpus, told = opened(tmp_path / "set.npz")
    np.testing.assert_array_equal(corpus.images, u)
    np.testing.assert_array_equal(corpus.labels, [0, 1, 0, 1, 0])
    assert len(told) == 1
    assert "--split test" in told[0]
    for options in ({"split": "test"}, {"array": test}):
        corpus, told = opened(tmp_path / "set.npz", **options)
        np.testing.assert_array_equal(corpus.images, v)
        np.testing.assert_array_equal(corpus.labels, [0, 1, 2])
        assert told == []


def test_an_npz_of_several_arrays_must_be_asked_for_one(tmp_path):
    np.savez(tmp_path / "set.npz", cats=images(2), dogs=images(3))
    with pytest.raises(ValueError, match=r"array='cats' or --array cats; it has cats .*dogs"):
        Corpus.open(tmp_path / "set.npz")
    assert len(Corpus.open(tmp_path / "set.npz", array="dogs")) == 3
    with pytest.raises(ValueError, match=r"no array 'dog' \(did you mean 'dogs'"):
        Corpus.open(tmp_path / "set.npz", array="dog")
    with pytest.raises(ValueError, match="no split 'train'"):
        Corpus.open(tmp_path / "set.npz", split="train")


def test_an_npz_without_images_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.zeros((2, 8, 8)), y_train=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"x_train \(float64, \(2, 8, 8\)\).*multiply"):
        Corpus.open(tmp_path / "set.npz")


def test_several_labels_for_an_image_are_no_classes_and_told(tmp_path):
    np.savez(tmp_path / "set.npz", images=images(3), labels=np.zeros((3, 14), int))
    corpus, told = opened(tmp_path / "set.npz")
    assert corpus.labels is None
    assert len(told) == 1
    assert "14 labels" in told[0]


def test_words_in_an_npz_are_classes(tmp_path):
    np.savez(tmp_path / "set.npz", images=images(3), labels=np.array(["dog", "cat", "dog"]))
    corpus = Corpus.open(tmp_path / "set.npz")
    assert corpus.class_names == ("cat", "dog")
    np.testing.assert_array_equal(corpus.labels, [1, 0, 1])


def test_one_array_height_width_channels_is_one_image_and_told(tmp_path):
    u = images(1, H=8, W=9)[0]
    np.save(tmp_path / "u.npy", u.transpose(1, 2, 0))
    corpus, told = opened(tmp_path / "u.npy")
    np.testing.assert_array_equal(corpus.images, u[None])
    assert len(told) == 1
    assert "one colour image" in told[0]


def test_an_array_that_may_be_three_images_or_one_is_refused(tmp_path):
    np.save(tmp_path / "u.npy", images(1)[0])
    with pytest.raises(ValueError, match=r"3 gray images or one of 3 channels.*reshape"):
        Corpus.open(tmp_path / "u.npy")
    np.savez(tmp_path / "u.npz", images=images(1)[0], labels=[0, 1, 0])  # so they are three
    assert Corpus.open(tmp_path / "u.npz").images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_what_is_no_array_file_says_so(tmp_path, suffix):
    (tmp_path / f"u.{suffix}").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ValueError, match="no array file of numpy, and pickles are refused"):
        Corpus.open(tmp_path / f"u.{suffix}")


# ---------------------------------------------------------------------------------------------
# Reasons


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"text", "not an image that Pillow can identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "format EPS"),
    ],
)
def test_a_skipped_file_has_its_reason(tmp_path, data, reason):
    save(tmp_path / "set" / "a.png", images(1)[0])
    (tmp_path / "set" / "b.png").write_bytes(data)
    with pytest.warns(UserWarning, match=rf"b\.png \(.*{reason}"):
        Corpus.open(tmp_path / "set")


def test_the_same_note_is_shown_once_by_default(tmp_path):
    source = store(tmp_path / "set", ramp(1, np.float32))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            Corpus.open(source)
    assert len(told) == 1


def test_the_former_place_of_decoding_has_its_names():
    from scoremachine import pixels

    for name in pixels.__all__:
        assert getattr(pixels, name) is getattr(decoding, name)


def test_a_data_sets_image_may_be_a_file_object():
    data = io.BytesIO(png(images(1)[0]))
    corpus = Corpus.open(Pairs([Image.open(data)]))
    np.testing.assert_array_equal(corpus.images, images(1))
