"""How good, how new and how varied: numbers whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import scoremachine as sm
from scoremachine.app import figures as drawing
from scoremachine.app import report
from scoremachine.lab.comparison import qualities
from scoremachine.lab.comparison.quality import features, kernel_distance, variety
from scoremachine.lab.networks import Network, Training, train

BRIEF = Training(steps=4, seconds=None, batch=8, precision="float32")


def test_a_kernel_distance_is_zero_between_halves_and_large_between_strangers():
    digits, faces = sm.Corpus.open("digits", limit=400), sm.Corpus.open("faces", size=8, limit=100)
    f = features(np.asarray(digits.images))
    same, spread = kernel_distance(f[::2], f[1::2])
    assert abs(same) < 3 * spread
    other, _ = kernel_distance(f, features(np.asarray(faces.images)))
    assert other > 5 * spread
    assert other > 0


def test_a_kernel_distance_is_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    # of two pictures each, the only subsets of two are the pictures: nothing is left to chance

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    cross = np.mean([k(x, y) for x in a for y in b])
    mean, spread = kernel_distance(a, b)
    assert mean == pytest.approx(k(a[0], a[1]) + k(b[0], b[1]) - 2 * cross)
    assert spread == pytest.approx(0, abs=1e-12)


def test_variety_is_the_mean_squared_distance_of_pairs():
    f = np.random.default_rng(0).normal(size=(7, 5))
    pairs = [((f[i] - f[j]) ** 2).sum() for i in range(7) for j in range(i)]
    assert variety(f) == pytest.approx(np.mean(pairs))


def test_a_vae_learns_draws_and_denoises_nothing(tmp_path):
    corpus = sm.Corpus.open("digits")
    how = Training(steps=250, seconds=None, batch=64, precision="float32", rate=3e-3)
    vae = train(corpus, "vae", tmp_path, how, width=8, latent=4)
    x = vae.draw(200, seed=3)
    assert x.shape == (200, 1, 8, 8)
    assert float(x.abs().max()) <= 1
    again = Network.load(tmp_path)
    assert torch.equal(again.draw(200, seed=3), x)
    assert not torch.equal(again.draw(200, seed=4), x)
    mean = torch.from_numpy(corpus.images / 127.5 - 1).float().mean(0)
    assert float((x.mean(0) - mean).abs().mean()) < 0.15
    assert float(x.std(0).mean()) > 0.05
    with pytest.raises(ValueError, match="does not denoise"):
        vae.denoise(x, 1.0)


def test_everybody_is_judged_beside_the_images_themselves(tmp_path):
    corpus = sm.Corpus.open("digits", limit=80)
    network = train(corpus, "mlp", None, BRIEF, width=16, depth=1)
    found = qualities([network], ["gaussian", "ideal"], corpus, count=5, steps=4)
    assert [q.label for q in found] == ["held-out images", "mlp", "gaussian", "ideal"]
    by = {q.label: q for q in found}
    assert np.all(by["ideal"].nearest < 1e-3)  # it gives training images back
    assert np.all(by["held-out images"].nearest > 0.05)
    assert np.all(by["ideal"].explained > 0.8)
    assert by["held-out images"].explained.mean() < by["ideal"].explained.mean() - 0.1
    assert by["gaussian"].explained.shape == (5,)
    assert 0.5 < by["held-out images"].variety < 1.5
    assert by["gaussian"].pictures.shape == (5, 1, 8, 8)
    files = report.write_quality(found, tmp_path)
    assert all(path.exists() for path in files)
    assert json.loads(files[1].read_text())[0]["seconds"] is None
    assert "| mlp |" in files[0].read_text()


def test_machines_draw_with_their_bandwidth_on_the_schedule_of_the_networks():
    corpus = sm.Corpus.open("digits", limit=80)
    wide, plain = (sm.build("ls", corpus, patch_size=3, bandwidth=h) for h in (0.2, 0.0))
    one, two = (qualities([], [m], corpus, count=3, steps=4)[1].pictures for m in (wide, plain))
    assert not np.array_equal(one, two)
    network = train(corpus, "mlp", None, BRIEF, width=16, depth=1)
    beside = qualities([network], [plain], corpus, count=3, steps=4)[2].pictures
    cosine = sm.generate(plain.clone_with(corpus, schedule=network.schedule), 3, 4)
    assert np.array_equal(beside, drawing.to_uint8(cosine.numpy()))


def test_too_few_pictures_are_refused():
    corpus = sm.Corpus.open("digits", limit=80)
    for options, words in [({"count": 1}, "neither"), ({"steps": 0}, "steps is 0")]:
        with pytest.raises(ValueError, match=words):
            qualities([], ["gaussian"], corpus, **options)
    with pytest.raises(ValueError, match="at least 4"):
        qualities([], ["gaussian"], sm.Corpus.open("digits", limit=5))
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(np.zeros((1, 3)), np.zeros((4, 3)))
