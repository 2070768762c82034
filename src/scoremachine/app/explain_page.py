"""The page of a trace: point at a pixel, and the training pixels that it comes from light up."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from scoremachine.data.pixels import to_uint8
from scoremachine.provenance import pictures as drawing
from scoremachine.provenance.explain import Trace

SHOWN, NAMED = 16, 4  # pictures, and sources of a pixel, at most
IMAGES = 2000  # training images in the page, about: more, and fewer sources are named
ACROSS = 40  # of them side by side


def page(trace: Trace, title: str) -> str:
    """One page with everything in it: it needs no other file and no network.

    Arguments:
        trace: The trace of some pictures; the first 16 are shown.
        title: A line that says what they are.
    """
    n = min(len(trace.y), SHOWN)
    images = trace.images[:n].numpy()
    k = min(NAMED, images.shape[1])
    while k > 1 and len(np.unique(images[:, :k])) > IMAGES:
        k -= 1
    known = np.unique(images[:, :k])
    known = known[known >= 0]
    number = {int(image): i for i, image in enumerate(known)}
    corpus = trace.machine.corpus
    data: dict[str, Any] = {
        "shape": list(corpus.shape[1:]),
        "across": ACROSS,
        "atlas": _atlas(corpus.images[known]),
        "images": known.tolist(),
        "classes": _classes(corpus, known),
        "pictures": [_picture(trace, picture, images[picture, :k], number) for picture in range(n)],
    }
    text = resources.files("scoremachine.app").joinpath("explain.html").read_text(encoding="utf-8")
    filled = text.replace("{{title}}", html.escape(title))
    return filled.replace("{{data}}", json.dumps(data).replace("</", "<\\/"))


def _picture(trace: Trace, p: int, images: np.ndarray, number: dict[int, int]) -> dict[str, Any]:
    k = len(images)
    D = to_uint8(trace.D[p].numpy())
    best = to_uint8(trace.rebuilt()[p].clamp(-1, 1).numpy())
    colours = drawing.colours_of(trace, p)
    views = {
        "picture": png(drawing.enlarged(D, 1)[0]),
        "leading image of each pixel, a colour each": png(drawing.mosaic(trace, p)),
        "each pixel from its largest source alone": png(drawing.enlarged(best, 1)[0]),
        "share of the largest source (white: all)": png(drawing.heat(trace.weights[p, 0].numpy())),
    }
    if trace.steps:
        views["step at which the leading image was decided (dark: early)"] = png(
            drawing.decided(trace, p)
        )
    leading = trace.leading_images(p, 12)
    others = 1 - (trace.own[p] + trace.weights[p, :k].sum(0)).numpy()
    return {
        "size": list(D.shape[1:]),
        "views": views,
        "source": [[number.get(int(i), -1) for i in plane.ravel()] for plane in images],
        "row": trace.rows[p, :k].flatten(1).tolist(),
        "column": trace.columns[p, :k].flatten(1).tolist(),
        "share": np.round(trace.weights[p, :k].flatten(1).numpy(), 4).tolist(),
        "rest": np.round(others.clip(0).flatten(), 4).tolist(),
        "own": np.round(trace.own[p].flatten().numpy(), 4).tolist(),
        "effective": np.round(trace.effective_sources[p].flatten().numpy(), 1).tolist(),
        "leading": [[number[n], round(share, 4)] for n, share in leading if n in number],
        "colours": {str(number[n]): c for n, c in colours.items() if n in number},
    }


def _classes(corpus: Any, known: np.ndarray) -> list[str] | None:
    labels = getattr(corpus, "labels", None)
    if labels is None:
        return None
    names = corpus.class_names
    return [str(names[c]) if names and c < len(names) else str(c) for c in labels[known].tolist()]


def _atlas(images: np.ndarray) -> str:
    """Images uint8 (n, C, H, W) side by side in one PNG."""
    n, _, H, W = images.shape
    lines = -(-n // ACROSS)
    canvas = np.zeros((lines * H, min(n, ACROSS) * W, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // ACROSS * H, i % ACROSS * W
        canvas[top : top + H, left : left + W] = drawing.enlarged(np.asarray(image), 1)[0]
    return png(canvas)


def png(rgb: np.ndarray | Image.Image) -> str:
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
