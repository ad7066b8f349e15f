"""What the width of a word costs: bits × error × bytes × FID, on deltas of the demo model.

    python -m benchmarks.encoding [--silos 4] [--rounds 6] [--steps 80] [--work FOLDER]

The digits of the demonstration are split over the silos by class; each silo trains, round after
round, as its agent would, and the round's deltas are encoded, summed over the ring, decoded and
averaged, all in this process. The error is the relative L2 distance of a round's mean from float64
FedAvg of the same deltas (no residual carried in, so that it is the error of one round). Every
width then runs a study of its own, with residuals carried from round to round, and its FID is set
beside that of a study averaged in float64.

The room that `next_clips` leaves was chosen on one split and one seed of training. The targets are
measured on others, drawn afresh; the setting it was chosen on stands beside them. Deltas and what
is finished are kept in --work, and a run that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Cells, Report
from concilium.datasets import digits
from concilium.partition import dirichlet
from diffusion.execution import choose_execution
from diffusion.features.network import load_feature_network
from diffusion.frechet import fid, moments
from diffusion.model import build_model, load_vector, parameter_layout, to_vector
from diffusion.sampling import sample
from diffusion.training import train
from silo.jobs.training import first_model
from study.encoding import Encoding, next_clips
from study.integers import Ring, coarse_count
from study.plan import Plan, load_plan

Vector = NDArray[np.float32]
RINGS: tuple[Ring, ...] = (8, 16, 32)
CHOSEN_ON = 101
"""Seed of the split on which the room for silos that differ from the mean was chosen."""
FRESH = (202,)
"""Seeds of splits and of training on which nothing was chosen."""
CPU = choose_execution("cpu", 1)


@dataclass
class Study:
    """Silos with their images, and local training as the plan says."""

    plan: Plan
    images: Sequence[NDArray[np.uint8]]
    steps: int
    seed: int
    """Of the batches and of the noise at every silo."""
    counts: list[int] = field(init=False)
    sizes: tuple[int, ...] = field(init=False)
    start: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [coarse_count(len(part)) for part in self.images]
        model = first_model(self.plan)
        layout = parameter_layout(model)
        self.sizes = tuple(int(np.prod(shape, dtype=np.int64)) for _, shape, _ in layout)
        self.start = to_vector(model)

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.array(self.counts) / sum(self.counts)

    def deltas(self, vector: Vector, round: int) -> list[Vector]:
        """What each silo's training makes of the global model."""
        found = []
        for silo, images in enumerate(self.images):
            model = build_model(self.plan.model)
            load_vector(model, vector)
            train(
                model,
                images,
                steps=self.steps,
                schedule=self.plan.schedule,
                objective=self.plan.objective,
                optimizer=self.plan.optimizer_of(round),
                seed=100_000 * self.seed + 1000 * silo + round,
                execution=CPU,
                first_step=(round - 1) * self.steps,
            )
            found.append(to_vector(model) - vector)
        return found

    def mean(self, deltas: Sequence[Vector]) -> NDArray[np.float64]:
        """Float64 FedAvg."""
        pairs = zip(self.weights, deltas, strict=True)
        total: NDArray[np.float64] = sum(w * delta.astype(np.float64) for w, delta in pairs)
        return total

    def fid(self, vector: Vector, samples: int) -> float:
        """Of fresh samples, against the images of all silos."""
        assert self.plan.evaluation is not None
        network = load_feature_network(self.plan.evaluation.feature_network)
        model = build_model(self.plan.model)
        load_vector(model, vector)
        drawn = sample(
            model,
            samples,
            schedule=self.plan.schedule,
            objective=self.plan.objective,
            sampler=self.plan.sampler,
            seed=self.plan.study.seed,
            execution=CPU,
        )
        real = moments(network.extract(np.concatenate(self.images)))
        return fid(real, moments(network.extract(drawn)))


@dataclass
class Summed:
    """Sums over one ring, with the clips and residuals that each round leaves to the next."""

    study: Study
    ring: Ring
    clips: tuple[float, ...]
    residuals: list[Vector] = field(init=False)
    errors: list[float] = field(default_factory=list)
    saturated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.residuals = [np.zeros_like(self.study.start) for _ in self.study.counts]

    @property
    def encoding(self) -> Encoding:
        counts = self.study.counts
        return Encoding(self.ring, len(counts), sum(counts), self.study.sizes, self.clips)

    def add(self, deltas: Sequence[Vector], residuals: Sequence[Vector]) -> tuple[Vector, int]:
        """(decoded mean, saturated elements); the residuals are replaced by the new ones."""
        encoding, total = self.encoding, self.encoding.zeros()
        key = np.random.default_rng(len(self.errors)).bytes(32)
        for silo, (delta, residual) in enumerate(zip(deltas, residuals, strict=True)):
            count = self.study.counts[silo]
            encoded = encoding.encode(
                delta, residual, count=count, loss=0.0, key=key, silo=silo + 1
            )
            total += encoded.vector
            self.residuals[silo] = encoded.residual
        decoded = encoding.decode(total)
        return decoded.mean_delta, decoded.saturated

    def one_round(self, deltas: Sequence[Vector]) -> None:
        """Note the error of this round alone, and take its clips on to the next."""
        exact = self.study.mean(deltas)
        mean, saturated = self.add(deltas, [np.zeros_like(delta) for delta in deltas])
        self.errors.append(float(np.linalg.norm(mean - exact) / np.linalg.norm(exact)))
        self.saturated.append(saturated)
        self.clips = next_clips(mean, self.encoding)

    def whole_study(self, rounds: int) -> Vector:
        """The model after all rounds, averaged through this ring."""
        vector = self.study.start
        for round in range(1, rounds + 1):
            mean, _ = self.add(self.study.deltas(vector, round), self.residuals)
            self.clips = next_clips(mean, self.encoding)
            vector = vector + mean
        return vector


