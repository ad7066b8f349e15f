"""Counter-based noise: every draw is a function of (key, sample_id, step, element) and of nothing
else.

    words   = Philox4x32-10(key = (key_lo, key_hi), counter = (element // 4, id_lo, id_hi, step))
    u       = (float32(words[0]) + 1/2) / 2^32          r = sqrt(-2 ln u)          u in (0, 1]
    phi     = 2 pi (words[1] >> 8) / 2^24
    eps     = r cos phi, r sin phi, and the same from words[2], words[3]

so block size, batch order and split, device and memory layout leave the bits alone. ``element``
counts in logical (C, H, W) order within one sample, whatever the strides.

The 128-bit counter holds what varies within one stream: the element, all 64 bits of the sample's id
and the low 32 bits of the step. What separates streams (the seed of a study, training against
sampling, timesteps against noise) is the 64-bit key: give each purpose its own with
:func:`derive_key`. Uniform draws use the key with a fixed tag, so that they are independent of the
normal draws even under the same key.

The logarithm and the sine are polynomials in float32 additions and multiplications, whose results
IEEE 754 fixes; the square root is the correctly rounded one; and fused multiply-add is switched
off. The torch reference and the Triton kernel therefore agree in every bit.

Sources: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (SC 2011) for Philox; Box &
Muller (1958); polynomial coefficients of ``logf``, ``sinf``, ``cosf`` from Cephes (S. L. Moshier).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._arguments import (
    check_batched,
    check_device,
    check_dtype,
    check_float_dtype,
    check_per_sample,
    check_scalar,
    check_stream,
    on_device_of,
)

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: what each round adds to the key
_UNIFORM_TAG = 0x756E69666F726D21  # flipped into the key of the uniform draws
_CHUNK = 16384  # counters at a time on the CPU, so that the temporaries stay in cache

_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_SQRT_HALF_BITS = 0x3F3504F3
_ONE_BITS = 0x3F800000


# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """ln x for normal x in (0, 1]: x = 2^e m with m in [sqrt(1/2), sqrt(2)), polynomial in m -
    1.
    """
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((bits >> 23) - 127).to(tl.float32)
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    y = 7.0376836292e-2 * m + -1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m + -1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m + -1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m + -2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * z
    y = y + e * -2.12194440e-4
    y = y - 0.5 * z
    return m + y + e * 0.693359375


@triton.jit
def _sin_cos_2pi(u):  # type: ignore[no-untyped-def]
    """(sin 2 pi u, cos 2 pi u) for u in [0, 1): the nearest quadrant, then a polynomial in [-pi/4,
    pi/4].
    """
    q = (u * 4.0 + 0.5).to(tl.int32)
    r = (u - q.to(tl.float32) * 0.25) * 6.283185307179586
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z + -1.6666654611e-1) * (z * r) + r
    c = (2.443315711809948e-5 * z + -1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * (z * z) + (1.0 - 0.5 * z)
    odd = (q & 1) != 0
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where((q & 2) != 0, -sin, sin), tl.where(((q + 1) & 2) != 0, -cos, cos)


@triton.jit
def _normal_pair(radius_word, angle_word):  # type: ignore[no-untyped-def]
    u = (radius_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r = tl.sqrt_rn(-2.0 * _log(u))
    sin, cos = _sin_cos_2pi((angle_word >> 8).to(tl.float32) * 5.9604644775390625e-08)
    return r * cos, r * sin


@triton.jit
def normal_block(key, sample_id, step, block, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The normals of elements [block * BLOCK, (block + 1) * BLOCK) of one sample; key, id, step:
    int64 scalars.
    """
    group = block.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = group * 0
    id_lo = zero + (sample_id & 0xFFFFFFFF).to(tl.uint32)
    id_hi = zero + ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low_step = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, group, id_lo, id_hi, low_step)
    e0, e1 = _normal_pair(w0, w1)
    e2, e3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(e0, e2), tl.interleave(e1, e3))


