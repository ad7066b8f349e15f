"""Labelled synthetic digits: what guidance does, and what a classifier learns from them.

    python -m benchmarks.conditional [--steps 2500] [--seed 0] [--json PATH]
    python -m benchmarks.conditional --rounds 20

One conditional model of the 1,500 digits that silos get: trained in one place, its moving average
sampled, or with --rounds by FedAvg over five silos of two classes each, a hundred local steps a
round, equal weights and no secure sum (which adds rounding only). Per guidance scale: FID and
coverage of 1,000 samples, as many of each class, and the accuracy on 297 held-out real digits of a
classifier trained on those samples alone. The bar is the same classifier trained on real digits.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from benchmarks.measure import Report, command
from diffusion.classifier import synthetic_to_real
from diffusion.coverage import coverage
from diffusion.execution import choose_execution
from diffusion.features.holdout import holdout_split
from diffusion.features.network import load_feature_network
from diffusion.frechet import fid, moments
from diffusion.labels import even_labels
from diffusion.model import build_model, initialise, load_vector, to_vector
from diffusion.sampling import sample
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec, ScheduleSpec
from diffusion.training import train

Images, Labels, Vector = NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]

CLASSES, SAMPLES, LOCAL_STEPS = 10, 1000, 100
SCALES = (1.0, 1.5, 2.0, 3.0)
MODEL = ModelSpec(
    image_size=8,
    block_out_channels=(16, 32),
    attention=(False, False),
    attention_head_dim=16,
    classes=CLASSES,
)
SCHEDULE, OBJECTIVE = ScheduleSpec(), ObjectiveSpec(label_dropout=0.1)


def trained(
    start: Vector, data: tuple[Images, Labels], steps: int, seed: int
) -> tuple[Vector, Vector]:
    """(last weights, moving average) of a model that was trained on one place's digits."""
    model = build_model(MODEL)
    load_vector(model, start)
    result = train(
        model,
        data[0],
        labels=data[1],
        steps=steps,
        schedule=SCHEDULE,
        objective=OBJECTIVE,
        optimizer=OptimizerSpec(),
        seed=seed,
        execution=choose_execution("cpu", threads=1),
    )
    return to_vector(model), result.ema


def federated(start: Vector, data: tuple[Images, Labels], rounds: int, seed: int) -> Vector:
    """FedAvg over five silos, of which silo i has the classes 2i and 2i + 1."""
    images, labels = data
    silos = [(images[labels // 2 == i], labels[labels // 2 == i]) for i in range(CLASSES // 2)]
    theta = start
    for round in range(rounds):
        numbers = (seed + 1000 * round + i + 1 for i in range(len(silos)))
        ends = [
            trained(theta, silo, LOCAL_STEPS, n)[0] for silo, n in zip(silos, numbers, strict=True)
        ]
        theta = np.mean(ends, axis=0, dtype=np.float64).astype(np.float32)
    return theta


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="of FedAvg, instead of training in one place")
    parser.add_argument("--json", help="write the table there as well")
    arguments = parser.parse_args()
    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    rows, held_out = holdout_split(len(images))
    real, unseen = (images[rows], labels[rows]), (images[held_out], labels[held_out])
    execution = choose_execution("cpu", threads=1)
    model = build_model(MODEL)
    initialise(model, arguments.seed)
    if arguments.rounds is None:
        load_vector(model, trained(to_vector(model), real, arguments.steps, arguments.seed)[1])
    else:
        load_vector(model, federated(to_vector(model), real, arguments.rounds, arguments.seed))
    network = load_feature_network("digits")
    center = network.public_center()
    features = network.extract(real[0])
    reference = moments(features, center)
    wanted = even_labels(SAMPLES, CLASSES)
    report = Report("what a classifier learns from labelled samples, by guidance")
    report.commands.append(command())
    bar = synthetic_to_real(real, unseen, CLASSES)
    report.row(**_row("1,500 real digits", None, None, bar))
    for scale in SCALES:
        drawn = sample(
            model,
            SAMPLES,
            labels=wanted,
            schedule=SCHEDULE,
            objective=OBJECTIVE,
            sampler=SamplerSpec(guidance=scale),
            seed=arguments.seed + 1,
            execution=execution,
        )
        found = network.extract(drawn)
        distance, near = fid(reference, moments(found, center)), coverage(features, found)
        score = synthetic_to_real((drawn, wanted), unseen, CLASSES)
        report.row(**_row(f"samples, guidance {scale:g}", distance, near, score))
    report.finish(arguments.json)


def _row(
    trained_on: str, distance: float | None, near: float | None, score: float
) -> dict[str, str | float | None]:
    return {
        "trained on": trained_on,
        "FID": None if distance is None else round(distance, 4),
        "coverage": None if near is None else round(near, 3),
        "accuracy on real digits": round(score, 3),
    }


if __name__ == "__main__":
    main()
