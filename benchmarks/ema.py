"""Which weights should a study publish? Moving averages over rounds and within them, on digits.

    python -m benchmarks.ema [--seeds 3] [--rounds 20] [--local-steps 60] [--json PATH]

FedAvg, five silos of two classes each, equal weights, no secure sum (which adds rounding only).

    raw         the aggregate θ_r
    rounds β    e_r = b_r e_{r−1} + (1 − b_r) θ_r,  b_r = min(β, (1 + r)/(10 + r)): the
                coordinator's to compute, free of any protocol
    ema deltas  every silo sends ē_i − θ_r instead of θ_i − θ_r, where ē_i is the moving average of
                its local steps, begun anew in each round

and, for comparison, one model trained on all images with as many steps as a silo takes in all, its
last weights and their moving average (decay 0.999 with the usual ramp), at the same points.

Prints the FID of 500 samples, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from benchmarks.measure import Report, command
from diffusion.execution import choose_execution
from diffusion.features.holdout import holdout_split
from diffusion.features.network import load_feature_network
from diffusion.frechet import Moments, fid, moments
from diffusion.model import build_model, initialise, load_vector, to_vector
from diffusion.sampling import sample
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec, ScheduleSpec
from diffusion.training import train

Vector = NDArray[np.float32]

MODEL = ModelSpec(
    image_size=8, block_out_channels=(16, 32), attention=(False, False), attention_head_dim=16
)
SCHEDULE, OBJECTIVE = ScheduleSpec(), ObjectiveSpec()
SAMPLER = SamplerSpec()
SILOS, SAMPLES = 5, 500
DECAYS = (0.5, 0.9)


def silo_images() -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Two classes for each of five silos, and all of them together."""
    bunch = load_digits()
    rows, _ = holdout_split(len(bunch.images))
    images = np.round(bunch.images[rows] * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target[rows]
    return [images[labels // 2 == i] for i in range(SILOS)], images


class Bench:
    """What every run has in common."""

    def __init__(self, rounds: int, local_steps: int, rate: float) -> None:
        self.rounds, self.local_steps = rounds, local_steps
        # An average over about the last third of a round; the ramp begins anew with each.
        self.optimizer = OptimizerSpec(learning_rate=rate, ema_decay=1 - 3 / local_steps)
        self.execution = choose_execution("cpu", threads=1)
        self.silos, self.images = silo_images()
        self.network = load_feature_network("digits")
        self.center = self.network.public_center()
        self.real = moments(self.network.extract(self.images), self.center)

    def moments_of(self, vector: Vector, seed: int) -> Moments:
        model = build_model(MODEL)
        load_vector(model, vector)
        drawn = sample(
            model,
            SAMPLES,
            schedule=SCHEDULE,
            objective=OBJECTIVE,
            sampler=SAMPLER,
            seed=1000 + seed,
            execution=self.execution,
        )
        return moments(self.network.extract(drawn), self.center)

    def local(self, start: Vector, silo: int, round: int, seed: int) -> tuple[Vector, Vector]:
        """(last weights, moving average) of one silo's round."""
        model = build_model(MODEL)
        load_vector(model, start)
        result = train(
            model,
            self.silos[silo],
            steps=self.local_steps,
            schedule=SCHEDULE,
            objective=OBJECTIVE,
            optimizer=self.optimizer,
            seed=seed * 1_000_003 + round * 101 + silo,
            execution=self.execution,
        )
        return to_vector(model), result.ema

    def run(self, seed: int, *, average_within: bool) -> list[Vector]:
        """The global model after each round."""
        model = build_model(MODEL)
        initialise(model, seed)
        theta, models = to_vector(model), []
        for round in range(self.rounds):
            ends = [self.local(theta, i, round, seed)[average_within] for i in range(SILOS)]
            theta = np.mean(ends, axis=0, dtype=np.float64).astype(np.float32)
            models.append(theta)
        return models

    def centralised(self, seed: int) -> tuple[list[Vector], list[Vector]]:
        """(last weights, moving averages) after as many steps as a silo has taken by each round."""
        model = build_model(MODEL)
        initialise(model, seed)
        average, ends, averages = None, [], []
        optimizer = self.optimizer.model_copy(update={"ema_decay": 0.999})
        for round in range(self.rounds):
            result = train(
                model,
                self.images,
                steps=self.local_steps,
                first_step=round * self.local_steps,
                ema=average,
                schedule=SCHEDULE,
                objective=OBJECTIVE,
                optimizer=optimizer,
                seed=seed,
                execution=self.execution,
            )
            average = result.ema
            ends.append(to_vector(model))
            averages.append(average)
        return ends, averages


def over_rounds(models: list[Vector], decay: float) -> list[Vector]:
    """The moving average after each round, as the module's docstring defines it."""
    average, averages = models[0].astype(np.float64), []
    for r, theta in enumerate(models):
        b = min(decay, (1 + r) / (10 + r))
        average = b * average + (1 - b) * theta
        averages.append(average.astype(np.float32))
    return averages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--json", help="write the table there as well")
    arguments = parser.parse_args()
    bench = Bench(arguments.rounds, arguments.local_steps, arguments.rate)
    shown = sorted({max(1, arguments.rounds * k // 4) for k in (1, 2, 3, 4)})
    table: dict[str, list[list[float]]] = {}

    def measure(kind: str, vectors: list[Vector], seed: int) -> None:
        values = [fid(bench.real, bench.moments_of(vectors[r - 1], seed)) for r in shown]
        table.setdefault(kind, []).append(values)
        print(seed, kind, [round(v, 3) for v in values], flush=True)

    for seed in range(arguments.seeds):
        ends, averages = bench.centralised(seed)
        measure("centralised, last weights", ends, seed)
        measure("centralised, moving average", averages, seed)
        for within, name in ((False, "raw"), (True, "ema deltas")):
            models = bench.run(seed, average_within=within)
            kinds = {name: models}
            kinds |= {f"{name}, rounds {d}": over_rounds(models, d) for d in DECAYS}
            for kind, vectors in kinds.items():
                measure(kind, vectors, seed)
    report = Report("FID by round of what a study could publish: mean, standard deviation")
    report.commands.append(command())
    for kind, rows in table.items():
        cells = zip(shown, np.mean(rows, axis=0), np.std(rows, axis=0), strict=True)
        of_rounds = {f"round {r}": f"{m:.3f} ± {s:.3f}" for r, m, s in cells}
        report.row(**{"published weights": kind, **of_rounds})
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
