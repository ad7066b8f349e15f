"""The uint8 cache: every image read once, resized once, and from then on mapped into memory.

images.npy    uint8 (n, c, h, w)
labels.npy    int64 (n,), numbers of classes from 0; only where every image has one
report.json   version of this layout, counts, shapes, names of the classes, what was skipped
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from silo.data.dataset import Dataset, Sample
from silo.errors import DataError
from silo.files import make_folder, move, read_json, sync_folder, write_file, write_json

VERSION = 3
"""Of the layout; a cache of another one is made anew from the images."""

_MOST_CLASSES = 65_536
_PROGRESS_EVERY = 256
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Cached:
    """A data set in one file that can be mapped."""

    folder: Path
    count: int
    shapes: dict[str, int]
    """Shapes in the source, with how many images have each."""
    skipped: dict[str, int]
    """Why files gave no image, with how many did not for that reason."""
    examples: dict[str, list[str]]
    """The first names of each reason."""
    series: int
    """How many DICOM series or NIfTI volumes; 0 for formats without."""
    classes: tuple[str, ...]
    """Names of the classes by their numbers; empty where the images have no labels."""

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

    def labels(self) -> Labels | None:
        """int64 (n,); None where not every image has a label."""
        return cached_labels(self.folder)


def cached_labels(folder: Path) -> Labels | None:
    """The labels of the images cached in `folder`: int64 (n,), None where there are none."""
    file = folder / "labels.npy"
    if not file.exists():
        return None
    labels: Labels = np.load(file, allow_pickle=False)
    return labels


def labels_of_study(folder: Path, classes: int, wanted: tuple[str, ...] | None) -> Labels:
    """The labels of the images cached in `folder`, as the study numbers its classes: int64 (n,).

    `wanted` are the study's names of the `classes` classes, None where it has none. A site numbers
    the classes that it has, so names go by the study's list; numbers go as they are. Raises
    DataError where an image has no label, or one that the study does not know.
    """
    labels, cached = cached_labels(folder), open_cache(folder)
    names = cached.classes if cached else ()
    if labels is None:
        raise DataError(
            f"the study's model has {classes} classes, but not every image here has a label: put "
            "the images into one folder per class, or use a format that holds labels"
        )
    if wanted is not None and names:
        if unknown := [name for name in names if name not in wanted]:
            raise DataError(
                f"the study does not know the classes {', '.join(unknown)} of the images, only "
                f"{', '.join(wanted)}: rename them, or ask for a study that has them"
            )
        return np.array([wanted.index(name) for name in names], dtype=np.int64)[labels]
    if any(name != str(number) for number, name in enumerate(names)):
        raise DataError(
            f"the images here have classes with names ({', '.join(names)}), and the study says not "
            "which numbers they have: its plan needs class_names in [data]"
        )
    if len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"the study's model has {classes} classes, 0 to {classes - 1}, but labels here go up "
            f"to {int(labels.max())}: correct the labels, or ask for a study of more classes"
        )
    return labels


def cache_dataset(
    dataset: Dataset, caches: Path, progress: Callable[[int], None] = lambda _: None
) -> Cached:
    """Read all of `dataset` into a folder below `caches`, unless that was done before.

    `progress` is called with how many images there are so far.

    The folder is named by the source's fingerprint, so that a source that changed is read anew.
    Raises DataError as `Dataset` does.
    """
    folder = caches / hashlib.sha256(dataset.fingerprint().encode()).hexdigest()[:16]
    if (known := open_cache(folder)) is not None:
        return known
    make_folder(folder)
    partial = folder / "images.partial"
    labels = _Labels()
    with open(partial, "wb") as file:
        count = _write_npy(file, labels.of(dataset), dataset.shape, progress)
        os.fsync(file.fileno())
    classes = _write_labels(folder, labels, dataset)
    move(partial, folder / "images.npy")
    report = {
        "version": VERSION,
        "source": str(dataset.path),
        "format": dataset.format,
        "count": count,
        "shapes": dict(dataset.shapes),
        "classes": classes,
        "skipped": dict(dataset.skips.counts),
        "examples": dataset.skips.examples,
        "series": dataset.series,
    }
    write_json(folder / "report.json", report)
    sync_folder(caches)
    return _cached(folder, report)


def open_cache(folder: Path) -> Cached | None:
    """What was cached in `folder`, None where nothing (or nothing whole) is."""
    report = read_json(folder / "report.json")
    if report is None or report.get("version") != VERSION:
        return None
    return _cached(folder, report)


def _cached(folder: Path, report: dict[str, Any]) -> Cached:
    return Cached(
        folder,
        report["count"],
        report["shapes"],
        report["skipped"],
        report["examples"],
        report["series"],
        tuple(report["classes"]),
    )


class _Labels:
    """The labels of the samples that pass by."""

    def __init__(self) -> None:
        self.values = array("q")
        self.missing = False

    def of(self, samples: Iterable[Sample]) -> Iterator[NDArray[np.uint8]]:
        for pixels, label in samples:
            if label is None:
                self.missing = True
            else:
                self.values.append(label)
            yield pixels


def _write_labels(folder: Path, labels: _Labels, dataset: Dataset) -> tuple[str, ...]:
    """Leaves labels.npy where every image has a label; the names of the classes."""
    file = folder / "labels.npy"
    file.unlink(missing_ok=True)
    if labels.missing:
        return ()
    values = np.array(labels.values, dtype=np.int64)
    most = min(int(values.max()) + 1, _MOST_CLASSES)
    classes = dataset.classes() or tuple(str(k) for k in range(most))
    if values.min() < 0 or values.max() >= len(classes):
        raise DataError(
            f"{dataset.path} has labels from {values.min()} to {values.max()}: number the classes "
            f"from 0 to at most {len(classes) - 1}"
        )
    write_file(file, _npy(values))
    return classes


def _npy(values: Labels) -> bytes:
    content = BytesIO()
    np.save(content, values)
    return content.getvalue()


def _write_npy(
    file: BinaryIO,
    images: Iterable[NDArray[np.uint8]],
    shape: tuple[int, ...],
    progress: Callable[[int], None],
) -> int:
    """Stream an .npy file whose length is known only at the end.

    numpy leaves room in a version 1.0 header for the first axis to grow, so that the header can be
    written again in place.
    """
    length = _write_header(file, (0, *shape))
    count = 0
    for image in images:
        file.write(image.tobytes())
        count += 1
        if count % _PROGRESS_EVERY == 0:
            progress(count)
    file.seek(0)
    if _write_header(file, (count, *shape)) != length:
        raise DataError("the cache's header does not fit: this version of numpy is too old")
    return count


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()
