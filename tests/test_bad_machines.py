"""Bad input to machines and generation: a ValueError that says value, expectation, remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scoremachine as sm
from conftest import SMALL, random_corpus, small

NAMES = list(SMALL)


def build(name, corpus=None, **settings):
    return small(name, corpus or random_corpus(), **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_must_be_positive_and_finite(name, sigma):
    with pytest.raises(ValueError, match=r"sigma is .*expected a finite number above 0"):
        build(name).denoise(torch.zeros(1, 1, 6, 6), sigma)


@pytest.mark.parametrize("sigma", [None, "1", [0.5, "a"]])
def test_sigma_must_be_a_number(sigma):
    with pytest.raises(ValueError, match=r"sigma is .*expected a finite number above 0"):
        build("ls").denoise(torch.zeros(2, 1, 6, 6), sigma)


@pytest.mark.parametrize("name", NAMES)
def test_no_pictures_are_denoised_to_none(name):
    assert build(name).denoise(torch.zeros(0, 1, 6, 6), 1.0).shape == (0, 1, 6, 6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_pixels_must_be_finite(name, pixel):
    y = torch.zeros(2, 1, 6, 6)
    y[1, 0, 2, 2] = pixel
    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        build(name).denoise(y, 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 3, 6, 6), (1, 1, 6, 7), (6, 6)])
def test_shapes_must_match_the_corpus(name, shape):
    if name in ("els", "epc") and shape == (1, 1, 6, 7):
        return  # they take any size
    with pytest.raises(ValueError, match=r"expected \(B, 1, 6, 6\)"):
        build(name).denoise(torch.zeros(shape), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_must_be_floats(name):
    with pytest.raises(ValueError, match=r"uint8.*floating-point"):
        build(name).denoise(torch.zeros(1, 1, 6, 6, dtype=torch.uint8), 1.0)
    with pytest.raises(ValueError, match=r"ndarray.*floating-point"):
        build(name).denoise(np.zeros((1, 1, 6, 6)), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_one_noise_level_or_one_each(name):
    with pytest.raises(ValueError, match="one noise level, or one for each of the 2"):
        build(name).denoise(torch.zeros(2, 1, 6, 6), torch.ones(3))


@pytest.mark.parametrize("name", ["ls", "els", "pspc"])
def test_patches_larger_than_the_image_are_refused(name):
    with pytest.raises(ValueError, match=r"patch_size 7 is larger than the 6 x 6 images"):
        build(name, patch_size=7)
    with pytest.raises(ValueError, match="larger than"):
        build(name, patch_size="kamb-cifar10-resnet")


@pytest.mark.parametrize("name", ["ls", "els"])
def test_even_patches_are_refused(name):
    with pytest.raises(ValueError, match=r"patch_size 4 is even.*use 3 or 5"):
        build(name, patch_size=4)


def test_composites_take_even_patches():
    build("pspc", patch_size=4).denoise(torch.zeros(1, 1, 6, 6), 1.0)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, None, "auot"])
def test_senseless_patch_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"expected a positive whole number|no published"):
        build("ls", patch_size=size)


def test_circular_patches_must_fit():
    corpus = random_corpus(H=4, W=9)
    with pytest.raises(ValueError, match="no 5 x 5 patch fits"):
        build("els", corpus, patch_size=5, boundary="circular")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bandwidth", [-0.1, float("nan"), "wide", None, True])
def test_senseless_bandwidths_are_refused(name, bandwidth):
    with pytest.raises(ValueError, match="bandwidth is"):
        build(name, bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("els", {"search": "fast"}, "search"),
        ("els", {"bound": "certain"}, "bound"),
        ("els", {"error": 0}, "error is 0; expected the largest error of a pixel"),
        ("els", {"error": True}, "error is True"),
        ("els", {"search": "bounded", "augment": "flips"}, "indexes of plain patches only"),
        ("els", {"search": "bounded", "window": "gaussian"}, "indexes of plain patches only"),
        ("pspc-flex", {"share": 0.0}, "share is 0.0; expected a number above 0 and at most 1"),
        ("pspc-flex", {"share": 1.5}, "share is 1.5"),
        ("pspc-flex", {"share": "pspc-flex"}, "there are pspc-flex-cifar10"),
        ("pspc-flex", {"heat_maps": 3}, "heat_maps is 3; expected 'wiener'"),
        ("pspc-flex", {"heat_maps": "nowhere.npz"}, "no file nowhere.npz"),
        ("pca", {"threshold": 0}, "threshold is 0; expected a number above 0 and at most 1"),
        ("pca", {"threshold": "tight"}, "no published schedule of threshold"),
        ("pca", {"threshold": True}, "threshold is True; expected a number"),
        ("smoothed", {"delta": -1.0}, "delta is -1.0; expected a finite number"),
        ("smoothed", {"M": 0}, "M is 0; expected a positive whole number"),
        ("smoothed", {"neighbours": 0}, "neighbours is 0"),
        ("smoothed", {"uniform": 3}, "uniform is 3 without neighbours"),
        ("smoothed", {"perturbations": "none"}, "expected 'fixed' or 'fresh'"),
        ("smoothed", {"delta": sm.PatchSchedule([1.0], [3])}, "expected a SmoothingSchedule"),
        ("ls", {"window": "hann"}, "window is 'hann'; expected 'box', 'gaussian' or 'wiener'"),
        ("ls", {"augment": "flips,zoom=2"}, "no augmentation is called 'zoom'"),
        ("ls", {"augment": "shifts=two"}, "expected shifts=NUMBER"),
        ("ls", {"augment": "shifts=1.5"}, "does not say a whole number"),
        ("ls", {"augment": "flips=0"}, "'flips=0' gives flips a value"),
        ("ls", {"schedule": "vp"}, "schedule is 'vp'; expected an azula Schedule"),
        ("ideal", {"self": 1}, "has no setting 'self'"),
        ("ideal", {"label": "3"}, "give it to denoise, score, log_density or generate"),
        ("ls", {"augment": "contrast=1.5"}, "contrast is 1.5; expected a number from 0 to below 1"),
        ("ls", {"augment": "brightness=-1"}, "brightness is -1.0; expected a number from 0"),
        ("ls", {"augment": 3}, "augment is 3; expected an Augment"),
        ("pca", {"window": "box"}, "no setting 'window'"),
        ("es", {"patch_size": 3}, "no setting 'patch_size'"),
    ],
)
def test_senseless_settings_are_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        build(name, **settings)


def test_heat_maps_must_fit_the_images(tmp_path):
    with pytest.raises(ValueError, match=r"heat maps are of 25 pixels; expected 36, as the 6 x 6"):
        build("pspc-flex", heat_maps=sm.HeatMaps([1.0], np.ones((1, 25, 25))))
    with pytest.raises(ValueError, match="expected \\(K, H W, H W\\)"):
        sm.HeatMaps([1.0, 2.0], np.ones((1, 36, 36)))
    with pytest.raises(ValueError, match="negative or infinite"):
        sm.HeatMaps([1.0], -np.ones((1, 36, 36)))
    with pytest.raises(ValueError, match="positive numbers"):
        sm.HeatMaps([0.0], np.ones((1, 36, 36)))
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="holds no heat maps"):
        build("pspc-flex", heat_maps=tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match="holds no heat maps"):
        build("pspc-flex", heat_maps=tmp_path / "array.npy")
    sm.HeatMaps([1.0], np.ones((1, 36, 36))).save(tmp_path / "maps.npz")
    whole = (tmp_path / "maps.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no heat maps"):
        build("pspc-flex", heat_maps=tmp_path / "cut.npz")
    sm.HeatMaps([1.0], np.ones((1, 36, 36))).save(tmp_path / "bare")
    assert {p.name for p in tmp_path.iterdir()} >= {"bare", "maps.npz"}
    assert sm.HeatMaps.load(tmp_path / "bare").maps.shape == (1, 36, 36)
    with pytest.raises(ValueError, match="heat maps are int64; expected floats"):
        sm.HeatMaps([1.0], np.ones((1, 36, 36), dtype=np.int64))
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match="heat maps"):
        build("pspc-flex", heat_maps=tmp_path / "text.npz")


def test_unknown_names_are_answered_with_close_ones():
    with pytest.raises(ValueError, match="did you mean 'pspc'"):
        sm.build("pspcs", random_corpus())
    with pytest.raises(ValueError, match="no kernel is called 'cuda'"):
        build("ls", kernel="cuda")
    with pytest.raises(ValueError, match="no setting 'boundary'"):
        build("ls", boundary="circular")
    with pytest.raises(ValueError, match="expected 'broken' or 'circular'"):
        build("els", boundary="open")


def test_a_machine_is_made_of_a_corpus():
    with pytest.raises(ValueError, match=r"not of ndarray: use Corpus"):
        sm.build("ideal", np.zeros((3, 1, 6, 6), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_labels_must_have_images(name):
    images = random_corpus(N=4).images
    corpus = sm.Corpus(images, labels=np.array([0, 0, 2, 2]))
    machine = small(name, corpus)
    y = torch.zeros(2, 1, 6, 6)
    with pytest.raises(ValueError, match="1"):
        machine.denoise(y, 1.0, label=1)
    with pytest.raises(ValueError, match="2 pictures; expected one for each"):
        machine.denoise(y, 1.0, label=[0, 2, 2])
    with pytest.raises(ValueError, match="label"):
        build("ls").denoise(y, 1.0, label=0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ideal", "gaussian", "es"}))
def test_local_machines_have_no_density(name):
    with pytest.raises(ValueError, match="no density"):
        build(name).log_density(torch.zeros(1, 1, 6, 6), 1.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "count is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"sampler": "dddim"}, "no sampler is called"),
        ({"bandwidth": -0.1}, "bandwidth is -0.1"),
        ({"bandwidth": "wide"}, "bandwidth is 'wide'"),
        ({"label": [0, 1]}, "generation takes one class"),
    ],
)
def test_generation_refuses_senseless_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        sm.generate(build("ls"), **settings)
