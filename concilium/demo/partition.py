"""Who holds what: splitting labelled images over silos."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def dirichlet(
    labels: NDArray[np.int64], silos: int, alpha: float, seed: int, at_least: int = 20
) -> list[Indices]:
    """Split by class with proportions p_c ~ Dirichlet(α, …, α) per class c (arXiv 1909.06335).

    Small α gives each silo few classes. Proportions are drawn again until every silo holds
    `at_least` images, since a silo with none cannot train; raises ValueError where a hundred draws
    do not give that. Returns for each silo the ascending indices of its images.
    """
    rng = np.random.default_rng(seed)
    for _ in range(100):
        parts = _draw(labels, silos, alpha, rng)
        if min(len(part) for part in parts) >= at_least:
            return parts
    raise ValueError(
        f"{len(labels)} images over {silos} silos with alpha = {alpha} leave a silo with fewer "
        f"than {at_least}: use fewer silos or a larger alpha"
    )


def _draw(
    labels: NDArray[np.int64], silos: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares: list[list[Indices]] = [[] for _ in range(silos)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet([alpha] * silos))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.astype(np.int64)), strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def histogram(labels: NDArray[np.int64], parts: list[Indices]) -> NDArray[np.int64]:
    """Images per silo and class: [silos, classes]."""
    classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])
