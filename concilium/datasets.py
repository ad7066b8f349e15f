"""Public labelled images: scikit-learn's digits, and the files that other publishers offer.

The files are read by the readers of the silo (`silo.data`), so that a simulation sees what a silo
would see: MNIST and Fashion-MNIST (IDX, also .gz), CIFAR-10 and CIFAR-100 (the binary and the
Python versions), MedMNIST (.npz, 2-D). What their publishers set apart to test with is no silo's,
and here the part `test`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silo.data.dataset import Dataset, open_dataset
from silo.data.items import Reading
from silo.errors import DataError, WrongSource

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


class DataMissing(Exception):
    """The data set is not on this machine, or its files are not what they should be."""


_WITH_TESTS = ("idx", "cifar", "npz")


@dataclass(frozen=True)
class ImageSet:
    """uint8 images [n, c, h, w], and their classes [n] where every image has one."""

    images: Images
    labels: Labels | None
    test: ImageSet | None = None
    """Those that are no silo's, where the publisher set some apart."""
    unlabelled: int = 0
    """How many images have no class."""


@dataclass(frozen=True)
class LabelledImages(ImageSet):
    """Images of which every one has a class."""

    labels: Labels


def load_dataset(
    name: str,
    image_size: int,
    channels: int = 1,
    remedy: str = 'correct data = "…" in [simulation]',
) -> ImageSet:
    """The training images of "digits", "fashion-mnist", or the file or folder `name`, resized; and
    the test images of "digits" and, where they are there, of MNIST's, CIFAR's and MedMNIST's files.

    Raises DataMissing where there is none.
    """
    if name == "digits":
        found: ImageSet = digits()
        if found.images.shape[1:] != (channels, image_size, image_size):
            raise DataMissing(
                f"digits are 1×8×8, not {channels}×{image_size}×{image_size}: "
                "write image_size = 8 and channels = 1 in [data]"
            )
        return found
    path = FASHION_MNIST if name == "fashion-mnist" else Path(name)
    if path == FASHION_MNIST:
        remedy = "on Debian: apt-get install dataset-fashion-mnist"
    try:
        dataset = open_dataset(path, "auto", image_size, channels)
        found, tests = _read(dataset), _tests_of(dataset)
        return replace(found, test=_read(tests)) if tests else found
    except WrongSource as error:
        raise DataMissing(f'data = "{name}": {error.problem}: {remedy}') from error
    except DataError as error:
        raise DataMissing(f'data = "{name}": {error}') from error


def _tests_of(dataset: Dataset) -> Dataset | None:
    if dataset.format not in _WITH_TESTS:
        return None
    reading = Reading(test=True)
    found = next(iter(dataset.reader.sources(dataset.path, reading)), None)
    return replace(dataset, reading=reading) if found else None


def _read(dataset: Dataset) -> ImageSet:
    samples = list(dataset)
    images = np.stack([sample.pixels for sample in samples])
    known = [sample.label for sample in samples if sample.label is not None]
    unlabelled = len(samples) - len(known)
    labels = None if unlabelled else np.array(known, dtype=np.int64)
    return ImageSet(images, labels, unlabelled=unlabelled)


def digits() -> LabelledImages:
    """scikit-learn's handwritten digits, 8×8, without those that trained the feature network."""
    from sklearn.datasets import load_digits

    from diffusion.features.holdout import holdout_split

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    for_silos, held_out = holdout_split(len(images))
    labels = raw.target.astype(np.int64)
    test = LabelledImages(images[held_out], labels[held_out])
    return LabelledImages(images[for_silos], labels[for_silos], test)


def fashion_mnist() -> LabelledImages:
    """Fashion-MNIST's 60,000 training images, 28×28; its test images trained the feature network.

    Raises `DataMissing` where Debian's `dataset-fashion-mnist` is not installed, or not whole.
    """
    found = load_dataset("fashion-mnist", 28)
    if found.labels is None:
        raise DataMissing(f"{FASHION_MNIST} has no file of labels: install the package anew")
    return LabelledImages(found.images, found.labels, found.test)


DATASETS = {"digits": digits, "fashion-mnist": fashion_mnist}
"""What `concilium demo` offers."""
