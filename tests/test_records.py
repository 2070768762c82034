"""Records of unfinished work: another run's are never taken for one's own; a disk may be full."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from azula.noise import Schedule
from hypothesis import given
from hypothesis import strategies as st

import scoremachine as sm
from scoremachine.app.runs.generation import Run, RunOptions
from scoremachine.lab.comparison import compare, parts, qualities, study
from scoremachine.lab.comparison.cells import Cell, Row, memorization
from scoremachine.lab.networks import Network, Training, train
from scoremachine.runtime import files, records
from scoremachine.runtime.records import differing, versions
from scoremachine.runtime.validation import options_of

VALUES = st.dictionaries(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 2)))


@given(VALUES, VALUES)
def test_records_differ_in_whatever_one_side_alone_has(asked, known):
    found = differing(asked, known)
    assert set(found) == set(differing(known, asked))
    assert (not found) == (asked == known)
    for name in {*asked, *known}:
        same = name in asked and name in known and asked[name] == known[name]
        assert (name in found) == (not same)


def half_finished(out: Path, **options) -> Run:
    """A run of which one picture is there."""
    machine = sm.build("ideal", sm.Corpus.open("digits", limit=20))
    run = Run(out, machine, RunOptions(count=2, steps=2, **options))
    run.go(False)
    picture = np.load(out / "samples.npz")["x"][0]
    run._begin(False)
    np.savez(run._kept(0), x=picture)
    return run


@pytest.mark.parametrize("options", [{"process": "heat"}, {"start": 0.5}, {"seed": 1}])
@pytest.mark.parametrize("other", [True, False])
def test_a_run_is_resumed_with_its_own_settings_alone(tmp_path, options, other):
    run = half_finished(tmp_path, **(options if other else {}))
    changed = RunOptions(count=2, steps=2, **({} if other else options))
    with pytest.raises(ValueError, match=f"another {next(iter(options))}; resume needs the same"):
        Run(tmp_path, run.machine, changed).go(True)
    run.go(True)
    assert (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="another"):  # nor is a finished one another's
        Run(tmp_path, run.machine, changed).go(True)


def test_a_run_of_other_versions_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    run = half_finished(tmp_path)
    now = {**versions(), "torch": "1.0"}
    monkeypatch.setattr(records, "versions", lambda: now)
    with pytest.raises(ValueError, match=r"begun with torch .*without --resume"):
        run.go(True)
    monkeypatch.undo()
    run.go(True)
    monkeypatch.setattr(records, "versions", lambda: now)
    run.go(True)  # complete: nothing is mixed
    said = capsys.readouterr().err
    assert "was made with torch" in said
    assert "complete" in said


def test_a_run_without_known_versions_is_one_of_others(tmp_path):
    run = half_finished(tmp_path)
    (run.unfinished / "settings.json").write_text(json.dumps(run.asked))
    with pytest.raises(ValueError, match="begun with unknown versions"):
        run.go(True)


def test_a_label_may_be_any_whole_number():
    assert RunOptions(label=np.int64(3)).label == 3
    assert type(RunOptions(label=np.int64(3)).label) is int


def test_a_training_that_goes_on_with_other_versions_says_so(tmp_path, monkeypatch, capsys):
    corpus = sm.Corpus.open("digits", limit=30)
    tiny = {"width": 8, "depth": 1}
    how = {"seconds": None, "batch": 4, "precision": "float32"}
    train(corpus, "resnet", tmp_path, Training(steps=2, **how), **tiny)
    earlier = versions()
    now = {**earlier, "torch": "1.0"}
    monkeypatch.setattr(records, "versions", lambda: now)
    network = train(corpus, "resnet", tmp_path, Training(steps=4, **how), True, **tiny)
    assert "begun with torch" in capsys.readouterr().err
    assert network.card["training"]["begun_with"] == [earlier]


def test_pieces_of_other_versions_are_not_taken(tmp_path, monkeypatch):
    made = []

    def make():
        made.append(1)
        return torch.zeros(1)

    parts.Pieces(tmp_path, "of").get(["key"], make)
    parts.Pieces(tmp_path, "of").get(["key"], make)
    assert len(made) == 1
    monkeypatch.setattr(parts, "versions", lambda: {"torch": "1.0"})
    parts.Pieces(tmp_path, "of").get(["key"], make)
    assert len(made) == 2


def test_a_study_of_another_kind_of_network_is_not_taken(tmp_path):
    corpus = sm.Corpus.open("digits", limit=40)
    cell = Cell("network", "tiny", 30, 2, "resnet", (("width", 8), ("depth", 1)))
    how = {"chosen": [cell], "count": 1, "pictures": 1}
    study(corpus, tmp_path, ["gaussian"], **how, training=Training(batch=4, precision="float32"))
    (card,) = tmp_path.glob("*/2/network.json")
    known = json.loads(card.read_text())
    known["settings"]["normalised"] = True
    card.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"layer|cannot be read|another"):
        study(corpus, tmp_path, ["gaussian"], **how, training=Training(batch=4))


def test_a_set_that_is_known_by_heart_has_a_lower_ratio_than_all_images():
    rng = np.random.default_rng(0)
    cell = Cell("images", "100 images", 100, 4)
    seen, unseen = rng.uniform(0.02, 0.04, 64), rng.uniform(0.01, 0.03, 64)  # seen ones harder

    def row(a, b):
        return Row(cell, "ls", None, None, [], list(a), list(b), 0.0)

    everything = row(seen, unseen)
    ratio, low, high = memorization(row(1.3 * seen, 1.3 * unseen), everything)
    assert (ratio, low, high) == pytest.approx((1, 1, 1))  # worse at all, and by no heart
    ratio, low, high = memorization(row(0.7 * seen * rng.uniform(0.9, 1.1, 64), unseen), everything)
    assert low < ratio < high < 1


# a disk that is full, a folder that is not one's own


@pytest.fixture
def full(monkeypatch):
    """No file can be written."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)


