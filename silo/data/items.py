"""What a reader yields: an image as its file has it, or a file that is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from silo.data.pixels import Pixels, fit, fit_array


@dataclass(frozen=True)
class Reading:
    """How images are read: what site.toml says about medical ones, and which part of a published
    data set."""

    window: tuple[float, float] | None = None
    """Centre and width in the units after rescale (Hounsfield for CT); None = as the file says."""
    burned_in: bool = False
    """Whether DICOM images are read that say of themselves that they have text burned in."""
    axis: str = "axial"
    """What NIfTI volumes are cut along: axial, coronal or sagittal."""
    test: bool = False
    """Whether of NPZ, IDX and CIFAR the images that the publisher set apart to test with are read,
    instead of those to train with. A silo never does."""


AS_THE_FILES_SAY = Reading()


@dataclass(frozen=True)
class Skipped:
    """A file, or a place in one, that gave no image. Names stay at the site."""

    name: str
    reason: str
    """One of a few sentences of the reader, so that they can be counted; never of the content."""


@dataclass(frozen=True)
class Source:
    """A file that holds images: one of a folder of pictures, all of an archive."""

    file: Path
    name: str
    label: int | None = None
    """The class of its images where the place of the file says so."""
    series: int = 0
    """Images of one DICOM series, or one volume, have the same number."""


@dataclass(frozen=True)
class Item:
    """An image of its own size: uint8 (h, w) or (h, w, 3), or Pillow's."""

    name: str
    image: NDArray[np.uint8] | Image.Image
    label: int | None = None
    """Number of its class, from 0; None where the source does not say."""
    series: int = 0
    """As its source's."""

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
