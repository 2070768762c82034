"""Is a picture, or a part of it, a copy of a training image? Scores with a false-alarm rate.

Real images that are in no way copies are audited like the pictures, and a picture's p-value is the
share of them that look at least as much like a copy: (1 + their number) / (1 + all of them). So it
holds whatever the score is (conformal p-values; Bates et al. 2104.08279). docs/audit.md has the
score, and how well it finds copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import ndimage

from scoremachine.data.corpus import Corpus
from scoremachine.data.pixels import with_channels
from scoremachine.data.store import Record
from scoremachine.provenance.alignment import Placement
from scoremachine.provenance.originals import Found, Originals
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.validation import check_integer, check_seed

VERSION = 4
REFERENCES = 1000  # held-out images, at most
FEWEST = 20  # held-out images without which there are no p-values
OUTLYING = 3.5  # standard deviations of log scores from which on held-out images are left out
QUARTILE = 0.6745  # standard deviations from the median of a normal distribution to its quartile
NARROW = 0.1  # the least standard deviation
KEPT_EVERY = 50  # held-out images, after which what was found is kept
MEMORIZED = 1 / 3  # d1 / d2 below which a picture is called memorized (Bonnaire et al. 2505.17638)


@dataclass(frozen=True, eq=False)
class Region:
    """The largest part of a picture that one training image explains.

    Attributes:
        mask: Which pixels of the picture, bool (H, W); none where no image explains any.
        box: Rows and columns in the picture: (top, left, bottom, right).
        source: Rows and columns of the same part in the training image.
    """

    mask: np.ndarray
    box: tuple[int, int, int, int]
    source: tuple[int, int, int, int]

    @property
    def share(self) -> float:
        """Its share of the picture."""
        return float(self.mask.mean())


@dataclass(frozen=True, eq=False)
class Audit:
    """Pictures, each with the training image that it is most alike.

    Attributes:
        names: What the pictures are called.
        images: The pictures, uint8 (n, C, H, W), in the images' shape.
        corpus: The training images.
        found: What was found of each.
        reference: The scores of held-out images, float64 (m,), rising.
        left_out: How many held-out images look like copies themselves, and are left out.
    """

    names: list[str]
    images: np.ndarray
    corpus: Corpus
    found: list[Found]
    reference: np.ndarray
    left_out: int

    def __len__(self) -> int:
        return len(self.found)

    @cached_property
    def score(self) -> np.ndarray:
        """How much each looks like a copy, float64 (n,); 1% of CIFAR-10 test images reach 1."""
        return np.array([each.score for each in self.found])

    @property
    def nearest(self) -> np.ndarray:
        """The training image that each is most alike, int64 (n,)."""
        placed = (each.placement.image if each.placement else each.nearest for each in self.found)
        return np.array(list(placed), dtype=np.int64)

    @property
    def p_value(self) -> np.ndarray:
        """The share of held-out images that look at least as much like a copy, float64 (n,).

        Raises:
            ValueError: Without enough held-out images.
        """
        return p_values(self.score, self.reference)

    @property
    def q_value(self) -> np.ndarray:
        """p-values adjusted for the number of pictures (Benjamini & Hochberg 1995), float64 (n,).

        Of the pictures whose q-value is at most q, a share of q are false alarms on average.
        """
        return adjusted(self.p_value)

    @cached_property
    def regions(self) -> list[Region]:
        """The largest part of each picture that its training image explains."""
        shape = self.images.shape[2:]
        return [region_of(each.shares.numpy(), each.placement, shape) for each in self.found]

    @property
    def identical(self) -> np.ndarray:
        """Whether each picture is a training image, pixel by pixel, bool (n,)."""
        return np.array([each.distance == 0 for each in self.found])

    @property
    def memorized(self) -> np.ndarray:
        """Whether d1 / d2 is below 1/3, as in Bonnaire et al. 2505.17638, bool (n,)."""
        return np.array([each.ratio < MEMORIZED for each in self.found])

    def order(self) -> np.ndarray:
        """The pictures' positions, the most alike first."""
        return np.argsort(-self.score, kind="stable")


