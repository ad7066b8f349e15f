"""Who holds what in the demonstration."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concilium.datasets import (
    FASHION_MNIST,
    DataMissing,
    ImageSet,
    digits,
    fashion_mnist,
    load_dataset,
)
from concilium.partition import Partition, dirichlet, histogram, histogram_png, histogram_text
from tests.silo.pickles import cifar_batch, python_2


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


def test_k_classes_per_silo_are_k_classes_per_silo_and_nobody_loses_an_image() -> None:
    labels = digits().labels
    for silos, k in ((5, 2), (4, 3), (10, 2), (3, 10)):
        parts = Partition(labels="classes", classes=k).split(labels, silos, seed=1)
        counts = histogram(labels, parts)
        assert ((counts > 0).sum(axis=1) == k).all()
        assert counts.sum() == len(labels)
    with pytest.raises(ValueError, match="every class needs a silo"):
        Partition(labels="classes", classes=2).split(labels, 4, seed=1)


def test_quantity_skew_keeps_the_labels_and_changes_the_sizes() -> None:
    labels = digits().labels
    parts = Partition(quantity=0.5).split(labels, 4, seed=2)
    sizes = sorted(len(part) for part in parts)
    assert sizes[-1] == 375, "the largest keeps all of its part"
    assert sizes[0] < 0.5 * sizes[-1]
    both = Partition(labels="classes", classes=5, quantity=1.0).split(labels, 4, seed=2)
    assert ((histogram(labels, both) > 0).sum(axis=1) == 5).all()


def test_scanners_differ_from_silo_to_silo_and_agree_with_themselves() -> None:
    images = digits().images[:30]
    skew = Partition(rotation=20.0, contrast=0.4, noise=10.0)
    seen = [skew.altered(images, silo, 3, seed=1) for silo in range(3)]
    assert all(s.shape == images.shape and s.dtype == np.uint8 for s in seen)
    assert np.array_equal(seen[0], skew.altered(images, 0, 3, seed=1))
    assert seen[0].std() < seen[1].std(), "the first silo has the lowest contrast"
    only = Partition(rotation=20.0)
    assert np.array_equal(only.altered(images, 1, 3, seed=1), images), "the middle one is upright"
    assert not np.array_equal(only.altered(images, 2, 3, seed=1), images)
    quarter = Partition(rotation=90.0).altered(images, 2, 3, seed=1)
    assert np.array_equal(quarter, np.rot90(images, axes=(2, 3)))


def test_a_partition_shows_itself_as_text_and_as_a_picture(tmp_path: Path) -> None:
    counts = np.array([[3, 0], [12, 5]])
    assert histogram_text(counts).splitlines()[1].split() == ["1", "3", "·", "3"]
    unlabelled = histogram_text(counts.sum(axis=1, keepdims=True), labelled=False)
    assert [line.split() for line in unlabelled.splitlines()] == [
        ["silo", "all"],
        ["1", "3"],
        ["2", "17"],
    ]
    histogram_png(counts, tmp_path / "h.png")
    with Image.open(tmp_path / "h.png") as picture:
        pixels = np.asarray(picture)
    assert pixels[20, 38] > pixels[38, 5] > 0, "more images are darker"


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def labels_of(found: ImageSet | None) -> list[int] | None:
    return None if found is None or found.labels is None else found.labels.tolist()


def test_published_layouts_are_read_with_their_labels(tmp_path: Path) -> None:
    mnist = tmp_path / "mnist"
    mnist.mkdir()
    grey = pixels(4, 28, 28)
    header = b"\0\0\x08\x03" + struct.pack(">III", 4, 28, 28)
    with gzip.open(mnist / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + grey.tobytes())
    labels = b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes([7, 0, 1, 9])
    (mnist / "train-labels-idx1-ubyte").write_bytes(labels)
    found = load_dataset(str(mnist), 28)
    assert np.array_equal(found.images[:, 0], grey)
    assert labels_of(found) == [7, 0, 1, 9]
    assert found.test is None
    (mnist / "t10k-images-idx3-ubyte").write_bytes(header + grey[::-1].tobytes())
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(labels)
    found = load_dataset(str(mnist), 28)
    assert np.array_equal(found.images[:, 0], grey), "as before"
    assert found.test is not None
    assert np.array_equal(found.test.images[:, 0], grey[::-1])
    assert labels_of(found.test) == [7, 0, 1, 9]

    colour = pixels(2, 3072)
    ten, hundred = tmp_path / "cifar10", tmp_path / "cifar100"
    ten.mkdir()
    hundred.mkdir()
    for k in range(1, 6):
        (ten / f"data_batch_{k}.bin").write_bytes(bytes([k]) + colour[0].tobytes())
    (hundred / "train.bin").write_bytes(bytes([1, 42]) + colour[1].tobytes())
    assert labels_of(load_dataset(str(ten), 32, 3)) == [1, 2, 3, 4, 5]
    assert labels_of(load_dataset(str(hundred), 32, 3)) == [42]
    assert np.array_equal(load_dataset(str(hundred), 32, 3).images[0], colour[1].reshape(3, 32, 32))

    med = tmp_path / "pathmnist.npz"
    np.savez(med, train_images=pixels(3, 28, 28, 3), train_labels=np.array([[2], [0], [1]]))
    assert load_dataset(str(med), 28, 3).images.shape == (3, 3, 28, 28)
    assert labels_of(load_dataset(str(med), 14, 1)) == [2, 0, 1]

    np.savez(tmp_path / "bare.npz", images=pixels(3, 8, 8))
    bare = load_dataset(str(tmp_path / "bare.npz"), 8)
    assert (bare.labels, bare.unlabelled) == (None, 3)
    volumes = {"train_images": pixels(2, 8, 8, 8), "train_labels": np.zeros((2, 1), np.uint8)}
    np.savez(tmp_path / "organ3d.npz", **volumes)
    with pytest.raises(DataMissing, match="volumes are not read: write the slices"):
        load_dataset(str(tmp_path / "organ3d.npz"), 8)


def publish(folder: Path, kind: str, part: str, images: np.ndarray, labels: list[int]) -> None:
    """A part of CIFAR as its publisher has it."""
    hundred = kind.startswith("cifar-100")
    fine = "fine_" if hundred else ""
    name = part if hundred else {"train": "data_batch_1", "test": "test_batch"}[part]
    if kind.endswith("python"):
        (folder / name).write_bytes(python_2(cifar_batch(images, labels, fine)))
        meta = folder / ("meta" if hundred else "batches.meta")
        meta.write_bytes(python_2({f"{fine}label_names": list("abcdef")}))
        return
    heads = [b"\0" * hundred + bytes([label]) for label in labels]
    records = (head + image.tobytes() for head, image in zip(heads, images, strict=True))
    (folder / f"{name}.bin").write_bytes(b"".join(records))


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("kind", ["cifar-10", "cifar-100"])
def test_the_test_images_of_cifar_are_no_silos(tmp_path: Path, kind: str, version: str) -> None:
    train, test = pixels(7, 3, 32, 32)[:4], pixels(7, 3, 32, 32)[4:]
    publish(tmp_path, f"{kind}-{version}", "train", train, [3, 1, 4, 1])
    assert load_dataset(str(tmp_path), 32, 3).test is None
    publish(tmp_path, f"{kind}-{version}", "test", test, [5, 0, 2])
    found = load_dataset(str(tmp_path), 32, 3)
    assert np.array_equal(found.images, train), "as before"
    assert labels_of(found) == [3, 1, 4, 1]
    assert found.test is not None
    assert np.array_equal(found.test.images, test)
    assert labels_of(found.test) == [5, 0, 2]


def test_the_test_images_of_medmnist_are_no_silos_and_its_validation_images_nobodys(
    tmp_path: Path,
) -> None:
    parts = {"train": pixels(4, 28, 28), "val": pixels(1, 28, 28), "test": pixels(3, 28, 28)}
    labels = {"train": [3, 1, 4, 1], "val": [1], "test": [5, 0, 2]}
    arrays = {f"{part}_images": images for part, images in parts.items()}
    arrays |= {f"{part}_labels": np.array([labels[part]], np.uint8).T for part in parts}
    np.savez(tmp_path / "organamnist.npz", **arrays)
    for path in (tmp_path, tmp_path / "organamnist.npz"):
        found = load_dataset(str(path), 28)
        assert np.array_equal(found.images[:, 0], parts["train"])
        assert labels_of(found) == labels["train"]
        assert found.test is not None
        assert np.array_equal(found.test.images[:, 0], parts["test"])
        assert labels_of(found.test) == labels["test"]


def test_test_images_alone_are_those_that_silos_have_and_no_others(tmp_path: Path) -> None:
    header = b"\0\0\x08\x03" + struct.pack(">III", 3, 28, 28)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + pixels(3, 28, 28).tobytes())
    found = load_dataset(str(tmp_path), 28)
    assert len(found.images) == 3
    assert found.test is None


def test_data_that_a_simulation_cannot_read_is_corrected_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path, problem in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "holds no image that can be read as images"),
    ):
        with pytest.raises(DataMissing, match=problem) as caught:
            load_dataset(str(path), 28)
        assert str(caught.value).startswith(f'data = "{path}": ')
        assert str(caught.value).endswith('correct data = "…" in [simulation]')
        assert "site.toml" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["data_batch_1", "data_batch_2", "batches.meta"], "cifar-10-binary"),
        (["train", "test", "meta"], "cifar-100-binary"),
    ],
)
def test_a_python_version_of_cifar_that_is_something_else_asks_for_the_binary_one(
    tmp_path: Path, files: list[str], wanted: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataMissing, match=f"{files[0]} is not as .* binary version, {wanted}"):
        load_dataset(str(tmp_path), 32, 3)


def test_fashion_mnist_is_read_where_it_is_installed_and_missed_with_a_hint() -> None:
    if FASHION_MNIST.exists():
        assert fashion_mnist().images.shape == (60_000, 1, 28, 28)
        return
    with pytest.raises(DataMissing, match="dataset-fashion-mnist"):
        fashion_mnist()
