"""The CPU path of :mod:`kernels.mask_add`, and the reference of its Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chacha20 import BLOCK_BYTES, keystream_reference

_CHUNK = 1 << 20  # elements at a time


def _stream_elements(key: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Elements `first` ... `first` + `count` - 1 of a keystream cut into elements of `dtype`."""
    per_block = BLOCK_BYTES // dtype.itemsize
    block, skip = divmod(first, per_block)
    words = keystream_reference(key, block, -(-(skip + count) // per_block))
    return words.view(dtype)[skip : skip + count]


def _check_signs(signs: Tensor) -> None:
    """On the CPU only, where looking costs nothing; it would stall a GPU's queue."""
    wrong = sorted(set(signs.tolist()) - {1, -1})
    if wrong:
        raise ValueError(f"masks: signs holds {wrong[:8]}; a mask is added (+1) or subtracted (-1)")


def add_masks_reference_(words: Tensor, keys: Tensor, signs: Tensor, first: int) -> None:
    """Add masks to `words`, elements `first` and following of a vector."""
    _check_signs(signs)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        for key, sign in zip(keys, signs.tolist(), strict=True):
            masks = _stream_elements(key, first + start, part.numel(), words.dtype)
            part.add_(-masks if sign < 0 else masks)


def _round_reference(
    wanted: Tensor, up: Tensor, down: Tensor, bounds: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, rest, clipped, finite); all in the dtype of `up`, `bits` are the unsigned dither."""
    u = bits.to(up.dtype).mul_(2.0**-32 if up.dtype == torch.float64 else 2.0**-16)
    wanted = wanted.to(up.dtype)
    finite = wanted.isfinite()
    q = wanted * up
    over = q.abs() > bounds[1]
    q = q.where(finite, q.new_zeros(())).clamp_(-bounds[0], bounds[0]).add_(u).floor_()
    return q, wanted.sub_(q * down), over, finite


def mask_add_reference(
    words: Tensor, delta: Tensor, residual: Tensor, carried: Tensor, ends: Tensor, up: Tensor,
    down: Tensor, bounds: Tensor, point: Tensor, rounding_key: Tensor, keys: Tensor, signs: Tensor,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """Fill `words` and `carried`, elements `first` and following of a vector; the numbers of
    clipped and of not finite elements.
    """
    _check_signs(signs)  # before anything is written
    counts = torch.zeros(2, dtype=torch.int64, device=words.device)
    wide = words.dtype == torch.int32
    for start in range(0, words.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        size = words[part].numel()
        dither = torch.int32 if wide else torch.int16
        bits = _stream_elements(rounding_key, first + start, size, dither)
        bits = (bits ^ point.view(dither)[:1]).to(torch.int64)
        bits &= 0xFFFFFFFF if wide else 0xFFFF
        at = torch.arange(first + start, first + start + size, device=words.device)
        tensor = torch.bucketize(at, ends, right=True)
        wanted = delta[part] + residual[part]
        q, rest, over, finite = _round_reference(wanted, up[tensor], down[tensor], bounds, bits)
        words[part] = q.to(torch.int32).to(words.dtype)
        carried[part] = rest
        counts += torch.stack([over.sum(), (~finite).sum()])
    add_masks_reference_(words, keys, signs, first)
    return counts
