"""Copies within a corpus are found, in groups, and images that have none are not."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

import scoremachine as sm
from scoremachine.app.cli import app
from test_audit import altered, textured


def with_copies() -> tuple[sm.Corpus, list[list[int]]]:
    """60 pictures, of which some are copies: the groups."""
    images = textured(1, 60)
    images[50] = altered("exact", images[3])
    images[51] = altered("moved", images[7])
    images[52] = altered("mirrored", images[11])
    images[53] = altered("relit", images[3])
    images[54] = altered("noisy", images[20])
    return sm.Corpus(images), [[3, 50, 53], [7, 51], [11, 52], [20, 54]]


def test_groups_of_copies_are_found():
    corpus, groups = with_copies()
    found = sm.risk(corpus)
    assert found.groups() == groups
    assert (np.sort(found.difference) == found.difference).all()
    assert found.group[0] == -1
    assert found.isolation.shape == (60,)
    assert found.isolation[[3, 50]].max() < 0.1
    assert len(found.csv().splitlines()) == 61


def test_images_without_copies_have_no_group():
    found = sm.risk(sm.Corpus(textured(2, 40)))
    assert found.groups() == []
    assert found.pairs.shape == (0, 2)


def test_one_image_is_refused_and_blank_ones_are_no_copies():
    with pytest.raises(ValueError, match="one image"):
        sm.risk(sm.Corpus(textured(2, 1)))
    blank = np.zeros((4, 1, 8, 8), dtype=np.uint8)
    assert sm.risk(sm.Corpus(blank)).groups() == []


def test_the_commands_write_their_files(tmp_path):
    corpus, _ = with_copies()
    np.save(tmp_path / "data.npy", corpus.images)
    np.save(tmp_path / "pictures.npy", corpus.images[:3])

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    said = run("risk", "--data", tmp_path / "data.npy", "--out", tmp_path / "risk")
    assert "4 groups of copies with 9 of 60 images" in said
    assert {path.name for path in (tmp_path / "risk").iterdir()} == {
        "risk.csv", "copies.csv", "copies.png",
    }  # fmt: skip
    of = "--images", tmp_path / "pictures.npy", "--data", tmp_path / "data.npy"
    how = "--machine", "ls:5", "--sigma", "0.2", "--scales", "1,2"
    run("attribute", *of, "--out", tmp_path / "attribute", *how)
    lines = (tmp_path / "attribute" / "attribute.csv").read_text("utf-8").splitlines()
    assert lines[0] == "picture,rank,training_image,number,share"
    assert lines[1].split(",")[3] == "0"
