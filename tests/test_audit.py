"""Copies of training images are found, and false alarms are as frequent as is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

import scoremachine as sm
from scoremachine.app.cli import app
from scoremachine.engines import inverted
from scoremachine.provenance.alignment import Placement, align, placed, relit, resized
from scoremachine.provenance.audit import adjusted, outlying, p_values, reference_scores, region_of
from scoremachine.provenance.originals import Originals
from scoremachine.provenance.windows import WindowIndex


def textured(seed: int, N: int, side: int = 24, C: int = 3) -> np.ndarray:
    """Pictures of blobs and lines at several sizes, no two alike."""
    rng = np.random.default_rng(seed)
    x = np.zeros((N, C, side, side))
    for coarse, size in ((4, 1.0), (8, 0.6), (side, 0.12)):
        noise = torch.from_numpy(rng.normal(0, size, (N, C, coarse, coarse)))
        x += torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear").numpy()
    return np.clip(127 + 50 * x, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def corpus():
    return sm.Corpus(textured(0, 150))


@pytest.fixture(scope="module")
def originals(corpus):
    return Originals.of(corpus)


def altered(kind: str, image: np.ndarray) -> np.ndarray:
    """A copy of an image."""
    x = image.astype(np.float64)
    if kind == "moved":
        return np.roll(image, (2, -1), (1, 2))
    if kind == "mirrored":
        return image[..., ::-1].copy()
    if kind == "relit":
        x = 0.85 * x + 15
    if kind == "noisy":
        x = x + np.random.default_rng(0).normal(0, 8, x.shape)
    if kind == "larger":
        large = resized(torch.from_numpy(x)[None].float(), 1.15)[0].numpy()
        return np.clip(large[:, 1:25, 2:26], 0, 255).round().astype(np.uint8)
    return np.clip(x, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["exact", "moved", "mirrored", "relit", "noisy", "larger"])
def test_copies_are_found_with_their_place(originals, kind):
    numbers = [3, 40, 77]
    pictures = np.stack([altered(kind, originals.corpus.images[n]) for n in numbers])
    for n, found in zip(numbers, originals.find(pictures), strict=True):
        assert found.placement.image == n
        assert found.share > 0.6
        assert found.placement.mirrored == (kind == "mirrored")
        if kind == "moved":
            assert (found.placement.row, found.placement.column) == (2, -1)
        if kind == "larger":
            assert found.placement.scale > 1


def test_a_part_is_found_with_its_region(originals):
    images = originals.corpus.images
    picture = textured(9, 1)[0]
    picture[:, 4:20, 6:22] = images[11][:, 2:18, 1:17]
    (found,) = originals.find(picture[None])
    assert found.placement.image == 11
    assert abs(found.placement.row - 2) <= 1
    assert abs(found.placement.column - 5) <= 1
    region = region_of(found.shares.numpy(), found.placement, (24, 24))
    inside = np.zeros((24, 24), dtype=bool)
    inside[3:21, 5:23] = True
    assert region.mask.sum() > 30
    assert region.mask[inside].sum() > 0.9 * region.mask.sum()
    top, left, bottom, right = region.source
    moved = np.array(region.box) - (top, left, bottom, right)
    assert np.abs(moved - (2, 5, 2, 5)).max() <= 2


def test_small_parts_look_more_like_copies_than_unrelated_pictures(originals):
    unrelated = textured(5, 20)
    most = max(found.score for found in originals.find(unrelated))
    pictures = unrelated[:4].copy()
    for i, picture in enumerate(pictures):
        part = originals.corpus.images[60 + i][:, 3:15, 5:17]
        picture[:, 8:20, 2:14] = part[..., ::-1] if i % 2 else part
    for i, found in enumerate(originals.find(pictures)):
        assert found.placement.image == 60 + i
        assert found.score > 2 * most


def test_unrelated_pictures_are_no_copies(originals):
    shares = [found.share for found in originals.find(textured(5, 30))]
    assert max(shares) < 0.5


def test_a_left_out_image_is_no_candidate(originals):
    pictures = originals.corpus.images[:4]
    with_itself = list(originals.find(pictures))
    without = list(originals.find(pictures, np.arange(4)))
    for n, (a, b) in enumerate(zip(with_itself, without, strict=True)):
        assert a.placement.image == n
        assert b.placement.image != n
        assert b.nearest != n
        assert b.share < a.share


def test_an_audit_ranks_copies_first(corpus):
    pictures = np.concatenate([textured(7, 12), corpus.images[20:22]])
    report = sm.audit(pictures, corpus, references=60)
    assert set(report.order()[:2].tolist()) == {12, 13}
    assert report.nearest[12:].tolist() == [20, 21]
    assert report.identical.tolist() == [False] * 12 + [True] * 2
    assert report.p_value[12:].max() <= 2 / 61
    assert np.median(report.p_value[:12]) > 0.1
    again = sm.audit(pictures, corpus, references=60)  # the held-out images' scores are kept
    np.testing.assert_array_equal(report.p_value, again.p_value)


def test_given_references_are_kept_even_if_they_look_like_copies(corpus, capsys):
    reference = np.concatenate([textured(8, 22), corpus.images[30:33]])
    report = sm.audit(textured(7, 2), corpus, reference)
    assert len(report.reference) == 25
    assert report.left_out == 0
    assert "3 of the 25 reference images look like copies" in capsys.readouterr().err


def test_held_out_images_that_are_copies_are_left_out():
    """A tenth of a corpus are copies of each other; the others' scores stay the reference."""
    images = textured(3, 60)
    images[:3] = images[57:] // 2 + 60
    scores, copies = reference_scores(Originals.of(sm.Corpus(images)), None, 60, 0)
    assert copies == 6
    assert len(scores) == 54
    again = reference_scores(Originals.of(sm.Corpus(images)), None, 60, 0)
    np.testing.assert_array_equal(again[0], scores)


