"""Where and in which number format the network runs; the program decides what is fastest.

Weights, optimiser and loss are float32 everywhere; `Execution.dtype` is what the network's forward
and backward compute in (autocast). The modules of diffusers that make images contiguous in passing
(upsampling from 64 images on, 1×1 shortcuts while training) are given forward passes that leave
channels_last alone; parameters, their names and the results stay.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from kernels import apply_to_unet

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PAGE, _MADV_HUGEPAGE = 2**21, 14  # madvise(2)
_LARGE_PAGES = 2**30 - _PAGE  # bytes: what malloc still takes from the heap
_MANY_TOKENS = 256  # from here on bfloat16 attention is the faster one on a CPU


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
        processor: Any = _CpuAttention()
        for module in model.modules():
            if type(module) is ResnetBlock2D and _is_plain_block(module):
                module.__class__ = _ResnetBlock
            elif type(module) is Upsample2D and _is_plain_upsampling(module):
                module.__class__ = _Upsample
            elif type(module) is Attention and self._is_half_on_cpu and _is_plain_attention(module):
                module.processor = processor
        if self.fused_norms:
            apply_to_unet(model)

    @property
    def _is_half_on_cpu(self) -> bool:
        return self.device.type == "cpu" and self.dtype != torch.float32

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

    bfloat16 where there are instructions for its products (GPUs that support it, CPUs with AMX or
    AVX512_BF16), channels_last there and GroupNorm and SiLU as one op. A CPU without them would
    have to convert, which costs three times what float32 takes, and stays in float32, in NCHW and
    with torch's own norm, which is faster there. Measured: docs/kernels.md, On a CPU.

    `threads` sets torch's intra-operation threads for the process, None leaves them as they are. On
    a CPU the process keeps the memory it has freed (`keep_freed_memory`).
    Raises ValueError for a device this machine does not have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f'device = "{name}" is not supported: use "cpu", "cuda" or "cuda:1"')
    chosen = torch.device(name)
    if chosen.type == "cpu":
        keep_freed_memory()
        fast = _cpu_multiplies_bfloat16()
    elif torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count():
        with torch.cuda.device(chosen):  # of several, which need not be alike
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        raise ValueError(f'device = "{name}" is not present on this machine: use "cpu"')
    fused = fast or chosen.type == "cuda"
    dtype = torch.bfloat16 if fast else torch.float32
    layout = torch.channels_last if fused else torch.contiguous_format
    return Execution(chosen, dtype, layout, fused_norms=fused)


@functools.cache  # once a process is enough
def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed for the next request of this process, and ask for
    large pages beneath the first GiB of them.

    By default it gives them back to the system, which then faults in and zeroes the activations of
    every training step page by page: 34,000 page faults and 45 of 483 ms of CPU time for 1.1 M
    parameters with AMX. Large pages spare the walks through the page tables of what is read and
    written, where Linux leaves them to the program (`transparent_hugepage` = madvise). The GiB is
    address space alone until it is used. Elsewhere than under glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for option, size in (
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_MMAP_THRESHOLD, 2**30),
        (_TOP_PAD, 2**26),
    ):
        libc.mallopt(option, size)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    block = libc.malloc(_LARGE_PAGES)  # grows the heap, which stays as it is when this is freed
    if block:
        start = -(-block // _PAGE) * _PAGE
        libc.madvise(start, _LARGE_PAGES - _PAGE, _MADV_HUGEPAGE)
        libc.free(block)


def _cpu_multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("amx_tile", "avx512_bf16"))


class _ResnetBlock(ResnetBlock2D):
    """x_out = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + embedding)))"""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        assert self.time_emb_proj is not None  # noqa: S101  _is_plain_block
        embedding = self.time_emb_proj(self.nonlinearity(temb))
        h: torch.Tensor = self.conv1(self.nonlinearity(self.norm1(x)))
        h.add_(embedding[:, :, None, None])
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        return h.add_(x if self.conv_shortcut is None else _pointwise(self.conv_shortcut, x))


def _pointwise(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A 1×1 convolution, which is a matrix product where channels are innermost in memory."""
    out: torch.Tensor
    if not x.is_contiguous(memory_format=torch.channels_last):
        out = conv(x)
        return out
    out = nn.functional.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias)
    return out.movedim(-1, 1)


class _Upsample(Upsample2D):
    """Nearest neighbours to twice the size, then the convolution."""

    def forward(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
        if size is not None or 4 * x.numel() >= 2**31:  # pytorch issue 141831
            return super().forward(x, size)
        assert self.conv is not None  # noqa: S101  _is_plain_upsampling
        scaled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        out: torch.Tensor = self.conv(scaled)
        return out


class _CpuAttention(AttnProcessor2_0):
    """softmax(q kᵀ/√d) v in float32 where there are few tokens.

    There the backward pass of torch's bfloat16 attention on a CPU is several times slower (15 ms
    against 3.5 for 64 images, 2 heads, 64 tokens of 32 numbers, with AMX, forward included).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = hidden_states
        out: torch.Tensor
        other = encoder_hidden_states is not None or attention_mask is not None
        if other or x.dim() != 4 or x.shape[2] * x.shape[3] >= _MANY_TOKENS:
            out = super().__call__(attn, x, encoder_hidden_states, attention_mask, temb)
            return out
        tokens = x.flatten(2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens)
        tokens = tokens.transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2).float()
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        with torch.autocast("cpu", enabled=False):
            h = nn.functional.scaled_dot_product_attention(q, k, v)
        out = attn.to_out[1](attn.to_out[0](h.transpose(1, 2).flatten(2)))
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])
        if attn.residual_connection:
            out.add_(x)
        return out


def _is_plain_attention(attention: Any) -> bool:
    expected: dict[str, object] = {"spatial_norm": None, "norm_q": None, "norm_k": None}
    expected |= {"rescale_output_factor": 1.0}
    same = all(getattr(attention, name, value) == value for name, value in expected.items())
    return same and type(attention.processor) is AttnProcessor2_0


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
