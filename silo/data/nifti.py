"""NIfTI: the slices of volumes (`.nii`, `.nii.gz`), a file or a folder of them.

A volume is turned to the canonical axes (right, anterior, superior), whatever order it is stored
in, and cut along one of them. Slices lie as radiologists look at them: the patient's right is left,
and front or head up.

    axial      rows from front to back, columns from right to left
    coronal    rows from head to feet, columns from right to left
    sagittal   rows from head to feet, columns from front to back

The window of site.toml becomes black to white; without one the 0.5th and the 99.5th percentile of
the whole volume do, so that its slices are alike. Slices of one value (air beside the patient) are
skipped. Of several volumes in one file nobody can say which to learn from: such files are skipped.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from silo.data.files import is_nifti, walk
from silo.data.grey import eight_bits, stretch, window
from silo.data.items import Item, Reading, Skipped, Source

Volume = NDArray[np.float64]

_AXES = {"axial": 2, "coronal": 1, "sagittal": 0}
_LARGEST_VOLUME = 1 << 30  # voxels; a header that says more is damaged
_DAMAGED = "cannot be read as NIfTI: damaged, or cut short"


def files(path: Path) -> Iterator[Path]:
    """Every file below `path` that is not hidden, or the file."""
    return walk(path) if path.is_dir() else iter([path])


def classes(path: Path) -> tuple[str, ...]:
    """Volumes have no classes."""
    return ()


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """Every file with the name of a volume."""
    root, number = path if path.is_dir() else path.parent, 0
    for file in files(path):
        name = str(file.relative_to(root))
        if is_nifti(file):
            number += 1
            yield Source(file, name, series=number)
        else:
            yield Skipped(name, "no NIfTI file (.nii, .nii.gz)")


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every slice of a volume, or why there is none."""
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    try:
        volume = _volume(source.file)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Skipped(source.name, _DAMAGED)
        return
    if isinstance(volume, str):
        yield Skipped(source.name, volume)
        return
    shown = window(volume, *reading.window) if reading.window else stretch(volume, volume)
    for number, pixels in enumerate(_slices(eight_bits(shown), reading.axis)):
        name = f"{source.name}[{number}]"
        if pixels.min() == pixels.max():
            yield Skipped(name, "a slice of one value")
        else:
            yield Item(name, pixels, source.label, source.series)


def _volume(file: Path) -> Volume | str:
    """float64 (x, y, z) along the canonical axes, or why it is skipped."""
    image = nibabel.load(file)
    if not isinstance(image, nibabel.Nifti1Image):
        return _DAMAGED
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        return "not one volume of three axes: write the one to learn from as a file of its own"
    if not 0 < np.prod(shape, dtype=np.float64) <= _LARGEST_VOLUME:
        return _DAMAGED
    if image.get_data_dtype().kind not in "iuf":
        return "voxels that are not single numbers"
    canonical = nibabel.as_closest_canonical(image)
    values = np.asarray(canonical.get_fdata(caching="unchanged"), dtype=np.float64)
    return np.nan_to_num(values.reshape(values.shape[:3]))


def _slices(volume: NDArray[np.uint8], axis: str) -> Iterator[NDArray[np.uint8]]:
    turned = volume[::-1, ::-1, ::-1]  # rows and columns count from right, front and head
    along = _AXES[axis]
    for number in range(volume.shape[along]):
        plane = turned.take(volume.shape[along] - 1 - number, axis=along)
        yield np.ascontiguousarray(plane.T)
