"""One image of any size as the study needs it: uint8 (channels, size, size).

1. *Colour.* To one channel by ITU-R 601-2 luma, L = 0.299 R + 0.587 G + 0.114 B; to three channels
   by repeating grey. Alpha is dropped. 16-bit grey keeps its upper eight bits.
2. *Shape.* The largest centred square is cut out.
3. *Size.* Resized by area-weighted (antialiased) bilinear interpolation; an image that already has
   the size keeps its bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from silo.errors import DataError

Pixels = NDArray[np.uint8]


def fit(image: Image.Image, size: int, channels: int) -> Pixels:
    """uint8 (channels, size, size); raises DataError for channels other than 1 and 3."""
    converted = _with_channels(image, channels)
    side = min(converted.size)
    left, top = (converted.width - side) // 2, (converted.height - side) // 2
    square = converted.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def fit_array(pixels: Pixels, size: int, channels: int) -> Pixels:
    """The same for uint8 (h, w) or (h, w, 3 or 4) as array files hold them."""
    if pixels.shape == (size, size) and channels == 1:
        return pixels[None]
    return fit(Image.fromarray(pixels), size, channels)


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise DataError(f"the study wants {channels} channels; readers make 1 (grey) or 3 (RGB)")
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")
