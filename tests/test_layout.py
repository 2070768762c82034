"""What folders and label files say: splits, classes, shards; the same in a folder and in a zip."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from scoremachine.data.corpus import Corpus
from scoremachine.data.layout import Layout, labelled, of_split
from test_corpus import images, pack, png


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMACHINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "zip"])
def source(request, tmp_path):
    """Makes a folder or a zip of image paths and texts; every image differs."""

    def make(paths, texts=None):
        pixels = images(len(paths))
        entries = {path: png(p) for path, p in zip(paths, pixels, strict=True)}
        entries |= {name: text.encode() for name, text in (texts or {}).items()}
        if request.param == "zip":
            return pack(tmp_path / "set.zip", entries)
        for path, data in entries.items():
            (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / path).write_bytes(data)
        return tmp_path / "set"

    return make


def opened(source, **options):
    """A corpus and what was told when it was opened."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        corpus = Corpus.open(source, **options)
    return corpus, [str(warning.message) for warning in told]


def classes(corpus):
    """Class name by id."""
    assert corpus.labels is not None
    return dict(
        zip(corpus.ids, [corpus.class_names[k] for k in corpus.labels.tolist()], strict=True)
    )


# ---------------------------------------------------------------------------------------------
# Splits

BOTH = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in range(2)]


def test_train_is_opened_of_several_splits_and_told_at_every_open(source):
    made = source(BOTH)
    for _ in range(2):
        corpus, told = opened(made)
        assert list(corpus.ids) == [path for path in BOTH if path.startswith("train/")]
        assert corpus.class_names == ("a", "b")
        assert len(told) == 1
        assert "train is opened" in told[0]
        assert "--split test" in told[0]


@pytest.mark.parametrize("split", ["test", "testing", "eval"])
def test_a_split_is_opened_by_its_name_or_another_word_for_it(source, split):
    corpus, told = opened(source(BOTH), split=split)
    assert list(corpus.ids) == [path for path in BOTH if path.startswith("test/")]
    assert corpus.class_names == ("a", "b")
    assert told == []


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev", "Val"])
def test_all_words_for_validation_are_splits(source, word):
    corpus, _ = opened(source(["train/1.png", f"{word}/1.png"]), split="validation")
    assert list(corpus.ids) == [f"{word}/1.png"]


def test_splits_are_found_below_a_folder_that_holds_all(source):
    corpus, told = opened(source([f"set-1.0/images/{path}" for path in BOTH]))
    assert len(corpus) == 4
    assert corpus.class_names == ("a", "b")
    assert len(told) == 1


def test_several_splits_without_train_must_be_asked_for(source):
    made = source(["val/1.png", "test/1.png"])
    with pytest.raises(ValueError, match=r"splits test, val .*split='test'.*--split test"):
        Corpus.open(made)
    assert len(Corpus.open(made, split="val")) == 1


def test_an_unknown_split_is_refused_with_those_that_are_there(source):
    with pytest.raises(ValueError, match=r"no split 'extra'.*there are test, train"):
        Corpus.open(source(BOTH), split="extra")


def test_a_split_of_a_source_without_splits_is_refused(source):
    with pytest.raises(ValueError, match=r"no split 'train'.*leave split out"):
        Corpus.open(source(["a/1.png", "b/1.png"]), split="train")


def test_the_only_split_may_be_named_and_another_is_refused(source):
    made = source(["train/a/1.png", "train/b/1.png"])
    assert opened(made)[1] == []
    assert len(Corpus.open(made, split="train")) == 2
    with pytest.raises(ValueError, match=r"no split 'test'.*there are train"):
        Corpus.open(made, split="test")


def test_a_class_called_train_is_a_class(source):
    corpus, told = opened(source(["bus/1.png", "car/1.png", "train/1.png"]))
    assert corpus.class_names == ("bus", "car", "train")
    assert told == []


def test_another_folder_of_the_same_classes_is_a_split_too(source):
    paths = [f"{split}/{kind}/1.png" for split in ("train", "extra") for kind in "ab"]
    made = source(paths)
    assert opened(made)[0].class_names == ("a", "b")
    assert list(Corpus.open(made, split="extra").ids) == ["extra/a/1.png", "extra/b/1.png"]


def test_images_outside_of_the_splits_are_told():
    paths, notes = of_split("set", [*BOTH, "preview.png"], "train")
    assert len(paths) == 4
    assert len(notes) == 1
    assert "left out 1 " in notes[0]


def test_splits_are_different_corpora(source):
    made = source(BOTH)
    assert Corpus.open(made, split="train").key != Corpus.open(made, split="test").key


@pytest.mark.parametrize("given", ["digits", images(), Corpus(images())])
def test_what_has_no_splits_refuses_one(given):
    with pytest.raises(ValueError, match="split"):
        Corpus.open(given, split="train")


# ---------------------------------------------------------------------------------------------
# Folders


