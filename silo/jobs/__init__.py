"""What the worker process does: one file per kind of order. All but reading images need torch."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from silo.orders import (
    CacheImages,
    EvaluateModel,
    FeatureMoments,
    MeasureTraining,
    Order,
    PublishModel,
    SampleLocal,
    TrainLocal,
    TrainRound,
)
from silo.worker import ProgressFile

R = TypeVar("R")


def _one_of_several() -> bool:
    """Whether this process is one of several that train together."""
    return "WORLD_SIZE" in os.environ


def execute(order: Order[R], progress: ProgressFile) -> R:
    """The answer to an order. What it needs is imported now: a census waits for no torch."""
    answer: Any
    match order:
        case TrainRound() | TrainLocal() if order.machine.processes > 1 and not _one_of_several():
            from silo.jobs.together import run_together

            folder = order.checkpoint.parent
            answer = run_together(order, progress, order.machine.processes, folder)
        case CacheImages():
            from silo.jobs.images import cache_images

            answer = cache_images(order, progress)
        case TrainRound():
            from silo.jobs.round import train_round

            answer = train_round(order, progress)
        case TrainLocal():
            from silo.jobs.local import train_local

            answer = train_local(order, progress)
        case SampleLocal():
            from silo.jobs.local import sample_local

            answer = sample_local(order, progress)
        case FeatureMoments():
            from silo.jobs.moments import feature_moments

            answer = feature_moments(order, progress)
        case EvaluateModel():
            from silo.jobs.evaluation import evaluate_model

            answer = evaluate_model(order, progress)
        case PublishModel():
            from silo.jobs.publish import publish_model

            answer = publish_model(order)
        case MeasureTraining():
            from silo.jobs.measure import measure_training

            answer = measure_training(order, progress)
        case _:
            raise TypeError(f"no job for {type(order).__name__}")
    result: R = answer
    return result
