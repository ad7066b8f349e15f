"""What both kinds of local training have in common: a model, its first weights, a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffusion.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from diffusion.model import build_model, initialise, to_vector
from silo.data.cache import Labels, cached_labels, check_classes
from study.plan import Plan

Images = NDArray[np.uint8]
SAVE_EVERY = 100


def first_model(plan: Plan) -> nn.Module:
    """The model that every site derives from the plan's seed."""
    model = build_model(plan.model)
    initialise(model, plan.study.seed)
    return model


def model_sha256(model: nn.Module) -> bytes:
    """SHA-256 of the model as it travels: its flat vector, float32, little-endian."""
    return hashlib.sha256(to_vector(model).astype("<f4").tobytes()).digest()


def read_images(path: Path) -> Images:
    """uint8 (n, c, h, w), mapped into memory."""
    images: Images = np.load(path, mmap_mode="r")
    return images


def read_labels(plan: Plan, images: Path) -> Labels | None:
    """The labels beside the images: int64 (n,), None for an unconditional model.

    Raises DataError where a conditional one has images without labels, or with too many classes.
    """
    if plan.model.classes is None:
        return None
    labels = cached_labels(images.parent)
    check_classes(plan.model.classes, labels)
    return labels


def resume_from(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`; none where there is none, or none that can be read: then the work
    starts over, which costs time and nothing else."""
    try:
        return read_checkpoint(path) if path.exists() else None
    except CheckpointError:
        path.unlink()
        return None


def save_to(path: Path, checkpoint: Checkpoint) -> None:
    write_checkpoint(path, checkpoint)
