"""A contact sheet: what a person looks at to see that the right images were read the right way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_GAP = 2


def write_sheet(
    images: NDArray[np.uint8], path: Path, *, most: int = 100, columns: int = 10, tile: int = 64
) -> None:
    """At most `most` evenly spaced images of uint8 (n, 1 or 3, h, w) as one PNG."""
    count = min(most, len(images))
    chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
    channels, rows = chosen.shape[1], math.ceil(len(chosen) / columns)
    cell = tile + _GAP
    sheet = Image.new("L" if channels == 1 else "RGB", (columns * cell, rows * cell), "white")
    for place, pixels in enumerate(chosen):
        image = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
        enlarged = image.resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (place % columns * cell, place // columns * cell))
    sheet.save(path, format="PNG")
