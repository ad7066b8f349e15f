"""Non-negative integers in ring words, so that their sum is exact: counters and the census."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ring: TypeAlias = Literal[8, 16, 32]
Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

WORD: dict[Ring, np.dtype[Any]] = {8: np.dtype("<u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4")}
"""Ring width b → the dtype of its words."""


def coarse_count(count: int) -> int:
    """Round a sample count to two significant digits, halves up: 1,797 → 1,800; 42 → 42.

    Applied once per data set, before the census. Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count = {count}: a data set cannot have fewer than 0 samples")
    unit = int(10 ** max(0, len(str(count)) - 2))
    return (count + unit // 2) // unit * unit


@dataclass(frozen=True)
class Field:
    """A non-negative integer of at most `bits` bits."""

    name: str
    bits: int


@dataclass(frozen=True)
class Integers:
    """Named non-negative integers as limbs in words of b = `ring` bits, for N = `silos` silos.

    An integer v of B bits becomes limbs v_k of λ = b − ceil(log2 N) bits, v = Σ_k v_k 2^(λk). The
    sum of N limbs is at most N (2^λ − 1) < 2^b: no word wraps, and Σ v = Σ_k (Σ v_k) 2^(λk) is
    exact.
    """

    ring: Ring
    silos: int
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        if self.silos < 1 or self.limb_bits < 1:
            raise ValueError(
                f"silos = {self.silos} leave no room in words of {self.ring} bits: use a wider ring"
            )
        if len({f.name for f in self.fields}) != len(self.fields):
            raise ValueError("two fields have the same name")

    @property
    def limb_bits(self) -> int:
        """λ, bits per limb."""
        return self.ring - (self.silos - 1).bit_length()

    @property
    def length(self) -> int:
        """Words in the encoded vector."""
        return sum(self._limbs(f) for f in self.fields)

    def parameters(self) -> bytes:
        """Canonical bytes: ring, N and every field's name and width."""
        return struct.pack("<BII", self.ring, self.silos, len(self.fields)) + b"".join(
            struct.pack("<I", len(name)) + name + struct.pack("<I", f.bits)
            for f in self.fields
            for name in [f.name.encode()]
        )

    def encode(self, values: Mapping[str, int]) -> Words:
        """Words [length] of one silo's integers. Raises ValueError where one exceeds its field."""
        limbs: list[int] = []
        for field in self.fields:
            value = values[field.name]
            if not 0 <= value < 1 << field.bits:
                raise ValueError(f"{field.name} = {value} does not fit {field.bits} bits")
            limbs += [
                value >> k * self.limb_bits & (1 << self.limb_bits) - 1
                for k in range(self._limbs(field))
            ]
        return np.array(limbs, dtype=WORD[self.ring])

    def decode(self, total: Words) -> dict[str, int]:
        """The exact sums, from the wrapped sum [length] of at most N encoded vectors."""
        words = iter(total.tolist())
        return {
            field.name: sum(next(words) << k * self.limb_bits for k in range(self._limbs(field)))
            for field in self.fields
        }

    def _limbs(self, field: Field) -> int:
        return -(-field.bits // self.limb_bits)


def census(silos: int) -> Integers:
    """The encoding of the census: one coarse sample count per silo, summed exactly."""
    return Integers(32, silos, (Field("count", 40),))


FLAGS = (Field("faults", 1), Field("void", 1))
"""The last integers of a vector that a silo may void."""


def voided(ring: Ring, silos: int, length: int, draw: Callable[[int], bytes]) -> Words:
    """Random words [length] that end in `FLAGS`, both 1: a contribution that hides the others.

    Zeros would take the silo out of the sum and leave the others in it; whoever can bring all but
    one to send zeros reads that one. A uniform word makes the sum uniform, whatever the others
    added. `draw(n)` are n bytes of fresh entropy.
    """
    vector = np.frombuffer(draw(length * ring // 8), WORD[ring]).copy()
    flags = Integers(ring, silos, FLAGS)
    vector[-flags.length :] = flags.encode({"faults": 1, "void": 1})
    return vector
