"""Local training of the DDPM: a loop that fits on a screen, resumable at every step.

    L(theta) = E_{x_0, t, eps} w(t)·mean((f_theta(x_t, t) − target)²)
    g        = clip(∇L)  [+ mu·(theta − anchor), FedProx]  [+ c − c_i, SCAFFOLD]

Batches, timesteps, noise and dropped labels are functions of (seed, step), so that a run which was
interrupted and resumed from its checkpoint goes on as one that was not: on a CPU it ends in the
same bits. On a GPU torch's convolutions and attention may sum their gradients in another order each
time, unless `torch.use_deterministic_algorithms` forbids it, and two runs differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn

from diffusion.batches import Batches, Images, Shared
from diffusion.checkpoint import Checkpoint
from diffusion.execution import Execution
from diffusion.flat import FlatParameters
from diffusion.labels import Labels, check_labels, classes_of, drop_labels
from diffusion.model import Vector
from diffusion.schedule import alpha_bar
from diffusion.spec import ObjectiveSpec, OptimizerSpec, ScheduleSpec
from kernels import adamw_ema_, ddpm_loss, q_sample
from kernels.noise import derive_key, timesteps

_NOTHING: Vector = np.empty(0, dtype=np.float32)


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
    labels: Labels | None = None,
    shared: Shared | None = None,
    first_step: int = 0,
    ema: Vector | None = None,
    proximal: tuple[Vector, float] | None = None,
    control: Vector | None = None,
    progress: Callable[[int], None] | None = None,
    save: Callable[[Checkpoint], bool | None] | None = None,
    save_every: int = 100,
    save_now: Callable[[], bool] = lambda: False,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Take `steps` steps of AdamW on `images` (uint8 (n, c, h, w), array or memmap), in place.

    labels       int64 (n,), for a conditional model: of each image its class
    shared       images that take a fixed part of every batch, beside `images`
    first_step   number of the first step within the whole training: batches, noise, learning-rate
                 warm-up and EMA ramp go on from there
    ema          the moving average so far; None starts it at the model's weights
    proximal     (anchor, mu) of FedProx (arXiv 1812.06127)
    control      c − c_i of SCAFFOLD (arXiv 1910.06378), added to every gradient
    progress     called with the steps done after every step, which a GPU may still compute: to read
                 its loss would make every step wait
    save         called with a Checkpoint every `save_every` steps, not after the last; if it
                 returns True the run ends there
    save_now     asked after every step whether to save out of turn
    resume       a Checkpoint of this very call: same model, data, seed and specs

    A loss that is not finite does not stop the run; `TrainResult.first_non_finite_step` reports it.
    Under an initialised `torch.distributed` every process takes its share of each batch and all end
    with the same weights.

    Raises ValueError for images that are not uint8 (n, c, h, w), and for labels that do not fit.
    """
    _check_images(images)
    check_labels(model, labels, len(images))
    if shared is not None:
        _check_images(shared.images)
        check_labels(model, shared.labels, len(shared.images))
    run = _Run(model, schedule, objective, optimizer, seed, execution)
    run.begin(first_step, steps, ema, proximal, control, resume)
    batches = Batches(images, labels, shared, optimizer.batch_size, seed)
    for done in range(run.done, steps):
        batch, of_batch = batches.batch(first_step + done, run.rows)
        known = None if of_batch is None else _to_device(of_batch, execution.device)
        run.step(_to_device(batch, execution.device), known)
        if progress:
            progress(done + 1)
        due = done + 1 < steps and ((done + 1) % save_every == 0 or save_now())
        if save and due and save(run.checkpoint()):
            break
    return run.result()


def _check_images(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}: give uint8 of shape (n, c, h, w)"
        )


