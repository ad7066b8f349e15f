"""A model delta quantised and masked for a secure sum over Z_2^b, b = 8, 16 or 32.

    wanted = delta + residual                                  in float32
    q      = floor(clip(wanted * up_l, -limit, limit) + u)     up_l = w S / c_l, tensor l
    out    = q + sum_k sign_k keystream(key_k)  mod 2^b        carried = wanted - q down_l

u is made of the ChaCha20 stream of the rounding key, XORed with the silo's point
(`Quantiser.of`): 16 bits an element and float32 arithmetic for b = 8 and 16, 32 bits and float64
for b = 32. Element e is masked with bytes e b/8 to (e + 1) b/8 - 1 of each keystream, little-endian
(docs/secure-sum.md, *Masks*).

On a GPU one launch quantises and one masks: a kernel that did both took all registers of a thread
and spilled in some configurations, and the words between the two are little beside N keystreams.

Every operation is an addition, multiplication, rounding or comparison whose result IEEE 754 fixes,
in a fixed order and without fused multiply-add. A GPU therefore makes the bytes that the CPU path
(`study.encoding`, `secagg.masking`) makes, and both can sit in one session. Stochastic rounding
with error feedback: arXiv 1901.09847.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._arguments import check_device, check_dtype, check_same_shape, on_device_of
from kernels._mask_add_cpu import add_masks_reference_, mask_add_reference
from kernels.chacha20 import BLOCK_BYTES, MAX_BLOCKS, keystream_block
from kernels.quantiser import RING_DTYPES, Quantiser

_RINGS = {dtype: ring for ring, dtype in RING_DTYPES.items()}
_LANES = 128  # blocks of masks to a program: one a thread
# Blocks of dither to a program: few, since elements take registers, and so many that a thread still
# stores 128 bits where there are 64 to a warp.
_QUANTISED = {8: 128, 16: 64, 32: 64}
_NARROW = 32  # blocks to a program where no access is wide: they take more registers
# Registers are fewer still, as triton 3.6's compiler would keep two of them in memory with 32.
_QUANTISED_NARROW = {8: 16, 16: 16, 32: 32}
_REST = 64  # elements that one program takes at the end: whole blocks in every ring


# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _add_in_lanes(a, b, RING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Packed ring elements added within 32-bit words: no carry crosses from one to the next."""
    if RING == 32:
        return a + b
    high: tl.constexpr = 0x80008000 if RING == 16 else 0x80808080
    low: tl.constexpr = 0x7FFF7FFF if RING == 16 else 0x7F7F7F7F
    return ((a & low) + (b & low)) ^ ((a ^ b) & high)


