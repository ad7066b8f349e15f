"""What is compiled ahead of time is what training launches, by the network and not by a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.gpu_networks import NETWORKS
from diffusion.execution import Execution
from kernels.group_norm_silu import _launch_forward
from tests.kernels.conftest import AsOnAGpu
from tests.kernels.launches import launches

Specialised = tuple[Any, ...]


def _specialised(name: str, value: Any) -> Any:
    """What Triton compiles for: of a tensor its dtype (what torch allocates is aligned), of a
    number whether it is 1 and whether 16 divides it, constants and options as they are."""
    if isinstance(value, Tensor):
        return value.dtype
    if name.isupper() or name in ("num_warps", "enable_fp_fusion"):
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
    for kernel in ("_forward_kernel", "_backward_kernel"):
        # Not by the module's name, which in the package is that of the function.
        monkeypatch.setitem(_launch_forward.__globals__, kernel, _Recorder(kernel, found))
    return found


def test_every_norm_of_the_cifar_10_network_is_compiled_ahead_of_time(
    seen: set[Specialised], monkeypatch: pytest.MonkeyPatch
) -> None:
    for launch in launches():
        if launch.name.startswith("group_norm_silu"):
            launch.run()
    compiled = set(seen)
    seen.clear()
    monkeypatch.setattr(Execution, "_is_half_on_cpu", False)  # whose attention is another
    execution = Execution(torch.device("cpu"), torch.bfloat16, torch.channels_last, True)
    with torch.device("meta"):
        unet = diffusers.UNet2DModel(**NETWORKS["google/ddpm-cifar10-32"])
    execution.place(unet.to_empty(device="cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), AsOnAGpu():
        x, t = torch.randn(128, 3, 32, 32), torch.zeros(128, dtype=torch.int64)
        y = execution.predict(unet, x, t)
        torch.autograd.grad(y.float().sum(), list(unet.parameters()))
    assert {kernel for kernel, *_ in seen} == {"_forward_kernel", "_backward_kernel"}
    assert not seen - compiled, "give them a row in `launches.py`"
