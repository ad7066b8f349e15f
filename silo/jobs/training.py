"""What both kinds of local training have in common: a model, its first weights, a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffusion.checkpoint import Checkpoint, write_checkpoint
from diffusion.execution import Execution, choose_execution
from diffusion.model import build_model, initialise, to_vector
from silo.data.cache import Labels, labels_of_study
from silo.errors import Paused
from silo.jobs.together import leads, own_device
from silo.orders import Machine
from silo.process import pause_requested
from silo.worker import ProgressFile
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

    Raises DataError where a conditional one has images without labels that the plan knows.
    """
    if plan.model.classes is None:
        return None
    return labels_of_study(images.parent, plan.model.classes, plan.data.class_names)


def execution_of(machine: Machine) -> Execution:
    """Device and threads of this process: of several that train together, its share."""
    return choose_execution(own_device(machine.device), machine.threads_each)


def reporting(progress: ProgressFile, activity: str, steps: int) -> Callable[[int], None] | None:
    """What reports the steps done; of several processes the first does."""
    return (lambda done: progress(activity, done, steps)) if leads() else None


def saving(path: Path) -> Callable[[Checkpoint], None] | None:
    """What keeps a checkpoint, and raises Paused where the parent wants the order to end then; of
    several processes the first does, and the others end with it."""

    def save(checkpoint: Checkpoint) -> None:
        write_checkpoint(path, checkpoint)
        pause_if_wanted()

    return save if leads() else None


def pause_if_wanted() -> None:
    """Raises Paused where the parent wants the order under way to end."""
    if pause_requested():
        raise Paused("training pauses: it goes on from its checkpoint")
