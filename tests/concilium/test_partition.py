"""Who holds what in the demonstration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from concilium.demo.datasets import FASHION_MNIST, DataMissing, digits, fashion_mnist
from concilium.demo.partition import dirichlet, histogram


def test_every_image_goes_to_exactly_one_silo() -> None:
    labels = digits().labels
    parts = dirichlet(labels, 4, alpha=0.3, seed=7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert histogram(labels, parts).sum() == len(labels)


def test_the_split_is_the_same_for_the_same_seed_and_skewed_for_a_small_alpha() -> None:
    labels = digits().labels
    one, two = (dirichlet(labels, 4, alpha=0.3, seed=7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    skewed = histogram(labels, one)
    even = histogram(labels, dirichlet(labels, 4, alpha=1000.0, seed=7))
    assert skewed.std() > 3 * even.std()


def test_a_split_that_starves_a_silo_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="fewer silos or a larger alpha"):
        dirichlet(np.zeros(30, np.int64), 4, alpha=0.3, seed=1)


def test_no_silo_gets_an_image_that_trained_the_feature_network() -> None:
    assert digits().images.shape == (1500, 1, 8, 8)
    assert digits().images.max() == 255


def test_fashion_mnist_is_read_where_it_is_installed_and_missed_with_a_hint(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataMissing, match="dataset-fashion-mnist"):
        fashion_mnist(tmp_path)
    if FASHION_MNIST.exists():
        assert fashion_mnist().images.shape == (60_000, 1, 28, 28)
