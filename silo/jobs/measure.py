"""What this machine is: its device, and how long a training step of a plan takes on it."""

from __future__ import annotations

import resource
import time

import numpy as np
import torch
from torch import nn

from diffusion.execution import Execution
from diffusion.model import parameter_layout
from diffusion.training import train
from silo.jobs.training import execution_of, first_model
from silo.orders import Measured, MeasureTraining
from silo.worker import ProgressFile
from study.plan import Plan, load_plan

_STEPS, _FIRST = 6, 2  # the first steps warm caches up


def measure_training(order: MeasureTraining, progress: ProgressFile) -> Measured:
    """Takes a few steps on noise: what an image shows does not change what a step costs."""
    try:
        execution = execution_of(order.machine)
    except ValueError as error:
        return Measured(None, str(error))
    seconds, tensors = 0.0, 0
    if order.plan is not None:
        plan = load_plan(order.plan)
        model = first_model(plan)
        tensors = len(parameter_layout(model))
        seconds = _seconds_per_step(model, plan, order.machine.processes, execution)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Measured(_name(execution), "", seconds, tensors, peak)


def _seconds_per_step(model: nn.Module, plan: Plan, processes: int, execution: Execution) -> float:
    """Of one process with its share of the batch."""
    batch = max(1, plan.optimizer.batch_size // processes)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *plan.data.shape), dtype=np.uint8)
    labels = None
    if plan.model.classes is not None:
        labels = rng.integers(0, plan.model.classes, batch)
    ends: list[float] = []

    def end(_: int) -> None:
        if execution.device.type == "cuda":  # which has its steps only queued by then
            torch.cuda.synchronize(execution.device)
        ends.append(time.perf_counter())

    train(
        model,
        images,
        labels=labels,
        steps=_STEPS,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer.model_copy(update={"batch_size": batch}),
        seed=0,
        execution=execution,
        progress=end,
    )
    return float(np.median(np.diff(ends)[_FIRST - 1 :]))


def _name(execution: Execution) -> str:
    if execution.device.type == "cuda":
        return f"{execution.device} ({torch.cuda.get_device_name(execution.device)})"
    return f"cpu ({torch.get_num_threads()} threads, {str(execution.dtype).rpartition('.')[2]})"
