"""The study of when the theory holds: what is trained, kept, and told."""

from __future__ import annotations

import json

import numpy as np
import pytest

import scoremachine as sm
from scoremachine.app import report
from scoremachine.lab.comparison import Cell, study
from scoremachine.lab.comparison import cells as module
from scoremachine.lab.comparison.cells import cells
from scoremachine.lab.networks import Training

TINY = (("width", 8), ("depth", 1))
CELLS = [
    Cell("images", "12 images", 12, 4, "resnet", TINY),
    Cell("steps", "2 steps", 30, 2, "resnet", TINY),
    Cell("steps", "4 steps", 30, 4, "resnet", TINY),
    Cell("network", "MLP", 30, 4, "mlp", TINY),
]


def brief():
    return Training(batch=8, precision="float32")


def test_a_study_trains_compares_and_goes_on(tmp_path, monkeypatch):
    corpus = sm.Corpus.open("digits", limit=40)
    ask = [corpus, tmp_path, ["ls:3", "gaussian"]]
    how = {"steps": 4, "chosen": CELLS, "count": 2, "pictures": 2}
    rows = study(*ask, **how, training=brief())
    assert [(r.cell.label, r.machine) for r in rows] == [
        (cell.label, machine) for cell in CELLS for machine in ("ls:3", "gaussian")
    ]
    for row in rows:
        assert row.r2.count == 2
        assert 0 <= row.r2.median <= 1
        assert len(row.forward) == 5
        assert min(row.seen) > 0
        assert min(row.unseen) > 0
    # 2 steps and then 4: one training, which went on
    folders = {path.name for path in tmp_path.iterdir()}
    assert len(folders) == 3
    monkeypatch.setattr(module, "train", None)
    monkeypatch.setattr(module, "compare", None)
    again = study(*ask, **how, training=brief())
    assert again == rows
    files = report.write_study(rows, tmp_path)
    assert all(path.exists() for path in files)
    assert len(json.loads(files[1].read_text())) == len(rows)
    assert files[0].read_text().count("`ls:3`") == len(CELLS)


def test_a_study_goes_on_with_nothing_but_itself(tmp_path):
    corpus, other = sm.Corpus.open("digits", limit=40), sm.Corpus.open("faces", size=8, limit=40)
    ask = [tmp_path, ["gaussian"]]
    how = {"steps": 4, "chosen": CELLS[2:3], "count": 2, "pictures": 2}
    study(corpus, *ask, **how, training=brief())
    with pytest.raises(ValueError, match="another corpus_digest"):
        study(other, *ask, **how, training=brief())
    with pytest.raises(ValueError, match=r"another .*seed"):
        study(corpus, *ask, **how, seed=1, training=brief())
    with pytest.raises(ValueError, match="of 4 steps"):
        study(corpus, *ask, **how | {"steps": 2, "chosen": CELLS[1:2]}, training=brief())


def test_cells_ask_three_questions():
    found = cells(60_000, 2000, (32, 32))
    assert {cell.group for cell in found} == {"images", "steps", "network"}
    assert [c.images for c in found if c.group == "images"] == [
        100, 300, 1_000, 3_000, 10_000, 59_936
    ]  # fmt: skip
    assert max(c.steps for c in found) == 2000
    assert "dit" in {c.network for c in found}
    assert "dit" not in {c.network for c in cells(1000, 20, (9, 9))}
    assert np.all([c.images <= 40 for c in cells(50, 20, (8, 8))])


def test_senseless_studies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 8"):
        study(sm.Corpus.open("digits", limit=4), tmp_path)
    with pytest.raises(ValueError, match="steps is 0"):
        study(sm.Corpus.open("digits", limit=40), tmp_path, steps=0)
