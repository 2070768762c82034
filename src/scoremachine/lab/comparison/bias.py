"""The shared bias: how denoisers differ from the ideal one, and how similar these differences are.

Niedoba et al. 2411.19339 find that networks of all architectures have similar errors: D minus the
ideal D has about the same size and appearance. Here the similarity is measured for every pair of
denoisers, machines included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scoremachine.data.corpus import Corpus
from scoremachine.lab.comparison.parts import (
    MAX_IMAGES_ELS,
    Pieces,
    built_machines,
    denoised,
    forward_pictures,
    held_out_and_source,
)
from scoremachine.lab.networks.network import Network
from scoremachine.machines import Machine, build
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer

LEVELS = (20.0, 5.0, 2.0, 1.0, 0.5, 0.2)


@dataclass
class Bias:
    """Differences to the ideal denoiser, D - D_ideal, on held-out images with noise.

    Attributes:
        labels: Of the n denoisers, networks first.
        networks: How many of them are networks.
        sigmas: The K noise levels, in descending order.
        sizes: Root mean square of the differences, of each picture: (n, K, R).
        cosines: Between the differences of two denoisers, mean over pictures: (K, n, n).
        spread: Its standard error, (K, n, n).
        pictures: Of the first held-out image: y, D_ideal, each D - D_ideal (n + 2, K, C, H, W).
    """

    labels: list[str]
    networks: int
    sigmas: list[float]
    sizes: np.ndarray
    cosines: np.ndarray
    spread: np.ndarray
    pictures: np.ndarray

    def among_networks(self) -> np.ndarray:
        """(K,): the mean cosine of pairs of networks; NaN with fewer than two."""
        n = self.networks
        pairs = np.triu_indices(n, 1)
        if n < 2:
            return np.full(len(self.sigmas), np.nan)
        return self.cosines[:, pairs[0], pairs[1]].mean(1)

    def to_networks(self) -> np.ndarray:
        """(machines, K): the mean cosine of each machine with the networks."""
        return self.cosines[:, self.networks :, : self.networks].mean(2).T


def shared_bias(
    networks: Sequence[Network],
    machines: Sequence[str | Machine],
    corpus: Corpus,
    sigmas: Sequence[float] | np.ndarray = LEVELS,
    pictures: int = 16,
    seed: int = 0,
    max_images_els: int = MAX_IMAGES_ELS,
    kept: Path | None = None,
) -> Bias:
    """Measures how networks and machines differ from the ideal denoiser.

    For the arguments see `compare`. The networks should have been trained on the same images of the
    same corpus, with the same images held out.

    Raises:
        ValueError: As `compare`, and for fewer than two denoisers.
    """
    check_integer("pictures", pictures)
    check_integer("max_images_els", max_images_els)
    levels = np.sort(np.asarray(sigmas, dtype=float))[::-1].tolist()
    if not networks:
        raise ValueError("there is no network to measure the bias of; give at least one")
    for network in networks:
        network.check_corpus(corpus)
        for sigma in levels:
            network.time(sigma)
    held, source = held_out_and_source(networks, corpus, pictures, seed)
    built = built_machines(machines, source, max_images_els)
    ideal = build("ideal", source)
    x, eps = forward_pictures(corpus, held, seed)
    denoisers: dict[str, Network | Machine] = {}
    for network in networks:
        label, k = network.name, 2
        while label in denoisers or label in built:
            label, k = f"{network.name}-{k}", k + 1
        denoisers[label] = network
    denoisers |= built
    if len(denoisers) < 2:
        raise ValueError("there is only one denoiser; expected at least two: give another")
    pieces = Pieces(kept, [corpus.key, seed, held.tolist(), ideal.settings()])
    # before "auto" is resolved
    asked = [d.key if isinstance(d, Network) else d.settings() for d in denoisers.values()]
    differences: list[np.ndarray] = []
    shown = []
    with bar("Comparing", total=len(levels) * (1 + len(denoisers))) as progress:
        for sigma in levels:
            y = x + sigma * eps
            D_ideal = pieces.get(["ideal", sigma], lambda y=y, s=sigma: denoised(ideal, y, s))  # type: ignore[misc]
            progress.advance()
            at = []
            for who, denoiser in zip(map(json.dumps, asked), denoisers.values(), strict=True):
                D = pieces.get([who, sigma], lambda y=y, s=sigma, d=denoiser: denoised(d, y, s))  # type: ignore[misc]
                at.append((D - D_ideal).double().flatten(1).numpy())
                progress.advance()
            differences.append(np.stack(at))
            C, H, W = corpus.shape
            first = torch.stack([y[0], D_ideal[0]]).numpy()
            shown.append(np.concatenate([first, differences[-1][:, 0].reshape(-1, C, H, W)]))
    d = np.stack(differences, 1)  # (n, K, R, D)
    sizes = np.sqrt((d**2).mean(-1))
    norms = np.maximum(np.linalg.norm(d, axis=-1), 1e-12)
    each = np.einsum("nkrd,mkrd->kmnr", d, d) / np.einsum("nkr,mkr->kmnr", norms, norms)
    spread = each.std(-1, ddof=1 if len(held) > 1 else 0) / np.sqrt(len(held))
    return Bias(
        list(denoisers), len(networks), levels, sizes, each.mean(-1), spread, np.stack(shown, 1)
    )
