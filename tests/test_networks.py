"""Trained networks: what they are made of, how they are trained, kept and refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from azula.noise import CosineSchedule, VPSchedule

import scoremachine as sm
from conftest import noised, random_corpus
from scoremachine.lab.networks import ARCHITECTURES, Network, Training, foreign, train, training
from scoremachine.lab.networks.network import BUILT_IN, built_in

SMALL = {
    "resnet": {"width": 8, "depth": 1},
    "unet": {"width": 8, "levels": 2, "blocks": 1},
    "unet-attention": {"width": 8, "levels": 2, "blocks": 1, "attention": 2},
    "dit": {"width": 16, "depth": 1, "patch": 2, "heads": 2},
    "mlp": {"width": 16, "depth": 1},
}


def brief(steps=4, **settings):
    return Training(
        **{"steps": steps, "seconds": None, "batch": 8, "precision": "float32"} | settings
    )


@pytest.fixture(scope="module")
def corpus():
    return random_corpus(3, 40, 3, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_every_network_trains_and_comes_back_from_its_folder(name, corpus, tmp_path):
    network = train(corpus, name, tmp_path, brief(), **SMALL[name])
    again = Network.load(tmp_path)
    y, sigma = noised(corpus, [0.3, 2.0])
    assert torch.equal(network.denoise(y, sigma), again.denoise(y, sigma))
    assert again.card == json.loads((tmp_path / "network.json").read_text())
    assert again.name == tmp_path.name
    assert again.parameters_count == again.card["training"]["parameters"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "network.safetensors", "network.json", "loss.csv", "training.safetensors"
    }  # fmt: skip


def test_there_are_no_networks_but_these():
    assert set(ARCHITECTURES) == {*SMALL, "vae"}


def test_training_denoises_better_and_better():
    faces = sm.Corpus.open("digits")
    x = torch.from_numpy(np.array(faces.images[:64])).float() / 127.5 - 1
    y = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    errors = [
        float((train(faces, "resnet", None, brief(n, batch=32), width=16, depth=2)
               .denoise(y, 0.5) - x).square().mean())
        for n in (2, 60, 240)
    ]  # fmt: skip
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_an_interrupted_training_ends_as_one_that_was_not(corpus, tmp_path, monkeypatch):
    whole = train(corpus, "resnet", tmp_path / "whole", brief(9), width=8, depth=1)
    step = training._step

    def interrupted(state, *others):
        if state.step == 5:
            raise KeyboardInterrupt
        return step(state, *others)

    monkeypatch.setattr(training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, "resnet", tmp_path / "parts", brief(9), width=8, depth=1)
    assert not (tmp_path / "parts" / "network.safetensors").exists()
    monkeypatch.setattr(training, "_step", step)
    settings = {"width": 8, "depth": 1}
    parts = train(corpus, "resnet", tmp_path / "parts", brief(9), resume=True, **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    longer = train(corpus, "resnet", tmp_path / "parts", brief(12), resume=True, **settings)
    at_once = train(corpus, "resnet", None, brief(12), **settings)
    assert longer.key == at_once.key != whole.key


def test_one_seed_is_one_network(corpus):
    one, two = (train(corpus, "mlp", None, brief(seed=s), **SMALL["mlp"]) for s in (1, 1))
    other = train(corpus, "mlp", None, brief(seed=2), **SMALL["mlp"])
    assert one.key == two.key != other.key


def test_training_leaves_the_global_random_numbers_alone(corpus):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(corpus, "mlp", None, brief(2), **SMALL["mlp"])
    assert torch.equal(before, torch.get_rng_state())


def test_held_out_images_are_never_looked_at(corpus, monkeypatch):
    looked: set[int] = set()

    class RecordingDenoiser(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, np.ndarray):
                looked.update(key.tolist())
            return np.asarray(self)[key]

    watched = sm.Corpus(corpus.images)
    watched.images = np.asarray(corpus.images).view(RecordingDenoiser)
    network = train(watched, "mlp", None, brief(20, held_out=3), **SMALL["mlp"])
    unseen = network.unseen(watched)
    assert len(unseen) == 3
    assert looked == set(range(40)) - set(unseen.tolist())
    assert network.unseen(sm.Corpus(corpus.images[:39])) is None


def test_a_residual_network_sees_a_box():
    network = Network.made("resnet", (1, 15, 15), width=8, depth=2)
    torch.nn.init.normal_(network.backbone.last.weight)
    y = torch.randn(1, 1, 15, 15, requires_grad=True)
    network.denoise(y, 1.0)[0, 0, 7, 7].backward()
    seen = torch.nonzero(y.grad[0, 0])
    assert (seen.min(), seen.max()) == (7 - 4, 7 + 4)  # (2 depth + 5) across


def test_a_circular_network_is_equivariant():
    network = Network.made("resnet", (1, 8, 8), width=8, depth=2, padding="circular")
    torch.nn.init.normal_(network.backbone.last.weight)
    y = torch.randn(2, 1, 8, 8)
    D = network.denoise(y, 0.7)
    assert torch.allclose(
        network.denoise(y.roll((3, 2), (2, 3)), 0.7), D.roll((3, 2), (2, 3)), atol=1e-5
    )


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule()])
def test_predictions_of_the_same_thing_are_the_same(schedule):
    wiener = sm.build("gaussian", random_corpus(), schedule=schedule)

    def clean(x_t, t):
        alpha, sigma = (v.double().reshape(-1, 1, 1, 1) for v in schedule(t))
        return wiener.denoise(x_t.double() / alpha, (sigma / alpha).flatten()), alpha, sigma

    def x0(x_t, t):
        return clean(x_t, t)[0].float()

    def eps(x_t, t):
        D, alpha, sigma = clean(x_t, t)
        return ((x_t - alpha * D) / sigma).float()

    def v(x_t, t):
        D, alpha, sigma = clean(x_t, t)
        return (alpha * (x_t - alpha * D) / sigma - sigma * D).float()

    y, sigma = noised(wiener.corpus, [0.1, 1.0, 5.0])
    D = wiener.denoise(y, sigma)
    for f in (x0, eps, v):
        network = Network.of(f, (1, 6, 6), f.__name__, schedule)
        assert torch.allclose(network.denoise(y, sigma), D, atol=2e-5)
        # and under another schedule
        other = network.under(CosineSchedule())
        alpha, sigma_t = other.schedule(torch.tensor(0.5))
        x_t = alpha * y
        assert torch.allclose(
            other(x_t, torch.tensor(0.5)).mean, wiener.denoise(y, float(sigma_t / alpha)), atol=2e-5
        )


def test_a_key_is_of_all_that_decides_an_answer(corpus):
    module = torch.nn.Conv2d(3, 3, 3, padding=1)

    def f(prediction, schedule=None):
        class Answer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = module

            def forward(self, x_t, t):
                return self.module(x_t)

        return Network.of(Answer(), corpus.shape, prediction, schedule)

    keys = {f("eps").key, f("x0").key, f("eps", CosineSchedule()).key}
    assert len(keys) == 3
    assert f("eps").key in keys
    network = f("eps")
    before = network.key
    with torch.no_grad():
        module.weight.add_(1)
    assert network.key != before
    assert network.to(torch.bfloat16).key not in keys
    one, two = (Network.of(lambda x, t: x, corpus.shape) for _ in range(2))
    assert one.key == one.key != two.key


def test_a_network_that_is_still_trained_can_be_calibrated_towards(corpus):
    network = Network.of(torch.nn.Identity(), corpus.shape)
    layer = torch.nn.Conv2d(3, 3, 1)
    network = Network.of(lambda x, t: layer(x), corpus.shape)
    found = sm.calibrate(corpus, "ls", [0.5], 4, values=[3], bandwidths=[], network=network)
    assert found.chosen == [3]


def test_a_folder_comes_before_what_comes_along(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = train(corpus, "mlp", "mnist-resnet", brief(), **SMALL["mlp"])
    assert Network.load("mnist-resnet").key == mine.key


def test_what_cannot_work_is_refused_with_a_sentence(corpus, tmp_path):
    shape = corpus.shape
    for call, words in [
        (lambda: Network.made("resnett", shape), "did you mean 'resnet'"),
        (lambda: Network.made("resnet", shape, widht=8), "did you mean 'width'"),
        (lambda: Network.made("resnet", shape, width=0), "expected a positive whole number"),
        (lambda: Network.made("resnet", shape, width="wide"), "expected something like 64"),
        (lambda: Network.made("resnet", shape, padding="mirror"), "no padding is called"),
        (lambda: Network.made("unet", (1, 9, 9)), "size=8"),
        (lambda: Network.made("dit", (1, 9, 9)), "size=8"),
        (lambda: Training(steps=0), "steps is 0"),
        (lambda: Training(seconds=None), "never ends"),
        (lambda: Training(seconds=-1.0), "seconds are -1"),
        (lambda: Training(rate=2.0), "rate is 2"),
        (lambda: Training(batch=0), "batch is 0"),
        (lambda: Training(held_out=-5), "held_out is -5"),
        (lambda: Training(held_out=[99]).left_out(40), "outside 0 to 39"),
        (lambda: Network.made("dit", shape, heads=3), "multiples of the heads"),
        (lambda: Network.made("resnet", shape, width=9), "widths are even"),
        (lambda: Network.made("resnet", shape, width=28, normalised=True), "multiples of 8"),
        (lambda: Network.made("mlp", (1, 8, 8)).check_corpus(corpus), "grayscale=True"),
        (lambda: train(corpus, "mlp", None, brief(held_out=range(40))), "all 40 images"),
        (lambda: Training(seed=-1), "seed is -1"),
        (lambda: Training(precision="half"), "no precision is called"),
        (lambda: Network.load(tmp_path / "nowhere"), "there is no"),
        (lambda: Network.of(3, shape), "expected a callable"),
        (lambda: Network.of(lambda x, t: x, shape, "noise"), "no prediction is called"),
        (lambda: Network(torch.nn.Identity(), shape), "Network.of"),
        (lambda: Network.of(lambda x, t: x, shape).save(tmp_path), "no card"),
        (lambda: Network.of(lambda x, t: x[:, :1], shape).denoise(torch.zeros(2, *shape), 1.0),
         "expected a tensor of the same shape"),
        (lambda: Network.made("mlp", shape).denoise(torch.zeros(1, 1, 4, 4), 1.0),
         "expected (B, 3"),
        (lambda: Network.made("mlp", shape).denoise(torch.zeros(1, *shape), 1e5), "no noise level"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_damaged_folders_are_refused(corpus, tmp_path):
    train(corpus, "mlp", tmp_path, brief(), **SMALL["mlp"])
    card, weights = tmp_path / "network.json", tmp_path / "network.safetensors"
    good = card.read_text()
    for bad, words in [
        ("{", "is no JSON"),
        ("[]", "holds list"),
        ("{}", "no card of a network"),
        (good.replace('"width": 16', '"width": 32'), "cannot be read"),
        (good.replace("cosine", "sine"), "cannot be read"),
    ]:
        card.write_text(bad)
        with pytest.raises(ValueError, match=words):
            Network.load(tmp_path)
    card.write_text(good)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        Network.load(tmp_path)
    checkpoint = tmp_path / "training.safetensors"
    with pytest.raises(ValueError, match="of 4 steps"):
        train(corpus, "mlp", tmp_path, brief(2), resume=True, **SMALL["mlp"])
    with pytest.raises(ValueError, match="another rate"):
        train(corpus, "mlp", tmp_path, brief(9, rate=0.1), resume=True, **SMALL["mlp"])
    checkpoint.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        train(corpus, "mlp", tmp_path, brief(9), resume=True, **SMALL["mlp"])


@pytest.mark.parametrize("steps", [3, 60])
def test_a_loss_that_is_not_a_number_ends_the_training(corpus, monkeypatch, tmp_path, steps):
    monkeypatch.setattr(training, "_step", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="lower than"):
        train(corpus, "mlp", tmp_path, brief(steps), **SMALL["mlp"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_a_folder_of_diffusers_answers_as_diffusers_does(tmp_path, prediction, betas):
    pytest.importorskip("diffusers")
    scheduler_of, model_of = foreign._classes()
    torch.manual_seed(0)
    model = model_of(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = scheduler_of(
        num_train_timesteps=100, beta_schedule=betas, prediction_type=prediction, clip_sample=False
    )
    model.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    network = Network.load(tmp_path)
    assert network.shape == (1, 8, 8)
    x_t = torch.randn(2, 1, 8, 8)
    for step in (1, 40, 90):
        with torch.no_grad():
            said = model(x_t, step).sample
        expected = scheduler.step(said, step, x_t).pred_original_sample
        time = torch.tensor(step / 99, dtype=torch.float64)
        assert torch.allclose(network(x_t, time).mean.float(), expected, rtol=1e-3, atol=1e-4)
        alpha, sigma = network.schedule(time)
        D = network.denoise(x_t / float(alpha), float(sigma / alpha))
        assert torch.allclose(D, expected, rtol=1e-3, atol=1e-4)


def test_folders_of_diffusers_that_cannot_be_read_are_refused(tmp_path):
    config = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "sample_size": 8}
    for changed, words in [
        ({"_class_name": "UNet2DConditionModel"}, "only an unconditional UNet2DModel"),
        ({"num_class_embeds": 10}, "class-conditional"),
        ({"out_channels": 6}, "a variance"),
        ({"sample_size": None}, "no sample_size"),
        ({}, "safe_serialization"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=words):
            Network.load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="but a pickle"):
        Network.load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot be read|need diffusers"):
        Network.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("azula:edm:cifar", "pickle"),
        ("azula:sd", "latents"),
        ("edm", "pickle"),
        ("azula:xyz", "no plug-in 'xyz'"),
    ],
)
def test_plug_ins_of_azula_are_refused_with_the_reason(name, says):
    with pytest.raises(ValueError, match=says):
        Network.load(name)


def test_networks_that_come_along_are_small_and_whole():
    assert built_in() == ["cifar10-resnet", "mnist-resnet"]
    for name in built_in():
        network = Network.load(name)
        assert network.name == name
        assert len(network.card["training"]["held_out"]) == 256
        files = list((BUILT_IN / name).iterdir())
        assert sum(path.stat().st_size for path in files) < 2e6
        y = torch.zeros(1, *network.shape)
        assert torch.isfinite(network.denoise(y, 1.0)).all()


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist-resnet", "cifar10-resnet"])
def test_networks_that_come_along_beat_the_wiener_filter_on_what_they_have_not_seen(
    name, data_folder
):
    corpus = sm.Corpus.open(data_folder / f"{name.removesuffix('-resnet')}-train.zip", size=32)
    network = Network.load(name)
    unseen = network.unseen(corpus)
    assert len(unseen) == 256
    x = torch.from_numpy(np.array(corpus.images[unseen[:32]])).float() / 127.5 - 1
    y = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    wiener = sm.build("gaussian", corpus.subset(np.arange(5000)))
    mine, its = ((d.denoise(y, 0.5) - x).square().mean((1, 2, 3)) for d in (network, wiener))
    assert mine.mean() < its.mean()
    assert (mine < its).sum() >= 24  # by chance, one time in 300


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "noise levels of DDPM"),
        ({"rebuild": 1, "beta_schedule": "exp"}, "no scheduler that can be read"),
        ({"rescale_betas_zero_snr": True}, "pure noise"),
    ],
)
def test_schedulers_of_diffusers_that_are_not_ddpm_s_are_refused(tmp_path, changed, says):
    pytest.importorskip("diffusers")
    _, model_of = foreign._classes()
    model_of(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path)  # fmt: skip
    known = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(known | changed))
    with pytest.raises(ValueError, match=says):
        Network.load(tmp_path)


def test_a_network_generates_pictures_of_its_own_shape():
    network = Network.load("mnist-resnet")
    x = sm.generate(network, count=2, steps=2)
    assert x.shape == (2, *network.shape)
    assert torch.equal(x, sm.generate(network, count=2, steps=2, shape=network.shape))