def _to_device(batch: Images | Labels, device: torch.device) -> torch.Tensor:
    """Not waiting for what a GPU still computes, which a copy from ordinary memory would."""
    host = torch.from_numpy(batch)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


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
    ) -> None:
        execution.place(model)
        self.model, self.execution = model.train(), execution
        self.objective, self.optimizer = objective, optimizer
        self.device = execution.device
        self.alpha_bar = alpha_bar(schedule).to(self.device)
        self.noise_key = torch.tensor(derive_key(seed, "training noise"), device=self.device)
        self.timestep_key = torch.tensor(derive_key(seed, "training timesteps"), device=self.device)
        self.label_key = torch.tensor(derive_key(seed, "label dropout"), device=self.device)
        self.classes = classes_of(model)
        self.processes, self.rows = _share_of_batch(optimizer.batch_size)
        self.sample_id = torch.arange(optimizer.batch_size, device=self.device)[self.rows]
        self.flat = FlatParameters(model)
        self.first_moment, self.second_moment = self.flat.buffer(), self.flat.buffer()
        self.ema = self.flat.values.clone()
        self.anchor: torch.Tensor | None = None
        self.mu = 0.0
        self.control: torch.Tensor | None = None
        self.gradient_sum: torch.Tensor | None = None
        self.done = 0

    def begin(
        self,
        first_step: int,
        steps: int,
        ema: Vector | None,
        proximal: tuple[Vector, float] | None,
        control: Vector | None,
        resume: Checkpoint | None,
    ) -> None:
        buffer, o = self.flat.buffer, self.optimizer
        numbers = [(first_step + i, i + 1) for i in range(steps)]
        rates = [(learning_rate(k, o), ema_decay(k, o)) for k, _ in numbers]
        # On the device before the first step: no step waits for the host, or the host for a step.
        self.numbers = torch.tensor(numbers, device=self.device).view(steps, 2)
        self.rates = torch.tensor(rates, dtype=torch.float32, device=self.device).view(steps, 2)
        self.losses = torch.zeros(steps, device=self.device)
        if ema is not None:
            self.ema = buffer(ema)
        if proximal is not None and proximal[1] > 0.0:
            self.anchor, self.mu = buffer(proximal[0]), proximal[1]
        if control is not None:
            self.control, self.gradient_sum = buffer(control), buffer()
        if resume is None:
            return
        self.flat.values.copy_(buffer(resume.parameters))
        self.first_moment = buffer(resume.first_moment)
        self.second_moment = buffer(resume.second_moment)
        self.ema = buffer(resume.ema)
        if control is not None:
            self.gradient_sum = buffer(resume.gradient_sum)
        self.done = len(resume.losses)
        self.losses[: self.done] = torch.from_numpy(resume.losses)

    def step(self, x_0: torch.Tensor, labels: torch.Tensor | None) -> None:
        gradient, o = self.flat.gradient.zero_(), self.optimizer
        (step, count), (rate, decay) = self.numbers[self.done], self.rates[self.done]
        loss = self._loss(x_0, labels, step)
        loss.backward()
        self.losses[self.done] = _mean_over_processes(loss.detach(), self.processes)
        self.done += 1
        _mean_over_processes(gradient, self.processes)
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_((o.gradient_clip / norm).clamp(max=1.0))
        if self.gradient_sum is not None:
            self.gradient_sum.add_(gradient)
        adamw_ema_(
            self.flat.values,
            gradient,
            self.first_moment,
            self.second_moment,
            lr=rate,
            step=count,
            betas=o.betas,
            weight_decay=o.weight_decay,
            ema=self.ema,
            ema_decay=decay,
            anchor=self.anchor,
            mu=self.mu,
            control=self.control,
        )

    def _loss(
        self, x_0: torch.Tensor, labels: torch.Tensor | None, step: torch.Tensor
    ) -> torch.Tensor:
        key, table, row = self.noise_key, self.alpha_bar, self.sample_id
        t = timesteps(len(table), key=self.timestep_key, sample_id=row, step=step)
        x_t = q_sample(x_0, t, table, key=key, sample_id=row, step=step)
        if labels is not None and self.classes is not None:
            rate, label_key = self.objective.label_dropout, self.label_key
            labels = drop_labels(
                labels, rate, self.classes, key=label_key, sample_id=row, step=step
            )
        prediction = self.execution.predict(self.model, x_t, t, labels)
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

    def checkpoint(self) -> Checkpoint:
        vector = self.flat.vector
        return Checkpoint(
            parameters=vector(self.flat.values),
            first_moment=vector(self.first_moment),
            second_moment=vector(self.second_moment),
            ema=vector(self.ema),
            losses=self._losses(),
            gradient_sum=_NOTHING if self.gradient_sum is None else vector(self.gradient_sum),
        )

    def result(self) -> TrainResult:
        mean_gradient = None
        if self.gradient_sum is not None:
            mean_gradient = self.flat.vector(self.gradient_sum / max(self.done, 1))
        self.flat.release()
        return TrainResult(self._losses(), self.flat.vector(self.ema), mean_gradient)

    def _losses(self) -> Vector:
        return self.losses[: self.done].cpu().numpy().copy()


def learning_rate(step: int, optimizer: OptimizerSpec) -> float:
    """Rises linearly over the warm-up, then stays."""
    return optimizer.learning_rate * min(1.0, (step + 1) / (optimizer.warmup_steps + 1))


def ema_decay(step: int, optimizer: OptimizerSpec) -> float:
    """min(ema_decay, (1 + k)/(ema_ramp + k)) at step k.

    Without the ramp the average keeps the random first weights for 1/(1 − ema_decay) steps, and
    early samples are noise.
    """
    return min(optimizer.ema_decay, (1.0 + step) / (optimizer.ema_ramp + step))


def _share_of_batch(batch_size: int) -> tuple[int, slice]:
    """Number of training processes, and the rows of each batch that are this one's."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, slice(None)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if batch_size % processes:
        raise ValueError(
            f"batch_size = {batch_size} cannot be shared by {processes} processes: use a multiple"
        )
    return processes, slice(rank, None, processes)


def _mean_over_processes(values: torch.Tensor, processes: int) -> torch.Tensor:
    if processes > 1:
        distributed.all_reduce(values)
        values.div_(processes)
    return values
