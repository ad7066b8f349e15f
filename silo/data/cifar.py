"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as published: 32×32 pixels in colour.

    binary   CIFAR-10    data_batch_*.bin   record = label || 1024 red || 1024 green || 1024 blue
             CIFAR-100   train.bin          record = coarse label || fine label || the same
    Python   CIFAR-10    data_batch_*       pickle of {data: uint8 (n, 3072), labels, …}
             CIFAR-100   train              pickle of {data, fine_labels, …}

The label is CIFAR-100's fine one. Names of classes are read from the publisher's file of them where
it lies beside. Test images are left to others to evaluate with.

Pickles can run code of whoever wrote them, when they are unpickled. These are not: they are read as
data, and refused where they are anything else (`silo.data.pickled`). Beside binary files they are
left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from silo.data.items import Item, Reading, Skipped, Source
from silo.data.pickled import bytes_of_rows, read_pickle
from silo.errors import DataError

_PIXELS = 3 * 32 * 32


class _Layout(NamedTuple):
    archive: str
    train: str
    test: str
    names: str
    label_bytes: int
    """Before the pixels of a record; 0 in pickles."""
    fine: str
    """What keys of a pickle begin with."""


_LAYOUTS = (
    _Layout("cifar-10-binary", "data_batch_*.bin", "test_batch.bin", "batches.meta.txt", 1, ""),
    _Layout("cifar-100-binary", "train.bin", "test.bin", "fine_label_names.txt", 2, ""),
    _Layout("cifar-10-python", "data_batch_[0-9]", "test_batch", "batches.meta", 0, ""),
    _Layout("cifar-100-python", "train", "test", "meta", 0, "fine_"),
)


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
    layout = _layout_of(images[0])
    if layout.label_bytes:
        return tuple(line for line in names.read_text("utf-8").split("\n") if line.strip())
    found = _unpickled(names, layout).get(f"{layout.fine}label_names")
    if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise _damaged(names, layout, "it has no list of names")
    return tuple(found)


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """The files of images."""
    return (Source(file, file.name) for file in _image_files(path, reading.test))


def knows(file: Path) -> bool:
    """Whether a file is called as the publisher's files of images are."""
    return any(file.match(layout.train) or file.match(layout.test) for layout in _LAYOUTS)


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every image. Raises DataError for a file of another length, name or content."""
    layout = _layout_of(source.file)
    records = _records(source.file, layout) if layout.label_bytes else _rows(source.file, layout)
    for number, (label, pixels) in enumerate(records):
        image = pixels.reshape(3, 32, 32).transpose(1, 2, 0)
        yield Item(f"{source.file.name}[{number}]", image, label)


def _records(file: Path, layout: _Layout) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    size, length = file.stat().st_size, layout.label_bytes + _PIXELS
    if size == 0 or size % length:
        raise DataError(
            f"{file} has {size} bytes, no multiple of {length}: it is damaged, or "
            "has another layout"
        )
    with open(file, "rb") as stream:
        for _ in range(size // length):
            record = np.frombuffer(stream.read(length), np.uint8)
            yield int(record[layout.label_bytes - 1]), record[layout.label_bytes :]


def _rows(file: Path, layout: _Layout) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    content = _unpickled(file, layout)
    labels = content.get(f"{layout.fine}labels")
    try:
        rows = bytes_of_rows(content.pop("data", None), _PIXELS)
    except ValueError as error:
        raise _damaged(file, layout, str(error)) from error
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise _damaged(file, layout, f"it has no list of numbers called {layout.fine}labels")
    if len(labels) != len(rows):
        raise _damaged(file, layout, f"it has {len(labels)} labels of {len(rows)} images")
    yield from zip(labels, rows, strict=True)


def _unpickled(file: Path, layout: _Layout) -> dict[str, Any]:
    try:
        return read_pickle(file)
    except ValueError as error:
        raise _damaged(file, layout, str(error)) from error


def _damaged(file: Path, layout: _Layout, problem: str) -> DataError:
    binary = layout.archive.replace("python", "binary")
    return DataError(
        f"{file} is not as {layout.archive}.tar.gz has it: {problem}. Copy it anew, or take the "
        f"binary version, {binary}.tar.gz"
    )


def _image_files(path: Path, test: bool = False) -> list[Path]:
    if path.is_file():
        return [] if test else [path]
    for layout in _LAYOUTS:
        found = sorted(file for file in path.glob(layout.train) if file.is_file())
        # A file may be called `train` for other reasons; with `meta` beside it is CIFAR's.
        if found and (layout.label_bytes or (path / layout.names).is_file()):
            return [file for file in [path / layout.test] if file.is_file()] if test else found
    return []


def _layout_of(file: Path) -> _Layout:
    for layout in _LAYOUTS:
        if file.match(layout.train) or file.match(layout.test):
            return layout
    raise DataError(
        f"{file}: CIFAR-10's files are called data_batch_*.bin, CIFAR-100's train.bin (in the "
        "Python version, without .bin): rename it"
    )


def _names_file(images: Path) -> Path:
    return images.with_name(_layout_of(images).names)