@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_few_copies_do_not_hide_themselves(seed, copies):
    rng = np.random.default_rng(seed)
    bulk = np.exp(rng.normal(-1.8, 0.4, 100))
    limit = outlying(np.concatenate([bulk, np.full(copies, 50.0)]))
    assert 0.3 < limit < 50
    assert (bulk < limit).mean() > 0.97
    assert outlying(bulk[:19]) == np.inf


@given(arrays(np.float64, st.integers(20, 60), elements=st.floats(0, 5)), st.floats(-1, 6))
def test_p_values_count_larger_scores(reference, score):
    expected = (1 + (reference >= score).sum()) / (1 + len(reference))
    assert p_values(np.array([score]), reference)[0] == pytest.approx(expected)


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0.001, 1)))
def test_q_values_are_benjamini_and_hochberg_s(p):
    n, q = len(p), adjusted(p)
    order = np.argsort(p)
    for i in range(n):
        rank = int(np.flatnonzero(order == i)[0])
        expected = min(min(p[order[j]] * n / (j + 1) for j in range(rank, n)), 1.0)
        assert q[i] == pytest.approx(expected)


def test_too_few_held_out_images_are_refused(corpus):
    report = sm.audit(textured(7, 2), corpus, references=5)
    with pytest.raises(ValueError, match="need 20"):
        _ = report.p_value
    with pytest.raises(ValueError, match="one image"):
        sm.audit(textured(7, 2), corpus.subset([0]))


def test_pictures_of_another_kind_are_converted(corpus, capsys):
    report = sm.audit(textured(7, 2, side=30, C=1), corpus, references=5)
    assert report.images.shape == (2, 3, 24, 24)
    told = capsys.readouterr().err
    assert "resized to 24 x 24" in told
    assert "converted to 3" in told


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 1, 25, 25), (3, 3, 12, 20)])
def test_small_blank_and_few_images(shape):
    N, C, H, W = shape
    images = np.zeros((N + 1, C, H, W), dtype=np.uint8)
    images[0] = np.random.default_rng(0).integers(0, 256, (C, H, W))
    report = sm.audit(images, sm.Corpus(images), references=2)
    assert np.isfinite(report.score).all()
    assert report.identical.all()


def test_vectors_of_the_nearest_images():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(300, 6)).astype(np.float32)
    owners = np.sort(rng.integers(0, 40, 300)).astype(np.int32)
    queries = rng.normal(size=(20, 6)).astype(np.float32)
    starts = np.array([0, 120, 300])
    probes = np.tile(np.arange(2), (20, 1))
    distances, found = inverted.search(queries, probes, starts, codes, owners, 4)
    for q in range(20):
        far = ((codes - queries[q]) ** 2).sum(1)
        nearest = sorted(far[owners == n].min() for n in np.unique(owners))[:4]
        np.testing.assert_allclose(distances[q], nearest, rtol=1e-4)
        assert len(set(owners[found[q]])) == 4
        np.testing.assert_allclose(far[found[q]], distances[q], rtol=1e-4)