def test_a_stray_picture_leaves_the_classes_and_is_told(source):
    paths = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "preview.png"]
    corpus, told = opened(source(paths))
    assert list(corpus.ids) == paths[:4]
    assert corpus.class_names == ("cat", "dog")
    assert len(told) == 1
    assert "preview.png" in told[0]
    assert "left out 1 " in told[0]


def test_a_stray_picture_beside_a_split_is_told(source):
    corpus, told = opened(
        source(["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "x.png"])
    )
    assert corpus.class_names == ("cat", "dog")
    assert len(told) == 1


def test_as_many_pictures_outside_as_inside_mean_no_classes_and_are_told(source):
    corpus, told = opened(source(["cat/1.png", "dog/1.png", "1.png", "2.png"]))
    assert len(corpus) == 4
    assert corpus.labels is None
    assert len(told) == 1
    assert "without classes" in told[0]


def test_a_folder_inside_a_class_belongs_to_it(source):
    corpus, told = opened(source(["cat/1.png", "cat/best/of/2.png", "dog/1.png"]))
    assert set(classes(corpus).values()) == {"cat", "dog"}
    assert classes(corpus)["cat/best/of/2.png"] == "cat"
    assert told == []


@pytest.mark.parametrize(
    "paths",
    [
        ["00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png"],  # EDM
        ["00000/00000.png", "00000/00999.png", "01000/01000.png"],  # FFHQ
        ["000/000000001.png", "001/000010000.png", "002/000020000.png"],  # img2dataset
    ],
)
def test_shards_are_no_classes_and_told(source, paths):
    corpus, told = opened(source(paths))
    assert len(corpus) == 3
    assert corpus.labels is None
    assert len(told) == 1
    assert "shards" in told[0]


@pytest.mark.parametrize(
    "paths",
    [
        ["0/1.png", "0/3.png", "1/2.png", "1/4.png"],  # MNIST
        ["0/1.png", "0/2.png", "1/3.png", "1/4.png"],
        ["00000/00000_00000.png", "00000/00001_00001.png", "00001/00000_00000.png"],  # GTSRB
        ["001/a.png", "002/b.png"],
        ["0001/1.png", "002/2.png"],
    ],
)
def test_digits_and_numbered_classes_are_classes(source, paths):
    corpus, told = opened(source(paths))
    assert corpus.class_names == tuple(dict.fromkeys(path.split("/")[0] for path in paths))
    assert told == []


def test_shards_within_classes_leave_the_classes():
    paths = ["a/000/1.png", "a/001/2.png", "b/000/1.png", "b/001/2.png"]
    found = labelled("set", paths, [], lambda path: b"")
    assert found.class_names == ("a", "b")
    assert found.labels == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------
# dataset.json


def test_dataset_json_wins_over_folders(source):
    paths = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    text = json.dumps({"labels": [[p, k] for p, k in zip(paths, (2, 0, 2), strict=True)]})
    corpus, told = opened(source(paths, {"dataset.json": text}))
    np.testing.assert_array_equal(corpus.labels, [2, 0, 2])
    assert corpus.class_names == ("0", "1", "2")
    assert told == []


def test_dataset_json_without_labels_means_no_classes(source):
    paths = ["cat/1.png", "dog/1.png"]
    corpus, told = opened(source(paths, {"dataset.json": '{"labels": null}'}))
    assert corpus.labels is None
    assert told == []


def test_the_nearest_dataset_json_gives_the_labels(source):
    text = {
        "train/dataset.json": '{"labels": [["1.png", 0]]}',
        "test/dataset.json": '{"labels": [["1.png", 1]]}',
    }
    made = source(["train/1.png", "test/1.png"], text)
    assert Corpus.open(made, split="train").labels.tolist() == [0]
    assert Corpus.open(made, split="test").labels.tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        '{"labels": []}',
        '{"labels": [["a/1.png", 0]]}',
        '{"labels": [["a/1.png", -1], ["b/1.png", 0]]}',
        "{",
    ],
)
def test_a_dataset_json_that_gives_no_class_to_every_image_is_refused(source, text):
    with pytest.raises(ValueError, match=r"dataset\.json in .*expected"):
        Corpus.open(source(["a/1.png", "b/1.png"], {"dataset.json": text}))


def test_another_kind_of_dataset_json_is_told_and_not_used(source):
    corpus, told = opened(source(["a/1.png", "b/1.png"], {"dataset.json": '{"title": "x"}'}))
    assert corpus.class_names == ("a", "b")
    assert len(told) == 1


# ---------------------------------------------------------------------------------------------
# metadata

