"""What the worker computes with torch: each function runs in the child process.

Arguments and results are small; models and images travel as files. torch is imported inside the
functions, because the service imports this module for their names and must stay without it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation import summed_moments
from study.plan import Plan, load_plan
from study.quantity import MomentsWork

if TYPE_CHECKING:
    from torch import nn

    from diffusion.execution import Execution

_MODEL = np.dtype("<f4")
# Images of a study's grids are numbers 0, 1, … of one seed, so that grids of different rounds show
# the same noise turned into images by different models; those that FID measures come after.
_FIRST_MEASURED = 1_000_000
# Those that judge a correction are others: what is shown must not be what was chosen by.
_FIRST_JUDGED = 2_000_000


@dataclass(frozen=True)
class Machine:
    """Where to compute."""

    device: str | None
    threads: int | None

    def execution(self) -> Execution:
        from diffusion.execution import choose_execution

        return choose_execution(self.device, self.threads)


def first_model(plan_text: str, out: Path) -> list[int]:
    """The model that the plan's seed gives, written to `out`; the sizes of its tensors."""
    from diffusion.model import build_model, initialise, parameter_layout, to_vector

    plan = load_plan(plan_text)
    model = build_model(plan.model)
    initialise(model, plan.study.seed)
    to_vector(model).astype(_MODEL).tofile(out)
    return [math.prod(shape) for _, shape, _ in parameter_layout(model)]


def draw_grid(machine: Machine, plan_text: str, model: Path, images: int, png: Path) -> None:
    """A grid of samples of the model, as PNG."""
    from diffusion.sampling import grid_png

    plan = load_plan(plan_text)
    drawn = _samples(machine, plan, _load(plan, model), images, first=0)
    png.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not there, also where a job is done again while an earlier one still ends.
    partial = png.with_name(f".{os.getpid()}-{png.name}")
    grid_png(drawn, partial)
    os.replace(partial, png)


def write_pipeline(plan_text: str, model: Path, folder: Path) -> None:
    """The folder that diffusers.DDPMPipeline.from_pretrained loads."""
    from diffusion.model import save_pipeline

    plan = load_plan(plan_text)
    partial = folder.with_name(f".{os.getpid()}-{folder.name}")
    save_pipeline(partial, _load(plan, model), plan.schedule, plan.objective)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def held_out_loss(
    machine: Machine, plan_text: str, model: Path, images: Path, labels: Path | None
) -> float:
    """DDPM loss on auxiliary images (.npy, uint8 [n, c, h, w]) with labels (.npy, int64 [n]) where
    the model is conditional; timesteps and noise are fixed."""
    from diffusion.loss import fixed_loss

    plan = load_plan(plan_text)
    return fixed_loss(
        _load(plan, model),
        np.load(images),
        schedule=plan.schedule,
        objective=plan.objective,
        seed=plan.study.seed,
        execution=machine.execution(),
        labels=_labels(labels),
    )


def correct(
    machine: Machine,
    plan_text: str,
    model: Path,
    images: Path,
    labels: Path | None,
    steps: int,
    learning_rate: float,
    average: bool,
    round: int,
    seconds: float,
    kept: Path,
    out: Path,
) -> tuple[int, float]:
    """Optimise the model on auxiliary images for so many seconds, on from where `kept` is; the
    steps done by now, and the mean training loss.

    After the last of them the model (or, to `average`, the moving average of its weights) is in
    `out`, before that what it takes to go on is in `kept`. In however many parts, it ends in the
    same bits.
    """
    from diffusion.calibration import calibrate
    from diffusion.checkpoint import Checkpoint, resume_from, write_checkpoint
    from diffusion.model import to_vector

    def keep(checkpoint: Checkpoint) -> bool:
        # Beside `out`, a name of this process's: that of one that was taken over from may be at it.
        write_checkpoint(out, checkpoint)
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(out, kept)
        return True

    until = time.monotonic() + seconds
    plan = load_plan(plan_text)
    network = _load(plan, model)
    result = calibrate(
        network,
        np.load(images),
        steps=steps,
        learning_rate=learning_rate,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer,
        seed=plan.study.seed + round,
        execution=machine.execution(),
        labels=_labels(labels),
        save=keep,
        save_now=lambda: time.monotonic() >= until,
        resume=resume_from(kept),
    )
    if result.steps == steps:
        corrected = result.ema if average else to_vector(network)
        corrected.astype(_MODEL).tofile(out)
    return result.steps, result.loss_sum / result.steps


