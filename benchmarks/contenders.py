"""diffusers' training step and ours, as workers of `benchmarks.train_step`: same UNet and batch."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from benchmarks.worker import serve
from diffusion.execution import Execution, choose_execution
from diffusion.model import build_model, initialise
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, ScheduleSpec
from diffusion.training import _Run

T = TypeVar("T")
Job = tuple[Callable[[], object], dict[str, Any]]
SPECS = {
    # about 1.1 M parameters: what a hospital's CPU trains
    "cpu": ModelSpec(
        image_size=32, channels=1, block_out_channels=(32, 64, 64), layers_per_block=1,
        attention=(False, False, True), attention_head_dim=32, norm_num_groups=8,
    ),
    # 35.7 M parameters: the CIFAR-10 network of arXiv 2006.11239
    "cuda": ModelSpec(
        image_size=32, channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        attention=(False, True, False, False), attention_head_dim=256, norm_num_groups=32,
    ),
}  # fmt: skip
BATCH = {"cpu": 64, "cuda": 128}
_CPU = torch.device("cpu")
FORMS = {  # what choose_execution chooses from on a CPU
    "bf16, channels_last, fused": Execution(_CPU, torch.bfloat16, torch.channels_last, True),
    "bf16, channels_last": Execution(_CPU, torch.bfloat16, torch.channels_last),
    "fp32, channels_last": Execution(_CPU, torch.float32, torch.channels_last),
    "fp32, NCHW": Execution(_CPU, torch.float32, torch.contiguous_format),
}


def images(device: str) -> torch.Tensor:
    spec = SPECS[device]
    shape = (BATCH[device], spec.channels, spec.image_size, spec.image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _model(device: str) -> nn.Module:
    model = build_model(SPECS[device])
    initialise(model, seed=0)
    return model


def diffusers_step(device: str, *, half: bool = False, compiled: bool = False) -> Job:
    """The loop body of its example train_unconditional.py with its defaults and `--use_ema`;
    `half`: with `--mixed_precision=bf16`, `compiled`: the network with torch.compile."""
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    model = _model(device).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    ema.to(device)
    clean = (images(device).float() / 127.5 - 1.0).to(device)
    network: Any = torch.compile(model) if compiled else model

    def step() -> None:
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, 1000, (len(clean),), device=device)
        x_t = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            prediction = network(x_t, t).sample
        functional.mse_loss(prediction.float(), noise.float()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    if compiled:
        step()  # here, where a compiler that fails is this contender's own failure
    numbers, how = "bf16 autocast" if half else "fp32", "torch.compile" if compiled else "eager"
    return step, _about(model, f"{numbers}, {how}, NCHW")


def our_run(model: nn.Module, execution: Execution, batch: int) -> _Run:
    optimizer = OptimizerSpec(batch_size=batch, learning_rate=1e-4)
    schedule, objective = ScheduleSpec(kind="linear"), ObjectiveSpec(prediction="eps")
    run = _Run(model, schedule, objective, optimizer, 0, execution)
    run.begin(0, 1000, None, None, None, None)
    return run


def our_step(device: str, execution: Execution | None = None) -> Job:
    chosen = choose_execution(device)
    model, execution = _model(device), execution or chosen
    run, x_0 = our_run(model, execution, BATCH[device]), images(device).to(device)
    form = "fused norms" if execution.fused_norms else "torch's norms"
    about = _about(model, f"{execution.dtype}, eager, {execution.memory_format}, {form}")
    return lambda: run.step(x_0, None), about


WARMUP = 3  # steps before a capture: they compile everything, which a capture may not


def captured(make: Callable[[], tuple[Callable[[], object], T]]) -> tuple[Callable[[], None], T]:
    """What `make` builds and a CUDA graph of its fourth step, replayed. The number of that step
    stays; a step's work does not depend on it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # All on the stream of the capture: what lives on another would make that one wait for it.
    with torch.cuda.stream(side):
        step, about = make()
        for _ in range(WARMUP):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
    torch.cuda.synchronize()
    return graph.replay, about


def our_step_replayed(device: str, *, choose_convolutions: bool = False) -> Job:
    """`choose_convolutions`: cuDNN tries its algorithms at the first step and takes the fastest."""
    torch.backends.cudnn.benchmark = choose_convolutions
    replay, about = captured(lambda: our_step(device))
    how = "replayed CUDA graph" + (", cudnn.benchmark" if choose_convolutions else "")
    return replay, about | {"how": about["how"].replace("eager", how)}


def _about(model: nn.Module, how: str) -> dict[str, Any]:
    how = how.replace("torch.", "").replace("float32", "fp32").replace("bfloat16", "bf16")
    return {"parameters": sum(p.numel() for p in copy.copy(model).parameters()), "how": how}


def main() -> None:
    name, device = sys.argv[1:]
    others: dict[str, Callable[[str], Job]] = {
        "diffusers": diffusers_step,
        "diffusers, bf16": functools.partial(diffusers_step, half=True),
        "diffusers, bf16, compiled": functools.partial(diffusers_step, half=True, compiled=True),
        "ours": our_step,
        "ours, CUDA graph": our_step_replayed,
        "ours, CUDA graph, cudnn.benchmark": functools.partial(
            our_step_replayed, choose_convolutions=True
        ),
    }
    make = others.get(name) or functools.partial(our_step, execution=FORMS[name])
    if device == "cuda":
        serve(lambda: make(device), torch.cuda.synchronize, torch.cuda.max_memory_allocated)
    else:
        serve(lambda: make(device))


if __name__ == "__main__":
    main()