def test_an_error_of_the_system_is_a_sentence(tmp_path, full):
    with pytest.raises(OSError) as met:  # noqa: PT011
        files.write_text(tmp_path / "name.txt", "text")
    said = files.sentence_of(met.value)
    assert said.startswith(f"the disk of {tmp_path} is full or your quota is used up")
    assert "make room there, as with `scoremachine cache prune" in said
    assert "Errno" not in said


@pytest.mark.parametrize("code", [*sorted(files.REMEDIES), errno.EBUSY])
def test_every_error_of_the_system_says_where_and_what_to_do(code):
    said = files.sentence_of(OSError(code, os.strerror(code), "/some/where"))
    assert re.match(r"/some/where cannot be read or written \(.+\): .+", said)


def test_a_calibration_that_cannot_be_kept_is_made_all_the_same(full, capsys):
    u = np.random.default_rng(3).integers(0, 256, (40, 1, 6, 6), dtype=np.uint8)
    found = sm.calibrate(sm.Corpus(u), "ls", sigmas=[1.0, 0.5], held_out=4)
    assert len(found.chosen) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "is not kept, so the next run will not find it" in said
    assert "is full or your quota is used up" in said


def test_pieces_that_cannot_be_kept_are_made_all_the_same(tmp_path, full):
    assert parts.Pieces(tmp_path, "of").get(["key"], lambda: torch.ones(2)).sum() == 2


# schedules as papers write them


class Cosine(Schedule):
    def __call__(self, t):
        t = torch.as_tensor(t) * torch.pi / 2
        return torch.cos(t), torch.sin(t)


class Flow(Schedule):
    def __call__(self, t):
        t = torch.as_tensor(t)
        return 1 - t, t


@pytest.mark.parametrize("schedule", [Cosine(), Flow()])
def test_a_schedule_that_ends_at_no_noise_is_followed_to_the_last_level_above(schedule):
    corpus = sm.Corpus.open("digits", limit=40)
    wiener = sm.build("gaussian", corpus, schedule=schedule)

    def predict(x_t, t):
        t = t.double().clamp(1e-4, 1 - 1e-4)
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in schedule(t))
        ratio = (sigma / alpha).reshape(-1)
        return torch.cat(
            [
                wiener.denoise((x / a)[None], float(r))
                for x, a, r in zip(x_t, alpha, ratio, strict=True)
            ]
        )

    network = Network.of(predict, corpus.shape, "x0", schedule, "paper")
    found = compare(network, ["gaussian", "ls:3"], corpus, pictures=2, count=2, steps=5)
    (reverse, _) = found.of("reverse")
    assert len(reverse.sigmas) == 4
    assert 0 < reverse.sigmas[-1] < reverse.sigmas[0] <= 1001
    alpha, sigma = schedule(torch.tensor(0.25, dtype=torch.float64))
    assert reverse.sigmas[-1] == pytest.approx(float(sigma / alpha), rel=0.01)
    assert all(np.isfinite(values).all() for p in found.parts for values in p.measures.values())
    assert torch.isfinite(network.draw(2, steps=5)).all()
    judged = qualities([network], ["gaussian"], corpus, count=2, steps=3)
    assert len(judged) == 3


def test_a_schedule_that_ends_above_no_noise_stays_as_it_is():
    network = Network(sm.build("gaussian", sm.Corpus.open("digits", limit=9)), (1, 8, 8))
    same, steps = network.on_noise_levels(7)
    assert same is network
    assert steps == 7


def test_options_are_taken_by_earlier_names_and_refused_by_others():
    found = options_of(parts.ComparisonOptions, {"everywhere": 7, "ways": 2}, parts.EARLIER)
    assert (found.max_images_els, found.trajectories) == (7, 2)
    with pytest.raises(TypeError, match="did you mean 'pictures'"):
        options_of(parts.ComparisonOptions, {"picture": 7})


def test_every_text_file_is_utf_8():
    """Whatever the locale: encoding= wherever a text is read or written."""
    source = Path(files.__file__).parents[1]
    missing = []
    for path in sorted(source.rglob("*.py")):
        if path.relative_to(source).parts[0] in ("machines", "sampling", "sources"):
            continue
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            texts = re.search(r"\.(read_text|write_text)\(", line) or re.search(
                r'(?<!def )(?<![.\w])open\((?!.*"[rwa]\+?b")', line
            )
            if texts and "encoding=" not in line:
                missing.append(f"{path.relative_to(source)}:{n}: {line.strip()}")
    assert not missing
