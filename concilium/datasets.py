"""Public labelled images: scikit-learn's digits, and the files that other publishers offer.

The files are read by the readers of the silo (`silo.data`), so that a simulation sees what a silo
would see: MNIST and Fashion-MNIST (IDX, also .gz), CIFAR-10 and CIFAR-100 (the binary versions),
MedMNIST (.npz).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silo.data.dataset import open_dataset
from silo.errors import DataError, WrongSource

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


class DataMissing(Exception):
    """The data set is not on this machine, or its files are not what they should be."""


@dataclass(frozen=True)
class LabelledImages:
    """uint8 images [n, c, h, w] and their classes [n]."""

    images: Images
    labels: Labels
    test: LabelledImages | None = None
    """Those that are no silo's, where the publisher set some apart."""


def load_dataset(
    name: str,
    image_size: int,
    channels: int = 1,
    remedy: str = 'correct data = "…" in [simulation]',
) -> LabelledImages:
    """The training images of "digits", "fashion-mnist", or the file or folder `name`, resized; and
    the test images of "digits" and of folders with the files of MNIST.

    Raises DataMissing where there is none, or where it has no label for every image.
    """
    if name == "digits":
        found = digits()
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
        found = _read(path, name, image_size, channels)
        tests = sorted(path.glob("t10k-images*idx3-ubyte*"))[:1]
        test = _read(tests[0], name, image_size, channels) if tests else None
    except WrongSource as error:
        raise DataMissing(f'data = "{name}": {error.problem}: {remedy}') from error
    except DataError as error:
        raise DataMissing(f'data = "{name}": {error}') from error
    return replace(found, test=test)


def _read(path: Path, name: str, image_size: int, channels: int) -> LabelledImages:
    samples = list(open_dataset(path, "auto", image_size, channels))
    labels = [sample.label for sample in samples if sample.label is not None]
    if len(labels) != len(samples):
        raise DataMissing(
            f'data = "{name}": {len(samples) - len(labels)} of {len(samples)} images have no '
            "label: give a source that has them, such as a folder with a subfolder per class"
        )
    images = np.stack([sample.pixels for sample in samples])
    return LabelledImages(images, np.array(labels, dtype=np.int64))


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

    Raises `DataMissing` where Debian's `dataset-fashion-mnist` is not installed.
    """
    return load_dataset("fashion-mnist", 28)


DATASETS = {"digits": digits, "fashion-mnist": fashion_mnist}
"""What `concilium demo` offers."""
