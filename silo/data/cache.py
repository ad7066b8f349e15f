"""The uint8 cache: every image read once, resized once, and from then on mapped into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from silo.data.dataset import Dataset
from silo.data.items import Skipped
from silo.errors import DataError
from silo.files import make_folder, move, read_json, sync_folder, write_json


@dataclass(frozen=True)
class Cached:
    """A data set in one file that can be mapped."""

    folder: Path
    count: int
    shapes: dict[str, int]
    """Shapes in the source, with how many images have each."""
    skipped: tuple[Skipped, ...]

    @property
    def file(self) -> Path:
        return self.folder / "images.npy"

    @property
    def key(self) -> str:
        return self.folder.name

    def images(self) -> NDArray[np.uint8]:
        """uint8 (n, c, h, w), mapped: pages are read when touched."""
        mapped: NDArray[np.uint8] = np.load(self.file, mmap_mode="r")
        return mapped


def cache_dataset(dataset: Dataset, caches: Path) -> Cached:
    """Read all of `dataset` into a folder below `caches`, unless that was done before.

    The folder is named by the source's fingerprint, so that a source that changed is read anew.
    Raises DataError as `Dataset` does.
    """
    folder = caches / hashlib.sha256(dataset.fingerprint().encode()).hexdigest()[:16]
    if (known := open_cache(folder)) is not None:
        return known
    make_folder(folder)
    partial = folder / "images.partial"
    with open(partial, "wb") as file:
        count = _write_npy(file, dataset, dataset.shape)
        os.fsync(file.fileno())
    move(partial, folder / "images.npy")
    report = {
        "source": str(dataset.path),
        "format": dataset.format,
        "count": count,
        "shapes": dict(dataset.shapes),
        "skipped": [[s.name, s.reason] for s in dataset.skipped],
    }
    write_json(folder / "report.json", report)
    sync_folder(caches)
    return Cached(folder, count, dict(dataset.shapes), tuple(dataset.skipped))


def open_cache(folder: Path) -> Cached | None:
    """What was cached in `folder`, None where nothing (or nothing whole) is."""
    report = read_json(folder / "report.json")
    if report is None:
        return None
    skipped = tuple(Skipped(name, reason) for name, reason in report["skipped"])
    return Cached(folder, report["count"], report["shapes"], skipped)


def _write_npy(file: BinaryIO, images: Iterable[NDArray[np.uint8]], shape: tuple[int, ...]) -> int:
    """Stream an .npy file whose length is known only at the end.

    numpy leaves room in a version 1.0 header for the first axis to grow, so that the header can be
    written again in place.
    """
    length = _write_header(file, (0, *shape))
    count = 0
    for image in images:
        file.write(image.tobytes())
        count += 1
    file.seek(0)
    if _write_header(file, (count, *shape)) != length:
        raise DataError("the cache's header does not fit: this version of numpy is too old")
    return count


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()
