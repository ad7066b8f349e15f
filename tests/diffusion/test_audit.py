"""Copies of training images never pass, and the threshold is not fooled by duplicates."""

from __future__ import annotations

import numpy as np
import pytest

import diffusion.audit
from diffusion.audit import audit, copy_share, nearest_distances, nearest_images


def _images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(n, 1, 6, 6), dtype=np.uint8)


def test_copies_and_near_copies_are_dropped_and_counted() -> None:
    training, fresh = _images(200, 0), _images(50, 1)
    near = training[10:20] ^ 1  # one grey level off in every pixel
    keep, report = audit(np.concatenate([training[:10], near, fresh]), training)
    assert not keep[:20].any()
    assert keep[20:].mean() > 0.8
    assert (report.samples, report.kept) == (70, int(keep.sum()))
    assert report.dropped == 70 - report.kept
    assert report.sample_quantiles[0] == 0.0


def test_fresh_samples_of_the_same_distribution_are_dropped_at_about_the_quantile() -> None:
    training, fresh = _images(800, 0), _images(800, 1)
    for quantile in (0.02, 0.2):
        keep, _ = audit(fresh, training, quantile=quantile)
        assert abs((~keep).mean() - quantile) < 0.5 * quantile + 0.01


@pytest.mark.parametrize("flipped", [0, 1])
def test_duplicates_in_the_training_set_are_reported_and_do_not_lower_the_threshold(
    flipped,
) -> None:
    """Also those that were exported anew, one grey level off in every pixel."""
    training = _images(100, 0)
    _, clean = audit(_images(10, 1), training)
    keep, report = audit(training[:60], np.concatenate([training, training[:60] ^ flipped]))
    assert clean.training_duplicates == 0
    assert report.training_duplicates == 120
    assert report.threshold > 0.5 * clean.threshold
    assert not keep.any()


def test_a_training_set_of_one_image_repeated_is_refused() -> None:
    with pytest.raises(ValueError, match="two different training images"):
        audit(_images(3, 1), np.repeat(_images(1, 0), 5, axis=0))


def test_distances_are_root_mean_square_differences() -> None:
    samples, training = _images(5, 0), _images(9, 1)
    apart = samples[:, None].astype(float) - training[None]
    expected = np.sqrt((apart**2).mean(axis=(2, 3, 4))).min(axis=1) / 255
    np.testing.assert_allclose(nearest_distances(samples, training), expected, rtol=1e-12)
    black, white = np.zeros((1, 1, 6, 6), np.uint8), np.full((1, 1, 6, 6), 255, np.uint8)
    assert nearest_distances(black, white)[0] == pytest.approx(1.0)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, training = _images(50, 0), np.concatenate([_images(60, 1), _images(7, 1)])
    whole = audit(samples, training)
    monkeypatch.setattr(diffusion.audit, "_BLOCK", 7)
    monkeypatch.setattr(diffusion.audit, "_COLUMNS", 11)
    parts = audit(samples, training)
    assert np.array_equal(whole[0], parts[0])
    assert whole[1] == parts[1]


def test_a_large_training_set_is_compared_in_part() -> None:
    _, report = audit(_images(10, 0), _images(100, 1), compare_at_most=30)
    assert report.compared == 25
    assert report.training_images == 100


def test_no_samples_are_audited_without_complaint() -> None:
    keep, report = audit(_images(10, 0)[:0], _images(10, 1))
    assert len(keep) == report.samples == report.dropped == 0


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="resize one to the other"):
        audit(np.zeros((2, 1, 8, 8), np.uint8), _images(5, 0))
    with pytest.raises(ValueError, match=r"quantile = 1.0 must lie between 0 and 1"):
        audit(_images(2, 0), _images(5, 0), quantile=1.0)


def test_the_nearest_image_is_named_and_copies_are_counted_as_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, fresh = _images(80, 0), _images(30, 1)
    monkeypatch.setattr(diffusion.audit, "_COLUMNS", 16)
    monkeypatch.setattr(diffusion.audit, "_BLOCK", 8)
    distances, which = nearest_images(training[[70, 3, 40]] ^ 1, training)
    assert which.tolist() == [70, 3, 40]
    np.testing.assert_allclose(distances, 1 / 255)
    share = copy_share(np.concatenate([training[:10], fresh]), training)
    assert 10 / 40 <= share < 0.5
