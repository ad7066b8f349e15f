"""What the agent asks of its worker, and what comes back: plain values, so that no torch is here.

Large things travel as files. Every order says where its checkpoint is; an order that is given
again after a crash goes on from there and ends in the same result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from silo.data.items import AS_THE_FILES_SAY, Reading

R_co = TypeVar("R_co", covariant=True)


class Order(Generic[R_co]):
    """An order whose answer is an R."""


@dataclass(frozen=True)
class Machine:
    """What the worker may use; see [resources] in site.toml."""

    device: str | None
    threads: int | None
    processes: int = 1
    """Of training: one per GPU."""

    @property
    def threads_each(self) -> int | None:
        """CPU threads of each training process."""
        if self.processes == 1:
            return self.threads
        return max(1, (self.threads or os.cpu_count() or 1) // self.processes)


@dataclass(frozen=True)
class CacheImages(Order[Path]):
    """Read the institution's images into the uint8 cache; the answer is the cache's folder."""

    source: Path
    format: str
    image_size: int
    channels: int
    caches: Path
    reading: Reading = AS_THE_FILES_SAY
    processes: int = 1


@dataclass(frozen=True)
class TrainRound(Order["RoundTrained"]):
    """Train from the input model and encode the weighted delta."""

    machine: Machine
    plan: str
    """Canonical TOML."""
    round: int
    silos: int
    silo: int
    """This one's index in the roster."""
    work: bytes
    """Canonical JSON of a RoundWork."""
    model: Path
    """The input model: flat float32, little-endian; its file is named by its SHA-256."""
    images: Path
    """uint8 .npy (n, c, h, w)."""
    auxiliary: Path | None
    """Auxiliary images to train on as well, where the strategy wants that: one record after the
    other, (label and) pixels."""
    auxiliary_sheet: Path
    """Where a person finds a picture of those images; made once."""
    count: int
    """Coarse count: the weight of this silo."""
    seed: int
    residual: Path
    """What earlier rounds left out; may be missing."""
    vector: Path
    """Where the ring words go."""
    new_residual: Path
    """Where the residual goes that counts once the vector is in a sum."""
    control: Path
    """This silo's control variate, of strategies that have one; may be missing."""
    new_control: Path
    """Where the control variate goes that counts once the vector is in a sum."""
    checkpoint: Path


@dataclass(frozen=True)
class RoundTrained:
    """For the site's own log; the sum holds the same, hidden among the others."""

    loss: float
    saturated: int
    fault: bool
    """The delta (or loss) was not finite; zeros were encoded, with a flag."""
    void: bool
    """The input model cannot be trained, here or anywhere: the sum was made unreadable."""
    first_bad_step: int | None


@dataclass(frozen=True)
class TrainLocal(Order["LocalTrained"]):
    """Train the local DDPM that auxiliary images are sampled from."""

    machine: Machine
    plan: str
    images: Path
    seed: int
    weights: Path
    """Where the moving average of the weights goes: float32 .npy."""
    checkpoint: Path


@dataclass(frozen=True)
class LocalTrained:
    """For the site's own log."""

    loss: float
    first_bad_step: int | None


@dataclass(frozen=True)
class SampleLocal(Order["Sampled"]):
    """Draw images from the local DDPM and audit them against the training images."""

    machine: Machine
    plan: str
    images: Path
    weights: Path
    seed: int
    first: int
    """Number of the first sample: the same seed and number is the same image."""
    samples: int
    kept: Path
    """Where those that passed go: uint8 .npy, (n, c, h, w), or (n, 2 + c·h·w) with their labels."""


@dataclass(frozen=True)
class Sampled:
    """The audit's figures; they stay at the site."""

    samples: int
    kept: int
    threshold: float


@dataclass(frozen=True)
class FeatureMoments(Order["MomentsSummed"]):
    """Sum features of the real images and encode count, sum and outer products."""

    machine: Machine
    silos: int
    work: bytes
    """Canonical JSON of a MomentsWork."""
    images: Path
    vector: Path
    feature_files: tuple[Path, ...] = ()
    """Networks that do not ship; see [policy] in site.toml."""


@dataclass(frozen=True)
class EvaluateModel(Order["Evaluated"]):
    """Compare a model and samples of it with the real images, and encode the measures."""

    machine: Machine
    plan: str
    silos: int
    work: bytes
    """Canonical JSON of an EvaluationWork."""
    model: Path
    """Flat float32, little-endian."""
    samples: Path
    """uint8, (c, h, w) each, one after the other."""
    images: Path
    vector: Path
    feature_files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """For the site's own log; the sum holds the same, hidden among the others."""

    kid: float
    coverage: float
    copies: float
    loss: float
    fault: bool
    """There are too few images here, or the model's loss is not finite: zeros, with a flag."""


@dataclass(frozen=True)
class MomentsSummed:
    """How much did not fit the bound that the study set."""

    clipped: int


@dataclass(frozen=True)
class PublishModel(Order[Path]):
    """Turn the study's final model into a folder that diffusers loads."""

    machine: Machine
    plan: str
    model: Path
    folder: Path


@dataclass(frozen=True)
class MeasureTraining(Order["Measured"]):
    """Name the device, and take a few training steps of a plan, if there is one, on noise."""

    machine: Machine
    plan: str | None


@dataclass(frozen=True)
class Measured:
    """What was found."""

    device: str | None
    trouble: str
    """Why there is no device."""
    seconds_per_step: float = 0.0
    tensors: int = 0
    """Of the plan's model."""
    peak_mib: int = 0
    """Most memory of the process."""
