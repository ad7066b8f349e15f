"""Where and in which number format the network runs; the program decides what is fastest.

Weights, optimiser and loss are float32 everywhere; `Execution.dtype` is what the network's forward
and backward compute in (autocast). The modules of diffusers that make images contiguous in passing
(upsampling from 64 images on, 1×1 shortcuts while training) are given forward passes that leave
channels_last alone; parameters, their names and the results stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from kernels import apply_to_unet


@dataclass(frozen=True)
class Execution:
    """Device, compute dtype (float32 or bfloat16) and memory format of the network."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    fused_norms: bool = False
    """Whether GroupNorm + SiLU run as one op (`kernels.apply_to_unet`)."""

    def place(self, model: nn.Module) -> None:
        """Move the parameters of `model`, in place, to the device and memory format."""
        model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        for module in model.modules():
            if type(module) is ResnetBlock2D and _is_plain_block(module):
                module.__class__ = _ResnetBlock
            elif type(module) is Upsample2D and _is_plain_upsampling(module):
                module.__class__ = _Upsample
        if self.fused_norms:
            apply_to_unet(model)

    def predict(
        self,
        model: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The network's output for x_t (B, c, h, w), t and, where it is conditional, labels int64
        (B,), in its compute dtype."""
        x_t = x_t.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction: torch.Tensor = model(x_t, t, labels, return_dict=False)[0]
        return prediction


def choose_execution(device: str | None = None, threads: int | None = None) -> Execution:
    """The fastest exact-enough way to run on `device` ("cpu", "cuda", "cuda:1"; None = GPU if any).

    bfloat16 where there are matrix units for it (GPUs that support it, CPUs with AMX): 2.1 times
    faster with AMX, but 1.4–2.1 times *slower* on a CPU without, which therefore stays in float32.
    channels_last where there are matrix units, which want it; a CPU without them was faster in
    NCHW (1.28 against 1.56 s a step with nothing else running). GroupNorm and SiLU as one op except
    in float32 on a CPU, where torch's own pair is faster.

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
    fused = fast or chosen.type == "cuda"
    dtype = torch.bfloat16 if fast else torch.float32
    layout = torch.channels_last if fused else torch.contiguous_format
    return Execution(chosen, dtype, layout, fused_norms=fused)


def _cpu_has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


class _ResnetBlock(ResnetBlock2D):
    """x_out = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + embedding)))"""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        assert self.time_emb_proj is not None  # noqa: S101  _is_plain_block
        embedding = self.time_emb_proj(self.nonlinearity(temb))
        h: torch.Tensor = self.conv1(self.nonlinearity(self.norm1(x)))
        h.add_(embedding[:, :, None, None])
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Upsample(Upsample2D):
    """Nearest neighbours to twice the size, then the convolution."""

    def forward(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
        if size is not None or 4 * x.numel() >= 2**31:  # pytorch issue 141831
            return super().forward(x, size)
        assert self.conv is not None  # noqa: S101  _is_plain_upsampling
        scaled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        out: torch.Tensor = self.conv(scaled)
        return out


def _is_plain_block(block: nn.Module) -> bool:
    expected: dict[str, object] = {"upsample": None, "downsample": None, "skip_time_act": False}
    expected |= {"time_embedding_norm": "default", "output_scale_factor": 1.0}
    same = all(getattr(block, name, value) == value for name, value in expected.items())
    return same and block.time_emb_proj is not None


def _is_plain_upsampling(module: nn.Module) -> bool:
    expected: dict[str, object] = {
        "use_conv": True,
        "use_conv_transpose": False,
        "interpolate": True,
    }
    expected |= {"norm": None, "name": "conv"}
    return all(getattr(module, name, value) == value for name, value in expected.items())