def studies(plan: Plan, silos: int, steps: int, seed: int) -> Study:
    """The digits split by class with `seed`, and training with it."""
    labelled = digits()
    parts = dirichlet(labelled.labels, silos, alpha=0.3, seed=seed)
    return Study(plan, [labelled.images[part] for part in parts], steps, seed)


def kept_deltas(
    study: Study, vector: Vector, round: int, work: pathlib.Path | None
) -> list[Vector]:
    """What training makes of the model of a float64 study: the same whatever is encoded."""
    if work is None:
        return study.deltas(vector, round)
    name = f"deltas-{len(study.counts)}-{study.steps}-{study.seed}-{round}.npy"
    if not (work / name).exists():
        np.save(work / "part.npy", np.stack(study.deltas(vector, round)))
        (work / "part.npy").replace(work / name)
    return list(np.load(work / name))


def float64_study(
    study: Study, rounds: int, samples: int | None, work: pathlib.Path | None
) -> dict[str, Any]:
    """FedAvg in float64, the error of every ring in each round, and the FID at the end."""
    first = (study.plan.first_clip,) * len(study.sizes)
    sums = {ring: Summed(study, ring, first) for ring in RINGS}
    vector = study.start
    for round in range(1, rounds + 1):
        deltas = kept_deltas(study, vector, round, work)
        for summed in sums.values():
            summed.one_round(deltas)
        vector = (vector + study.mean(deltas)).astype(np.float32)
    return {
        "errors": {str(ring): summed.errors for ring, summed in sums.items()},
        "saturated": {str(ring): sum(summed.saturated[1:]) for ring, summed in sums.items()},
        "fid": None if samples is None else study.fid(vector, samples),
    }


def ring_study(study: Study, ring: Ring, rounds: int, samples: int) -> float:
    """The FID of a study that is averaged through the ring."""
    summed = Summed(study, ring, (study.plan.first_clip,) * len(study.sizes))
    return study.fid(summed.whole_study(rounds), samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, help="folder that keeps what is finished")
    parser.add_argument("--silos", type=int, nargs="+", default=[4, 10], help="FID with the first")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=80, help="of local training, a round")
    parser.add_argument("--samples", type=int, default=300, help="that each FID is measured on")
    parser.add_argument("--no-fid", action="store_true", help="errors only")
    asked = parser.parse_args()
    plan = load_plan(files("concilium.demo").joinpath("digits.toml").read_text("utf-8"))
    parameters = to_vector(first_model(plan)).size
    report = Report(
        f"Encoding: {parameters} parameters, {asked.rounds} rounds of {asked.steps} steps, FedAvg; "
        f"FID of {asked.samples} samples with the digits network"
    )
    worst = dict.fromkeys(RINGS, 0.0)
    for silos in asked.silos:
        samples = None if asked.no_fid or silos != asked.silos[0] else asked.samples
        found = measure(plan, silos, asked.rounds, asked.steps, samples, asked.work, report)
        worst = {ring: max(worst[ring], found[ring]) for ring in RINGS}
    for ring, most in ((16, 5e-4), (32, 1e-7)):
        report.target(f"encoding_error_{ring}", worst[ring], "", at_most=most)
    report.finish(asked.json)


def measure(
    plan: Plan,
    silos: int,
    rounds: int,
    steps: int,
    samples: int | None,
    work: pathlib.Path | None,
    report: Report,
) -> dict[Ring, float]:
    """The rows of one number of silos, with FID where `samples` are given; ring → largest error of
    the fresh splits. Round 1 has the plan's constant for a clip and does not count there: from then
    on there is an aggregate to learn from."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    setting = {"silos": silos, "rounds": rounds, "steps": steps, "samples": samples}
    cells = Cells(work / f"cells-{silos}.json" if work else None, **setting)
    known, *fresh = (studies(plan, silos, steps, seed) for seed in (CHOSEN_ON, *FRESH))
    found: dict[int, dict[str, Any]] = {}
    for study in (*fresh, known):
        measured = samples if study is fresh[0] else None
        job = partial(float64_study, study, rounds, measured, work)
        found[study.seed] = cells.get(f"float64, seed {study.seed}", job)
    if samples is not None:
        seed = fresh[0].seed
        report.row(part="fid", silos=silos, bits="float64", seed=seed, fid=found[seed]["fid"])
        for ring in RINGS:
            job_of_ring = partial(ring_study, fresh[0], ring, rounds, samples)
            score = cells.get(f"{ring} bits, seed {seed}", job_of_ring)
            report.row(part="fid", silos=silos, bits=ring, seed=seed, fid=score)
    for ring in RINGS:
        for study in (known, *fresh):
            errors = found[study.seed]["errors"][str(ring)]
            report.row(
                part="errors",
                silos=silos,
                bits=ring,
                seed=study.seed,
                bytes_per_param=ring / 8,
                error_round_1=errors[0],
                error_median=float(np.median(errors[1:])),
                error_worst=max(errors[1:]),
                saturated=found[study.seed]["saturated"][str(ring)],
            )
    return {
        ring: max(max(found[study.seed]["errors"][str(ring)][1:]) for study in fresh)
        for ring in RINGS
    }


if __name__ == "__main__":
    main()
