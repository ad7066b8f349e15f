"""A data set of any known format, read front to back, one image in memory at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from silo.data import cifar, folder, idx, npz
from silo.data.items import Item, Skipped
from silo.data.pixels import Pixels
from silo.errors import DataError


class Reader(Protocol):
    """What the module of each format offers."""

    def files(self, path: Path) -> list[Path]:
        """What is read when the data set is `path`: a change in any of them is a change of it."""

    def items(self, path: Path) -> Iterator[Item | Skipped]:
        """Every image in a fixed order. Raises DataError."""

    def classes(self, path: Path) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty where they have only those."""


_READERS: dict[str, Reader] = {"images": folder, "npz": npz, "idx": idx, "cifar": cifar}


class Sample(NamedTuple):
    """One image and its class."""

    pixels: Pixels
    """uint8 (channels, image_size, image_size)."""
    label: int | None


@dataclass
class Dataset:
    """Images at `path`, as uint8 (channels, image_size, image_size), with labels where it has any.

    `count`, `skipped` and `shapes` say what was met by the last complete iteration.
    """

    path: Path
    format: str
    image_size: int
    channels: int
    count: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.channels, self.image_size, self.image_size

    def __iter__(self) -> Iterator[Sample]:
        """Every image. Raises DataError where the source cannot be read, or holds no image."""
        self.count, self.skipped, self.shapes = 0, [], Counter()
        try:
            for item in _READERS[self.format].items(self.path):
                if isinstance(item, Skipped):
                    self.skipped.append(item)
                    continue
                pixels = item.fit(self.image_size, self.channels)
                self.count += 1
                self.shapes[item.shape] += 1
                yield Sample(pixels, item.label)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        if not self.count:
            raise self._empty()

    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels count, empty where the source has numbers only."""
        return _READERS[self.format].classes(self.path)

    def fingerprint(self) -> str:
        """A digest that changes when a file is added, removed or written, without reading any."""
        state = hashlib.sha256(f"{self.format} {self.shape}".encode())
        for file in _READERS[self.format].files(self.path):
            stat = file.stat()
            state.update(f"\n{file} {stat.st_size} {stat.st_mtime_ns}".encode())
        return state.hexdigest()

    def _empty(self) -> DataError:
        what = f"{self.path} holds no image that can be read as {self.format}"
        if not self.skipped:
            return DataError(f"{what}: check [data] path and format in site.toml")
        first = self.skipped[0]
        return DataError(
            f"{what}; {len(self.skipped)} files were skipped, the first, {first.name}, "
            f"because it is {first.reason}: check [data] path and format in site.toml"
        )


def open_dataset(path: Path, format: str, image_size: int, channels: int) -> Dataset:
    """The data set at `path`; `format` is images, npz, idx, cifar or auto (told by the names of
    files).

    Raises DataError for a path that is not there or cannot be entered, or that no reader is for.
    """
    try:
        exists = path.exists()
        kind = _guess(path) if format == "auto" and exists else format
    except PermissionError as error:
        raise DataError(f"{path} may not be read by this user: change its permissions") from error
    if not exists:
        raise DataError(f"{path} does not exist: correct [data] path in site.toml")
    if kind == "npz" and path.is_dir():
        path = _only_npz(path)
    if kind == "images" and not path.is_dir():
        raise DataError(f"{path} is a file: give the folder that holds the images")
    return Dataset(path, kind, image_size, channels)


def _guess(path: Path) -> str:
    if path.is_file():
        return {".npz": "npz", ".bin": "cifar"}.get(path.suffix, "idx")
    names = [p.name for p in path.iterdir()]
    if any("idx3-ubyte" in name for name in names):
        return "idx"
    if cifar.files(path):
        return "cifar"
    return "npz" if any(name.endswith(".npz") for name in names) else "images"


def _only_npz(path: Path) -> Path:
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
        raise DataError(f"{path} holds {len(found)} .npz files: name the one to use in site.toml")
    return found[0]
