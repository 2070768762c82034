"""Sources, which pictures are compared with: images, processed images, mixtures.

Each implements `fold` for a `FoldRequest`; no code branches on the type of a source.
"""

from __future__ import annotations

from typing import Any

from scoremachine.data.corpus import Corpus
from scoremachine.sources.images import ImageSource
from scoremachine.sources.source import Source


def source_of(corpus: Any, kernel: str) -> Source:
    """The source for a machine: images of a given corpus, or a given source itself.

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
