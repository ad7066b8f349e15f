"""The DDPM loss as a measurement: fixed images, fixed timesteps, fixed noise.

With common random numbers the loss of two models differs by the models alone, so that the
improvement from round to round (the trigger of FedDDPM+) is far less noisy than the losses
themselves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffusion.execution import Execution
from diffusion.labels import Labels, check_labels
from diffusion.schedule import alpha_bar
from diffusion.spec import ObjectiveSpec, ScheduleSpec
from kernels import ddpm_loss, q_sample
from kernels.noise import derive_key, timesteps

Images = NDArray[np.uint8]


@torch.no_grad()
def loss_table(
    model: nn.Module,
    images: Images,
    *,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
    bins: int = 10,
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """Loss of every image (uint8 (n, c, h, w)) in every bin of timesteps: float32 (n, bins).

    Bin j covers t = ⌊jT/bins⌋ … ⌊(j + 1)T/bins⌋ − 1. Image i is given one timestep and one noise
    in each bin, functions of (seed, i, j). A conditional model is given every image's label (int64
    (n,)).

    Raises ValueError when there are more bins than timesteps, and for labels that do not fit.
    """
    steps = schedule.num_train_timesteps
    if not 1 <= bins <= steps:
        raise ValueError(f"bins = {bins} must be between 1 and num_train_timesteps = {steps}")
    check_labels(model, labels, len(images), null=True)
    execution.place(model)
    model.eval()
    device = execution.device
    bars = alpha_bar(schedule).to(device)
    noise_key = torch.tensor([derive_key(seed, "loss noise")], device=device)
    timestep_key = torch.tensor([derive_key(seed, "loss timesteps")], device=device)
    table = np.empty((len(images), bins), dtype=np.float32)
    for start in range(0, len(images), batch_size):
        x_0 = torch.tensor(images[start : start + batch_size], device=device)
        row = torch.arange(start, start + len(x_0), device=device)
        known = None
        if labels is not None:
            known = torch.tensor(labels[start : start + len(x_0)], device=device)
        for j in range(bins):
            low, high = j * steps // bins, (j + 1) * steps // bins
            step = torch.tensor([j], device=device)
            t = low + timesteps(high - low, key=timestep_key, sample_id=row, step=step)
            x_t = q_sample(x_0, t, bars, key=noise_key, sample_id=row, step=step)
            losses = ddpm_loss(
                execution.predict(model, x_t, t, known),
                x_0,
                t,
                bars,
                key=noise_key,
                sample_id=row,
                step=step,
                objective=objective.prediction,
                snr_gamma=objective.snr_gamma,
            )
            table[start : start + len(x_0), j] = losses.cpu().numpy()
    return table


def fixed_loss(
    model: nn.Module,
    images: Images,
    *,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
    bins: int = 10,
) -> float:
    """Mean of `loss_table`: an estimate of the DDPM loss that is comparable between models."""
    table = loss_table(
        model,
        images,
        schedule=schedule,
        objective=objective,
        seed=seed,
        execution=execution,
        labels=labels,
        bins=bins,
    )
    return float(table.mean(dtype=np.float64))


def loss_curve(table: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean loss per timestep bin of a `loss_table`: float64 (bins,)."""
    curve: NDArray[np.float64] = table.mean(axis=0, dtype=np.float64)
    return curve
