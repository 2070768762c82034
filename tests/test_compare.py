"""Machines against networks, where the answer is known."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import r2_score

import scoremachine as sm
from conftest import random_corpus
from scoremachine.app import report
from scoremachine.lab.comparison import MachineSpec, Summary, agreement, compare, parts, shared_bias
from scoremachine.lab.networks import Network
from scoremachine.machines import spelled


def as_network(machine):
    """A machine as if it were a trained network."""
    return Network(machine, machine.corpus.shape, name=f"trained-{machine.name}")


@pytest.fixture(scope="module")
def corpus():
    return sm.Corpus.open("digits", limit=60)


@pytest.fixture(scope="module")
def found(corpus):
    """A network that is a local score machine of the images that are not held out, and three."""
    order = np.random.default_rng(0).permutation(60)
    source = corpus.subset(np.setdiff1d(np.arange(60), order[:6]))
    network = as_network(sm.build("ls", source, patch_size=3))
    entrants = ["gaussian", "ls:3", "els:3"]
    return compare(network, entrants, corpus, pictures=6, count=4, steps=5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_measures_are_what_their_names_say(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, 1, 3, 4))
    b = a * rng.normal() + rng.normal() + rng.normal(size=a.shape) * rng.exponential()
    found = agreement(a, b)
    for k in range(n):
        x, y = a[k].ravel(), b[k].ravel()
        assert found["mse"][k] == pytest.approx(np.mean((x - y) ** 2))
        assert found["cosine"][k] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        assert found["r"][k] == pytest.approx(pearsonr(x, y).statistic)
        assert found["r2"][k] == pytest.approx(pearsonr(x, y).statistic ** 2)
        assert found["R2"][k] == pytest.approx(r2_score(x, y))


def test_pictures_of_one_value_have_no_correlation():
    flat = np.full((1, 3, 32, 32), 0.1)  # whose mean is not exact
    same, other = agreement(flat, flat), agreement(flat, flat + 0.1)
    assert [same[m][0] for m in ("mse", "cosine", "r", "r2", "R2")] == [0, 1, 1, 1, 1]
    assert np.isnan(other["r"][0])
    assert np.isnan(other["R2"][0])
    assert Summary.of(other["r"]).count == 0


def test_a_summary_is_a_median_with_its_interval():
    values = np.random.default_rng(0).exponential(size=40)
    s = Summary.of(np.append(values, np.nan))
    assert (s.median, s.count) == (np.median(values), 40)
    assert s.low < s.interval[0] < s.median < s.interval[1] < s.high
    one = Summary.of(np.array([2.0]))
    assert (one.median, one.interval, one.count) == (2.0, (2.0, 2.0), 1)


def test_a_network_that_is_the_wiener_filter_is_predicted_by_it(corpus):
    wiener = sm.build("gaussian", corpus)
    found = compare(as_network(wiener), [wiener, "ls:3"], corpus, pictures=5, count=3, steps=4)
    for part in found.parts:
        if part.label == "gaussian":
            assert np.all(part.measures["mse"] < 1e-10)
            assert np.all(part.measures["R2"] > 1 - 1e-6)
            assert np.all(part.measures["r2"] > 1 - 1e-6)
        elif part.label == "ls:3":
            assert np.all(part.measures["mse"] > 0)
    for part in ("forward", "reverse", "samples"):
        assert found.best(part)[0].all()


def test_the_machine_that_the_network_is_wins_everywhere(found):
    assert found.labels == ["gaussian", "ls:3", "els:3"]
    for part in ("forward", "reverse", "samples"):
        assert [p.label for p in found.of(part)] == found.labels
        assert found.best(part)[1].all()
    (samples,) = (p for p in found.of("samples") if p.label == "ls:3")
    assert np.all(samples.measures["R2"] > 1 - 1e-6)


def test_truth_is_the_error_to_the_clean_picture(found, corpus):
    held = found.settings["held_out"]
    x = torch.from_numpy(np.array(corpus.images[held])).float() / 127.5 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    source = corpus.subset(np.setdiff1d(np.arange(60), held))
    D = sm.build("gaussian", source).denoise(x + 0.05 * eps, 0.05)
    (part,) = (p for p in found.of("forward") if p.label == "gaussian")
    assert part.sigmas[-1] == pytest.approx(0.05)
    expected = ((D - x) ** 2).mean((1, 2, 3)).numpy()
    assert part.measures["truth"][-1] == pytest.approx(expected, rel=1e-4)


def test_images_that_the_network_has_not_seen_are_held_out(corpus):
    network = as_network(sm.build("gaussian", corpus))
    network.card = {"training": {"held_out": [3, 5, 8], "corpus_digest": corpus.digest}}
    found = compare(network, ["gaussian"], corpus, pictures=2, count=1, steps=2)
    assert found.settings["held_out"] == [3, 5]
    assert found.settings["machines"]["gaussian"]["images"] == 57
    network.card["training"]["corpus_digest"] = "of another corpus"
    found = compare(network, ["gaussian"], corpus, pictures=2, count=1, steps=2)
    assert found.settings["machines"]["gaussian"]["images"] == 58


def test_what_is_finished_is_not_measured_again(corpus, tmp_path, monkeypatch):
    network = as_network(sm.build("gaussian", corpus))
    calls = []
    batches = parts.denoised

    def counted(machine, y, sigma):
        if machine is network:
            return batches(machine, y, sigma)
        calls.append(sigma)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batches(machine, y, sigma)

    monkeypatch.setattr(parts, "denoised", counted)
    ask = [network, ["ls:3"], corpus]
    how = {"sigmas": [1.0, 0.5, 0.2, 0.1], "pictures": 4, "count": 1, "steps": 2}
    with pytest.raises(KeyboardInterrupt):
        compare(*ask, **how, kept=tmp_path)
    before = len(calls)
    again = compare(*ask, **how, kept=tmp_path)
    assert calls[before : before + 1] == [0.1]  # three levels were finished
    whole = compare(*ask, **how)
    for a, b in zip(again.parts, whole.parts, strict=True):
        for name in a.measures:
            assert np.array_equal(a.measures[name], b.measures[name])


def test_files_hold_every_number_and_the_page_needs_no_other(found, tmp_path):
    files = report.write(found, tmp_path, page=True)
    assert sorted(p.name for p in files) == sorted(p.name for p in tmp_path.iterdir())
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["parts"][1]["pictures"]["mse"] == found.parts[1].measures["mse"].tolist()
    rows = (tmp_path / "compare.csv").read_text().splitlines()
    values = sum(len(p.sigmas) * len(p.measures) for p in found.parts)
    assert len(rows) == 1 + values
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png") == 3
    assert "trained-ls" in page
    tables = (tmp_path / "compare.md").read_text()
    assert tables == report.markdown(found)
    assert tables.count("`els:3`") == 3


def test_machines_are_read_from_words():
    assert MachineSpec.of("ls").settings == {}
    assert MachineSpec.of("ls:7+h").settings == {"patch_size": 7, "bandwidth": "auto"}
    assert MachineSpec.of("pspc:pspc-cifar10").settings == {"patch_size": "pspc-cifar10"}
    assert MachineSpec.of("pca:0.05").settings == {"threshold": 0.05}
    assert MachineSpec.of("cfdm").name == "smoothed"
    soft = MachineSpec.of("els:9+gaussian+h")
    assert soft.settings == {"patch_size": 9, "window": "gaussian", "bandwidth": "auto"}
    assert MachineSpec.of("ls:network+wiener").towards
    assert MachineSpec.of("ls:network+wiener").settings == {"window": "wiener"}
    both = {"patch_size": 5, "window": "gaussian", "boundary": "circular"}
    assert MachineSpec.of("els:5+gaussian+circular").settings == both


def test_what_cannot_work_is_refused_with_a_sentence(corpus):
    network = as_network(sm.build("gaussian", corpus))
    one = sm.Corpus(corpus.images[:1])
    for machines, of, options, words in [
        (["lss"], corpus, {}, "did you mean 'ls'"),
        (["gaussian:3"], corpus, {}, "no locality"),
        (["ls+k"], corpus, {}, "expected +h"),
        (["pca+gaussian"], corpus, {}, "with machines of boxes"),
        (["ls:3+circular"], corpus, {}, "+circular with els"),
        (["ls:3", "ls:3"], corpus, {}, "twice"),
        ([], corpus, {}, "at least one"),
        (["ls:big"], corpus, {}, "patch_size"),
        (["ls:3"], random_corpus(), {}, "size=8"),
        (["ls:3"], one, {}, "none can be held out"),
        (["ls:3"], corpus, {"sigmas": [1e6]}, "no noise level"),
        (["ls:3"], corpus, {"pictures": 0}, "pictures is 0"),
        (["ls:3"], corpus, {"count": 0}, "count is 0"),
        (["ls:3"], corpus, {"sampler": "magic"}, "no sampler"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            compare(network, machines, of, **options)


def test_a_bias_is_what_sets_a_denoiser_apart_from_the_ideal(corpus):
    order = np.random.default_rng(0).permutation(60)
    source = corpus.subset(np.setdiff1d(np.arange(60), order[:5]))
    ls = as_network(sm.build("ls", source, patch_size=3))
    ideal = as_network(sm.build("ideal", source))
    found = shared_bias([ls, ideal], ["ls:3", "gaussian"], corpus, [2.0, 0.5], pictures=5)
    assert found.labels == ["trained-ls", "trained-ideal", "ls:3", "gaussian"]
    assert found.sigmas == [2.0, 0.5]
    assert np.allclose(found.sizes[0], found.sizes[2])
    assert np.allclose(found.sizes[1], 0, atol=1e-6)
    assert np.allclose(found.cosines[:, 0, 2], 1)
    assert np.allclose(found.cosines, found.cosines.transpose(0, 2, 1))
    held = order[:5]
    held.sort()
    x = torch.from_numpy(np.array(corpus.images[held])).float() / 127.5 - 1
    y = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    a, b, zero = (
        sm.build(n, source, **({"patch_size": 3} if n == "ls" else {})).denoise(y, 0.5)
        for n in ("ls", "gaussian", "ideal")
    )
    cosine = torch.nn.functional.cosine_similarity((a - zero).flatten(1), (b - zero).flatten(1))
    assert found.cosines[1, 0, 3] == pytest.approx(float(cosine.mean()), abs=1e-4)
    assert found.to_networks()[1, 1] == pytest.approx(found.cosines[1, 3, :2].mean())
    assert found.among_networks()[1] == found.cosines[1, 0, 1]


def test_a_bias_is_drawn_and_kept(corpus, tmp_path):
    networks = [as_network(sm.build(n, corpus, patch_size=3)) for n in ("ls", "pspc")]
    ask = [networks, ["gaussian", "ls"], corpus, [2.0, 0.5], 3]
    found = shared_bias(*ask, kept=tmp_path / "kept")
    known = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(known) == 2 * (1 + 4)
    again = shared_bias(*ask, kept=tmp_path / "kept")  # finds everything there
    assert {path.name for path in (tmp_path / "kept").iterdir()} == known
    assert np.array_equal(again.cosines, found.cosines)
    tmp_path = tmp_path / "out"
    files = report.write_bias(found, tmp_path)
    assert sorted(p.name for p in files) == sorted(p.name for p in tmp_path.iterdir())
    kept = json.loads((tmp_path / "bias.json").read_text())
    assert kept["cosines"] == found.cosines.tolist()
    assert kept["labels"] == found.labels


def test_a_bias_needs_networks_and_a_pair(corpus):
    network = as_network(sm.build("gaussian", corpus))
    for networks, machines, options, words in [
        ([], ["ls:3"], {}, "no network"),
        ([network], [], {}, "at least two"),
        ([network], ["ls:3"], {"pictures": 0}, "pictures is 0"),
        ([network], ["ls:3"], {"sigmas": [1e7]}, "no noise level"),
        ([network], ["ls:3", "ls:3"], {}, "twice"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            shared_bias(networks, machines, corpus, **options)


def test_a_machine_is_spelled_with_the_file_of_a_calibration():
    assert spelled("ls:7+gaussian+h") == (
        "ls",
        {"patch_size": 7, "window": "gaussian", "bandwidth": "auto"},
    )
    path = "runs/ls+h/calibration.json"
    assert spelled(f"ls:{path}") == ("ls", {"patch_size": path})
    assert spelled(f"ls:{path}+h") == ("ls", {"patch_size": path, "bandwidth": "auto"})