FLAT = ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\n0.png,dog\n1.png,cat\n2.png,dog\n"),
        (
            "metadata.csv",
            "\ufefflabel,file_name,text\r\ndog,0.png,x\r\ncat,1.png,\r\ndog,2.png,x\r\n",
        ),
        ("metadata.csv", 'file_name,text,class\n0.png,"a, b",dog\n1.png,,cat\n./2.png,"",dog\n'),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "label": "dog"}\n\n{"file_name": "1.png", "label": "cat"}\n'
            '{"file_name": "2.png", "label": "dog"}\n',
        ),
    ],
)
def test_metadata_gives_labels(source, name, text):
    corpus, told = opened(source(FLAT, {name: text}))
    assert classes(corpus) == {"0.png": "dog", "1.png": "cat", "2.png": "dog"}
    assert corpus.class_names == ("cat", "dog")
    assert told == []


def test_metadata_may_be_parquet(source):
    pytest.importorskip("pyarrow")
    import io

    import pyarrow
    from pyarrow import parquet

    data = io.BytesIO()
    table = pyarrow.table({"file_name": FLAT, "label": ["dog", "cat", "dog"]})
    parquet.write_table(table, data)
    found = labelled("set", FLAT, ["metadata.parquet"], lambda path: data.getvalue())
    assert found.labels == [1, 0, 1]


def test_metadata_wins_over_folders_and_the_nearest_wins(source):
    texts = {
        "metadata.csv": "file_name,label\na/1.png,far\nb/1.png,far\n",
        "b/metadata.csv": "file_name,label\n1.png,near\n",
    }
    corpus, _ = opened(source(["a/1.png", "b/1.png"], texts))
    assert classes(corpus) == {"a/1.png": "far", "b/1.png": "near"}


def test_metadata_in_utf_8_is_read_whatever_the_locale(source, monkeypatch):
    import locale

    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr(locale, "getencoding", lambda: "ascii")
    text = "file_name,label\n0.png,Häher\n1.png,鳥\n2.png,Häher\n"
    corpus, _ = opened(source(FLAT, {"metadata.csv": text}))
    assert set(corpus.class_names) == {"Häher", "鳥"}


def test_numbers_in_metadata_are_the_labels(source):
    text = "file_name,label\n0.png,3\n1.png,0\n2.png,3\n"
    corpus, _ = opened(source(FLAT, {"metadata.csv": text}))
    np.testing.assert_array_equal(corpus.labels, [3, 0, 3])
    assert corpus.class_names == ("0", "1", "2", "3")


def test_images_without_a_label_are_left_out_and_told(source):
    text = "file_name,label\n0.png,cat\n1.png,\n9.png,dog\n"
    corpus, told = opened(source(FLAT, {"metadata.csv": text}))
    assert list(corpus.ids) == ["0.png"]
    assert any("2 of the images" in sentence for sentence in told)
    assert any("1 images that are not there" in sentence for sentence in told)


@pytest.mark.parametrize(
    "text",
    ["file_name,text\n0.png,a cat\n", "name,label\n0.png,cat\n", "file_name,label\nx.png,a\n"],
)
def test_metadata_without_labels_is_told_and_folders_are_classes(source, text):
    corpus, told = opened(source(["a/0.png", "b/0.png"], {"metadata.csv": text}))
    assert corpus.class_names == ("a", "b")
    assert len(told) == 1
    assert "not used" in told[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("metadata.jsonl", "{"), ("metadata.jsonl", '{"file_name": "0.png", "label": [1, 2]}')],
)
def test_metadata_that_cannot_be_used_is_refused_in_a_sentence(source, name, text):
    with pytest.raises(ValueError, match=r"metadata\.jsonl in .*; expected"):
        Corpus.open(source(FLAT, {name: text}))


def test_changed_labels_are_another_corpus(tmp_path):
    (tmp_path / "set").mkdir()
    for k, pixels in enumerate(images(2)):
        (tmp_path / "set" / f"{k}.png").write_bytes(png(pixels))
    metadata = tmp_path / "set" / "metadata.csv"
    metadata.write_text("file_name,label\n0.png,a\n1.png,b\n", encoding="utf-8")
    before = Corpus.open(tmp_path / "set")
    metadata.write_text("file_name,label\n0.png,a\n1.png,cc\n", encoding="utf-8")
    after = Corpus.open(tmp_path / "set")
    assert before.key != after.key
    assert after.class_names == ("a", "cc")


def test_a_layout_says_nothing_of_images_without_folders():
    assert labelled("set", FLAT, [], lambda path: b"") == Layout(FLAT)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "N", "K"), [("cifar10-train", 50_000, 10), ("mnist-train", 60_000, 10)]
)
def test_the_folders_of_cifar_10_and_mnist_are_classes(data_folder, name, N, K):
    import zipfile

    names = zipfile.ZipFile(data_folder / f"{name}.zip").namelist()
    paths, notes = of_split(name, names, None)
    found = labelled(name, paths, [], lambda path: b"")
    assert len(found.paths) == N
    assert len(found.class_names or ()) == K
    assert not any("/" in each for each in found.class_names)
    assert not notes
    assert not found.notes
