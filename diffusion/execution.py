"""Where and in which number format the network runs; the program decides what is fastest.

Weights, optimiser and loss are float32 everywhere; `Execution.dtype` is what the network's forward
and backward compute in (autocast).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Execution:
    """Device, compute dtype (float32 or bfloat16) and memory format of the network."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format

    def place(self, model: nn.Module) -> None:
        """Move the parameters of `model`, in place, to the device and memory format."""
        model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def predict(self, model: nn.Module, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output for x_t (B, c, h, w) and t int64 (B,), in its compute dtype."""
        x_t = x_t.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction: torch.Tensor = model(x_t, t, return_dict=False)[0]
        return prediction


def choose_execution(device: str | None = None, threads: int | None = None) -> Execution:
    """The fastest exact-enough way to run on `device` ("cpu", "cuda", "cuda:1"; None = GPU if any).

    bfloat16 where there are matrix units for it (GPUs that support it, CPUs with AMX): 2.1 times
    faster with AMX, but 1.4–2.1 times *slower* on a CPU without, which therefore stays in float32.
    channels_last everywhere: −5 to +9 % on such a CPU in float32, and what matrix units want.

    `threads` sets torch's intra-operation threads for the process, None leaves them as they are.
    Raises ValueError for a device this machine does not have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f'device = "{name}" is not supported: use "cpu", "cuda" or "cuda:1"')
    chosen = torch.device(name)
    if chosen.type == "cpu":
        fast = _cpu_has_amx()
    elif torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        raise ValueError(f'device = "{name}" is not present on this machine: use "cpu"')
    return Execution(chosen, torch.bfloat16 if fast else torch.float32, torch.channels_last)


def _cpu_has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))
