"""The public images that the demonstration hands out to its sites."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


class DataMissing(Exception):
    """The data set is not on this machine."""


@dataclass(frozen=True)
class LabelledImages:
    """uint8 images [n, c, h, w] and their classes [n]."""

    images: Images
    labels: Labels


def digits() -> LabelledImages:
    """scikit-learn's handwritten digits, 8×8, without those that trained the feature network."""
    from sklearn.datasets import load_digits

    from diffusion.features.holdout import holdout_split

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    for_silos, _ = holdout_split(len(images))
    return LabelledImages(images[for_silos], raw.target[for_silos].astype(np.int64))


def fashion_mnist(folder: Path = FASHION_MNIST) -> LabelledImages:
    """Fashion-MNIST's 60,000 training images, 28×28; its test images trained the feature network.

    Raises `DataMissing` where Debian's `dataset-fashion-mnist` is not installed.
    """
    try:
        images = _read_idx(folder / "train-images-idx3-ubyte.gz", header=16)
        labels = _read_idx(folder / "train-labels-idx1-ubyte.gz", header=8)
    except OSError as error:
        raise DataMissing(
            f"Fashion-MNIST is not in {folder}; on Debian: apt-get install dataset-fashion-mnist"
        ) from error
    return LabelledImages(images.reshape(-1, 1, 28, 28), labels.astype(np.int64))


def _read_idx(path: Path, header: int) -> Images:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


DATASETS = {"digits": digits, "fashion-mnist": fashion_mnist}
