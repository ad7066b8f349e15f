"""A folder of PNG and JPEG files, subfolders included, in the order of their names."""

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


def items(path: Path) -> Iterator[Item | Skipped]:
    """Every image, and every file that is none with the reason."""
    for file in files(path):
        name = str(file.relative_to(path))
        if file.suffix.lower() not in _SUFFIXES:
            yield Skipped(name, "neither PNG nor JPEG")
            continue
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                image.load()
                yield Item(name, image)
        except UnidentifiedImageError:
            yield Skipped(name, "not the content of a PNG or JPEG file")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield Skipped(name, f"cannot be decoded: {error}")
