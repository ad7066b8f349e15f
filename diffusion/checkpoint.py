"""Everything a training run needs to go on as if it had never stopped, as one safetensors file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Vector = NDArray[np.float32]


class CheckpointError(ValueError):
    """A checkpoint cannot be read; delete it and the round starts from the global model again."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `steps` = len(losses) steps of one call of `train`; vectors as in `to_vector`."""

    parameters: Vector
    first_moment: Vector
    second_moment: Vector
    ema: Vector
    losses: Vector
    gradient_sum: Vector

    @property
    def steps(self) -> int:
        """Steps done so far."""
        return len(self.losses)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace `path` by the new checkpoint; a crash leaves either the old one or the new one."""
    names = [field.name for field in fields(Checkpoint)]
    partial = path.with_name(path.name + ".partial")
    save_file({name: getattr(checkpoint, name) for name in names}, partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; raises CheckpointError if it is not a whole one."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    names = {field.name for field in fields(Checkpoint)}
    if tensors.keys() != names or any(t.dtype != np.float32 for t in tensors.values()):
        raise CheckpointError(f"{path} is not a checkpoint of this version: delete it")
    return Checkpoint(**tensors)


def resume_from(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`; none where there is none, or none that can be read: then the work
    starts over, which costs time and nothing else."""
    try:
        return read_checkpoint(path) if path.exists() else None
    except CheckpointError:
        return None
