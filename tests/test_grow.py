"""Pictures grown from one photograph: exact posteriors, candidates, masks, tiles, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import scoremachine as sm
from scoremachine.app.cli import app
from scoremachine.engines import boxes
from scoremachine.provenance.places import Piece, identity, largest, pieces, share_of_large
from scoremachine.runtime.progress import quiet
from scoremachine.sampling.grow import coverage, folded, relative


def photo(H: int = 40, W: int = 52, C: int = 3) -> np.ndarray:
    """A picture of smooth blobs and a little grain, uint8 (C, H, W)."""
    g = torch.Generator().manual_seed(0)
    x = sum(
        size * torch.nn.functional.interpolate(
            torch.randn(1, C, k, k, generator=g), (H, W), mode="bicubic", align_corners=False
        )
        for k, size in ((4, 60.0), (12, 25.0), (30, 8.0))
    )  # fmt: skip
    return (x[0] + 127).clamp(0, 255).round().to(torch.uint8).numpy()


def flat(x: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) as float32 (H, W C) in [-1, 1]."""
    pixels = x.transpose(1, 2, 0).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.reshape(len(pixels), -1))


def everywhere(high: int, wide: int, boxes_: tuple[int, int]):
    return np.ones((high, wide), dtype=bool), relative(*boxes_), relative(high, wide)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_all_patches_are_the_machine_epc(sigma):
    P, s = 5, photo(14, 17)
    y = torch.randn(1, 3, 12, 15, generator=torch.Generator().manual_seed(1))
    exact = sm.build("epc", sm.Corpus(s[None]), patch_size=P).denoise(y, sigma)[0]
    query = np.ascontiguousarray(y[0].permute(1, 2, 0).numpy().reshape(12, -1))
    at = everywhere(10, 13, (8, 11))
    l = boxes.dense(query, flat(s), at, (P, 3), (boxes.effective_scale(sigma), 0.0))
    w = boxes.softmax(l.reshape(88, -1)).reshape(8, 11, 10, 13)
    D = boxes.composed(flat(s), None, w, (P, 3), (12, 15)) / coverage(12, 15, P)
    assert np.abs(D.transpose(2, 0, 1) - exact.numpy()).max() < 1e-4


