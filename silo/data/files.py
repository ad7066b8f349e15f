"""The files of a folder in one order everywhere, and what a file is, told without its library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def walk(path: Path) -> Iterator[Path]:
    """Every file below `path` that is not hidden, folder by folder, in the order of their names.

    Holds the names of one folder at a time. A link to a folder is not followed.
    """
    with os.scandir(path) as entries:
        found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries if e.name[0] != "."]
    for name, is_folder in sorted(found):
        if is_folder:
            yield from walk(path / name)
        elif (path / name).is_file():
            yield path / name


def is_dicom(file: Path) -> bool:
    """Whether the file has DICOM's magic."""
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_nifti(file: Path) -> bool:
    """By its name."""
    return file.name.lower().endswith((".nii", ".nii.gz"))