def test_an_index_is_kept(corpus, monkeypatch):
    first = WindowIndex.of(corpus)
    monkeypatch.setattr(WindowIndex, "built", lambda corpus: pytest.fail("built again"))
    again = WindowIndex.of(corpus)
    np.testing.assert_array_equal(first.codes, again.codes)
    assert len(first.codes) == len(first.owners) == first.starts[-1]


@given(st.integers(-30, 30), st.integers(-30, 30))
def test_what_is_placed_covers_its_part(row, column):
    image = torch.ones(2, 5, 7)
    canvas, covered = placed(image, row, column, 9, 11)
    at = torch.arange(9)[:, None] - row, torch.arange(11) - column
    inside = (at[0] >= 0) & (at[0] < 5) & (at[1] >= 0) & (at[1] < 7)
    assert torch.equal(covered, inside)
    assert torch.equal(canvas, inside.float().expand(2, -1, -1))


def test_relighting_undoes_a_gain_and_a_bias():
    x = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    y = x * torch.tensor([0.8, 1.2, 1.0])[:, None, None] + 0.05
    torch.testing.assert_close(
        relit(x, y, torch.ones(9, 9, dtype=torch.bool)), y, rtol=0, atol=2e-3
    )


def test_alignment_finds_the_shift():
    image = torch.from_numpy(textured(3, 1)[0]).float() / 255
    y = torch.roll(image, (1, -2), (1, 2))
    found = align(y, [Placement(0, False, 1.0, 0, 0)], {0: image})
    assert (found.placements[0].row, found.placements[0].column) == (1, -2)
    assert found.placements[0].scale == 1.0


def test_the_command_writes_a_page_and_goes_on(tmp_path, corpus, monkeypatch):
    np.save(tmp_path / "data.npy", corpus.images)
    np.save(tmp_path / "pictures.npy", np.concatenate([textured(7, 30), corpus.images[:2]]))
    words = [
        "audit", "--images", tmp_path / "pictures.npy", "--data", tmp_path / "data.npy", "--out",
        tmp_path / "out", "--references", 40,
    ]  # fmt: skip

    def run(*more: object):
        return CliRunner().invoke(app, [str(word) for word in [*words, *more]])

    find, calls = Originals.find, []

    def stopped(self, pictures, leave_out=None):
        calls.append(len(pictures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find(self, pictures, leave_out)

    monkeypatch.setattr(Originals, "find", stopped)
    assert run().exit_code == 130
    assert not (tmp_path / "out" / "audit.csv").exists()
    done = run("--fail-below", 0.1)
    assert done.exit_code == 3, done.output
    assert calls[:3] == [16, 16, 16]  # the first is not done again
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"audit.csv", "audit.html", "audit.json"}
    record = json.loads((tmp_path / "out" / "audit.json").read_text("utf-8"))
    assert record["pictures"] == 32
    assert [row["identical"] for row in record["rows"][:3]] == [True, True, False]
    lines = (tmp_path / "out" / "audit.csv").read_text("utf-8").splitlines()
    assert len(lines) == 33
    html = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert html.count('class="case"') == 32
    assert "http" not in html
    assert run("--fail-below", 2).exit_code != 0


def test_attribution_ranks_the_image_itself_first():
    images = textured(2, 40, side=12)
    corpus = sm.Corpus(images)
    for machine, scales in (("ls:5", (1,)), (["ls:5", "pspc:5"], (1, 2)), ("ideal", (1,))):
        found = sm.attribute(images[:3], corpus, machine, sigma=[0.1, 0.3], scales=scales)
        top, shares = found.top(4)
        assert top[:, 0].tolist() == [0, 1, 2]
        assert (shares[:, 0] > 0.5).all()
        assert found.shares.shape == (3, 40)
        assert len(found.csv(4).splitlines()) <= 1 + 3 * 4
    assert sm.attribute(images[:2], corpus, sm.build("ls", corpus, patch_size=3), 0.2).top(1)[
        0
    ].shape == (2, 1)
    with pytest.raises(ValueError, match="gaussian has no sources"):
        sm.attribute(images[:2], corpus, "gaussian", 0.2)
