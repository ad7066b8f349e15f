"""Labelled synthetic digits: what guidance does, and what a classifier learns from them.

    python -m benchmarks.conditional [--steps 2500] [--seed 0]

One conditional model, trained on the 1,500 digits that silos get (all of them in one place: this
is about guidance, not about federation), its moving average sampled with several scales. Per scale:
FID and coverage of 1,000 samples, as many of each class, and the accuracy on 297 held-out real
digits of a classifier trained on those samples alone. The bar is the same classifier trained on
real digits. Prints a Markdown table.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

from diffusion.classifier import synthetic_to_real
from diffusion.coverage import coverage
from diffusion.execution import choose_execution
from diffusion.features.holdout import holdout_split
from diffusion.features.network import load_feature_network
from diffusion.frechet import fid, moments
from diffusion.labels import even_labels
from diffusion.model import build_model, initialise, load_vector
from diffusion.sampling import sample
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec, ScheduleSpec
from diffusion.training import train

CLASSES, SAMPLES = 10, 1000
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
MODEL = ModelSpec(
    image_size=8,
    block_out_channels=(16, 32),
    attention=(False, False),
    attention_head_dim=16,
    classes=CLASSES,
)
SCHEDULE, OBJECTIVE = ScheduleSpec(), ObjectiveSpec(label_dropout=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    rows, held_out = holdout_split(len(images))
    real, unseen = (images[rows], labels[rows]), (images[held_out], labels[held_out])
    execution = choose_execution("cpu", threads=1)
    model = build_model(MODEL)
    initialise(model, arguments.seed)
    trained = train(
        model,
        real[0],
        labels=real[1],
        steps=arguments.steps,
        schedule=SCHEDULE,
        objective=OBJECTIVE,
        optimizer=OptimizerSpec(),
        seed=arguments.seed,
        execution=execution,
    )
    load_vector(model, trained.ema)
    network = load_feature_network("digits")
    center = network.public_center()
    features = network.extract(real[0])
    reference = moments(features, center)
    wanted = even_labels(SAMPLES, CLASSES)
    print("| trained on | FID | coverage | accuracy on real digits |\n|---|---|---|---|")
    bar = synthetic_to_real(real, unseen, CLASSES)
    print(f"| 1,500 real digits | – | – | {bar:.1%} |", flush=True)
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
        print(
            f"| samples, guidance {scale} | {distance:.3f} | {near:.2f} | {score:.1%} |", flush=True
        )


if __name__ == "__main__":
    main()
