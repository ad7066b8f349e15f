"""Local training of the DDPM: a loop that fits on a screen, resumable at every step.

    L(theta) = E_{x_0, t, eps} w(t)·mean((f_theta(x_t, t) − target)²)
    g        = clip(∇L)  [+ mu·(theta − anchor), FedProx]  [+ c − c_i, SCAFFOLD]

Batches, timesteps and noise are functions of (seed, step), so that a run which was interrupted and
resumed from its checkpoint ends in the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffusion.batches import BatchOrder
from diffusion.checkpoint import Checkpoint
from diffusion.ema import ema_decay, update_ema
from diffusion.execution import Execution
from diffusion.model import Vector, join_vector, load_vector, parameters, split_vector
from diffusion.schedule import alpha_bar
from diffusion.spec import ObjectiveSpec, OptimizerSpec, ScheduleSpec
from kernels import ddpm_loss, q_sample
from kernels.noise import derive_key, timesteps

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` did; the trained weights are in the model."""

    loss_per_step: Vector
    """Mean loss of each batch, before its update: float32 (steps,)."""
    ema: Vector
    """Moving average of the weights, in the order of `parameter_layout`."""
    mean_gradient: Vector | None
    """Mean clipped loss gradient over the steps (SCAFFOLD's next c_i); None without `control`."""

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.loss_per_step)

    @property
    def loss_sum(self) -> float:
        """Sum of the batch losses in float64."""
        return float(self.loss_per_step.sum(dtype=np.float64))

    @property
    def first_non_finite_step(self) -> int | None:
        """First step whose loss was NaN or infinite, None if all were finite."""
        bad = np.flatnonzero(~np.isfinite(self.loss_per_step))
        return int(bad[0]) if len(bad) else None


