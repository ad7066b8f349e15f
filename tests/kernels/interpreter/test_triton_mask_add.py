"""The mask kernel against RFC 8439, and against its torch reference in every bit."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.chacha20 import keystream_block
from kernels.mask_add import (
    RING_DTYPES,
    Quantiser,
    _as_words,
    _floor,
    _launch_mask_add,
    _launch_masks,
    add_masks_reference_,
    mask_add_reference,
)


@triton.jit
def _blocks(out, key, counter, n, LANES: tl.constexpr):
    at = tl.arange(0, 16 * LANES)
    counters = tl.load(counter + tl.arange(0, LANES)).to(tl.uint32, bitcast=True)
    words = keystream_block(key, counters).to(tl.int32, bitcast=True)
    tl.store(out + at, words, mask=at < 16 * n)


# RFC 8439, appendix A.1: those of its keystream vectors whose nonce is zero
VECTORS = [
    (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
     "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"),
    (bytes(32), 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
     "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"),
    (bytes(31) + b"\x01", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
     "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"),
    (b"\x00\xff" + bytes(30), 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
     "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "stream"), VECTORS)
def test_the_vectors_of_rfc_8439(key, counter, stream):
    words = torch.frombuffer(bytearray(key), dtype=torch.int32)
    out = torch.zeros(16, dtype=torch.int32)
    _blocks[(1,)](out, words, torch.tensor([counter], dtype=torch.int32), 1, LANES=1)
    assert out.numpy().tobytes().hex() == stream


def test_the_counter_is_unsigned_to_its_end():
    from kernels.chacha20 import keystream_reference

    key = torch.arange(8, dtype=torch.int32)
    counter = torch.tensor([2**31 - 1, -(2**31), -2, -1], dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    _blocks[(1,)](out, key, counter, 4, LANES=4)
    assert torch.equal(out[:32], keystream_reference(key, 2**31 - 1, 2))
    assert torch.equal(out[32:], keystream_reference(key, 2**32 - 2, 2))


def _keys(n):
    generator = torch.Generator().manual_seed(n)
    keys = torch.randint(0, 256, (n, 32), dtype=torch.uint8, generator=generator)
    return _as_words(keys), torch.randint(0, 2, (n,), generator=generator) * 2 - 1


@pytest.mark.parametrize("n_keys", [2])
@pytest.mark.parametrize("ring", [8, 16, 32])
def test_masks_from_any_element_on(ring, n_keys):
    keys, signs = _keys(n_keys)
    per_program = 128 * 512 // ring
    lengths = (0, 1, 3, 31, 63, 64, 65, 127, per_program - 1, per_program, per_program + 1)
    given = [(0, size) for size in lengths] + [(128, 195), (511, 200), (2**34 + 7, 1), (7, 0)]
    for first, size in given:
        words = torch.randint(-100, 100, (size,)).to(RING_DTYPES[ring])
        want = words.clone()
        _launch_masks(words, keys, signs, first)
        add_masks_reference_(want, keys, signs, first)
        assert torch.equal(words, want)


@pytest.mark.slow  # 257 keystreams in the interpreter take minutes
@pytest.mark.timeout(900)
def test_more_masks_are_subtracted_than_an_element_counts():
    """As many ones complete the complements, modulo 2^8 in each element."""
    keys, signs = _as_words(torch.arange(257 * 32).to(torch.uint8).view(257, 32)), -torch.ones(257)
    words, want = torch.zeros(2, 5, dtype=torch.int8)
    _launch_masks(words, keys, signs.long())
    add_masks_reference_(want, keys, signs.long(), 0)
    assert torch.equal(words, want)


@triton.jit
def _floors(out, x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, _floor(tl.load(x + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_that_of_every_number(dtype):
    tiny, most = torch.finfo(dtype).tiny, 2.0**31 - (128 if dtype == torch.float32 else 0.5)
    x = [0.0, 0.5, 1.0, 1.5, tiny, tiny / 2, 127.0, 32767.5]
    x = torch.tensor([*x, *(-value for value in x), 2.0**24 - 1, most, -most, -0.99], dtype=dtype)
    x = torch.cat([x, torch.randn(32 - len(x), dtype=dtype) * 1e5])
    out = torch.full(x.shape, 77, dtype=torch.int32)
    _floors[(1,)](out, x, len(x))
    assert torch.equal(out.double(), x.double().floor())


def _strided(x):
    """The same numbers with others between them."""
    wide = torch.stack([x, x.flip(0)], -1)
    return wide[..., 0]


def test_signs_may_be_expanded():
    keys, _ = _keys(2)
    words, signs = torch.arange(-50, 50, dtype=torch.int16), torch.tensor(-1).expand(2)
    want = words.clone()
    _launch_masks(words, keys, signs)
    add_masks_reference_(want, keys, signs, 0)
    assert torch.equal(words, want)


@pytest.mark.parametrize("ring", [8, 16, 32])
def test_what_is_given_may_be_strided(ring):
    keys, signs, sizes = _keys(2)[0], torch.tensor([-1, 7, 1])[::2], (3, 1, 40)
    q = Quantiser.of(
        ring=ring, sizes=sizes, clips=[0.5, 0.25, 1.0], count=37, total_count=101, scale=100
    )
    delta, residual = torch.randn(2, sum(sizes))
    constants = (q.ends, q.up, q.down, q.bounds, q.point, keys[0])
    words, want = torch.empty(2, sum(sizes), dtype=RING_DTYPES[ring])
    carried, rest = torch.empty(2, sum(sizes))
    strided = tuple(map(_strided, constants))
    given = (delta, residual, carried, *strided)
    _launch_mask_add(words, keys.T.contiguous().T, signs, given)
    mask_add_reference(want, delta, residual, rest, *constants, keys, signs)
    assert torch.equal(words, want)
    assert torch.equal(carried, rest)


@pytest.mark.parametrize("ring", [8, 16, 32])
def test_vectors_may_begin_anywhere_in_memory(ring):
    (keys, signs), n = _keys(2), 2200
    q = Quantiser.of(ring=ring, sizes=[n], clips=[0.5], count=37, total_count=101, scale=100)
    delta, residual, carried, rest = torch.randn(4, n + 1)[:, 1:]
    words, want = torch.empty(2, n + 1, dtype=RING_DTYPES[ring])[:, 1:]
    constants = (q.ends, q.up, q.down, q.bounds, q.point, keys[0])
    _launch_mask_add(words, keys, signs, (delta, residual, carried, *constants))
    mask_add_reference(want, delta, residual, rest, *constants, keys, signs)
    assert torch.equal(words, want)
    assert torch.equal(carried, rest)


def test_the_bytes_of_a_key_may_lie_anywhere():
    many = torch.randint(0, 256, (70,), dtype=torch.uint8)
    for start in (0, 1, 4, 7):
        assert torch.equal(_as_words(many[start:][:32]), _as_words(many[start:][:32].clone()))


SIZES = [
    (1,),
    (3, 1, 100, 4200),
    (63,),  # what is beyond whole blocks is launched apart: nothing, all or some of it
    (64,),
    (65,),
    (2048, 2048, 64),  # tensors that end where programs do
    (2047, 2, 2046, 3, 7),
    (1,) * 130,  # more tensors than elements are left at the end
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
@pytest.mark.parametrize("ring", [8, 16, 32])
def test_quantised_and_masked(ring, sizes):
    n = sum(sizes)
    clips = [2.0 ** (i % 5 - 6) for i in range(len(sizes))]
    quantiser = Quantiser.of(
        ring=ring, sizes=sizes, clips=clips, count=37, total_count=101, scale=2 ** (ring - 1) - 9,
        silo=len(sizes) + 1,
    )  # fmt: skip
    keys, signs = _keys(2)
    rounding_key = keys[0].flip(0)
    delta, residual = torch.randn(n) * 0.02, torch.randn(n) * 1e-3
    delta[0] = float("nan")
    delta[-1] = float("inf")
    q = quantiser
    results = []
    for kernel in (True, False):
        words = torch.full((n,), 77, dtype=RING_DTYPES[ring])
        carried = torch.full((n,), 77.0)
        given = (delta, residual, carried, q.ends, q.up, q.down, q.bounds, q.point, rounding_key)
        if kernel:
            counts = _launch_mask_add(words, keys, signs, given)
        else:
            counts = mask_add_reference(words, *given, keys, signs)
        results.append((words, carried.view(torch.int32), counts))
    got, want = results
    finite = (delta + residual).isfinite()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1][finite], want[1][finite])
    assert got[2].tolist() == want[2].tolist()
    assert got[2][1] == (~finite).sum()
