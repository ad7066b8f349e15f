"""A data set of any known format, read front to back, a few images in memory at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from silo.data import cifar
from silo.data.decoding import Work, decode
from silo.data.files import is_dicom, is_nifti, walk
from silo.data.items import AS_THE_FILES_SAY, Reading, Skipped
from silo.data.pixels import Pixels
from silo.data.readers import PER_FILE, Reader, reader_of
from silo.errors import DataError, WrongSource

_FILES_TO_GUESS_BY = 500
_EXAMPLES = 20


class Sample(NamedTuple):
    """One image and its class."""

    pixels: Pixels
    """uint8 (channels, image_size, image_size)."""
    label: int | None


@dataclass
class Skips:
    """What gave no image, counted by reason; of each reason the first names, not all."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, skipped: Skipped) -> None:
        self.counts[skipped.reason] += 1
        names = self.examples.setdefault(skipped.reason, [])
        if len(names) < _EXAMPLES:
            names.append(skipped.name)


@dataclass
class Dataset:
    """Images at `path`, as uint8 (channels, image_size, image_size), with labels where it has any.

    `count`, `skips`, `shapes` and `series` say what was met by the last complete iteration.
    """

    path: Path
    format: str
    image_size: int
    channels: int
    reading: Reading = AS_THE_FILES_SAY
    processes: int = 1
    count: int = 0
    skips: Skips = field(default_factory=Skips)
    shapes: Counter[str] = field(default_factory=Counter)
    series: int = 0
    """How many series or volumes, 0 for formats without."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.channels, self.image_size, self.image_size

    @property
    def reader(self) -> Reader:
        return reader_of(self.format)

    def __iter__(self) -> Iterator[Sample]:
        """Every image. Raises DataError where the source cannot be read, or holds no image."""
        self.count, self.skips, self.shapes, self.series = 0, Skips(), Counter(), 0
        work = Work(self.format, self.reading, self.image_size, self.channels)
        processes = self.processes if self.format in PER_FILE else 1
        try:
            for found in decode(work, self.reader.sources(self.path, self.reading), processes):
                if isinstance(found, Skipped):
                    self.skips.add(found)
                    continue
                self.count += 1
                self.shapes[found.shape] += 1
                self.series = max(self.series, found.series)
                yield Sample(found.pixels, found.label)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        if not self.count:
            raise self._empty()

    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels count, empty where the source has numbers only."""
        return self.reader.classes(self.path)

    def fingerprint(self) -> str:
        """A digest that changes when a file is added, removed or written, or is to be read in
        another way, without reading any."""
        state = hashlib.sha256(f"{self.format} {self.shape}".encode())
        if self.reading != AS_THE_FILES_SAY:
            state.update(f" {self.reading}".encode())
        for file in self.reader.files(self.path):
            stat = file.stat()
            state.update(f"\n{file} {stat.st_size} {stat.st_mtime_ns}".encode())
        return state.hexdigest()

    def _empty(self) -> DataError:
        what = f"{self.path} holds no image that can be read as {self.format}"
        if self.skips.counts:
            reason, count = self.skips.counts.most_common(1)[0]
            what += (
                f"; {self.skips.counts.total()} files were skipped, {count} of them "
                f'({self.skips.examples[reason][0]}, for one) as "{reason}"'
            )
        return WrongSource(what, "check [data] path and format in site.toml")


def open_dataset(
    path: Path,
    format: str,
    image_size: int,
    channels: int,
    reading: Reading = AS_THE_FILES_SAY,
    processes: int = 1,
) -> Dataset:
    """The data set at `path`; `format` is images, dicom, nifti, npz, idx, cifar, or auto (told by
    what lies there). Formats with a file per image are decoded by several processes if wanted.

    Raises DataError for a path that is not there or cannot be entered, or that no reader is for.
    """
    try:
        exists = path.exists()
        kind = _guess(path) if format == "auto" and exists else format
    except PermissionError as error:
        raise DataError(f"{path} may not be read by this user: change its permissions") from error
    if not exists:
        raise WrongSource(f"{path} does not exist", "correct [data] path in site.toml")
    if kind == "npz" and path.is_dir():
        path = _only_npz(path)
    if kind == "images" and not path.is_dir():
        raise DataError(f"{path} is a file: give the folder that holds the images")
    return Dataset(path, kind, image_size, channels, reading, processes)


def _guess(path: Path) -> str:
    if path.is_file():
        by_suffix = {".npz": "npz", ".bin": "cifar"}
        otherwise = "cifar" if cifar.knows(path) else "idx"
        return by_suffix.get(path.suffix) or _medical(path) or otherwise
    names = [p.name for p in path.iterdir()]
    if any("idx3-ubyte" in name for name in names):
        return "idx"
    if next(cifar.files(path), None):
        return "cifar"
    if any(name.endswith(".npz") for name in names):
        return "npz"
    found = (_medical(file) for file in islice(walk(path), _FILES_TO_GUESS_BY))
    return next((kind for kind in found if kind), "images")


def _medical(file: Path) -> str | None:
    if is_nifti(file):
        return "nifti"
    return "dicom" if is_dicom(file) else None


def _only_npz(path: Path) -> Path:
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
        raise WrongSource(
            f"{path} holds {len(found)} .npz files", "name the one to use in site.toml"
        )
    return found[0]
