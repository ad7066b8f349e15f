"""The masks: ChaCha20 keystreams added to a vector over Z_2^b.

Element k of a ring of b bits is masked by bytes k·b/8 … (k+1)·b/8 − 1 of the keystream, read as a
little-endian integer. A mask key is used for one keystream only, so the nonce and the initial
block counter are zero (RFC 8439 §2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from secagg.errors import InvalidParameters
from secagg.primitives import Secret

DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4")}
# One chunk of keystream, zeros and vector together stay in a core's second-level cache.
CHUNK_BYTES = 256 * 1024
_COUNTER_AND_NONCE = bytes(16)

Vector = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class MaskKey:
    """A 32-byte ChaCha20 key and the sign with which its keystream enters the vector."""

    key: Secret
    sign: int


class Masks:
    """Σ sign · keystream(key) mod 2^b, word after word, for a vector that comes in parts.

    Memory: two chunks, whatever the length of the vector and the number of keys.
    """

    def __init__(self, keys: Sequence[MaskKey]) -> None:
        self._zeros = memoryview(bytes(CHUNK_BYTES))
        self._stream = np.empty(CHUNK_BYTES, dtype=np.uint8)
        self._masks = [
            (
                Cipher(algorithms.ChaCha20(k.key.reveal(), _COUNTER_AND_NONCE), None).encryptor(),
                np.add if k.sign > 0 else np.subtract,
            )
            for k in keys
        ]

    def add_to(self, part: Vector) -> None:
        """part ← part + the next words of all masks, in place; the keystreams move on.

        `part` is a one-dimensional contiguous array of uint8, uint16 or uint32, of one dtype for
        all parts; numpy's unsigned wrap-around is the ring. Raises `InvalidParameters` for any
        other array.
        """
        if part.dtype not in DTYPES.values() or part.ndim != 1 or not part.flags.c_contiguous:
            raise InvalidParameters("masks go on a contiguous vector of uint8, uint16 or uint32")
        per_chunk = CHUNK_BYTES // part.dtype.itemsize
        words, out = self._stream.view(part.dtype), memoryview(self._stream.data)
        for start in range(0, part.size, per_chunk):
            chunk = part[start : start + per_chunk]
            mask, source = words[: chunk.size], self._zeros[: chunk.nbytes]
            target = out[: chunk.nbytes]
            for cipher, combine in self._masks:
                cipher.update_into(source, target)
                combine(chunk, mask, out=chunk)


def apply_masks(vector: Vector, keys: Sequence[MaskKey]) -> None:
    """vector ← vector + Σ sign · keystream(key) mod 2^b, in place; see `Masks.add_to`."""
    Masks(keys).add_to(vector)
