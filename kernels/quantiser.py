"""What turns a model delta into ring elements: the constants that :mod:`kernels.mask_add` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

RING_DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True)
class Quantiser:
    """The constants of one silo's encoding, on the device; made by :meth:`of`."""

    ring: int
    total: int
    """Elements of all tensors: what a vector must have. Known to the host, which then need not ask
    the device for `ends`."""
    ends: Tensor
    """Where each tensor ends in the flat vector, int64 (L,)."""
    up: Tensor
    """w S / c_l: float32, float64 for the ring of 32 bits."""
    down: Tensor
    """c_l / (w S)."""
    bounds: Tensor
    """(limit, the magnitude beyond which an element counts as clipped)."""
    point: Tensor
    """What the rounding key's stream is XORed with, one 32-bit word, int32 (1,): the silo's own."""

    @classmethod
    def of(
        cls,
        *,
        ring: int,
        sizes: Sequence[int],
        clips: Sequence[float],
        count: int,
        total_count: int,
        scale: int,
        silo: int = 1,
        device: torch.device | str = "cpu",
    ) -> Quantiser:
        """For tensors of `sizes` clipped at `clips`, weight w = `count` / `total_count`, S =
        `scale`; the arithmetic is that of `study.encoding.Encoding`. `silo` is the roster index,
        1 ... N, by which silos that share a rounding key round differently (docs/secure-sum.md,
        *D: a delta*).
        """
        if ring not in RING_DTYPES:
            raise ValueError(f"mask_add: ring must be 8, 16 or 32, got {ring}")
        right = all(0.0 < clip < math.inf for clip in clips)  # not so for NaN
        if len(sizes) != len(clips) or not sizes or min(sizes) < 1 or not right:
            raise ValueError(
                "mask_add: give one size >= 1 and one finite clip > 0 for every tensor, got sizes "
                f"{_some(sizes)} and clips {_some(clips)}"
            )
        if not 1 <= count <= total_count or not 1 <= scale < 1 << ring - 1:
            raise ValueError(
                f"mask_add: count {count} of {total_count} or scale {scale} is out of range"
            )
        if silo < 1:
            raise ValueError(f"mask_add: silo is {silo}, not a roster index 1 ... N")
        share = count * scale / total_count
        limit = _limit(share, -(-count * scale // total_count), wide=ring == 32)
        real = torch.float64 if ring == 32 else torch.float32

        def on_device(values: Sequence[float], dtype: torch.dtype = real) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        return cls(
            ring=ring,
            total=sum(sizes),
            ends=on_device(list(accumulate(sizes)), torch.int64),
            up=on_device([share / clip for clip in clips]),
            down=on_device([clip / share for clip in clips]),
            bounds=on_device([limit, share * (1 + 1e-6)]),
            point=on_device([_point(silo, wide=ring == 32)], torch.int32),
        )


def _some(values: Sequence[float]) -> str:
    return f"{list(values[:8])}" + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _point(silo: int, *, wide: bool) -> int:
    """The bits of floor((i - 1) / 2) in reverse, for even i their complement: the sums of silos'
    roundings stay close (van der Corput; docs/secure-sum.md). As a signed word, or two halves."""
    bits = 32 if wide else 16
    point = int(f"{(silo - 1) // 2:0{bits}b}"[::-1], 2)
    point = point if silo % 2 else point ^ (1 << bits) - 1
    word = point if wide else point | point << 16
    return word - (1 << 32) if word >> 31 else word


def _limit(share: float, most: int, *, wide: bool) -> float:
    """The largest x <= share for which floor(x + u) <= `most` = ceil(share), whatever u < 1."""
    real = np.float64 if wide else np.float32
    x, u = real(share), real(1 - 2.0 ** (-32 if wide else -16))
    while x > share or np.floor(x + u) > most:
        x = np.nextafter(x, real(0))
    return float(x)