def feature_dimension(network: str, sha256: str, files: Sequence[Path]) -> int:
    """d of a feature network; raises FeatureFileError unless its weights are the ones pinned."""
    from diffusion.features.file import FEATURES
    from diffusion.features.network import load_feature_network

    load_feature_network(network, sha256, files)
    return FEATURES


def draw_samples(machine: Machine, plan_text: str, model: Path, out: Path) -> None:
    """The samples that the plan evaluates: uint8 (c, h, w) each, one after the other."""
    plan = load_plan(plan_text)
    if plan.evaluation is None:
        raise ValueError("the plan has no [evaluation]")
    images = plan.evaluation.samples
    _samples(machine, plan, _load(plan, model), images, first=_FIRST_MEASURED).tofile(out)


def frechet_distance(
    plan_text: str,
    samples: Path,
    total: Path,
    work: dict[str, Any],
    silos: int,
    summed: int,
    files: Sequence[Path],
) -> float:
    """FID of the samples of `draw_samples` against the images of all silos, of which `total` is
    the sum of moments over `summed` silos."""
    plan = load_plan(plan_text)
    drawn = np.fromfile(samples, dtype=np.uint8).reshape(-1, *plan.data.shape)
    return _fid(drawn, total, work, silos, summed, files)


def images_distance(
    parts: list[Path],
    total: Path,
    work: dict[str, Any],
    silos: int,
    summed: int,
    files: Sequence[Path],
) -> float:
    """FID of images (.npy, uint8 [n, c, h, w]; all parts together) as `frechet_distance` has it."""
    drawn = np.concatenate([np.load(part) for part in parts])
    return _fid(drawn, total, work, silos, summed, files)


def judged_distances(
    machine: Machine,
    plan_text: str,
    models: list[Path],
    total: Path,
    work: dict[str, Any],
    silos: int,
    summed: int,
    files: Sequence[Path],
) -> list[float]:
    """The FID of each model as `frechet_distance` has it, of samples that it never sees; from the
    same noise for all of them."""
    plan = load_plan(plan_text)
    if plan.evaluation is None:
        raise ValueError("the plan has no [evaluation]")
    images, found = plan.evaluation.samples, []
    for model in models:
        drawn = _samples(machine, plan, _load(plan, model), images, first=_FIRST_JUDGED)
        found.append(_fid(drawn, total, work, silos, summed, files))
    return found


def _fid(
    drawn: NDArray[np.uint8],
    total: Path,
    work: dict[str, Any],
    silos: int,
    summed: int,
    files: Sequence[Path],
) -> float:
    from diffusion.features.network import load_feature_network
    from diffusion.frechet import fid, moments

    asked = MomentsWork.model_validate(work)
    network = load_feature_network(asked.network, asked.sha256, files)
    center = network.public_center().astype(np.float64)
    real, _, _ = summed_moments(total.read_bytes(), asked, silos, summed, center)
    return fid(real, moments(network.extract(drawn), center))


def _samples(
    machine: Machine, plan: Plan, model: nn.Module, images: int, *, first: int
) -> NDArray[np.uint8]:
    from diffusion.labels import even_labels
    from diffusion.sampling import sample

    classes = plan.model.classes
    return sample(
        model,
        images,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=plan.study.seed,
        execution=machine.execution(),
        labels=None if classes is None else even_labels(images, classes),
        first_index=first,
    )


def _labels(path: Path | None) -> NDArray[np.int64] | None:
    return None if path is None else np.load(path)


def _load(plan: Plan, path: Path) -> nn.Module:
    from diffusion.model import build_model, load_vector

    model = build_model(plan.model)
    load_vector(model, np.fromfile(path, dtype=_MODEL).astype(np.float32, copy=False))
    return model
