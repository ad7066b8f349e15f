"""The readers: one module per format, imported when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from silo.data.items import Item, Reading, Skipped, Source

_MODULES = {"images": "folder"}  # the others are called like their format
PER_FILE = ("images", "dicom", "nifti")
"""Formats whose files are decoded independently of each other."""


class Reader(Protocol):
    """What the module of each format offers."""

    def files(self, path: Path) -> Iterator[Path]:
        """What is read when the data set is `path`: a change in any of them is a change of it."""

    def sources(self, path: Path, reading: Reading) -> Iterator[Source | Skipped]:
        """The files with images, in a fixed order. Raises DataError."""

    def read(self, source: Source, reading: Reading) -> Iterator[Item | Skipped]:
        """Every image of a source in a fixed order. Raises DataError."""

    def classes(self, path: Path) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty where they have only those."""


def reader_of(format: str) -> Reader:
    """The reader of images, dicom, nifti, npz, idx or cifar."""
    return cast(Reader, import_module(f"silo.data.{_MODULES.get(format, format)}"))
