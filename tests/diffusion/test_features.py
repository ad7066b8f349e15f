"""The shipped feature networks are the pinned ones, bounded, and never saw a silo's image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusion.features import network as module
from diffusion.features.file import FEATURE_BOUND, FEATURES, FeatureFileError
from diffusion.features.holdout import holdout_split
from diffusion.features.network import CENTRED_BOUND, load_feature_network
from diffusion.features.pinned import FEATURE_NETWORKS, PinnedNetwork
from diffusion.frechet import fid, moments

NAMES = sorted(FEATURE_NETWORKS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 20, 20)])
def test_features_are_bounded_for_images_of_any_size(name: str, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(40, *shape), dtype=np.uint8)
    network = load_feature_network(name)
    features = network.extract(images, batch_size=16)
    assert features.shape == (40, FEATURES)
    assert features.dtype == np.float32
    assert np.abs(features).max() <= FEATURE_BOUND
    assert np.abs(features - network.public_center()).max() <= CENTRED_BOUND
    np.testing.assert_allclose(features, network.extract(images), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_centre_lies_inside_the_bounds(name: str) -> None:
    center = load_feature_network(name).public_center()
    assert center.shape == (FEATURES,)
    assert (np.abs(center) <= FEATURE_BOUND).all()
    assert np.abs(center).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_enough_to_ship(name: str) -> None:
    path = Path(module.__file__).with_name(FEATURE_NETWORKS[name].file)
    assert path.stat().st_size < 300_000


def test_digits_are_recognised_by_a_network_that_saw_297_of_them() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    silos, _ = holdout_split(len(images))
    network = load_feature_network("digits")
    features = network.extract(images[silos])
    logits = features @ network.classify.weight.detach().numpy().T
    logits += network.classify.bias.detach().numpy()
    assert (logits.argmax(axis=1) == bunch.target[silos]).mean() > 0.95


def test_features_tell_real_digits_from_degraded_ones() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images = np.round(datasets.load_digits().images * (255 / 16))[:, None]
    silos, _ = holdout_split(len(images))
    first, second = images[silos[:750]], images[silos[750:]]
    noisy = np.clip(first + np.random.default_rng(0).normal(0, 40, first.shape), 0, 255)
    network = load_feature_network("digits")
    center = network.public_center()
    real, degraded, other = (
        moments(network.extract(part.astype(np.uint8)), center) for part in (first, noisy, second)
    )
    assert fid(degraded, other) > 2 * fid(real, other)


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = PinnedNetwork("network.py", "0" * 64, 8, ((24, 1),))
    monkeypatch.setitem(FEATURE_NETWORKS, "digits", other)
    with pytest.raises(FeatureFileError, match=f"SHA-256 .* expected {'0' * 16}…"):
        load_feature_network("digits")


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of digits, fashion-mnist"):
        load_feature_network("inception")


def test_silos_and_the_feature_network_share_no_image() -> None:
    silos, held_out = holdout_split(1797)
    assert len(silos) == 1500
    assert len(held_out) == 297
    assert sorted([*silos, *held_out]) == list(range(1797))
    assert silos[:4].tolist() == [799, 639, 710, 1560]
    with pytest.raises(ValueError, match="hold out fewer"):
        holdout_split(100)