@triton.jit
def _halves(words):  # type: ignore[no-untyped-def]
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def _elements(words, RING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words cut into ring elements, little-endian."""
    if RING == 32:
        return words
    elif RING == 16:
        return _halves(words)
    else:
        halves = _halves(words)
        return tl.interleave(halves & 0xFF, halves >> 8)


@triton.jit
def _sum_of_keystreams(keys, signs, n_keys, counter, RING: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """sum sign keystream, packed. -w is ~w + 1, and the ones are counted and added at the end."""
    ones: tl.constexpr = 1 if RING == 32 else (0x00010001 if RING == 16 else 0x01010101)
    total = tl.zeros((LANES * 16,), tl.uint32)
    negatives = tl.full((), 0, tl.uint32)
    for k in range(n_keys):
        subtract = tl.load(signs + k) < 0
        words = keystream_block(keys + 8 * k, counter)
        total = _add_in_lanes(total, tl.where(subtract, words ^ 0xFFFFFFFF, words), RING)
        negatives += subtract.to(tl.uint32)
    if RING < 32:  # as many as an element counts, in each of them
        negatives = (negatives & ((1 << RING) - 1)) * ones
    return _add_in_lanes(total, tl.zeros_like(total) + negatives, RING)


@triton.jit
def _tensor_of(at, ends, n_tensors, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of tensors that end at or before the one element `at`, by binary search."""
    found = 0
    for i in tl.static_range(SEARCH):
        candidate = found + (1 << (SEARCH - 1 - i))
        inside = candidate <= n_tensors
        end = tl.load(ends + candidate - 1, mask=inside, other=0)
        found = tl.where(inside & (end <= at), candidate, found)
    return found


@triton.jit
def _of_tensors(values, ends, first, last, start, lane):  # type: ignore[no-untyped-def]
    """For element start + lane the value of its tensor, which is one of `first` to `last`.

    Few tensors meet in a program, mostly one: a search for every element would take more registers
    than there are.
    """
    chosen = tl.broadcast_to(tl.load(values + first), lane.shape)
    for tensor in range(first, last):
        beyond = lane >= (tl.load(ends + tensor) - start).to(tl.int32)
        chosen = tl.where(beyond, tl.load(values + tensor + 1), chosen)
    return chosen


@triton.jit
def _counters(block, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    return block.to(tl.uint32) + tl.arange(0, LANES).to(tl.uint32)


@triton.jit
def _dither(key, point, block, WIDE: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """u in [0, 1) of each element: the key's stream, XORed with the silo's point."""
    own = tl.load(point).to(tl.uint32, bitcast=True)
    bits = keystream_block(key, _counters(block, LANES)) ^ own
    if WIDE:
        return bits.to(tl.float64) * 2.3283064365386963e-10
    else:
        return _halves(bits).to(tl.float32) * 1.52587890625e-05


@triton.jit
def _floor(x):  # type: ignore[no-untyped-def]
    """floor(x) as int32, |x| < 2^31. tl.floor takes float32's subnormals for zero on NVIDIA GPUs;
    these conversions and the comparison take every number as it is.
    """
    towards_zero = x.to(tl.int32)
    return towards_zero - (towards_zero.to(x.dtype) > x).to(tl.int32)


@triton.jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    words,
    delta,
    residual,
    carried,
    partial,
    ends,
    up,
    down,
    bounds,
    point,
    rounding_key,
    n_tensors,
    size,
    begin,
    WIDE: tl.constexpr,
    SEARCH: tl.constexpr,
    LANES: tl.constexpr,
):
    """words[begin:size] = q, where `begin` is the first element of a block of dither."""
    PER_BLOCK: tl.constexpr = 16 if WIDE else 32
    REAL: tl.constexpr = tl.float64 if WIDE else tl.float32
    program = tl.program_id(0)
    start = program.to(tl.int64) * (LANES * PER_BLOCK) + begin
    lane = tl.arange(0, LANES * PER_BLOCK)
    at = start + lane
    inside = at < size
    wanted = tl.load(delta + at, mask=inside, other=0.0)
    wanted = (wanted + tl.load(residual + at, mask=inside, other=0.0)).to(REAL)
    first = _tensor_of(start, ends, n_tensors, SEARCH)
    end = tl.minimum(start + LANES * PER_BLOCK, size)
    last = _tensor_of(end - 1, ends, n_tensors, SEARCH)
    finite = tl.abs(wanted) < float("inf")
    q = wanted * _of_tensors(up, ends, first, last, start, lane)
    limit = tl.load(bounds)
    over = tl.abs(q) > tl.load(bounds + 1)
    tl.store(partial + 2 * program, tl.sum((over & inside).to(tl.int32)))
    tl.store(partial + 2 * program + 1, tl.sum((~finite).to(tl.int32)))
    q = tl.minimum(tl.maximum(tl.where(finite, q, 0.0), -limit), limit)
    word = _floor(q + _dither(rounding_key, point, start // PER_BLOCK, WIDE, LANES))
    q = word.to(REAL)
    rest = wanted - q * _of_tensors(down, ends, first, last, start, lane)
    tl.store(carried + at, rest.to(tl.float32), mask=inside)
    tl.store(words + at, word.to(words.dtype.element_ty), mask=inside)


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]
    words,
    keys,
    signs,
    n_keys,
    size,
    first_block,
    begin,
    RING: tl.constexpr,
    LANES: tl.constexpr,
):
    """words[begin:size] += masks; the first block starts at `begin`, before words[0] where that is
    negative.
    """
    PER_BLOCK: tl.constexpr = 512 // RING
    program = tl.program_id(0)
    start = program.to(tl.int64) * (LANES * PER_BLOCK) + begin
    at = start + tl.arange(0, LANES * PER_BLOCK)
    inside = (at >= 0) & (at < size)
    counter = _counters(first_block + program.to(tl.int64) * LANES, LANES)
    masks = _elements(_sum_of_keystreams(keys, signs, n_keys, counter, RING, LANES), RING)
    value = tl.load(words + at, mask=inside, other=0).to(tl.int32)
    value = value + masks.to(tl.int32, bitcast=True)
    tl.store(words + at, value.to(words.dtype.element_ty), mask=inside)


def _parts(n: int, per_block: int, lanes: int) -> list[tuple[int, int, int, int]]:
    """[0, n) as (begin, end, blocks to a program, warps). Triton proves that accesses are wide only
    where 16 divides the size: what is beyond whole blocks is a launch of its own.
    """
    whole = n - n % _REST
    parts = [(0, whole, lanes, 4), (whole, n, _REST // per_block, 1)]
    return [part for part in parts if part[0] < part[1]]


def _aligned(*vectors: Tensor) -> bool:
    """Whether all begin on 128 bits, as what torch allocates does and a view may not."""
    return not any(vector.data_ptr() % 16 for vector in vectors)


def _launch_masks(words: Tensor, keys: Tensor, signs: Tensor, first: int = 0) -> None:
    """Add masks to `words`, elements `first` and following of a vector."""
    ring, n = _RINGS[words.dtype], words.numel()
    per_block = 8 * BLOCK_BYTES // ring
    block, skip = divmod(first, per_block)
    # The kernel reads one element after the other, whatever the strides.
    keys, signs = keys.contiguous(), signs.contiguous()
    most = _LANES if _aligned(words) else _NARROW
    parts = [(-skip, n, _NARROW, 4)] if skip and n else _parts(n, per_block, most)
    for begin, end, lanes, warps in parts:
        with on_device_of(words):
            _mask_kernel[(triton.cdiv(end - begin, lanes * per_block),)](
                words, keys, signs, keys.shape[0], end, block + max(begin, 0) // per_block, begin,
                RING=ring, LANES=lanes, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip


def _launch_mask_add(
    words: Tensor, keys: Tensor, signs: Tensor, rounding: tuple[Tensor, ...]
) -> Tensor:
    """Fill `words` and `carried`: `rounding` is (delta, residual, carried, ends, up, down, bounds,
    point, rounding key). Returns the numbers of clipped and of not finite elements.
    """
    n, ring = words.numel(), _RINGS[words.dtype]
    per_block = 16 if ring == 32 else 32
    vectors, constants = rounding[:3], [value.contiguous() for value in rounding[3:]]
    most = (_QUANTISED if _aligned(words, *vectors) else _QUANTISED_NARROW)[ring]
    n_tensors = constants[0].numel()
    programs = triton.cdiv(n, most * per_block) + 1
    partial = torch.zeros((programs, 2), dtype=torch.int32, device=words.device)
    for begin, end, lanes, warps in _parts(n, per_block, most):
        counted = partial if begin == 0 else partial[-1:]
        with on_device_of(words):
            _quantise_kernel[(triton.cdiv(end - begin, lanes * per_block),)](
                words, *vectors, counted, *constants, n_tensors, end, begin,
                WIDE=ring == 32, SEARCH=n_tensors.bit_length(), LANES=lanes,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    _launch_masks(words, keys, signs)
    return partial.sum(0)


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::mask_add", mutates_args=(), device_types="cpu")
def _mask_add(
    delta: Tensor, residual: Tensor, ends: Tensor, up: Tensor, down: Tensor, bounds: Tensor,
    point: Tensor, rounding_key: Tensor, keys: Tensor, signs: Tensor, ring: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    words, carried = torch.empty_like(delta, dtype=RING_DTYPES[ring]), torch.empty_like(delta)
    given = (delta, residual, carried, ends, up, down, bounds, point, rounding_key)
    counts = mask_add_reference(words, *given, keys, signs)
    return words, carried, counts


@_mask_add.register_kernel("cuda")
def _mask_add_cuda(
    delta: Tensor, residual: Tensor, ends: Tensor, up: Tensor, down: Tensor, bounds: Tensor,
    point: Tensor, rounding_key: Tensor, keys: Tensor, signs: Tensor, ring: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    words, carried = torch.empty_like(delta, dtype=RING_DTYPES[ring]), torch.empty_like(delta)
    rounding = (delta, residual, carried, ends, up, down, bounds, point, rounding_key)
    return words, carried, _launch_mask_add(words, keys, signs, rounding)


@_mask_add.register_fake
def _mask_add_fake(
    delta: Tensor, residual: Tensor, ends: Tensor, up: Tensor, down: Tensor, bounds: Tensor,
    point: Tensor, rounding_key: Tensor, keys: Tensor, signs: Tensor, ring: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    words = torch.empty_like(delta, dtype=RING_DTYPES[ring])
    return words, torch.empty_like(delta), delta.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("concilium::add_masks_", mutates_args=("words",), device_types="cpu")
def _add_masks(words: Tensor, keys: Tensor, signs: Tensor, first: int) -> None:
    add_masks_reference_(words, keys, signs, first)


@_add_masks.register_kernel("cuda")
def _add_masks_cuda(words: Tensor, keys: Tensor, signs: Tensor, first: int) -> None:
    _launch_masks(words, keys, signs, first)


@_add_masks.register_fake
def _add_masks_fake(words: Tensor, keys: Tensor, signs: Tensor, first: int) -> None:
    return None


def _check_keys(op: str, keys: Tensor, signs: Tensor, device: torch.device) -> None:
    check_dtype(op, "keys", keys, (torch.uint8,))
    check_dtype(op, "signs", signs, (torch.int64,))
    if keys.dim() != 2 or keys.shape[1] != 32 or signs.shape != keys.shape[:1]:
        raise ValueError(
            f"{op}: keys must be (N, 32) bytes and signs (N,), got {tuple(keys.shape)} and "
            f"{tuple(signs.shape)}"
        )
    check_device(op, device, keys=keys, signs=signs)


def _check_length(op: str, end: int, item: int) -> None:
    if end * item > MAX_BLOCKS * BLOCK_BYTES:
        raise ValueError(
            f"{op}: {end} elements of {item} bytes need more than the 2^32 blocks that one key "
            "may make (RFC 8439); split the vector over several sessions"
        )


def _check_vector(op: str, name: str, value: Tensor) -> None:
    if value.dim() != 1 or not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be one flat contiguous buffer")


def mask_add(
    delta: Tensor,
    residual: Tensor,
    quantiser: Quantiser,
    *,
    rounding_key: Tensor,
    keys: Tensor,
    signs: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(words, carried, counts) of delta + residual, float32 ``(n,)`` each.

    ``rounding_key``: 32 bytes, uint8 ``(32,)``, the same for all silos of a sum and different ones
    for each sum, no secret (``docs/secure-sum.md``, *D: a delta*). ``keys``: uint8 ``(N, 32)``,
    each for one vector only; N = 0 quantises without masks. ``signs``: +1 or -1, int64 ``(N,)``.
    ``quantiser``: that of exactly n elements, on the same device.

    ``words``: int8, int16 or int32 ``(n,)``, the two's complement of the unsigned ring elements.
    ``carried``: float32 ``(n,)``, what the words leave out. ``counts``: int64 ``(2,)``, the
    elements beyond their clip and those not finite. Where the second is not zero the words mean
    nothing: never send them, mask a vector of zeros with :func:`add_masks_` instead.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, length or device, for
    a vector longer than one keystream and, on the CPU, for any other sign (on CUDA, where looking
    would stall the queue, what is negative subtracts and all else adds). RFC 8439; arXiv
    1901.09847.
    """
    op = "mask_add"
    for name, value in (("delta", delta), ("residual", residual)):
        check_dtype(op, name, value, (torch.float32,))
        _check_vector(op, name, value)
    check_same_shape(op, "residual", residual, "delta", delta)
    if delta.numel() != quantiser.total:
        raise ValueError(
            f"{op}: delta has {delta.numel()} elements, the quantiser's tensors {quantiser.total}; "
            "make it with Quantiser.of(sizes=...) of the tensors that were flattened into delta"
        )
    check_dtype(op, "rounding_key", rounding_key, (torch.uint8,))
    if rounding_key.shape != (32,):
        raise ValueError(f"{op}: rounding_key must be 32 bytes, got {tuple(rounding_key.shape)}")
    _check_keys(op, keys, signs, delta.device)
    check_device(op, delta.device, residual=residual, rounding_key=rounding_key, up=quantiser.up)
    _check_length(op, delta.numel(), max(2, quantiser.ring // 8))
    words, carried, counts = _mask_add(
        delta.detach(), residual.detach(), quantiser.ends, quantiser.up, quantiser.down,
        quantiser.bounds, quantiser.point, _as_words(rounding_key), _as_words(keys), signs,
        quantiser.ring,
    )  # fmt: skip
    return words, carried, counts


def add_masks_(words: Tensor, *, keys: Tensor, signs: Tensor, first: int = 0) -> None:
    """words <- words + sum_k signs_k keystream(keys_k) mod 2^b, in place.

    ``words``: int8, int16 or int32 ``(n,)``, contiguous: elements ``first`` ... ``first`` + n - 1
    of a vector. ``keys``, ``signs`` as for :func:`mask_add`, signs other than +1 and -1 too. Raises
    ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape or device and past the end of
    a keystream. RFC 8439.
    """
    op = "add_masks_"
    check_dtype(op, "words", words, tuple(_RINGS))
    _check_vector(op, "words", words)
    _check_keys(op, keys, signs, words.device)
    if first < 0:
        raise ValueError(f"{op}: first must not be negative, got {first}")
    _check_length(op, first + words.numel(), words.element_size())
    _add_masks(words, _as_words(keys), signs, first)


def _as_words(key: Tensor) -> Tensor:
    """Little-endian 32-bit words of keys, as RFC 8439 section 2.3 reads them."""
    if not key.numel():
        return key.new_empty((0, 8), dtype=torch.int32)
    # A copy, since bytes may start anywhere in memory and words may not.
    return key.clone(memory_format=torch.contiguous_format).view(torch.int32)