def test_candidates_come_near_all_patches():
    P, s = 5, photo(40, 44)
    x = flat(s).reshape(40, 44, 3)
    rng = np.random.default_rng(0)
    y = (np.roll(x, (7, -9), (0, 1)) + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    y = np.ascontiguousarray(y.reshape(40, -1))
    at, scale = everywhere(36, 40, (36, 40)), (boxes.effective_scale(0.1), 0.0)
    places = np.zeros((36, 40, 4, 2), dtype=np.int32)
    for k in range(8):
        places, logits = boxes.search(y, flat(s), at, places, (P, 3), scale, k)
    w = boxes.softmax(boxes.dense(y, flat(s), at, (P, 3), scale).reshape(36 * 40, -1))
    exact = boxes.composed(flat(s), None, w.reshape(36, 40, 36, 40), (P, 3), (40, 44))
    near = boxes.composed(flat(s), places, boxes.softmax(logits), (P, 3), (40, 44))
    difference = (near - exact) / coverage(40, 44, P)
    assert float((difference**2).mean()) < 1e-3
    some = np.array([[0, 0], [20, 11], [35, 39]])
    found = some, logits[some[:, 0], some[:, 1]]
    mass = boxes.omitted(y, flat(s), at, (P, 3), scale, found)
    named = places[some[:, 0], some[:, 1]]
    for n, (i, j) in enumerate(some):
        of = w.reshape(36, 40, 36, 40)[i, j]
        assert mass[n] == pytest.approx(1 - of[named[n, :, 0], named[n, :, 1]].sum(), abs=1e-3)


def test_balance_uses_patches_equally():
    rng = np.random.default_rng(0)
    l = rng.normal(0, 3, (60, 20)).astype(np.float32)
    valid = np.ones(20, dtype=bool)

    plain, equal = boxes.softmax(l), boxes.balanced(l, valid, 1.0, 50)
    assert equal.sum(0).std() < 0.05 < plain.sum(0).std()
    assert np.abs(equal.sum(1) - 1).max() < 1e-5
    assert np.array_equal(boxes.balanced(l, valid, 0.0), plain)


def test_results_do_not_depend_on_threads_or_on_other_pictures():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sm.grow(photo(28, 32), (24, 30), count=2, seed=3)
        torch.set_num_threads(2)
        two = sm.grow(photo(28, 32), (24, 30), count=2, seed=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert one.shape == (2, 3, 24, 30)
    assert torch.equal(sm.grow(photo(28, 32), (24, 30), seed=3)[0], one[0])
    assert not torch.equal(one[0], one[1])
    assert float(one.abs().max()) <= 1


@pytest.mark.parametrize("boxes_of", [(6, 9), (11, 5)])
def test_a_tile_is_the_mean_of_boxes_that_wrap_around(boxes_of):
    """`folded` adds what boxes beyond the border give to the other side."""
    (H, W), P = boxes_of, 4
    rng = np.random.default_rng(0)
    total, expected = np.zeros((H + P - 1, W + P - 1, 2)), np.zeros((H, W, 2))
    for i in range(H):
        for j in range(W):
            box = rng.normal(size=(P, P, 2))
            total[i : i + P, j : j + P] += box
            rows, columns = (i + np.arange(P)) % H, (j + np.arange(P)) % W
            expected[rows[:, None], columns] += box / P**2
    np.testing.assert_allclose(folded(total, P, (H, W)), expected)


def test_a_tile_tiles():
    """Across the border neighbouring pixels are as alike as anywhere else."""
    x = sm.grow(photo(30, 34), (30, 30), seed=1, tile=True, keep=0)[0]
    inside = x.diff(dim=1).abs().mean(), x.diff(dim=2).abs().mean()
    across = (x[:, 0] - x[:, -1]).abs().mean(), (x[:, :, 0] - x[:, :, -1]).abs().mean()
    for a, b in zip(across, inside, strict=True):
        assert float(a) < 2 * float(b)


@pytest.mark.parametrize("symmetry", ["mirror", "rotate", "four"])
def test_symmetries(symmetry):
    x = sm.grow(photo(), (30, 33), seed=1, symmetry=symmetry)[0]
    if symmetry in ("mirror", "four"):
        assert torch.equal(x, x.flip(2))
    if symmetry == "four":
        assert torch.equal(x, x.flip(1))
    if symmetry == "rotate":
        assert torch.equal(x, x.flip(1, 2))


def test_known_pixels_stay_and_the_hole_is_no_source():
    given = photo()
    mask = np.zeros((40, 52), dtype=bool)
    mask[12:24, 20:34] = True
    spoiled = given.copy()
    spoiled[:, mask] = 255
    x = sm.grow(spoiled, seed=0, mask=mask)[0].numpy()
    expected = given.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(x[:, ~mask], expected[:, ~mask], atol=1e-6)
    assert x[:, mask].mean() < 0.9  # nothing of the white hole


def test_enlarged_pictures_reduce_to_the_photograph():
    from scoremachine.sampling.grow import resized

    given = photo(26, 30)
    x = sm.grow(given, (52, 60), enlarge=True)[0].permute(1, 2, 0).numpy()
    small = resized(np.ascontiguousarray(x), 26, 30)
    assert np.abs(small - (given.transpose(1, 2, 0) / 127.5 - 1)).mean() < 0.05


def test_noise_that_turns_comes_back():
    at = [sm.grow(photo(26, 26), (24, 24), seed=0, turn=turn) for turn in (0.0, 0.2, 2 * np.pi)]
    assert float((at[0] - at[2]).abs().max()) < 1e-3
    assert float((at[0] - at[1]).abs().mean()) > 0


def test_several_photographs_are_mixed():
    x = sm.grow([photo(28, 24), 255 - photo(24, 40)], (24, 24), seed=0)
    assert x.shape == (1, 3, 24, 24)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (photo(), {"size": (3, 40)}, "smaller than the patches of 7 x 7"),
        (photo(), {"keep": 2.0}, "keep is 2.0; expected a number from 0 to 1"),
        (photo(), {"symmetry": "odd"}, "symmetry"),
        (photo(), {"mask": np.zeros((4, 4), dtype=bool)}, "the mask has 4 x 4 pixels"),
        (photo(), {"mask": np.ones((40, 52), dtype=bool)}, "covers the whole picture"),
        ([photo(), photo(C=1)], {}, "some photographs are gray"),
    ],
)
def test_senseless_arguments_are_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        sm.grow(given, **options)


