"""A folder of PNG and JPEG files, subfolders included, in the order of their names.

Where every image lies in a subfolder of the folder, `<class>/<image>`, the subfolders are the
classes, numbered in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from silo.data.items import Item, Skipped

_SUFFIXES = {".png", ".jpg", ".jpeg"}


def files(path: Path) -> list[Path]:
    """Every file below `path` that is not hidden."""
    found = (p for p in path.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(q.startswith(".") for q in p.relative_to(path).parts))


def classes(path: Path) -> tuple[str, ...]:
    """The subfolders of `path`."""
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))


def items(path: Path) -> Iterator[Item | Skipped]:
    """Every image, and every file that is none with the reason."""
    numbers = {name: number for number, name in enumerate(classes(path))}
    for file in files(path):
        place = file.relative_to(path)
        label = numbers[place.parts[0]] if len(place.parts) == 2 else None
        if file.suffix.lower() not in _SUFFIXES:
            yield Skipped(str(place), "neither PNG nor JPEG")
            continue
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                image.load()
                yield Item(str(place), image, label)
        except UnidentifiedImageError:
            yield Skipped(str(place), "not the content of a PNG or JPEG file")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield Skipped(str(place), f"cannot be decoded: {error}")
