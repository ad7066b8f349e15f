"""How a model compares with the real images of one place, by samples and by its loss.

What a silo computes in an evaluated round: four measures that need the images and whose plain mean
over the silos is meaningful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffusion.audit import copy_share
from diffusion.coverage import NEIGHBOURS, coverage
from diffusion.execution import Execution
from diffusion.features.network import FeatureNetwork
from diffusion.frechet import kid
from diffusion.labels import Labels
from diffusion.loss import loss_curve, loss_table
from diffusion.spec import ObjectiveSpec, ScheduleSpec

Images = NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

COMPARED_IMAGES = 4096
"""Most real images whose features are compared, evenly spaced ones: KID and coverage of more differ
little, and take quadratic time."""
LOSS_IMAGES = 512
"""The same for the loss."""


@dataclass(frozen=True)
class Comparison:
    """Measures of one model at one place; NaN where there are too few images for one."""

    kid: float
    """Kernel distance of samples and images (`diffusion.frechet.kid`)."""
    coverage: float
    """Share of the images near a sample (`diffusion.coverage.coverage`)."""
    copies: float
    """Share of the samples that are near-copies (`diffusion.audit.copy_share`)."""
    losses: tuple[float, ...]
    """Loss by bins of timesteps, the least noisy first (`diffusion.loss.loss_curve`)."""


def compare(
    model: nn.Module,
    samples: Images,
    images: Images,
    network: FeatureNetwork,
    *,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
    bins: int = 10,
) -> Comparison:
    """`model` and `samples` of it against real `images` (uint8 (n, c, h, w), the samples alike).

    `labels` are the real images', int64 (n,), for a conditional model. Timesteps and noise of the
    loss are functions of `seed`, the same for any model. Raises ValueError as its parts do.
    """
    chosen = evenly_spaced(images, COMPARED_IMAGES)
    real, drawn = network.extract(chosen), network.extract(samples)
    enough = min(len(real), len(drawn)) > 1
    subset = evenly_spaced(images, LOSS_IMAGES)
    table = loss_table(
        model,
        subset,
        schedule=schedule,
        objective=objective,
        seed=seed,
        execution=execution,
        labels=None if labels is None else evenly_spaced(labels, LOSS_IMAGES),
        bins=bins,
    )
    return Comparison(
        kid=kid(drawn, real) if enough else math.nan,
        coverage=coverage(real, drawn) if len(real) > NEIGHBOURS else math.nan,
        copies=copy_share(samples, images) if enough else math.nan,
        losses=tuple(float(loss) for loss in loss_curve(table)),
    )


def evenly_spaced(values: NDArray[T], at_most: int) -> NDArray[T]:
    """Every s-th of the values, with the smallest s that leaves `at_most` of them."""
    return values[:: max(1, -(-len(values) // at_most))]
