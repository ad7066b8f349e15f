"""What the worker process does: one file per kind of order. This is where torch is."""

from __future__ import annotations

from typing import Any, TypeVar

from silo.jobs.images import cache_images
from silo.jobs.local import sample_local, train_local
from silo.jobs.moments import feature_moments
from silo.jobs.publish import publish_model
from silo.jobs.round import train_round
from silo.orders import (
    CacheImages,
    FeatureMoments,
    Order,
    PublishModel,
    SampleLocal,
    TrainLocal,
    TrainRound,
)
from silo.worker import ProgressFile

R = TypeVar("R")


def execute(order: Order[R], progress: ProgressFile) -> R:
    """The answer to an order."""
    answer: Any
    match order:
        case CacheImages():
            answer = cache_images(order, progress)
        case TrainRound():
            answer = train_round(order, progress)
        case TrainLocal():
            answer = train_local(order, progress)
        case SampleLocal():
            answer = sample_local(order, progress)
        case FeatureMoments():
            answer = feature_moments(order, progress)
        case PublishModel():
            answer = publish_model(order)
        case _:
            raise TypeError(f"no job for {type(order).__name__}")
    result: R = answer
    return result
