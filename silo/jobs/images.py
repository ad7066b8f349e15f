"""Reading the institution's images. Needs no torch, but may need minutes and memory."""

from __future__ import annotations

from pathlib import Path

from silo.data.cache import cache_dataset
from silo.data.dataset import open_dataset
from silo.orders import CacheImages
from silo.worker import ProgressFile


def cache_images(order: CacheImages, progress: ProgressFile) -> Path:
    progress("reading images", 0, 1)
    dataset = open_dataset(
        order.source,
        order.format,
        order.image_size,
        order.channels,
        order.reading,
        order.processes,
    )
    return cache_dataset(dataset, order.caches).folder
