"""Float vectors within a public bound, summed exactly in fixed point: feature moments, losses."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from study.integers import FLAGS, WORD, Field, Integers, Words, voided


@dataclass(frozen=True)
class FixedSum:
    """What the sum of fixed-point vectors says."""

    values: NDArray[np.float64]
    """[length of the values] Σ_i x_i over the silos in the sum."""
    clipped: int
    """Values that exceeded the bound, all silos together: unless 0, the sum falls short."""
    faults: int
    """Silos whose values held NaN or Inf and that contributed zeros, or voided the sum."""
    void: int
    """Silos that made the sum unreadable (`FixedPoint.void`): then `values` and `clipped` are 0."""


@dataclass(frozen=True)
class FixedPoint:
    """Values in [−B, B] as offset binary of n = `bits` bits, in limbs of 32-bit words.

        u = round(x/B · M) + M,   M = 2^(n−1) − 1,        Σ x = (Σ u − K·M) · B / M

    where K is the number of silos in the sum. Limbs as in `study.integers`: the sum of the u is
    exact, so Σ x is within K·B·2^(1−n) of the float64 sum. Offset binary, because a limb must not
    be negative.
    """

    silos: int
    """N, the pinned roster."""
    size: int
    """Number of values."""
    bound: float
    """B: public, and generous; what exceeds it is clipped and counted."""
    bits: int = 48

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 52:
            raise ValueError(f"bits = {self.bits}: float64 holds 2 … 52 of them exactly")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound = {self.bound}: use a positive number")
        if not 1 <= self.silos <= 1024 or self.size < 1:
            raise ValueError(f"silos = {self.silos}, size = {self.size}: use 1 … 1024 and ≥ 1")

    @property
    def tail(self) -> Integers:
        """The encoding of the counters."""
        return Integers(32, self.silos, (Field("clipped", 40), *FLAGS))

    @property
    def limbs(self) -> int:
        """Words per value."""
        return -(-self.bits // self.tail.limb_bits)

    @property
    def length(self) -> int:
        """Words in the encoded vector: all lowest limbs, all next ones, …, then the tail."""
        return self.limbs * self.size + self.tail.length

    def parameters(self) -> bytes:
        """Canonical bytes; different for any two encodings that differ in anything."""
        return (
            b"concilium/fixed-point/1"
            + struct.pack("<IQdB", self.silos, self.size, self.bound, self.bits)
            + self.tail.parameters()
        )

    def void(self, draw: Callable[[int], bytes]) -> Words:
        """What a silo contributes that will not let this sum be read (`study.integers.voided`)."""
        return voided(32, self.silos, self.length, draw)

    def encode(self, values: NDArray[np.float64]) -> Words:
        """uint32 [length] of float64 values [size].

        Values beyond the bound are clipped and counted; NaN or Inf among them makes all values
        zero and sets the fault counter. Raises ValueError for a wrong shape.
        """
        if values.shape != (self.size,):
            raise ValueError(f"values have shape {list(values.shape)}, not [{self.size}]")
        fault = not bool(np.isfinite(values).all())
        x = np.zeros(self.size) if fault else values.astype(np.float64)
        clipped = int(np.count_nonzero(np.abs(x) > self.bound))
        fixed = np.rint(np.clip(x / self.bound, -1.0, 1.0) * self._middle).astype(np.int64)
        fixed += self._middle
        width = self.tail.limb_bits
        words = [(fixed >> k * width) & (1 << width) - 1 for k in range(self.limbs)]
        tail = self.tail.encode({"clipped": clipped, "faults": int(fault), "void": 0})
        return np.concatenate([*(w.astype(WORD[32]) for w in words), tail])

    def decode(self, total: Words, summed: int) -> FixedSum:
        """Σ x from the wrapped sum uint32 [length] over exactly K = `summed` silos."""
        if total.shape != (self.length,) or total.dtype != WORD[32]:
            raise ValueError(f"sum is {total.dtype}{list(total.shape)}, not uint32[{self.length}]")
        if not 1 <= summed <= self.silos:
            raise ValueError(f"summed = {summed} is outside 1 … {self.silos}")
        tail = self.tail.decode(total[self.limbs * self.size :])
        if tail["void"]:
            return FixedSum(np.zeros(self.size), 0, tail["faults"], tail["void"])
        limbs = total[: self.limbs * self.size].reshape(self.limbs, self.size)
        fixed = np.zeros(self.size, dtype=np.int64)
        for k, words in enumerate(limbs):
            fixed += words.astype(np.int64) << k * self.tail.limb_bits
        values = (fixed - summed * self._middle).astype(np.float64) * (self.bound / self._middle)
        return FixedSum(values, tail["clipped"], tail["faults"], 0)

    @property
    def _middle(self) -> int:
        """M: what zero is encoded as, and the number of steps between 0 and B."""
        return (1 << self.bits - 1) - 1
