"""IDX, the layout of MNIST: `*-images-idx3-ubyte`, plain or gzipped, one file or a folder of them.

    images = 00 00 08 03 || u32 n || u32 h || u32 w || n·h·w bytes          (big-endian)
    labels = 00 00 08 01 || u32 n || n bytes

From a folder with files that begin with `train-` only those are taken; `t10k-` ones beside them are
left to others to evaluate with. Labels are in the file beside the images whose name has
`labels-idx1` for `images-idx3`; it may be missing. Of a file that lies there gzipped and plain the
plain one is read.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from itertools import repeat
from pathlib import Path

import numpy as np

from silo.data.items import Item, Reading, Skipped, Source
from silo.errors import DataError

_IMAGES, _LABELS = struct.Struct(">4sIII"), struct.Struct(">4sI")


def files(path: Path) -> Iterator[Path]:
    """The files of images and those of their labels."""
    for file in _image_files(path):
        labels = _labels_of(file)
        yield from (file, labels) if labels else (file,)


def classes(path: Path) -> tuple[str, ...]:
    """The layout has numbers only."""
    return ()


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """The files of images."""
    return (Source(file, file.name) for file in _image_files(path, reading.test))


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every image. Raises DataError for a file that is damaged or of another kind."""
    try:
        with _open(source.file) as stream:
            yield from _images(source.file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source.file} cannot be read: {error}") from error


def _images(file: Path, stream: BufferedIOBase) -> Iterator[Item]:
    header = stream.read(_IMAGES.size)
    if len(header) < _IMAGES.size:
        raise DataError(f"{file} has {len(header)} bytes: not an IDX file")
    magic, n, h, w = _IMAGES.unpack(header)
    if magic != b"\x00\x00\x08\x03":
        raise DataError(f"{file} is not an IDX file of unsigned bytes in three dimensions")
    if not h * w:
        raise DataError(f"{file} says that its images have {h}×{w} pixels")
    labels = _read_labels(file, n)
    for number, label in zip(range(n), labels, strict=False):
        content = stream.read(h * w)
        if len(content) != h * w:
            raise _wrong_length(file, n, h, w)
        pixels = np.frombuffer(content, np.uint8).reshape(h, w)
        yield Item(f"{file.name}[{number}]", pixels, label)
    if stream.read(1):
        raise _wrong_length(file, n, h, w)


def _read_labels(images: Path, n: int) -> Iterator[int | None]:
    file = _labels_of(images)
    if file is None:
        return repeat(None)
    with _open(file) as stream:
        content = stream.read(_LABELS.size + n + 1)
    if len(content) != _LABELS.size + n or _LABELS.unpack_from(content) != (b"\0\0\x08\x01", n):
        raise DataError(f"{file} is not an IDX file with the labels of {n} images: copy it anew")
    return iter(content[_LABELS.size :])


def _image_files(path: Path, test: bool = False) -> list[Path]:
    if path.is_file():
        return [] if test else [path]
    found = sorted(p for p in path.glob("*images*idx3-ubyte*") if p.is_file())
    found = [p for p in found if p.suffix != ".gz" or p.with_suffix("") not in found]
    train = [p for p in found if p.name.startswith("train-")]
    if test:  # without others they are what is trained on
        return [p for p in found if p.name.startswith("t10k-")] if train else []
    return train or found


def _labels_of(images: Path) -> Path | None:
    """The file of labels, gzipped or not, whichever the images are."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    found = (images.with_name(name), images.with_name(name + ".gz"))
    return next((file for file in found if file != images and file.is_file()), None)


def _wrong_length(file: Path, n: int, h: int, w: int) -> DataError:
    return DataError(f"{file} says {n} images of {h}×{w} but has another length: copy it anew")


def _open(file: Path) -> BufferedIOBase:
    return gzip.GzipFile(file) if file.suffix == ".gz" else open(file, "rb")