def train(
    model: nn.Module,
    images: Images,
    *,
    steps: int,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    optimizer: OptimizerSpec,
    seed: int,
    execution: Execution,
    first_step: int = 0,
    ema: Vector | None = None,
    proximal: tuple[Vector, float] | None = None,
    control: Vector | None = None,
    progress: Callable[[int, float], None] | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    save_every: int = 100,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Take `steps` steps of AdamW on `images` (uint8 (n, c, h, w), array or memmap), in place.

    first_step   number of the first step within the whole training: batches, noise, learning-rate
                 warm-up and EMA ramp go on from there
    ema          the moving average so far; None starts it at the model's weights
    proximal     (anchor, mu) of FedProx (arXiv 1812.06127)
    control      c − c_i of SCAFFOLD (arXiv 1910.06378), added to every gradient
    progress     called with (steps done, loss of the last batch) after every step
    save         called with a Checkpoint every `save_every` steps, not after the last
    resume       a Checkpoint of this very call: same model, data, seed and specs

    A loss that is not finite does not stop the run; `TrainResult.first_non_finite_step` reports it.
    Raises ValueError for images of another shape or dtype than the model's.
    """
    _check_images(images)
    run = _Run(model, schedule, objective, optimizer, seed, execution, ema)
    run.correct_by(proximal, control)
    losses = run.resume(resume) if resume else []
    order = BatchOrder(len(images), optimizer.batch_size, seed)
    for done in range(len(losses), steps):
        step = first_step + done
        x_0 = torch.from_numpy(images[order.indices(step)]).to(execution.device)
        losses.append(run.step(x_0, step))
        if progress:
            progress(done + 1, float(losses[-1]))
        if save and (done + 1) % save_every == 0 and done + 1 < steps:
            save(run.checkpoint(losses))
    return run.result(losses)


def _check_images(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}: give uint8 of shape (n, c, h, w)"
        )


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self,
        model: nn.Module,
        schedule: ScheduleSpec,
        objective: ObjectiveSpec,
        optimizer: OptimizerSpec,
        seed: int,
        execution: Execution,
        ema: Vector | None,
    ) -> None:
        execution.place(model)
        device = execution.device
        self.model, self.execution = model.train(), execution
        self.objective, self.optimizer = objective, optimizer
        self.parameters = parameters(model)
        self.adamw = _adamw(self.parameters, optimizer)
        self.ema = [p.detach().clone() for p in self.parameters]
        if ema is not None:
            _copy_into(self.ema, split_vector(model, ema))
        self.alpha_bar = alpha_bar(schedule).to(device)
        self.noise_key = torch.tensor([derive_key(seed, "training noise")], device=device)
        self.timestep_key = torch.tensor([derive_key(seed, "training timesteps")], device=device)
        self.sample_id = torch.arange(optimizer.batch_size, device=device)
        self.anchor: list[torch.Tensor] = []
        self.mu = 0.0
        self.control: list[torch.Tensor] = []
        self.gradient_sum: list[torch.Tensor] = []

    def correct_by(self, proximal: tuple[Vector, float] | None, control: Vector | None) -> None:
        if proximal is not None:
            self.anchor, self.mu = self._on_device(proximal[0]), proximal[1]
        if control is not None:
            self.control = self._on_device(control)
            self.gradient_sum = [torch.zeros_like(p) for p in self.parameters]

    def step(self, x_0: torch.Tensor, step: int) -> torch.Tensor:
        loss = self._loss(x_0, torch.tensor([step], device=x_0.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optimizer.gradient_clip)
        self._correct_gradient()
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(step, self.optimizer)
        self.adamw.step()
        self.adamw.zero_grad()
        decay = ema_decay(step, self.optimizer.ema_decay, self.optimizer.ema_ramp)
        update_ema(self.ema, self.parameters, decay)
        return loss.detach()

    def _loss(self, x_0: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        key, table, row = self.noise_key, self.alpha_bar, self.sample_id
        t = timesteps(len(table), key=self.timestep_key, sample_id=row, step=step)
        x_t = q_sample(x_0, t, table, key=key, sample_id=row, step=step)
        prediction = self.execution.predict(self.model, x_t, t)
        return ddpm_loss(
            prediction,
            x_0,
            t,
            table,
            key=key,
            sample_id=row,
            step=step,
            objective=self.objective.prediction,
            snr_gamma=self.objective.snr_gamma,
        ).mean()

    @torch.no_grad()
    def _correct_gradient(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.gradient_sum:
            torch._foreach_add_(self.gradient_sum, gradients)
            torch._foreach_add_(gradients, self.control)
        if self.anchor:
            drift = torch._foreach_sub(list(self.parameters), self.anchor)
            torch._foreach_add_(gradients, drift, alpha=self.mu)

    def checkpoint(self, losses: list[torch.Tensor]) -> Checkpoint:
        state = [self.adamw.state[p] for p in self.parameters]
        return Checkpoint(
            parameters=join_vector(self.parameters),
            first_moment=join_vector([s["exp_avg"] for s in state]),
            second_moment=join_vector([s["exp_avg_sq"] for s in state]),
            ema=join_vector(self.ema),
            losses=torch.stack(losses).cpu().numpy(),
            gradient_sum=join_vector(self.gradient_sum or [torch.empty(0)]),
        )

    def resume(self, checkpoint: Checkpoint) -> list[torch.Tensor]:
        load_vector(self.model, checkpoint.parameters)
        _copy_into(self.ema, split_vector(self.model, checkpoint.ema))
        if self.gradient_sum:
            _copy_into(self.gradient_sum, split_vector(self.model, checkpoint.gradient_sum))
        first = self._on_device(checkpoint.first_moment)
        second = self._on_device(checkpoint.second_moment)
        for parameter, m, v in zip(self.parameters, first, second, strict=True):
            steps = torch.tensor(float(checkpoint.steps), device=parameter.device)
            self.adamw.state[parameter] = {"step": steps, "exp_avg": m, "exp_avg_sq": v}
        return list(torch.tensor(checkpoint.losses))

    def result(self, losses: list[torch.Tensor]) -> TrainResult:
        mean_gradient = None
        if self.gradient_sum:
            mean_gradient = join_vector(self.gradient_sum) / np.float32(max(len(losses), 1))
        per_step = torch.stack(losses).cpu().numpy() if losses else np.empty(0, dtype=np.float32)
        return TrainResult(per_step, join_vector(self.ema), mean_gradient)

    def _on_device(self, vector: Vector) -> list[torch.Tensor]:
        """`vector` cut up like the parameters, in their memory layout."""
        copies = [torch.empty_like(p) for p in self.parameters]
        _copy_into(copies, split_vector(self.model, vector))
        return copies


def learning_rate(step: int, optimizer: OptimizerSpec) -> float:
    """Rises linearly over the warm-up, then stays."""
    return optimizer.learning_rate * min(1.0, (step + 1) / (optimizer.warmup_steps + 1))


def _adamw(parameters: list[nn.Parameter], optimizer: OptimizerSpec) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )


@torch.no_grad()
def _copy_into(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
