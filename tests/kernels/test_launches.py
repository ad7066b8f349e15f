"""What is compiled ahead of time is what training launches, by the network and not by a list."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.gpu_networks import NETWORKS
from diffusion.execution import Execution
from diffusion.spec import ObjectiveSpec, OptimizerSpec, ScheduleSpec
from diffusion.training import _Run
from kernels.adamw_ema import _launch_adamw_ema
from kernels.ddpm_loss import _launch_ddpm_loss
from kernels.group_norm_silu import _launch_forward
from kernels.q_sample import _launch_q_sample
from tests.kernels.conftest import AsOnAGpu
from tests.kernels.launches import PARAMETERS, launches

Specialised = tuple[Any, ...]


def _specialised(name: str, value: Any) -> Any:
    """What Triton compiles for: of a tensor its dtype (what torch allocates is aligned), of a
    number whether it is 1 and whether 16 divides it, constants and options as they are."""
    if isinstance(value, Tensor):
        return value.dtype
    if value is None or name.isupper() or name in ("num_warps", "enable_fp_fusion"):
        return value
    return type(value) if isinstance(value, float) else (value == 1, value % 16 == 0)


class _Recorder:
    """Stands for a kernel: launched, it notes what would be compiled."""

    def __init__(self, name: str, seen: set[Specialised]) -> None:
        self._name, self._seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *given: Any, **named: Any) -> None:
        arguments = {str(place): value for place, value in enumerate(given)} | named
        found = [(name, _specialised(name, value)) for name, value in arguments.items()]
        self._seen.add((self._name, *sorted(found)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Specialised]:
    found: set[Specialised] = set()
    for launch, names in (
        (_launch_forward, ("_forward_kernel", "_backward_kernel")),
        (_launch_q_sample, ("_q_sample_kernel",)),
        (_launch_ddpm_loss, ("_residual_kernel", "_finish_kernel")),
        (_launch_adamw_ema, ("_adamw_ema_kernel",)),
    ):
        for name in names:
            # Not by the module's name, which in the package is that of the function.
            monkeypatch.setitem(launch.__globals__, name, _Recorder(name, found))
    return found


def _compiled_ahead_of_time(seen: set[Specialised], of: tuple[str, ...]) -> set[Specialised]:
    for launch in launches():
        if launch.name.startswith(of):
            launch.run()
    compiled = set(seen)
    seen.clear()
    return compiled


def _on_a_gpu() -> Execution:
    """As there, but for the device."""
    return Execution(torch.device("cpu"), torch.bfloat16, torch.channels_last, True)


def test_every_norm_of_the_cifar_10_network_is_compiled_ahead_of_time(
    seen: set[Specialised], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled_ahead_of_time(seen, ("group_norm_silu",))
    monkeypatch.setattr(Execution, "_is_half_on_cpu", False)  # whose attention is another
    execution = _on_a_gpu()
    with torch.device("meta"):
        unet = diffusers.UNet2DModel(**NETWORKS["google/ddpm-cifar10-32"])
    execution.place(unet.to_empty(device="cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), AsOnAGpu():
        x, t = torch.randn(128, 3, 32, 32), torch.zeros(128, dtype=torch.int64)
        y = execution.predict(unet, x, t)
        torch.autograd.grad(y.float().sum(), list(unet.parameters()))
    assert {kernel for kernel, *_ in seen} == {"_forward_kernel", "_backward_kernel"}
    assert not seen - compiled, "give them a row in `launches.py`"


@pytest.mark.parametrize(
    ("prediction", "snr_gamma", "term"),
    [
        ("eps", None, None),
        ("eps", 5.0, "proximal"),
        ("x0", None, "control"),
        ("x0", 5.0, None),
        ("v", None, "proximal"),
        ("v", 5.0, "control"),
    ],
)
def test_what_a_training_step_launches_besides_is_compiled_ahead_of_time(
    prediction: str, snr_gamma: float | None, term: str | None, seen: set[Specialised]
) -> None:
    """Around a network of as many parameters as the CIFAR-10 one and hardly any work."""
    compiled = _compiled_ahead_of_time(seen, ("q_sample", "ddpm_loss", "adamw_ema"))
    objective = ObjectiveSpec(prediction=prediction, snr_gamma=snr_gamma)
    run = _Run(_Scaled(), ScheduleSpec(), objective, OptimizerSpec(), 1, _on_a_gpu())
    vector = np.zeros(PARAMETERS, np.float32)
    proximal = (vector, 0.1) if term == "proximal" else None
    run.begin(0, 1, None, proximal, vector if term == "control" else None, None)
    images = torch.zeros(OptimizerSpec().batch_size, 3, 32, 32, dtype=torch.uint8)
    with AsOnAGpu():
        run.step(images, None)
    kernels = ("_q_sample_kernel", "_residual_kernel", "_finish_kernel", "_adamw_ema_kernel")
    assert {kernel for kernel, *_ in seen} == set(kernels)
    assert not seen - compiled, "give them a row in `launches.py`"


class _Scaled(torch.nn.Module):
    """Multiplies by one of its parameters, as a network whose last layer computes in bfloat16."""

    config = SimpleNamespace(num_class_embeds=None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(PARAMETERS))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (x.to(torch.bfloat16) * self.weight[0].to(torch.bfloat16),)
