"""What a reader yields: an image as its file has it, or a file that is none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from silo.data.pixels import Pixels, fit, fit_array


@dataclass(frozen=True)
class Skipped:
    """A file, or a place in one, that gave no image. Names stay at the site."""

    name: str
    reason: str


@dataclass(frozen=True)
class Item:
    """An image of its own size: uint8 (h, w) or (h, w, 3), or Pillow's."""

    name: str
    image: NDArray[np.uint8] | Image.Image
    label: int | None = None
    """Number of its class, from 0; None where the source does not say."""

    @property
    def shape(self) -> str:
        """Width × height × channels, as people say it."""
        if isinstance(self.image, Image.Image):
            return f"{self.image.width}×{self.image.height}×{len(self.image.getbands())}"
        channels = self.image.shape[2] if self.image.ndim == 3 else 1
        return f"{self.image.shape[1]}×{self.image.shape[0]}×{channels}"

    def fit(self, size: int, channels: int) -> Pixels:
        """uint8 (channels, size, size), as `silo.data.pixels` says."""
        if isinstance(self.image, Image.Image):
            return fit(self.image, size, channels)
        return fit_array(self.image, size, channels)
