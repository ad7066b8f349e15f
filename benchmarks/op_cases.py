"""Every public op with inputs for any batch, layout and device: what holds for all of them alike is
shown of these, by `tests/kernels/test_every_op.py` on a CPU and by `benchmarks.gpu_ops` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels

SIZES = (1400, 7)
Given = dict[str, Tensor]
LEAVES = ("x", "y", "weight", "bias", "scale", "shift")
WITHOUT_LAYOUT = ("adamw_ema_", "mask_add", "add_masks_")  # their buffers are contiguous


@dataclass(frozen=True)
class Case:
    """An op with inputs for any batch size; of those named, the first dimension is the batch."""

    run: Callable[..., Any]
    given: Callable[[int, str], Given]
    batched: tuple[str, ...]


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; expanded, those of the first sample for all."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "permuted":  # dense, but neither NCHW nor channels_last
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(batch: int, step: int = 7) -> Given:
    ids = torch.arange(batch) * (2**33 + 12_345) - 3  # both words of an id matter, and its sign
    key = torch.tensor(kernels.derive_key(1, "tests"))
    return {"key": key, "sample_id": ids, "step": torch.tensor(step)}


def _images(batch: int) -> Given:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (batch, 3, 6, 5), dtype=torch.uint8, generator=generator)
    floats = {"x": numbers(batch, 3, 6, 5), "y": numbers(batch, 3, 6, 5, seed=2)}
    return floats | {"pixels": pixels, "t": torch.arange(batch) * 99 + 1} | stream(batch)


def _norm(batch: int) -> Given:
    embedding = {"scale": numbers(batch, 8), "shift": numbers(batch, 8, seed=2)}
    parameters = {"weight": numbers(8), "bias": numbers(8, seed=2)}
    return embedding | parameters | {"x": numbers(batch, 8, 6, 5, seed=3)}


def _buffers(batch: int) -> Given:
    names = ("param", "grad", "m", "v", "ema", "anchor", "control")
    flat = {name: numbers(100 * batch, seed=i) for i, name in enumerate(names)}
    rates = {"lr": torch.tensor(1e-2), "step": torch.tensor(3), "decay": torch.tensor(0.9)}
    return flat | rates | {"v": flat["v"].square()}


def _masks(batch: int) -> Given:
    keys = torch.arange(32 * batch, dtype=torch.uint8).view(batch, 32)
    delta = {"delta": numbers(sum(SIZES)), "residual": 1e-3 * numbers(sum(SIZES), seed=2)}
    words = torch.arange(100, dtype=torch.int16)
    return delta | {"keys": keys, "signs": torch.arange(batch) % 2 * 2 - 1, "words": words}


def _on(device: str, make: Callable[[int], Given]) -> Callable[[int, str], Given]:
    """Laid out there: a copy from one device to another leaves strides and overlaps behind."""

    def given(batch: int, layout: str) -> Given:
        made = {name: value.to(device) for name, value in make(batch).items()}
        images = {n: in_layout(v, layout) for n, v in made.items() if v.dim() == 4}
        return made | images

    return given


def _adamw(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, ema: Tensor, anchor: Tensor,
    control: Tensor, lr: Tensor, step: Tensor, decay: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    state = tuple(x.clone() for x in (param, m, v, ema))
    kernels.adamw_ema_(
        state[0], grad, *state[1:3], lr=lr, step=step, ema=state[3], ema_decay=decay,
        anchor=anchor, mu=0.1, control=control, weight_decay=0.1,
    )  # fmt: skip
    return state


def _masked(keys: Tensor, signs: Tensor, words: Tensor, **_: Tensor) -> Tensor:
    words = words.clone()
    kernels.add_masks_(words, keys=keys, signs=signs, first=5)
    return words


def _normed(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return kernels.group_norm_silu(x, 4, weight, bias, scale=scale, shift=shift)


def _of_stream(key: Tensor, sample_id: Tensor, step: Tensor, **_: Tensor) -> Given:
    return {"key": key, "sample_id": sample_id, "step": step}


def cases(device: str) -> dict[str, Case]:
    alpha_bar = torch.linspace(0.999, 0.001, 1000).to(device)
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=SIZES, clips=[0.5, 0.25], count=3, total_count=7, scale=9000, device=device
    )
    of_images: dict[str, Callable[..., Any]] = {
        "normal": lambda x, **s: kernels.normal(
            (x.shape[0], 3, 5), dtype=x.dtype, **_of_stream(**s)
        ),
        "uniform": lambda x, **s: kernels.uniform((x.shape[0], 3, 5), **_of_stream(**s)),
        "timesteps": lambda **s: kernels.timesteps(1000, **_of_stream(**s)),
        "q_sample": lambda x, pixels, t, **s: kernels.q_sample(
            pixels, t, alpha_bar, dtype=x.dtype, **_of_stream(**s)
        ),
        "add_noise": lambda x, y, t, **_: kernels.add_noise(x, y, t, alpha_bar, dtype=x.dtype),
        "ddpm_loss": lambda x, pixels, t, **s: kernels.ddpm_loss(
            x, pixels, t, alpha_bar, objective="v", snr_gamma=5.0, **_of_stream(**s)
        ),
        "sampler_step": lambda x, y, t, **s: kernels.sampler_step(
            x.detach(), y.detach(), t, t - 1, alpha_bar, eta=0.5, **_of_stream(**s)
        ),
    }
    batched, images = ("x", "y", "pixels", "t", "sample_id"), _on(device, _images)
    masks = _on(device, _masks)
    flat = ("param", "grad", "m", "v", "ema", "anchor", "control")
    return {name: Case(run, images, batched) for name, run in of_images.items()} | {
        "group_norm_silu": Case(_normed, _on(device, _norm), ("x", "scale", "shift")),
        "adamw_ema_": Case(_adamw, _on(device, _buffers), flat),
        "mask_add": Case(
            lambda delta, residual, keys, signs, **_: kernels.mask_add(
                delta, residual, quantiser, rounding_key=keys[0], keys=keys, signs=signs
            ),
            masks, ("keys", "signs"),
        ),
        "add_masks_": Case(_masked, masks, ("keys", "signs")),
    }  # fmt: skip


def outputs_and_gradients(
    run: Callable[..., Any], given: Given, dtype: torch.dtype = torch.float32,
    upstream_like: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:  # fmt: skip
    """What the op returns, and the gradients of what may have one."""
    given = {k: v.to(dtype) if k in (*LEAVES, "grad") else v for k, v in given.items()}
    leaves = [v.requires_grad_() for k, v in given.items() if k in LEAVES]
    made = run(**given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    if not outputs[0].requires_grad:
        return outputs
    upstream = torch.linspace(0.5, 2.0, outputs[0].numel()).view(outputs[0].shape)
    upstream = upstream_like(upstream.to(outputs[0]))
    grads = torch.autograd.grad(outputs[0], leaves, upstream, allow_unused=True)
    return [v.detach() for v in (*outputs, *grads) if v is not None]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
