"""Windows, and which size they have at which noise level."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoremachine.core.collection import Collection
from scoremachine.core.schedules import (
    BandwidthSchedule,
    PatchSchedule,
    ShareSchedule,
    edm_sigmas,
    kamb_sigmas,
)
from scoremachine.core.windows import Box, Masks, Soft
from scoremachine.sampling.schedules import EDMSchedule


def test_edm_levels_are_those_of_karras():
    sigmas = edm_sigmas(18)
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-1] == pytest.approx(0.002)
    assert (np.diff(sigmas) < 0).all()
    # sigma^(1/rho) falls evenly
    assert np.allclose(np.diff(sigmas ** (1 / 7)), np.diff(sigmas ** (1 / 7))[0])


def test_the_edm_schedule_visits_the_edm_levels():
    import torch

    t = torch.linspace(1, 0, 18, dtype=torch.float64)
    alpha, sigma = EDMSchedule()(t)
    assert (alpha == 1).all()
    np.testing.assert_allclose(sigma.numpy(), edm_sigmas(18))


def test_a_schedule_takes_the_level_nearest_in_log_sigma():
    schedule = PatchSchedule([0.1, 10.0], [3, 9])
    assert schedule(1e-9) == schedule(0.99) == 3
    assert schedule(1.01) == schedule(1e9) == 9


def test_published_pspc_sizes_stand_at_their_edm_levels():
    schedule = PatchSchedule.named("pspc-cifar10")
    sizes = [schedule(s) for s in edm_sigmas(18)]
    assert sizes == [32] * 7 + [23, 15, 11, 7, 5] + [3] * 6


@pytest.mark.parametrize("name", [n for n in PatchSchedule.names() if n.startswith("kamb")])
def test_published_els_sizes_never_fall_with_the_noise(name):
    schedule = PatchSchedule.named(name)
    assert len(schedule.sizes) == 20
    assert (np.diff(schedule.sizes) >= 0).all()
    assert (schedule.sizes % 2 == 1).all()
    assert schedule(1e-3) == schedule.sizes[0]


def test_kamb_levels_follow_the_cosine_schedule():
    sigmas = kamb_sigmas()
    assert (np.diff(sigmas) > 0).all()
    assert 1 / (1 + sigmas[9] ** 2) == pytest.approx(np.cos(np.pi / 2 * 0.5 / 1.008) ** 2)


@pytest.mark.parametrize(
    ("sigmas", "sizes", "says"),
    [
        ([], [], "0 noise levels"),
        ([1.0], [3, 5], "2 values"),
        ([1.0, 1.0], [3, 5], "twice"),
        ([-1.0], [3], "positive"),
        ([float("nan")], [3], "positive"),
        ([1.0], [0], "positive whole number"),
        ([1.0], [2.5], "positive whole number"),
    ],
)
def test_bad_schedules_are_refused(sigmas, sizes, says):
    with pytest.raises(ValueError, match=says):
        PatchSchedule(sigmas, sizes)


def test_bad_bandwidths_are_refused():
    with pytest.raises(ValueError, match="0 or more"):
        BandwidthSchedule([1.0], [-0.1])
    with pytest.raises(ValueError, match="one value for each"):
        BandwidthSchedule([1.0], [])


def test_unknown_schedule_names_are_answered_with_the_known():
    with pytest.raises(ValueError, match="pspc-cifar10"):
        PatchSchedule.named("pspc-cifar")


def test_a_schedule_is_read_from_a_calibration(tmp_path):
    path = tmp_path / "mine" / "calibration.json"
    path.parent.mkdir()
    chosen = {"setting": "patch_size", "sigmas": [10.0, 0.1], "chosen": [9, 3]}
    path.write_text(json.dumps(chosen))
    schedule = PatchSchedule.of(str(path))
    assert schedule == PatchSchedule([0.1, 10.0], [3, 9])
    assert schedule.name == "mine"
    with pytest.raises(ValueError, match="is a calibration of patch_size; expected one of share"):
        ShareSchedule.of(str(path))
    for other, says in (({"weights": []}, "of weights"), ({"setting": None}, "that has no local")):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=says):
            PatchSchedule.of(str(path))


UNREADABLE = '{"setting": "patch_size", "sigmas": null, "chosen": 3}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no"),
        ("", "is no JSON"),
        ("[]", "holds list"),
        ("\xff", "is no JSON"),
        ('{"sigmas": [1.0]}', "holds no patch_size"),
        (UNREADABLE, "holds no patch_size"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content, says):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{says}.*; expected the calibration.json"):
        PatchSchedule.of(str(path))


@pytest.mark.parametrize(("image", "P"), [((5, 7), 3), ((6, 6), 6), ((4, 9), 4)])
def test_coverage_counts_the_boxes_that_hold_a_pixel(image, P):
    c = Collection(image, Box((P, P)), "boxes", "window")
    counts = np.zeros(image)
    for i in range(c.grid[0]):
        for j in range(c.grid[1]):
            counts[i : i + P, j : j + P] += 1
    np.testing.assert_array_equal(c.coverage, counts)


@given(st.integers(0, 2**31), st.sampled_from(["box", "gaussian", "masks", "boxes"]))
def test_painting_is_the_adjoint_of_looking(seed, kind):
    rng = np.random.default_rng(seed)
    image = tuple(rng.integers(3, 9, 2).tolist())
    window = {
        "box": Box((3, 5)),
        "boxes": Box((2, 3)),
        "gaussian": Soft.gaussian(5, 3),
        "masks": Masks.of([rng.random((image[0] * image[1],) * 2) > 0.5], image),
    }[kind]
    c = Collection(image, window, "boxes" if kind == "boxes" else "pixels", "window")
    v = torch.from_numpy(rng.normal(size=(2, *image)))
    w = torch.from_numpy(rng.normal(size=(2, *c.grid)))
    torch.testing.assert_close((c.window_sum(v) * w).sum(), (v * c.window_adjoint(w)).sum())


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6))
def test_masks_are_kept_by_few_terms(seed, H, W):
    rng = np.random.default_rng(seed)
    q = rng.random((H * W, H * W)) < rng.random()
    masks = Masks.of(np.array_split(q, 3), (H, W))
    for site, row in enumerate(q):
        np.testing.assert_array_equal(masks.row(site).ravel(), row)
    for shape, terms in (((4, 3), 4), ((1, 3), 2), ((3, 1), 3), ((4, 1), 4), ((1, 1), 1)):
        rectangle = np.zeros((1, 6, 7), dtype=bool)
        rectangle[0, 1 : 1 + shape[0], 2 : 2 + shape[1]] = True
        assert Masks.of([rectangle.reshape(1, 42)], (6, 7)).terms.nnz == terms


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7))
def test_soft_windows_are_sums_of_products(seed, P, Q):
    q = np.random.default_rng(seed).random((P, Q))
    np.testing.assert_allclose(Soft.of(q).weights, q, atol=1e-12)
    assert len(Soft.of(np.outer(q[:, 0], q[0])).rows) == 1
