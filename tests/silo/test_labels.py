"""Labels: read where a source has one per image, cached beside the images, and never guessed."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from silo.data.cache import (
    Cached,
    cache_dataset,
    cached_labels,
    labels_of_study,
    open_cache,
)
from silo.data.dataset import open_dataset
from silo.errors import DataError
from tests.silo.pickles import cifar_batch, python_2


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, *shape), dtype=np.uint8)


def cached(path: Path, caches: Path, size: int = 8, channels: int = 1) -> Cached:
    caches.mkdir(exist_ok=True)
    return cache_dataset(open_dataset(path, "auto", size, channels), caches)


def labels_of(found: Cached) -> list[int] | None:
    labels = cached_labels(found.folder)
    return None if labels is None else labels.tolist()


def test_medmnist_labels_come_with_their_images(tmp_path: Path) -> None:
    labels = np.array([[2], [0], [2]], dtype=np.uint8)
    np.savez_compressed(
        tmp_path / "blood.npz",
        train_images=pixels(3, 8, 8, 3),
        train_labels=labels,
        test_images=pixels(1, 8, 8, 3),
        test_labels=labels[:1],
    )
    found = cached(tmp_path / "blood.npz", tmp_path / "cache")
    assert labels_of(found) == [2, 0, 2]
    labels = found.labels()
    assert labels is not None
    assert labels.dtype == np.int64
    assert found.classes == ("0", "1", "2")
    assert open_cache(found.folder) == found


def test_findings_that_exclude_no_other_are_no_classes(tmp_path: Path) -> None:
    findings = np.zeros((3, 14), dtype=np.uint8)
    np.savez(tmp_path / "chest.npz", train_images=pixels(3, 8, 8), train_labels=findings)
    found = cached(tmp_path / "chest.npz", tmp_path / "cache")
    assert labels_of(found) is None
    assert found.classes == ()


def test_labels_that_do_not_fit_their_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(3, 8, 8), labels=np.arange(2))
    with pytest.raises(DataError, match="2 labels of 3 images"):
        cached(tmp_path / "a.npz", tmp_path / "cache")
    np.savez(tmp_path / "b.npz", images=pixels(3, 8, 8), labels=np.array([0, -1, 1]))
    with pytest.raises(DataError, match="from -1 to 1: number the classes from 0"):
        cached(tmp_path / "b.npz", tmp_path / "cache")
    np.savez(tmp_path / "c.npz", images=pixels(3, 8, 8), labels=np.array([0, 2**62, 1]))
    with pytest.raises(DataError, match="at most 65535"):
        cached(tmp_path / "c.npz", tmp_path / "cache")


def test_idx_labels_lie_beside_the_images(tmp_path: Path) -> None:
    images = pixels(4, 8, 8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        struct.pack(">4sIII", b"\0\0\x08\x03", *images.shape) + images.tobytes()
    )
    assert labels_of(cached(tmp_path, tmp_path / "cache")) is None
    content = struct.pack(">4sI", b"\0\0\x08\x01", 4) + bytes([3, 1, 4, 1])
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    found = cached(tmp_path, tmp_path / "cache")
    assert labels_of(found) == [3, 1, 4, 1]
    assert found.classes == ("0", "1", "2", "3", "4")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(DataError, match="the labels of 4 images"):
        cached(tmp_path, tmp_path / "cache")


def test_cifar_10_gives_its_training_batches_with_the_names_of_classes(tmp_path: Path) -> None:
    first, second = pixels(2, 3, 32, 32), pixels(1, 3, 32, 32)[:, ::-1]
    (tmp_path / "data_batch_1.bin").write_bytes(
        b"".join(
            bytes([label]) + image.tobytes() for label, image in zip([1, 0], first, strict=True)
        )
    )
    (tmp_path / "data_batch_2.bin").write_bytes(b"\2" + second.tobytes())
    (tmp_path / "test_batch.bin").write_bytes(b"\0" + second.tobytes())
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    found = cached(tmp_path, tmp_path / "cache", 32, 3)
    assert np.array_equal(found.images(), np.concatenate([first, second]))
    assert labels_of(found) == [1, 0, 2]
    assert found.classes == ("airplane", "automobile", "bird")


def test_cifar_100_is_labelled_finely(tmp_path: Path) -> None:
    image = pixels(1, 3, 32, 32)
    (tmp_path / "train.bin").write_bytes(bytes([11, 3]) + image.tobytes())
    found = cached(tmp_path, tmp_path / "cache", 32, 3)
    assert np.array_equal(found.images(), image)
    assert labels_of(found) == [3]


def test_cifar_in_its_python_version_gives_the_same_images_labels_and_names(
    tmp_path: Path,
) -> None:
    images, names = pixels(3, 3, 32, 32), ["airplane", "automobile", "bird"]
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()
    for name, part, labels in (
        ("data_batch_1", images[:2], [1, 0]),
        ("data_batch_2", images[2:], [2]),
        ("test_batch", images[:1], [1]),
    ):
        (ten / name).write_bytes(python_2(cifar_batch(part, labels)))
    (ten / "batches.meta").write_bytes(python_2({"label_names": names}))
    for name, part, labels in (("train", images, [2, 0, 1]), ("test", images[:1], [2])):
        (hundred / name).write_bytes(python_2(cifar_batch(part, labels, fine="fine_")))
    (hundred / "meta").write_bytes(
        python_2({"coarse_label_names": ["birds"], "fine_label_names": names})
    )
    for folder, labels in ((ten, [1, 0, 2]), (hundred, [2, 0, 1])):
        found = cached(folder, tmp_path / "cache", 32, 3)
        assert np.array_equal(found.images(), images), "those to train with alone"
        assert labels_of(found) == labels
        assert found.classes == tuple(names)
    alone = cached(ten / "data_batch_2", tmp_path / "cache", 32, 3)
    assert labels_of(alone) == [2]


def test_binary_files_are_read_where_the_python_version_lies_beside(tmp_path: Path) -> None:
    images = pixels(2, 3, 32, 32)
    (tmp_path / "data_batch_1").write_bytes(python_2(cifar_batch(images[:1], [7])))
    (tmp_path / "batches.meta").write_bytes(python_2({"label_names": ["a"] * 10}))
    (tmp_path / "data_batch_1.bin").write_bytes(b"\5" + images[1].tobytes())
    assert labels_of(cached(tmp_path, tmp_path / "cache", 32, 3)) == [5]


def test_a_cut_or_renamed_cifar_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="3072 bytes, no multiple of 3073"):
        cached(tmp_path, tmp_path / "cache", 32, 3)
    (tmp_path / "mine.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match="rename it"):
        cached(tmp_path / "mine.bin", tmp_path / "cache", 32, 3)


def test_one_level_of_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("normal", "benign", "malignant"):
        (data / name).mkdir(parents=True)
    for place in ("normal/1.png", "malignant/1.png", "benign/2.png"):
        Image.fromarray(pixels(1, 8, 8)[0]).save(data / place)
    found = cached(data, tmp_path / "cache")
    assert found.classes == ("benign", "malignant", "normal")
    assert labels_of(found) == [0, 1, 2]
    Image.fromarray(pixels(1, 8, 8)[0]).save(data / "loose.png")
    assert labels_of(cached(data, tmp_path / "cache")) is None, "one image has no class"


def test_named_classes_go_by_the_studys_list_and_never_by_a_sites_own_numbers(
    tmp_path: Path,
) -> None:
    """Two sites with different folders number them differently: normal is 1 here and 2 there."""
    wanted = ("benign", "malignant", "normal")
    for site, names in (("a", ("benign", "normal")), ("b", ("benign", "malignant", "normal"))):
        for name in names:
            (tmp_path / site / name).mkdir(parents=True)
            Image.fromarray(pixels(1, 8, 8)[0]).save(tmp_path / site / name / "1.png")
    folders = [cached(tmp_path / site, tmp_path / "cache").folder for site in ("a", "b")]
    assert labels_of_study(folders[0], 3, wanted).tolist() == [0, 2]
    assert labels_of_study(folders[1], 3, wanted).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="plan needs class_names"):
        labels_of_study(folders[0], 3, None)
    with pytest.raises(DataError, match="does not know the classes normal of the images"):
        labels_of_study(folders[0], 2, ("benign", "malignant"))


def test_a_cache_of_an_older_layout_is_made_anew_under_the_same_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(2, 8, 8), labels=np.array([1, 0]))
    found = cached(tmp_path / "x.npz", tmp_path / "cache")
    report = json.loads((found.folder / "report.json").read_text())
    del report["version"], report["classes"]
    (found.folder / "report.json").write_text(json.dumps(report))
    (found.folder / "labels.npy").unlink()
    assert open_cache(found.folder) is None
    again = cached(tmp_path / "x.npz", tmp_path / "cache")
    assert again == found
    assert labels_of(again) == [1, 0]