def p_values(score: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(1 + number of reference scores at least as large) / (1 + all of them)."""
    if len(reference) < FEWEST:
        raise ValueError(
            f"there are {len(reference)} held-out images to compare with, and p-values need "
            f"{FEWEST}: give more as reference"
        )
    below = np.searchsorted(np.sort(reference), score, side="left")
    return (1 + len(reference) - below) / (1 + len(reference))


def adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's q-values."""
    n, order = len(p), np.argsort(p, kind="stable")
    ranked = p[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1.0)
    return q


def region_of(shares: np.ndarray, at: Placement | None, frame: tuple[int, ...]) -> Region:
    """The largest connected part with shares above a half, and where its source is."""
    pieces, n = ndimage.label(shares > 0.5)
    if n == 0 or at is None:
        return Region(np.zeros(shares.shape, dtype=bool), (0, 0, 0, 0), (0, 0, 0, 0))
    sizes = ndimage.sum_labels(np.ones_like(pieces), pieces, np.arange(1, n + 1))
    mask = pieces == 1 + int(np.argmax(sizes))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    H, W = frame
    left, right = (W - box[3], W - box[1]) if at.mirrored else (box[1], box[3])
    source = (
        (box[0] - at.row) / at.scale, (left - at.column) / at.scale,
        (box[2] - at.row) / at.scale, (right - at.column) / at.scale,
    )  # fmt: skip
    limits = H, W, H, W
    a, b, c, d = (int(np.clip(round(v), 0, most)) for v, most in zip(source, limits, strict=True))
    return Region(mask, box, (a, b, c, d))


def audit(
    pictures: Any,
    corpus: Corpus,
    reference: Any = None,
    references: int = REFERENCES,
    seed: int = 0,
) -> Audit:
    """Which pictures are copies of training images, in whole or in part.

    Arguments:
        pictures: uint8 (n, C, H, W); or a folder, file or `Corpus`. Pictures of another size or
            number of channels are resized or converted, which is said.
        corpus: The training images.
        reference: Real images that are no copies, as `pictures`; None: images of the corpus, each
            compared with all others.
        references: How many of them at most.
        seed: Which of them.

    Raises:
        ValueError: For a corpus of fewer than two images, or pictures that cannot be read.
    """
    check_integer("references", references)
    check_seed(seed)
    names, images = pictures_of(pictures, corpus)
    originals = Originals.of(corpus)
    with bar("Auditing", total=len(images)) as progress:
        found = []
        for each in originals.find(images):
            found.append(each)
            progress.advance()
    scores, copies = reference_scores(originals, reference, references, seed)
    return Audit(names, images, corpus, found, scores, copies)


def reference_scores(
    originals: Originals, reference: Any, most: int, seed: int
) -> tuple[np.ndarray, int]:
    """The scores of held-out images, rising, and how many were copies and are left out.

    Those of the corpus's own images are kept beside it. Given images are never left out.
    """
    corpus = originals.corpus
    record: Record | None = None
    scores: list[float] = []
    if reference is None:
        index = np.sort(np.random.default_rng(seed).permutation(len(corpus))[:most])
        images, leave_out = np.asarray(corpus.images[index]), index
        record = corpus.record("audit", [VERSION, most, seed])
        known = record.read(_known) or record.unfinished.read(_known)
        if known is not None:
            scores = known
    else:
        _, images = pictures_of(reference, corpus)
        some = np.sort(np.random.default_rng(seed).permutation(len(images))[:most])
        images, leave_out = images[some], np.full(len(some), -1)
    done = len(scores)
    with bar("Auditing held-out images", total=len(images)) as progress:
        progress.advance(done)
        for each in originals.find(images[done:], leave_out[done:]):
            scores.append(each.score)
            progress.advance()
            if record is not None and len(scores) % KEPT_EVERY == 0:
                record.unfinished.write({"scores": scores})
    if record is not None and done < len(images):
        record.write({"scores": scores})
        record.unfinished.remove()
    found = np.sort(np.array(scores, dtype=np.float64))
    limit = outlying(found)
    copies = int((found >= limit).sum())
    if not copies:
        return found, 0
    alike = f"look like copies (their score is {limit:.2g} or more, far above the others')"
    if record is None:
        say(
            f"{copies} of the {len(images)} reference images {alike}. They are kept, since they "
            "were given; if they are copies, p-values are too large: take them out of the reference"
        )
        return found, 0
    say(f"{copies} of {len(images)} held-out images {alike}, and are left out of the comparison")
    return found[found < limit], copies


def outlying(scores: np.ndarray) -> float:
    """The score from which on held-out images are taken for copies.

    The bulk of log scores is about normal: its median and upper quartile, which copies hardly
    change, say where scores lie that it does not have. Infinite for fewer than `FEWEST` scores.
    """
    if len(scores) < FEWEST:
        return np.inf
    middle, upper = np.quantile(np.log(scores), [0.5, 0.75])
    return float(np.exp(middle + OUTLYING * max((upper - middle) / QUARTILE, NARROW)))


def _known(found: dict[str, Any]) -> list[float]:
    return [float(s) for s in found["scores"]]


def pictures_of(pictures: Any, corpus: Corpus) -> tuple[list[str], np.ndarray]:
    """Names and pixels of pictures in the shape of a corpus, uint8 (n, C, H, W)."""
    C, H, W = corpus.shape
    if isinstance(pictures, np.ndarray):
        opened = Corpus(pictures)
    elif isinstance(pictures, Corpus):
        opened = pictures
    else:
        opened = Corpus.open(pictures, size=(H, W), grayscale=C == 1)
    images = np.array(opened.images)  # which can be written to, as PyTorch wants
    if opened.shape[1:] != (H, W):
        size = f"{opened.shape[1]} x {opened.shape[2]}"
        say(f"the pictures have {size} pixels, and are resized to {H} x {W}")
        images = _fitted(images, H, W)
    if images.shape[1] != C:
        say(f"the pictures have {images.shape[1]} channels, and are converted to {C}")
        images = with_channels(images, C)
    names = (
        list(opened.ids) if opened.ids is not None else [f"picture {i}" for i in range(len(images))]
    )
    return names, images


def _fitted(images: np.ndarray, H: int, W: int) -> np.ndarray:
    from PIL import Image, ImageOps

    found = []
    for image in images:
        planes = [
            np.asarray(ImageOps.fit(Image.fromarray(plane), (W, H), Image.Resampling.LANCZOS))
            for plane in image
        ]
        found.append(np.stack(planes))
    return np.stack(found)


def path_of(corpus: Corpus, n: int) -> str:
    """What an image of a corpus is called."""
    return str(corpus.ids[n]) if corpus.ids is not None else f"image {n}"
