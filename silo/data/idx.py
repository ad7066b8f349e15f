"""IDX, the layout of MNIST: `*-images-idx3-ubyte`, plain or gzipped, one file or a folder of them.

    file = 00 00 08 03 || u32 n || u32 h || u32 w || n·h·w bytes          (big-endian)

From a folder with files that begin with `train-` only those are taken.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from silo.data.items import Item, Skipped
from silo.errors import DataError

_HEADER = struct.Struct(">4sIII")
_MAGIC = b"\x00\x00\x08\x03"


def files(path: Path) -> list[Path]:
    """The image files of a folder, or the file itself."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob("*images*idx3-ubyte*") if p.is_file())
    return [p for p in found if p.name.startswith("train-")] or found


def items(path: Path) -> Iterator[Item | Skipped]:
    """Every image. Raises DataError for a file that is damaged or of another kind."""
    for file in files(path):
        content = _content(file)
        if len(content) < _HEADER.size:
            raise DataError(f"{file} has {len(content)} bytes: not an IDX file")
        magic, n, h, w = _HEADER.unpack_from(content)
        if magic != _MAGIC:
            raise DataError(f"{file} is not an IDX file of unsigned bytes in three dimensions")
        if len(content) != _HEADER.size + n * h * w:
            raise DataError(f"{file} says {n} images of {h}×{w} but has another length: copy anew")
        pixels = np.frombuffer(content, np.uint8, offset=_HEADER.size).reshape(n, h, w)
        for number, image in enumerate(pixels):
            yield Item(f"{file.name}[{number}]", image)


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
