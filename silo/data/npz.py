"""NPZ: MedMNIST's layout (`train_images`), or one array under the key `images`.

uint8 of shape (n, h, w), (n, h, w, 1) or (n, h, w, 3). Of MedMNIST only the training images are
taken; its `val_` and `test_` arrays are for others to evaluate with.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silo.data.items import Item, Skipped
from silo.errors import DataError

_KEYS = ("train_images", "images")


def items(path: Path) -> Iterator[Item | Skipped]:
    """Every image of the array. Raises DataError for a file of another layout."""
    pixels = _load(path)
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 3 or pixels.shape[3:] == (3,)):
        raise DataError(
            f"{path}: images are {pixels.dtype}{list(pixels.shape)}; write uint8 of shape "
            "(n, h, w) or (n, h, w, 3)"
        )
    for number, image in enumerate(pixels):
        yield Item(f"{path.name}[{number}]", image)


def _load(path: Path) -> NDArray[np.uint8]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in _KEYS:
                if key in arrays:
                    loaded: NDArray[np.uint8] = arrays[key]
                    return loaded
            found = ", ".join(arrays.files) or "nothing"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as NPZ: {error}") from error
    raise DataError(f"{path} holds {found}: name the array of images one of {', '.join(_KEYS)}")
