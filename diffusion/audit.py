"""Memorisation audit: drop generated images that are copies of a training image.

    d(a, b)    = ‖a − b‖₂ / (255·√(c·h·w))                     root mean square difference, 0 … 1
    nearest(s) = min over training images x of d(s, x)
    threshold  = q-quantile over training images x of min over x' of d(x, x'),  d > 2/255

A sample is dropped when nearest(s) < threshold. Images at most two grey levels apart are one
picture, exported twice: if they counted, a silo with many such pairs would have a threshold below
which no copy falls. (Fashion-MNIST at 16×16 has pairs at 0.0015 and 0.007, then none below 0.024.)
A perfect sampler of the same distribution would lose a share of about q; a sampler that copies
loses far more. Diffusion models do copy: arXiv 2301.13188, arXiv 2402.01054.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Distances = NDArray[np.float64]

_BLOCK, _COLUMNS = 1024, 8192  # one block of squared distances takes 64 MiB
_SAME = 2.0  # grey levels, root mean square
REPORTED_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)
_COPY_QUANTILE = 0.05


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; distances as defined in this module."""

    samples: int
    kept: int
    threshold: float
    quantile: float
    """The q that set the threshold."""
    training_images: int
    training_duplicates: int
    """Training images, among those compared, that are the same picture as another one."""
    compared: int
    """Training images whose nearest neighbour was looked up for the threshold."""
    sample_quantiles: tuple[float, ...]
    """Nearest-training-image distances of the samples at REPORTED_QUANTILES."""
    training_quantiles: tuple[float, ...]
    """Leave-one-out nearest-neighbour distances, but of duplicates, at REPORTED_QUANTILES."""

    @property
    def dropped(self) -> int:
        """Samples too close to a training image."""
        return self.samples - self.kept


def audit(
    samples: Images, training: Images, *, quantile: float = 0.05, compare_at_most: int = 4096
) -> tuple[NDArray[np.bool_], AuditReport]:
    """Which samples (uint8 (n, c, h, w)) to keep: bool (n,), and the figures behind it.

    The threshold is the `quantile` of the leave-one-out nearest-neighbour distances of at most
    `compare_at_most` evenly spaced training images, each against all others. Duplicates are
    reported but do not count for it: thresholds near zero would let copies pass.

    Raises ValueError for images of different shapes, a quantile outside (0, 1), or fewer than two
    different training images.
    """
    if samples.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"samples are {samples.shape[1:]} and training images {training.shape[1:]} (c, h, w): "
            "resize one to the other"
        )
    own, duplicates, compared = _own_distances(training, quantile, compare_at_most)
    threshold = float(np.quantile(own, quantile))
    nearest = nearest_distances(samples, training)
    keep = nearest >= threshold
    report = AuditReport(
        samples=len(samples),
        kept=int(keep.sum()),
        threshold=threshold,
        quantile=quantile,
        training_images=len(training),
        training_duplicates=duplicates,
        compared=compared,
        sample_quantiles=_quantiles(nearest),
        training_quantiles=_quantiles(own),
    )
    return keep, report


def copy_share(samples: Images, training: Images) -> float:
    """Share of the samples that are nearer to a training image than 5 % of these are to another
    one. About 0.05 for a perfect sampler, 1 for one that copies; the quantile is not a plan's, so
    that the shares of any two compare. Raises ValueError as `audit` does."""
    keep, _ = audit(samples, training, quantile=_COPY_QUANTILE)
    return 1.0 - float(keep.mean())


def _own_distances(
    training: Images, quantile: float, compare_at_most: int
) -> tuple[Distances, int, int]:
    """Leave-one-out distances, duplicates among those compared, and how many were compared."""
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile = {quantile} must lie between 0 and 1, for example 0.05")
    flat = _flat(training)
    compared = flat[:: max(1, -(-len(flat) // compare_at_most))]
    own, duplicates = _leave_one_out(compared, flat)
    if not np.isfinite(own).any():
        raise ValueError("the audit needs at least two different training images")
    return own[np.isfinite(own)], duplicates, len(compared)


def nearest_distances(images: Images, training: Images) -> Distances:
    """d(image, nearest training image) for each of `images`: float64 (n,)."""
    distances, _ = nearest_images(images, training)
    return distances


def nearest_images(images: Images, training: Images) -> tuple[Distances, NDArray[np.int64]]:
    """For each of `images` the distance to the nearest training image, float64 (n,), and which one
    that is, int64 (n,)."""
    flat = _flat(training)
    nearest = np.full(len(images), np.inf)
    which = np.zeros(len(images), dtype=np.int64)
    for rows, columns, squared in _blocks(_flat(images), flat):
        here = squared.argmin(axis=1)
        found = squared[np.arange(len(squared)), here]
        better = found < nearest[rows]
        nearest[rows] = np.where(better, found, nearest[rows])
        which[rows] = np.where(better, columns.start + here, which[rows])
    return _to_distance(nearest, flat.shape[1]), which


def _leave_one_out(queries: Images, training: Images) -> tuple[Distances, int]:
    """Distance to the nearest different training image, and how many queries have a duplicate."""
    nearest = np.full(len(queries), np.inf)
    duplicates = np.zeros(len(queries), dtype=np.int64)  # itself among them
    for rows, _, squared in _blocks(queries, training):
        same = squared <= _SAME**2 * training.shape[1]
        duplicates[rows] += same.sum(axis=1)
        squared[same] = np.inf
        np.minimum(nearest[rows], squared.min(axis=1), out=nearest[rows])
    return _to_distance(nearest, training.shape[1]), int((duplicates > 1).sum())


def _blocks(a: Images, b: Images) -> Iterator[tuple[slice, slice, Distances]]:
    """(rows of a, rows of b, their squared distances), until every pair was seen.

    Sums of products of bytes are exact in float64, so identical images are at distance exactly
    zero.
    """
    for i in range(0, len(a), _BLOCK):
        x = a[i : i + _BLOCK].astype(np.float64)
        xx = np.einsum("ij,ij->i", x, x)[:, None]
        for j in range(0, len(b), _COLUMNS):
            y = b[j : j + _COLUMNS].astype(np.float64)
            yy = np.einsum("ij,ij->i", y, y)[None]
            yield slice(i, i + _BLOCK), slice(j, j + _COLUMNS), xx + yy - 2.0 * (x @ y.T)


def _flat(images: Images) -> Images:
    return images.reshape(len(images), math.prod(images.shape[1:]))


def _to_distance(squared: Distances, elements: int) -> Distances:
    distance: Distances = np.sqrt(squared / elements) / 255.0
    return distance


def _quantiles(values: Distances) -> tuple[float, ...]:
    if not len(values):
        return ()
    return tuple(float(q) for q in np.quantile(values, REPORTED_QUANTILES))
