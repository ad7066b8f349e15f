"""FID from sums is the FID of the pooled images, and agrees with a published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import diffusion.frechet
from diffusion.frechet import fid, kid, moments


class Projection(torch.nn.Module):
    """A fixed linear map of pixels as the feature extractor."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        weights = np.random.default_rng(7).normal(size=(48, self.num_features))
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255).flatten(1) @ self.weights


def _images(n: int, seed: int, top: int = 256) -> torch.Tensor:
    draw = np.random.default_rng(seed).integers(0, top, size=(n, 3, 4, 4))
    return torch.tensor(draw, dtype=torch.uint8)


def test_fid_agrees_with_torchmetrics() -> None:
    real, fake = _images(300, 0), _images(200, 1, top=200)
    metric = FrechetInceptionDistance(feature=Projection(), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    extract = Projection()
    ours = fid(moments(extract(real).numpy()), moments(extract(fake).numpy()))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_summed_moments_of_three_silos_equal_the_pooled_ones() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(3.0, 1.0, size=(500, 16))
    center = np.full(16, 2.9)
    silos = [moments(part, center) for part in np.split(features, [50, 300])]
    summed, pooled = silos[0] + silos[1] + silos[2], moments(features, center)
    assert summed.count == pooled.count
    np.testing.assert_allclose(summed.covariance(), np.cov(features.T), rtol=1e-10, atol=1e-12)
    other = moments(draw.normal(3.1, 1.1, size=(400, 16)))
    assert fid(summed, other) == pytest.approx(fid(pooled, other), rel=1e-10)


def test_the_centre_changes_nothing_but_the_rounding() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(1e4, 1.0, size=(200, 8)), draw.normal(1e4 + 0.1, 1.0, size=(200, 8))
    near = fid(moments(a, np.full(8, 1e4)), moments(b, np.full(8, 1e4)))
    exact = fid(moments(a - 1e4), moments(b - 1e4))
    assert near == pytest.approx(exact, rel=1e-6)


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """Diagonal covariances: ‖Δμ‖² + Σ(σ_a − σ_b)², here for samples with exactly these moments."""
    x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    sigma = np.sqrt(4 / 3)  # unbiased standard deviation of ±1
    value = fid(moments(x * [1.0, 2.0]), moments(x * [3.0, 2.0] + [0.5, 0.0]))
    assert value == pytest.approx(0.25 + (2 * sigma) ** 2)


def test_fid_of_a_set_with_itself_is_zero_even_when_degenerate() -> None:
    features = np.random.default_rng(0).normal(size=(5, 32))  # covariance of rank 4
    assert abs(fid(moments(features), moments(features))) < 1e-6


def test_moments_about_different_centres_are_not_added() -> None:
    a = np.zeros((2, 3))
    with pytest.raises(ValueError, match="one public centre"):
        moments(a) + moments(a, np.ones(3))


def test_too_few_features_are_refused() -> None:
    one, two = np.zeros((1, 3)), np.zeros((2, 3))
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        fid(moments(one), moments(two))
    with pytest.raises(ValueError, match="got 2 and 1"):
        kid(two, one)


def test_kid_is_the_definition_and_unbiased() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(6, 4)), draw.normal(size=(5, 4))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    same_a = np.mean([k(a[i], a[j]) for i in range(6) for j in range(6) if i != j])
    same_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    cross = np.mean([k(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(same_a + same_b - 2 * cross)
    many = [kid(draw.normal(size=(20, 4)), draw.normal(size=(20, 4))) for _ in range(300)]
    assert abs(np.mean(many)) < 4 * np.std(many) / np.sqrt(300)
    assert kid(a, b + 3.0) > 1.0


def test_kid_agrees_with_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion.frechet, "_BLOCK", 64)
    real, fake = _images(150, 0), _images(150, 1, top=200)
    # One subset that holds everything: the plain estimator, without torchmetrics' resampling.
    metric = KernelInceptionDistance(feature=Projection(), subsets=1, subset_size=150)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    extract = Projection()
    theirs, _ = metric.compute()
    assert kid(extract(real).numpy(), extract(fake).numpy()) == pytest.approx(
        float(theirs), rel=1e-3
    )


def test_averaged_kid_ranks_as_the_pooled_one() -> None:
    """Σ λ_i KID(silo i, samples) − KID(all, samples) is the same for any samples (2310.11714)."""
    draw = np.random.default_rng(3)
    silos = [draw.normal(place, 1.0, size=(n, 6)) for place, n in ((0.0, 300), (1.5, 700))]
    pooled = np.concatenate(silos)
    gaps = []
    for place in (0.0, 0.7, 3.0):
        samples = draw.normal(place, 1.2, size=(500, 6))
        averaged = sum(len(silo) / 1000 * kid(silo, samples) for silo in silos)
        gaps.append(averaged - kid(pooled, samples))
    assert np.ptp(gaps) < 0.02 * abs(np.mean(gaps))