@triton.jit
def _normal_kernel(  # type: ignore[no-untyped-def]
    out, key, sample_id, step, elements, n_blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    program = tl.program_id(0)
    n = program // n_blocks
    block = program % n_blocks
    if WIDE:
        block = block.to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    eps = normal_block(tl.load(key), tl.load(sample_id + n), tl.load(step), block, BLOCK)
    out += n.to(tl.int64) * elements
    tl.store(out + index, eps.to(out.dtype.element_ty), mask=index < elements)


def block_size(elements: int) -> int:
    """Elements a program takes: of those that 128-bit accesses allow the largest that pads least,
    in sixteenths of a sample, since noise is computed for the padding too. CIFAR's 3,072 elements
    are three blocks of 1,024. Few elements take one block, not much more than they are.
    """
    if elements <= 512:
        return max(64, 1 << max(elements - 1, 0).bit_length())
    return min((2048, 1024, 512), key=lambda block: -elements % block * 16 // elements)


def warps_for(block: int) -> int:
    """Warps to a program: 16 elements a thread, which makes 128 bits of the narrowest, uint8."""
    return max(1, block // 512)


def needs_wide_index(elements: int) -> bool:
    """Whether an offset within one sample may not fit in 32 bits."""
    return elements > (1 << 31) - 4096


def _launch_normal(out: Tensor, key: Tensor, sample_id: Tensor, step: Tensor) -> None:
    """Fill the contiguous (B, ...) tensor ``out``."""
    if out.numel() == 0:
        return
    elements = out[0].numel()
    block = block_size(elements)
    n_blocks = triton.cdiv(elements, block)
    with on_device_of(out):
        _normal_kernel[(out.shape[0] * n_blocks,)](
            out,
            key,
            sample_id,
            step,
            elements,
            n_blocks,
            BLOCK=block,
            WIDE=needs_wide_index(elements),
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )


# --- torch ----------------------------------------------------------------------------------------


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 in int64 arithmetic; overwrites both arguments.

    ``even`` holds the counter words (c0, c2) and ``odd`` (c1, c3), int64 of shape (2, ...) with
    values below 2^32; the result is the output words (w0, w2) and (w1, w3). A product of two
    32-bit words wraps at 2^64 without losing a bit, so its halves are a shift and a mask.
    """
    key = key.reshape(1)
    words = torch.cat([key, key >> 32]) & _MASK
    # Filled, not copied from the host: a copy would wait for the GPU and break a graph's capture.
    weyl = torch.empty_like(words)
    weyl[0].fill_(_WEYL[0])
    weyl[1].fill_(_WEYL[1])
    rounds = torch.arange(_ROUNDS, dtype=torch.int64, device=key.device)
    round_keys = (words + rounds[:, None] * weyl) & _MASK
    round_keys = round_keys.reshape(_ROUNDS, 2, *[1] * (even.dim() - 1))
    product = torch.empty_like(even)
    for round_key in round_keys:
        torch.mul(even[0], _MULTIPLIER[0], out=product[1])
        torch.mul(even[1], _MULTIPLIER[1], out=product[0])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd, product = product, odd  # its upper half goes with the next mask
    return even, odd.bitwise_and_(_MASK)


def _counters(
    sample_id: Tensor, step: Tensor, groups: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    even = sample_id.new_empty((2, sample_id.shape[0], groups))
    odd = torch.empty_like(even)
    even[0] = torch.arange(first, first + groups, dtype=torch.int64, device=sample_id.device)
    even[1] = ((sample_id >> 32) & _MASK)[:, None]
    odd[0] = (sample_id & _MASK)[:, None]
    odd[1] = step.reshape(()) & _MASK
    return even, odd


def _log_reference(x: Tensor) -> Tensor:
    bits = x.view(torch.int32) + (_ONE_BITS - _SQRT_HALF_BITS)
    e = ((bits >> 23) - 127).to(torch.float32)
    m = bits.bitwise_and_(0x007FFFFF).add_(_SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    z = m * m
    y = m * _LOG[0]
    for coefficient in _LOG[1:]:
        y.add_(coefficient).mul_(m)
    y.mul_(z).add_(e * -2.12194440e-4)
    y.sub_(z.mul_(0.5))
    return m.add_(y).add_(e.mul_(0.693359375))


def _sin_cos_2pi_reference(u: Tensor) -> tuple[Tensor, Tensor]:
    q = (u * 4.0).add_(0.5).to(torch.int32)
    r = u.sub_(q.to(torch.float32).mul_(0.25)).mul_(2 * math.pi)
    z = r * r
    s = (z * _SIN[0]).add_(_SIN[1]).mul_(z).add_(_SIN[2]).mul_(z * r).add_(r).view(torch.int32)
    c = (z * _COS[0]).add_(_COS[1]).mul_(z).add_(_COS[2]).mul_(z * z)
    c = c.add_(z.mul_(-0.5).add_(1.0)).view(torch.int32)
    swap = (s ^ c).bitwise_and_(-(q & 1))  # odd quadrants exchange sine and cosine
    sin = s.bitwise_xor_(swap).bitwise_xor_((q & 2) << 30)  # bit 31 is the sign
    cos = c.bitwise_xor_(swap).bitwise_xor_(q.add_(1).bitwise_and_(2) << 30)
    return sin.view(torch.float32), cos.view(torch.float32)


def fill_normal_reference(
    out: Tensor, key: Tensor, sample_id: Tensor, step: Tensor, first: int = 0
) -> None:
    """The groups of four from ``first`` on; ``out``: (B, groups, 4) float32."""
    radius, angle = philox(*_counters(sample_id, step, out.shape[1], first), key)
    u = radius.to(torch.float32).add_(0.5).mul_(2.0**-32)
    square = _log_reference(u).mul_(-2.0)
    r = square.double().sqrt_().to(torch.float32)  # torch's float32 sqrt is not correctly rounded
    sin, cos = _sin_cos_2pi_reference((angle >> 8).to(torch.float32).mul_(2.0**-24))
    pairs = out.view(*out.shape[:2], 2, 2).movedim(2, 0)
    torch.mul(r, cos, out=pairs[..., 0])
    torch.mul(r, sin, out=pairs[..., 1])


def normal_reference(
    shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor, dtype: torch.dtype
) -> Tensor:
    batch, elements = shape[0], math.prod(shape[1:])
    groups = -(-elements // 4)
    out = torch.empty((batch, groups, 4), dtype=torch.float32, device=sample_id.device)
    rows = max(1, _CHUNK // max(groups, 1))
    for start in range(0, batch if groups else 0, rows):
        part = slice(start, start + rows)
        fill_normal_reference(out[part], key, sample_id[part], step)
    flat = out.view(batch, groups * 4)[:, :elements]
    return flat.to(dtype).reshape(tuple(shape)).contiguous()


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::normal", mutates_args=(), device_types="cpu")
def _normal(
    shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor, dtype: torch.dtype
) -> Tensor:
    return normal_reference(shape, key, sample_id, step, dtype)


@_normal.register_kernel("cuda")
def _normal_cuda(
    shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=sample_id.device)
    _launch_normal(out, key, sample_id.contiguous(), step)
    return out


@_normal.register_fake
def _normal_fake(
    shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor, dtype: torch.dtype
) -> Tensor:
    return sample_id.new_empty(shape, dtype=dtype)


@torch.library.custom_op("concilium::uniform_words", mutates_args=())
def _uniform_words(shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor) -> Tensor:
    elements = math.prod(shape[1:])
    even, odd = _counters(sample_id, step, -(-elements // 4))
    even, odd = philox(even, odd, key ^ _UNIFORM_TAG)
    words = torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)
    return words.flatten(1)[:, :elements].reshape(tuple(shape)).contiguous()


@_uniform_words.register_fake
def _uniform_words_fake(
    shape: Sequence[int], key: Tensor, sample_id: Tensor, step: Tensor
) -> Tensor:
    return sample_id.new_empty(shape)


def normal(
    shape: Sequence[int],
    *,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of shape ``(B, ...)`` on the device of ``sample_id``, contiguous.

    ``key``: int64, one element, 64 bits of Philox key (:func:`derive_key`). ``sample_id``: int64
    ``(B,)``, all 64 bits count. ``step``: int64, one element, of which the low 32 bits count: a
    stream longer than 2^32 steps needs a new key. All three are tensors so that CUDA graphs and
    ``torch.compile`` see them change. ``dtype``: float32, bfloat16 or float16, rounded from
    float32. The largest magnitude is 6.8.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape or device or more than
    2^34 elements a sample. Philox: Salmon et al., SC 2011.
    """
    shape = list(shape)
    check_batched("normal", "shape", shape)
    check_float_dtype("normal", dtype)
    check_per_sample("normal", "sample_id", sample_id, shape[0])
    check_stream("normal", key, sample_id, step, shape[0], sample_id.device)
    out: Tensor = _normal(shape, key, sample_id, step, dtype)
    return out


def uniform(shape: Sequence[int], *, key: Tensor, sample_id: Tensor, step: Tensor) -> Tensor:
    """Uniform float32 of shape ``(B, ...)`` in [0, 1), multiples of 2^-24; arguments as for
    :func:`normal`.
    """
    shape = list(shape)
    check_batched("uniform", "shape", shape)
    check_per_sample("uniform", "sample_id", sample_id, shape[0])
    check_stream("uniform", key, sample_id, step, shape[0], sample_id.device)
    words: Tensor = _uniform_words(shape, key, sample_id, step)
    return (words >> 8).to(torch.float32) * 2.0**-24


def timesteps(num_train_timesteps: int, *, key: Tensor, sample_id: Tensor, step: Tensor) -> Tensor:
    """Timesteps in [0, T), int64 ``(B,)``: ``t = floor(T w / 2^32)`` of one Philox word w, in
    integers.

    ``key``, ``sample_id``, ``step`` as for :func:`normal`. No timestep is favoured by more than T /
    2^32 of its share (Lemire, arXiv 1805.10941, without the rejection). Raises ``ValueError``
    unless 1 <= T <= 2^31.
    """
    if not 1 <= num_train_timesteps <= 1 << 31:
        raise ValueError(
            f"timesteps: num_train_timesteps must be 1 to 2^31, got {num_train_timesteps}"
        )
    check_scalar("timesteps", "key", key)
    check_scalar("timesteps", "step", step)
    check_dtype("timesteps", "sample_id", sample_id, (torch.int64,))
    check_per_sample("timesteps", "sample_id", sample_id, sample_id.numel())
    check_device("timesteps", sample_id.device, key=key, step=step)
    words: Tensor = _uniform_words([sample_id.shape[0], 1], key, sample_id, step)
    return (words[:, 0] * num_train_timesteps) >> 32


def derive_key(seed: int, purpose: str) -> int:
    """The 64-bit key of one purpose, as the int64 that a tensor can hold: BLAKE2b-64 of (seed,
    purpose).

    ``torch.tensor(derive_key(seed, "training noise"), device=...)`` is what the ops take as
    ``key``.
    """
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8, person=b"concilium-noise")
    return int.from_bytes(digest.digest(), "little", signed=True)
