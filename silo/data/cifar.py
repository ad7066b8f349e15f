"""The binary layout of CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 32×32 pixels in colour.

    CIFAR-10    data_batch_*.bin    record = label || 1024 red || 1024 green || 1024 blue
    CIFAR-100   train.bin           record = coarse label || fine label || the same

The label is CIFAR-100's fine one. Names of classes are read from `batches.meta.txt` or
`fine_label_names.txt` where they lie beside. Test images are left to others to evaluate with.

Both are also published as "Python version", in files without a suffix: those are pickles, which can
run code of whoever wrote them, and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from silo.data.items import Item, Reading, Skipped, Source
from silo.errors import DataError

_PIXELS = 3 * 32 * 32


def files(path: Path) -> Iterator[Path]:
    """The files of images, and that with the names of their classes."""
    images = _image_files(path)
    yield from images
    if images and (names := _names_file(images[0])).is_file():
        yield names


def classes(path: Path) -> tuple[str, ...]:
    """As the file of names has them."""
    images = _image_files(path)
    names = _names_file(images[0]) if images else None
    if names is None or not names.is_file():
        return ()
    return tuple(line for line in names.read_text("utf-8").split("\n") if line.strip())


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """The files of images. Raises DataError for a folder with the Python version alone."""
    if not _image_files(path) and (name := python_version(path)):
        wanted = {"cifar-10": "data_batch_1.bin to data_batch_5.bin", "cifar-100": "train.bin"}
        raise DataError(
            f"{path} is the Python version of {name.upper()}: take the binary version, "
            f"{name}-binary.tar.gz, whose images are in {wanted[name]}"
        )
    return (Source(file, file.name) for file in _image_files(path))


def python_version(path: Path) -> str | None:
    """ "cifar-10" or "cifar-100" where `path` is a folder with the Python version of either."""
    files = {"cifar-10": ("data_batch_1", "batches.meta"), "cifar-100": ("train", "test", "meta")}
    return next(
        (name for name, own in files.items() if all((path / file).is_file() for file in own)), None
    )


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every image. Raises DataError for a file of another length or name."""
    file, labels = source.file, _label_bytes(source.file)
    size = file.stat().st_size
    if size == 0 or size % (labels + _PIXELS):
        raise DataError(
            f"{file} has {size} bytes, no multiple of {labels + _PIXELS}: it is damaged, or "
            "has another layout"
        )
    with open(file, "rb") as stream:
        for number in range(size // (labels + _PIXELS)):
            record = np.frombuffer(stream.read(labels + _PIXELS), np.uint8)
            pixels = record[labels:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield Item(f"{file.name}[{number}]", pixels, int(record[labels - 1]))


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("data_batch_*.bin")) or [p for p in [path / "train.bin"] if p.is_file()]


def _label_bytes(file: Path) -> int:
    if file.name.startswith(("data_batch", "test_batch")):
        return 1
    if file.name in ("train.bin", "test.bin"):
        return 2
    raise DataError(
        f"{file}: CIFAR-10's files are called data_batch_*.bin, CIFAR-100's train.bin: rename it"
    )


def _names_file(images: Path) -> Path:
    fine = images.name in ("train.bin", "test.bin")
    return images.with_name("fine_label_names.txt" if fine else "batches.meta.txt")
