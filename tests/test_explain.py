"""Provenance: shares add up, rebuild the answer, and say what would be without an image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from typer.testing import CliRunner

import scoremachine as sm
from conftest import SMALL, random_corpus, random_images
from scoremachine.app.cli import app
from scoremachine.core.shares import gathered, leading

EXPLAINED = [name for name in SMALL if name != "gaussian"]
SIGMAS = st.floats(0.05, 20.0)


def every(name: str) -> int:
    """How many sources a pixel has in a corpus of 9 pictures of 6 x 6, at most."""
    return 9 * 36 if name in ("es", "els", "epc") else 9


def noisy(seed: int, B: int = 2, C: int = 1, H: int = 6, W: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, H, W, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", EXPLAINED)
@given(seed=st.integers(0, 2**16), sigma=SIGMAS, h=st.sampled_from([0.0, 0.3]))
def test_shares_add_up_and_rebuild_the_answer(name, seed, sigma, h):
    machine = sm.build(name, random_corpus(seed, N=7), bandwidth=h, **SMALL[name])
    y = noisy(seed)
    trace = sm.explain(machine, y, sigma, k=every(name))
    D = machine.denoise(y, sigma)
    total = trace.weights.sum(1) + trace.rest + trace.own
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert float(trace.rest.max()) < 1e-6  # every source is named
    torch.testing.assert_close(trace.D, D, rtol=0, atol=1e-5)
    rebuilt = trace.contributions + trace.own[:, None] * y
    if name == "composite":  # the part that is a filter of y
        s, a = float(np.hypot(sigma, h)), sigma**2 / (sigma**2 + h**2)
        w = machine.weights_at(sigma)[0]
        rebuilt += a * w * (machine.members["gaussian"].denoise(y, s) - y)
    torch.testing.assert_close(rebuilt, D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("boundary", ["broken", "circular"])
@pytest.mark.parametrize("canvas", [(6, 6), (8, 11), (5, 4)])
def test_composites_of_any_size_rebuild_their_answer(boundary, canvas):
    machine = sm.build("epc", random_corpus(4, N=3), patch_size=4, boundary=boundary)
    y = noisy(6, 2, 1, *canvas)
    trace = sm.explain(machine, y, 0.8, k=3 * 36)
    torch.testing.assert_close(trace.contributions, machine.denoise(y, 0.8), rtol=0, atol=1e-5)
    assert float(trace.rest.max()) < 1e-6


@pytest.mark.parametrize("name", EXPLAINED)
def test_few_leaders_are_the_first_of_all(name):
    machine, y = sm.build(name, random_corpus(3), **SMALL[name]), noisy(5)
    everything, few = (sm.explain(machine, y, 1.5, k=k) for k in (every(name), 3))
    shape = (2, 3, 6, 6)
    assert few.images.shape == few.rows.shape == few.columns.shape == few.weights.shape == shape
    # a mean of several posteriors can have a third source that leads in none of them
    exactly = name in ("ideal", "es", "ls", "els")
    first, tolerance = everything.weights[:, :3], 1e-6 if exactly else 5e-3
    torch.testing.assert_close(few.weights, first, rtol=0, atol=tolerance)
    assert float((few.weights - first).max()) < 1e-6
    assert bool((few.weights[:, 1:] <= few.weights[:, :-1] + 1e-12).all())
    total = few.weights.sum(1) + few.rest + few.own
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EXPLAINED if name != "composite"])
@given(
    seed=st.integers(0, 2**16),
    sigma=SIGMAS,
    gone=st.sets(st.integers(0, 8), min_size=1, max_size=4),
)
def test_without_images_is_the_machine_without_them(name, seed, sigma, gone):
    corpus, y = random_corpus(seed), noisy(seed)
    machine = sm.build(name, corpus, **SMALL[name])
    left = sm.build(name, corpus.subset([n for n in range(9) if n not in gone]), **SMALL[name])
    found = sm.explain(machine, y, sigma, k=every(name)).without(sorted(gone))
    torch.testing.assert_close(found, left.denoise(y, sigma), rtol=0, atol=1e-5)


def test_without_asks_again_where_others_matter(capsys):
    corpus, y = random_corpus(1), noisy(1)
    machine, left = (sm.build("ls", c, patch_size=3) for c in (corpus, corpus.subset(range(1, 9))))
    found = sm.explain(machine, y, 5.0, k=1).without(0)
    torch.testing.assert_close(found, left.denoise(y, 5.0), rtol=0, atol=1e-5)
    assert "asked again" in capsys.readouterr().err
    sm.explain(machine, y, 5.0, k=9).without(0)
    assert "asked again" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
@pytest.mark.parametrize(
    "augment", ["flips", "flips,brightness=0.1,contrast=0.2", "flips,shifts=1"]
)
def test_variants_and_shifts_are_named(name, augment):
    if name == "els" and "shifts" in augment:
        pytest.skip("els has every position already")
    machine = sm.build(name, random_corpus(2), patch_size=3, augment=augment)
    trace = sm.explain(machine, noisy(2), 0.7, k=9 * 36 * 12)
    torch.testing.assert_close(trace.contributions, trace.D, rtol=0, atol=1e-5)
    assert int(trace.variants.max()) == len(machine.variants) - 1


@pytest.mark.parametrize("name", EXPLAINED)
def test_under_a_forward_process(name):
    machine = sm.build(name, random_corpus(4), **SMALL[name])
    process = sm.HeatDissipation((6, 6), machine.schedule)
    trace = sm.explain(machine, noisy(4), 0.6, k=every(name), process=process)
    D = machine.denoise_through(process, noisy(4), 0.6)
    torch.testing.assert_close(trace.D, D, rtol=0, atol=1e-5)
    if name != "composite":
        torch.testing.assert_close(trace.contributions, D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ideal", "ls", "els"])
def test_mixtures_name_clusters(name):
    mixture = sm.compress(random_corpus(0, C=1), 4, patch_size=3, rank=1)
    machine = sm.build(name, mixture, **SMALL[name])
    trace = sm.explain(machine, noisy(0), 0.7, k=4)
    total = trace.weights.sum(1) + trace.rest
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)
    torch.testing.assert_close(trace.D, machine.denoise(noisy(0), 0.7), rtol=0, atol=1e-9)
    assert float(trace.rest.max()) < 1e-9
    with pytest.raises(ValueError, match="clusters of a mixture"):
        _ = trace.values


def test_labels_name_images_of_the_class():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    corpus = sm.Corpus(random_images(0, 9, 1, 6, 6), labels=labels)
    trace = sm.explain(sm.build("ls", corpus, patch_size=3), noisy(1), 0.5, label=[0, 1])
    images = trace.images
    assert set(labels[images[0][images[0] >= 0]]) == {0}
    assert set(labels[images[1][images[1] >= 0]]) == {1}


def test_image_shares_add_up():
    trace = sm.explain(sm.build("ls", random_corpus(0), patch_size=3), noisy(3), 0.5, k=9)
    shares = trace.image_shares()
    assert isinstance(shares, csr_array)
    assert shares.shape == (2, 9)
    np.testing.assert_allclose(shares.sum(1), 1 - trace.rest.mean((1, 2)).numpy(), atol=1e-9)
    (n, share), *_ = trace.leading_images(0)
    assert share == pytest.approx(shares.toarray()[0].max())
    assert n == shares.toarray()[0].argmax()


def test_a_training_image_explains_itself():
    corpus = random_corpus(7, N=8)
    y = torch.from_numpy(corpus.images[5:6] / 127.5 - 1)
    trace = sm.explain(sm.build("ls", corpus, patch_size=3), y, 0.02, k=1)
    assert bool((trace.images == 5).all())
    assert bool((trace.rows[0, 0] == torch.arange(6)[:, None]).all())
    torch.testing.assert_close(trace.rebuilt(), y, rtol=0, atol=1e-9)


def test_generated_pictures_carry_their_steps():
    machine = sm.build("ls", random_corpus(0), patch_size=3)
    x = sm.generate(machine, count=3, steps=5, seed=2)
    same, trace = sm.generate(machine, count=3, steps=5, seed=2, explain=4, batch=2)
    assert torch.equal(x, same)
    torch.testing.assert_close(trace.D.float(), x, rtol=0, atol=1e-5)
    assert len(trace.steps) == 5
    leading = torch.stack([step.images for step in trace.steps])
    for at in np.ndindex(3, 6, 6):
        path = leading[(slice(None), *at)].tolist()
        first = int(trace.decided()[at])
        assert len(set(path[first:])) == 1
        assert first == 0 or path[first - 1] != path[first]


def test_a_saved_trace_loads_without_the_package(tmp_path):
    _, trace = sm.generate(sm.build("els", random_corpus(0), patch_size=3), 2, 4, explain=True)
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        assert file["images"].shape == file["weights"].shape == (2, 8, 6, 6)
        assert file["step_images"].shape == (2, 4, 6, 6)
        np.testing.assert_array_equal(file["images"], trace.images.numpy())
        total = file["weights"].sum(1) + file["rest"] + file["own"]
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_what_has_no_sources_says_so():
    y = noisy(0)
    with pytest.raises(ValueError, match="gaussian has no sources"):
        sm.explain(sm.build("gaussian", random_corpus(0)), y, 0.5)
    with pytest.raises(ValueError, match="no sources"):
        sm.generate(sm.build("gaussian", random_corpus(0)), 1, 2, explain=True)
    with pytest.raises(ValueError, match="expected a machine"):
        sm.explain("ls", y, 0.5)
    with pytest.raises(ValueError, match="k is 0"):
        sm.explain(sm.build("ideal", random_corpus(0)), y, 0.5, k=0)
    trace = sm.explain(sm.build("ideal", random_corpus(0)), y, 0.5)
    with pytest.raises(ValueError, match="no steps"):
        trace.decided()
    with pytest.raises(ValueError, match="positions from 0 to 8"):
        trace.without(9)
    with pytest.raises(ValueError, match="nothing is left"):
        trace.without(range(9))


def test_sources_met_twice_are_named_once():
    weights = torch.tensor([0.2, 0.3, 0.1]).reshape(1, 3, 1, 1, 1)
    places = torch.tensor([4, 7, 4]).reshape(1, 3, 1, 1)
    w, p = leading(*gathered(weights, places), 3)
    assert p.flatten().tolist() == [4, 7, -1] or p.flatten().tolist() == [7, 4, -1]
    np.testing.assert_allclose(w.flatten().numpy(), [0.3, 0.3, 0.0], atol=1e-7)


def test_the_command_explains_runs_and_pictures(tmp_path):
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    of = "--data", "digits", "--limit", 40
    run("generate", *of, "--machine", "pspc", "--patch-size", 3, "--augment", "flips", "--count", 2,
        "--steps", 3, "--out", tmp_path / "run")  # fmt: skip
    run("explain", tmp_path / "run", *of, "--without", "auto")
    made = {path.name for path in (tmp_path / "run" / "explain").iterdir()}
    assert made == {
        "explain.html", "mosaic.png", "sheet-000.png", "sheet-001.png", "trace.npz",
        "trajectory-mosaic.gif", "without.png",
    }  # fmt: skip
    html = (tmp_path / "run" / "explain" / "explain.html").read_text("utf-8")
    data = json.loads(html.split('type="application/json">')[1].split("</script>")[0])
    assert len(data["pictures"]) == 2
    assert "http" not in html.replace("http-equiv", "")
    of = *of, "--machine", "ls", "--patch-size", 3
    run("explain", "photo/chelsea", *of, "--out", tmp_path / "p", "--without", "0,3")
    assert (tmp_path / "p" / "explain.html").exists()
    with pytest.raises(ValueError, match="other images"):
        run("explain", tmp_path / "run", "--data", "digits", "--limit", 41)


def test_one_source_alone():
    """A single candidate of windows, as where the whole picture is one training image."""
    corpus = random_corpus(5)
    machine = sm.build("pspc", corpus, patch_size=5)
    trace = sm.explain(machine, torch.from_numpy(corpus.images[3:4] / 127.5 - 1), 0.01, k=1)
    assert bool((trace.images == 3).all())
    torch.testing.assert_close(trace.contributions, trace.D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ls", "pspc"])
def test_effective_sources_are_at_most_the_true_number(name):
    corpus = sm.Corpus(np.random.default_rng(0).integers(0, 256, (5, 1, 6, 6), dtype=np.uint8))
    machine = sm.build(name, corpus, patch_size=3, bandwidth=0.1)
    y = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    everything = sm.explain(machine, y, 0.8, k=5 * 36)
    w = everything.weights / everything.weights.sum(1, keepdim=True)
    true = 1 / (w**2).sum(1)
    found = sm.explain(machine, y, 0.8, k=4).effective_sources
    assert (found <= true * (1 + 1e-6)).all()
    if name == "ls":
        assert torch.allclose(found, true, rtol=1e-5)
    else:  # more than the harmonic mean of its posteriors where the named shares say so
        assert (everything.effective_sources > 1.5).any()
        assert torch.allclose(everything.effective_sources, true, rtol=1e-5)
