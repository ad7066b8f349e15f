"""Fréchet and kernel distance between feature distributions, from sums that can be added up.

    FID = ‖μ_a − μ_b‖² + tr(C_a + C_b − 2·(C_a C_b)^{1/2})                        (arXiv 1706.08500)
    KID = unbiased MMD² with k(x, y) = (x·y/d + 1)³                               (arXiv 1801.01401)

μ and C follow from count, Σ(f − m) and Σ(f − m)(f − m)ᵀ for any fixed m. A public m near the mean
keeps the subtraction Σffᵀ/n − μμᵀ from cancelling, and the sums small enough for fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BLOCK = 1024


@dataclass(frozen=True)
class Moments:
    """Sums over `count` features f in R^d, all about the same public centre m."""

    count: int
    total: Array
    """Σ(f − m), float64 (d,)."""
    outer: Array
    """Σ(f − m)(f − m)ᵀ, float64 (d, d)."""
    center: Array
    """m, float64 (d,)."""

    def __add__(self, other: Moments) -> Moments:
        """The moments of the union; raises ValueError for different centres."""
        if not np.array_equal(self.center, other.center):
            raise ValueError(
                "moments about different centres cannot be added: use one public centre"
            )
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.outer + other.outer,
            self.center,
        )

    def mean(self) -> Array:
        """μ = m + Σ(f − m)/n."""
        result: Array = self.center + self.total / self.count
        return result

    def covariance(self) -> Array:
        """The unbiased sample covariance, symmetric even if the sums were rounded."""
        shift = self.total / self.count
        spread = self.outer - self.count * np.outer(shift, shift)
        result: Array = (spread + spread.T) / (2.0 * (self.count - 1))
        return result


def moments(features: NDArray[np.floating], center: NDArray[np.floating] | None = None) -> Moments:
    """Moments of features (n, d) about `center` (d,), zero if not given; summed in float64."""
    f = np.asarray(features, dtype=np.float64)
    m = np.zeros(f.shape[1]) if center is None else np.asarray(center, dtype=np.float64)
    centred = f - m
    return Moments(len(f), centred.sum(axis=0), centred.T @ centred, m)


def fid(a: Moments, b: Moments) -> float:
    """Fréchet distance of two sets of features, from their moments alone (any centres).

    tr (C_a C_b)^{1/2} is the sum of the singular values of C_a^{1/2} C_b^{1/2}: no complex root is
    taken, and covariances of low rank lose no digits. Eigenvalues that rounding made negative count
    as zero. Raises ValueError when a set has fewer than two features.
    """
    for side in (a, b):
        if side.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {side.count}")
    difference = a.mean() - b.mean()
    cov_a, cov_b = a.covariance(), b.covariance()
    product = _symmetric_root(cov_a) @ _symmetric_root(cov_b)
    overlap = np.linalg.svd(product, compute_uv=False).sum()
    traces = np.trace(cov_a) + np.trace(cov_b) - 2.0 * overlap
    return float(difference @ difference + traces)


def _symmetric_root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def kid(features_a: NDArray[np.floating], features_b: NDArray[np.floating]) -> float:
    """Unbiased squared MMD of two sets of features (n, d), (m, d) with the cubic kernel.

    Can be slightly negative for equal distributions. For silos whose images are shares λ_i of all,
    Σ λ_i KID(silo i, samples) is the KID of the pooled images plus a constant that does not depend
    on the samples, so the averages rank models as the pooled KID does (arXiv 2310.11714).

    Raises ValueError for fewer than two of either.
    """
    a, b = (np.asarray(f, dtype=np.float64) for f in (features_a, features_b))
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least 2 features on each side, got {n} and {m}")
    same_a = (_cubic_sum(a, a) - _cubic_diagonal(a)) / (n * (n - 1))
    same_b = (_cubic_sum(b, b) - _cubic_diagonal(b)) / (m * (m - 1))
    return same_a + same_b - 2.0 * _cubic_sum(a, b) / (n * m)


def _cubic_sum(x: Array, y: Array) -> float:
    """Σ_ij (x_i·y_j/d + 1)³, a block of rows at a time."""
    d = x.shape[1]
    blocks = (x[start : start + _BLOCK] for start in range(0, len(x), _BLOCK))
    return float(sum(((block @ y.T / d + 1.0) ** 3).sum() for block in blocks))


def _cubic_diagonal(x: Array) -> float:
    """Σ_i (x_i·x_i/d + 1)³."""
    return float(((np.einsum("ij,ij->i", x, x) / x.shape[1] + 1.0) ** 3).sum())
