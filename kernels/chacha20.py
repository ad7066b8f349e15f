"""The ChaCha20 keystream of RFC 8439, as the masks of a secure sum use it: nonce 0, counter from 0.

    state     4x4 words of 32 bits: constants, key (8), counter, nonce (3)
    block     10 double rounds of the state, plus the state            RFC 8439, section 2.3
    stream    the words of block 0, 1, 2, ..., each little-endian      RFC 8439, section 2.4

A GPU computes one block per lane. The counter has 32 bits: one key makes 2^38 bytes and no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 64
MAX_BLOCKS = 1 << 32
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_CHUNK = 4096  # blocks at a time on the CPU, so that the state stays in cache


# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _quarter_round(a, b, c, d):  # type: ignore[no-untyped-def]
    a = a + b
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = c + d
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = a + b
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = c + d
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _word(key, i, zero):  # type: ignore[no-untyped-def]
    return zero + tl.load(key + i).to(tl.uint32, bitcast=True)


@triton.jit
def keystream_block(key, counter):  # type: ignore[no-untyped-def]
    """The 16 words of every block in `counter` (uint32, nonce 0) in the order of the stream.

    `key`: pointer to 8 int32 words.
    """
    zero = counter * 0
    k0, k1, k2 = _word(key, 0, zero), _word(key, 1, zero), _word(key, 2, zero)
    k3, k4, k5 = _word(key, 3, zero), _word(key, 4, zero), _word(key, 5, zero)
    k6, k7 = _word(key, 6, zero), _word(key, 7, zero)
    x0, x1, x2, x3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = counter, zero, zero, zero
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    x0, x1, x2, x3 = x0 + 0x61707865, x1 + 0x3320646E, x2 + 0x79622D32, x3 + 0x6B206574
    even = _interleave_4(x0, x4 + k0, x8 + k4, x12 + counter)
    odd = _interleave_4(x2, x6 + k2, x10 + k6, x14)
    first = tl.interleave(even, odd)
    even = _interleave_4(x1, x5 + k1, x9 + k5, x13)
    odd = _interleave_4(x3, x7 + k3, x11 + k7, x15)
    return tl.interleave(first, tl.interleave(even, odd))


@triton.jit
def _interleave_4(a, b, c, d):  # type: ignore[no-untyped-def]
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


# --- torch ----------------------------------------------------------------------------------------


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    low = (x >> (32 - bits)).bitwise_and_((1 << bits) - 1)
    return x.bitwise_left_shift_(bits).bitwise_or_(low)


def _quarter_round_reference(x: Tensor, a: int, b: int, c: int, d: int) -> None:
    for plus, onto, bits in ((b, a, 16), (d, c, 12), (b, a, 8), (d, c, 7)):
        turned = d if onto == a else b
        x[onto] += x[plus]
        _rotate_left(x[turned].bitwise_xor_(x[onto]), bits)


def keystream_reference(key: Tensor, first_block: int, blocks: int) -> Tensor:
    """Blocks `first_block` and following as int32 words, (16 blocks,); `key`: (8,) int32 words."""
    out = torch.empty((blocks, 16), dtype=torch.int32, device=key.device)
    for start in range(0, blocks, _CHUNK):
        part = out[start : start + _CHUNK]
        state = torch.zeros((16, len(part)), dtype=torch.int32, device=key.device)
        state[:4] = torch.tensor(_CONSTANTS, dtype=torch.int32)[:, None]
        state[4:12] = key[:, None]
        counter = torch.arange(len(part), device=key.device) + (first_block + start)
        state[12] = counter.to(torch.int32)  # the low 32 bits
        x = state.clone()
        for _ in range(10):
            for quarter in _COLUMNS + _DIAGONALS:
                _quarter_round_reference(x, *quarter)
        part.copy_(x.add_(state).T)
    return out.view(-1)
