"""NPZ: MedMNIST's layout (`train_images`, `train_labels`), or arrays `images` and `labels`.

Images are uint8 of shape (n, h, w), (n, h, w, 1) or (n, h, w, 3); labels, which may be missing, are
integers of shape (n,) or (n, 1). Labels of another shape (ChestMNIST's fourteen findings per image,
say) are no classes, and are left out. Of MedMNIST only the training images are taken; its `val_`
and `test_` arrays are for others to evaluate with. Its 3-D sets are refused: models here are of
images.

An array is read from the archive as it is stored, image by image: it may be larger than memory.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import IO

import numpy as np

from silo.data.items import Item, Reading, Skipped, Source
from silo.errors import DataError

_PREFIXES, _TEST = ("train_", ""), "test_"
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,  # a compression that zipfile has not
    RuntimeError,  # an archive with a password
    zipfile.BadZipFile,
    zlib.error,
)


def files(path: Path) -> Iterator[Path]:
    """The archive."""
    yield path


def classes(path: Path) -> tuple[str, ...]:
    """The layout has numbers only."""
    return ()


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """The archive; for test images, if it has any."""
    if not reading.test or _has_tests(path):
        yield Source(path, path.name)


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every image of the array. Raises DataError for a file of another layout."""
    path = source.file
    try:
        with zipfile.ZipFile(path) as archive:
            yield from _items(path, archive, (_TEST,) if reading.test else _PREFIXES)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _has_tests(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{_TEST}images.npy" in archive.namelist()
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as NPZ: {error}")


def _items(path: Path, archive: zipfile.ZipFile, prefixes: tuple[str, ...]) -> Iterator[Item]:
    found = {name.removesuffix(".npy") for name in archive.namelist()}
    prefix = next((p for p in prefixes if f"{p}images" in found), None)
    if prefix is None:
        names = ", ".join(sorted(found)) or "nothing"
        wanted = ", ".join(f"{p}images" for p in prefixes)
        raise DataError(f"{path} holds {names}: name the array of images one of {wanted}")
    with archive.open(f"{prefix}images.npy") as stream:
        shape, dtype = _header(stream)
        if dtype != np.uint8 or not (len(shape) == 3 or shape[3:] in ((1,), (3,))):
            raise DataError(f"{path}: images are {dtype}{list(shape)}; {_advice(shape)}")
        labels: Iterator[int | None] = repeat(None)
        if f"{prefix}labels" in found:
            labels = _labels(path, archive, f"{prefix}labels.npy", shape[0])
        one = shape[1:3] if shape[3:] == (1,) else shape[1:]
        size = int(np.prod(one))
        for number, label in zip(range(shape[0]), labels, strict=False):
            content = stream.read(size)
            if len(content) != size:
                raise DataError(f"{path} ends in image {number} of {shape[0]}: copy it anew")
            pixels = np.frombuffer(content, np.uint8).reshape(one)
            yield Item(f"{path.name}[{number}]", pixels, label)


def _advice(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[1] == shape[2] == shape[3]:
        return "volumes are not read: write the slices to learn from as (n, h, w)"
    return "write uint8 of shape (n, h, w) or (n, h, w, 3)"


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    match version:
        case (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        case (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
        case _:
            raise ValueError(f"an array of .npy version {version}, newer than this program")
    if fortran_order and len(shape) > 1:
        raise ValueError("an array in Fortran order: write it with numpy.ascontiguousarray")
    return shape, dtype


def _labels(path: Path, archive: zipfile.ZipFile, name: str, count: int) -> Iterator[int | None]:
    with archive.open(name) as stream:
        shape, dtype = _header(stream)
        if shape[1:] not in ((), (1,)) or dtype.kind not in "iu":
            return repeat(None)
        content = stream.read()
    if shape[0] != count:
        raise DataError(f"{path}: {shape[0]} labels of {count} images")
    numbers: list[int | None] = np.frombuffer(content, dtype).tolist()
    return iter(numbers)
