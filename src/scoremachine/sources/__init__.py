"""What a machine compares pictures with: images, processed images, mixtures.

Each answers `fold` for a `FoldRequest`; nobody asks what kind of source it is.
"""

from __future__ import annotations

from typing import Any

from scoremachine.data.corpus import Corpus
from scoremachine.sources.images import ImageSource
from scoremachine.sources.source import Source


def source_of(corpus: Any, kernel: str) -> Source:
    """The source behind what a machine is made of: a corpus, or what is a source already.

    Raises:
        ValueError: For anything else, or an unknown kernel.
    """
    if isinstance(corpus, Corpus):
        return ImageSource(corpus, kernel)
    if callable(getattr(corpus, "fold", None)):
        return corpus
    raise ValueError(
        f"a machine is made of a Corpus, not of {type(corpus).__name__}: "
        "use Corpus.open(source) or Corpus(images)"
    )