def test_the_command_resumes_and_makes_the_same_picture(tmp_path, monkeypatch):
    Image.fromarray(photo(40, 44).transpose(1, 2, 0)).save(tmp_path / "photo.png")
    run = ["grow", str(tmp_path / "photo.png"), "--quiet", "--seed", "4", "--out"]
    whole = CliRunner().invoke(app, [*run, str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output
    from scoremachine.sampling import grow as growing

    real = growing.Grower._scale

    def stops(self, scale, *rest):
        if scale == 0:
            raise KeyboardInterrupt
        return real(self, scale, *rest)

    monkeypatch.setattr(growing.Grower, "_scale", stops)
    assert CliRunner().invoke(app, [*run, str(tmp_path / "part")]).exit_code != 0
    assert not (tmp_path / "part" / "grown.png").exists()
    monkeypatch.setattr(growing.Grower, "_scale", real)
    with quiet():
        assert CliRunner().invoke(app, [*run, str(tmp_path / "part")]).exit_code == 0
    names = [tmp_path / name / "grown.png" for name in ("whole", "part")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert not (tmp_path / "part" / ".unfinished").exists()
    assert json.loads((tmp_path / "part" / "grow.json").read_text())["size"] == [40, 44]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["brick", "--size", "128"], "expected HEIGHTxWIDTH"),
        (["brick", "--size", "40000x40000"], "say --yes"),
        (["brick", "--extend", "1,2"], "expected one number, or TOP,RIGHT,BOTTOM,LEFT"),
        (["brick", "--extend", "5", "--upscale", "2"], "are asked for together"),
        (["brick", "--strength", "0.5"], "belongs to --from"),
        (["brick", "--upscale", "1"], "expected a factor above 1"),
    ],
)
def test_the_command_s_errors_are_sentences(arguments, message, tmp_path):
    found = CliRunner().invoke(app, ["grow", *arguments, "--out", str(tmp_path)])
    assert found.exit_code != 0
    assert message in found.output + str(found.exception)
    assert not list(tmp_path.iterdir())


def test_origins_are_the_sources_with_the_largest_shares():
    rng = np.random.default_rng(0)
    P, K, frame = 3, 2, (7, 8)
    places = rng.integers(0, 5, (5, 6, K, 2)).astype(np.int32)
    weights = rng.random((5, 6, K)).astype(np.float32)
    weights /= weights.sum(-1, keepdims=True)
    found, share = boxes.origins(places, weights, P, frame, wraps=False)
    for i, j in np.ndindex(frame):
        given: dict[tuple[int, int], float] = {}
        covering = 0
        for y, x in np.ndindex(5, 6):
            if 0 <= i - y < P and 0 <= j - x < P:
                covering += 1
                for k in range(K):
                    a, b = places[y, x, k] + (i - y, j - x)
                    given[a, b] = given.get((a, b), 0.0) + float(weights[y, x, k])
        assert given[tuple(found[i, j])] == pytest.approx(max(given.values()))
        assert share[i, j] == pytest.approx(max(given.values()) / covering, abs=1e-5)


def test_pieces_are_parts_of_the_photograph_as_they_are():
    pixels = photo().transpose(1, 2, 0).astype(np.float32) / 127.5 - 1
    x = np.concatenate([pixels[:, 10:40], pixels[:, :12] + 0.3], 1)
    origins = identity(pixels)
    origins = np.concatenate([origins[:, 10:40], origins[:, :12]], 1)
    of, sizes = pieces(x, origins, [pixels])
    assert largest(of, sizes, origins) == Piece(1200, (0, 0, 40, 30), (0, 0, 10))
    assert share_of_large(sizes) == pytest.approx(30 / 42)
    known = np.where(np.arange(42)[None, :, None] < 20, -1, origins)  # which are no copies
    of, sizes = pieces(x, known, [pixels])
    assert largest(of, sizes, known) == Piece(400, (0, 20, 40, 30), (0, 0, 30))


def test_grow_explains(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo(24, 28).transpose(1, 2, 0)).save(path)
    for extra in ([], ["--tile", "--symmetry", "mirror"]):
        out = tmp_path / f"out{len(extra)}"
        asked = ["grow", str(path), "--out", str(out), "--explain", "--size", "24x30", *extra]
        assert CliRunner().invoke(app, asked).exit_code == 0
        x = np.asarray(Image.open(out / "grown.png")).astype(int)
        with np.load(out / "sources.npz") as file:
            assert (file["photographs"] == 0).all()
            assert (file["shares"] > 0).all()
            assert file["shares"].max() <= 1 + 1e-5
            source = photo(24, 28).transpose(1, 2, 0)[file["rows"], file["columns"]].astype(int)
        assert np.median(np.abs(x - source)) < 25
        assert json.loads((out / "grow.json").read_text())["copies"][0]["large_share"] >= 0
        assert Image.open(out / "sources.png").size[0] > 58


def test_symmetry_cannot_change_known_pixels():
    hole = np.zeros((40, 52), dtype=bool)
    hole[10:20, 10:20] = True
    with pytest.raises(ValueError, match="known pixels stay"):
        sm.grow(photo(), mask=hole, symmetry="mirror")


def test_structure_is_that_of_the_picture_that_is_given():
    dark_left = np.full((3, 40, 52), 220, dtype=np.uint8)
    dark_left[:, :, :26] = 30
    with quiet(True):
        x = sm.grow(photo(), start=dark_left, structure=True, keep=0.5)[0]
    assert x[:, :, :20].mean() < x[:, :, -20:].mean() - 0.1
