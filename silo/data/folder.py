"""A folder of PNG and JPEG files, subfolders included, in the order of their names.

Where every image lies in a subfolder of the folder, `<class>/<image>`, the subfolders are the
classes, numbered in the order of their names. An image is turned as its EXIF orientation says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from silo.data.files import walk
from silo.data.items import Item, Reading, Skipped, Source

_SUFFIXES = {".png", ".jpg", ".jpeg"}


def files(path: Path) -> Iterator[Path]:
    """Every file below `path` that is not hidden."""
    return walk(path)


def classes(path: Path) -> tuple[str, ...]:
    """The subfolders of `path`."""
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """Every file with the name of an image."""
    numbers = {name: number for number, name in enumerate(classes(path))}
    for file in walk(path):
        place = file.relative_to(path)
        label = numbers.get(place.parts[0]) if len(place.parts) == 2 else None
        if file.suffix.lower() in _SUFFIXES:
            yield Source(file, str(place), label)
        else:
            yield Skipped(str(place), "neither PNG nor JPEG")


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """The image of a file, or why there is none."""
    try:
        with Image.open(source.file, formats=("PNG", "JPEG")) as image:
            yield Item(source.name, ImageOps.exif_transpose(image), source.label)
    except UnidentifiedImageError:
        yield Skipped(source.name, "not the content of a PNG or JPEG file")
    except Image.DecompressionBombError:
        yield Skipped(source.name, "more pixels than an image has: most likely no image at all")
    except (OSError, SyntaxError, ValueError, OverflowError, MemoryError, EOFError):
        yield Skipped(source.name, "cannot be decoded: damaged, or cut short")
