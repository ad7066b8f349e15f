"""Coverage: how many of the real images have a generated one in their neighbourhood.

    r_i      = distance of real feature i to its k-th nearest neighbour among the other real ones
    coverage = mean over i of 1[min over samples j of ‖x_i − y_j‖ < r_i]

Naeem, Oh, Uh, Choi, Yoo: *Reliable Fidelity and Diversity Metrics for Generative Models* (arXiv
2002.09797, equation 10; the strict inequality is that of the authors' program). Two equal
distributions give about 1 − 2^−k for equally many features of each (their section 3.2). FID and
KID compare distributions as a whole; coverage falls when a part of the real images, a class, say,
is missing from the samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Features = NDArray[np.floating]

NEIGHBOURS = 5
"""k: the authors' choice."""
_BLOCK = 1024


def coverage(real: Features, samples: Features, neighbours: int = NEIGHBOURS) -> float:
    """Share of the real features (n, d) that are covered by those of the samples (m, d).

    Raises ValueError where there are not more real features than `neighbours`, or no sample.
    """
    return float(covered(real, samples, neighbour_radii(real, neighbours)).mean())


def neighbour_radii(real: Features, neighbours: int = NEIGHBOURS) -> Array:
    """r_i of each of the real features (n, d): float64 (n,). Raises ValueError for n ≤ k."""
    if not 1 <= neighbours < len(real):
        raise ValueError(
            f"the {neighbours} nearest neighbours of each of {len(real)} features: give more "
            "images, or ask for fewer neighbours"
        )
    radii = np.empty(len(real))
    for rows, squared in _squared_distances(real, real):
        own = np.arange(rows.start, rows.start + len(squared))
        squared[np.arange(len(squared)), own] = np.inf
        radii[rows] = np.partition(squared, neighbours - 1, axis=1)[:, neighbours - 1]
    return np.sqrt(radii)


def covered(real: Features, samples: Features, radii: Array) -> NDArray[np.bool_]:
    """Which of the real features (n, d) have one of the samples (m, d) within their radius (n,)."""
    if not len(samples):
        raise ValueError("there is no sample that could cover anything")
    nearest = np.empty(len(real))
    for rows, squared in _squared_distances(real, samples):
        nearest[rows] = squared.min(axis=1)
    inside: NDArray[np.bool_] = np.sqrt(nearest) < radii
    return inside


def _squared_distances(a: Features, b: Features) -> Iterator[tuple[slice, Array]]:
    """(rows of a, their squared distances to all of b), block by block."""
    y = np.asarray(b, dtype=np.float64)
    yy = np.einsum("ij,ij->i", y, y)[None]
    for start in range(0, len(a), _BLOCK):
        x = np.asarray(a[start : start + _BLOCK], dtype=np.float64)
        squared = np.einsum("ij,ij->i", x, x)[:, None] + yy - 2.0 * (x @ y.T)
        yield slice(start, start + len(x)), np.maximum(squared, 0.0)
