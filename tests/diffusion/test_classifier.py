"""A classifier of synthetic images finds in real ones what the synthetic ones showed it."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion.classifier import fit_classifier, synthetic_to_real
from diffusion.model import to_vector


def _bars(n: int, seed: int, kinds: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one bright row, whose number is the label."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 60, size=(n, 1, 8, 8), dtype=np.uint8)
    labels = draw.integers(0, kinds, size=n)
    images[np.arange(n), 0, labels] += 150
    return images, labels


def test_what_the_synthetic_images_show_is_found_in_real_ones() -> None:
    real = _bars(300, 1)
    assert synthetic_to_real(_bars(300, 0), real, 4, steps=60) > 0.95
    images, labels = _bars(300, 0)
    shuffled = (images, np.random.default_rng(2).permutation(labels))
    assert synthetic_to_real(shuffled, real, 4, steps=60) < 0.6


def test_a_class_that_was_never_sampled_is_missed() -> None:
    images, labels = _bars(300, 0)
    without = (images[labels != 3], labels[labels != 3])
    real = _bars(400, 1)
    assert synthetic_to_real(without, real, 4, steps=60) == pytest.approx(
        (real[1] != 3).mean(), abs=0.05
    )


def test_the_seed_decides_everything() -> None:
    first, again = (to_vector(fit_classifier(*_bars(50, 0), 4, seed=5, steps=3)) for _ in range(2))
    assert np.array_equal(first, again)
    other = to_vector(fit_classifier(*_bars(50, 0), 4, seed=6, steps=3))
    assert not np.array_equal(first, other)


def test_labels_that_do_not_fit_are_refused() -> None:
    images, labels = _bars(20, 0)
    with pytest.raises(ValueError, match="the 2 classes from 0 to 1"):
        fit_classifier(images, labels, 2)
    with pytest.raises(ValueError, match="20 images and labels of shape"):
        fit_classifier(images, labels[:5], 4)
