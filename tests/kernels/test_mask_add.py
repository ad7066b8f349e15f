"""Quantise and mask: the bytes are those of the silo's CPU path, whatever the session."""

import sys

import numpy as np
import pytest
import torch

import kernels
from secagg.masking import MaskKey, apply_masks
from secagg.primitives import Secret
from study.encoding import Encoding


def _bytes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _session(ring, seed):
    """A random study, silo and model delta, and the keys of its masks."""
    rng = np.random.default_rng(seed)
    tensors = int(rng.integers(1, 6))
    silos = int(rng.integers(3, 9 if ring == 8 else 100))
    encoding = Encoding(
        ring=ring,
        silos=silos,
        total_count=int(rng.integers(1_000, 10**9)),
        sizes=tuple(int(n) for n in rng.integers(1, 40_000, tensors)),
        clips=tuple(float(np.float32(2.0**e)) for e in rng.uniform(-30, 4, tensors)),
    )
    n = sum(encoding.sizes)
    clip = np.repeat(np.float32(encoding.clips), encoding.sizes)
    delta = (clip * rng.normal(0, 0.6, n)).astype(np.float32)  # about one in ten is clipped
    delta[rng.integers(0, n, 5)] = (0.0, -0.0, 1e-42, 3e38, -3e38)
    residual = (clip * rng.normal(0, 1e-3, n)).astype(np.float32)
    count = int(rng.integers(1, encoding.total_count + 1))
    signs = rng.choice([-1, 1], int(rng.integers(0, 6)))
    return encoding, delta, residual, count, _bytes(rng, 32), _bytes(rng, len(signs), 32), signs


def _quantiser(encoding, count, silo=1):
    return kernels.Quantiser.of(
        ring=encoding.ring,
        sizes=encoding.sizes,
        clips=encoding.clips,
        count=count,
        total_count=encoding.total_count,
        scale=encoding.scale,
        silo=silo,
    )


def _mask_keys(keys, signs):
    return [MaskKey(Secret(k.tobytes()), int(s)) for k, s in zip(keys, signs, strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ring", [8, 16, 32])
def test_the_bytes_are_those_of_the_silo_s_cpu_path(ring, seed):
    encoding, delta, residual, count, rounding_key, keys, signs = _session(ring, seed)
    silo = seed % 3 + 1 if seed < 5 else encoding.silos
    rounding = {"count": count, "key": rounding_key.tobytes(), "silo": silo}
    cpu = encoding.encode(delta, residual, loss=0.25, **rounding)
    want = cpu.vector.copy()
    apply_masks(want, _mask_keys(keys, signs))

    masks = {"keys": torch.from_numpy(keys), "signs": torch.from_numpy(signs)}
    words, carried, counts = kernels.mask_add(
        torch.from_numpy(delta),
        torch.from_numpy(residual),
        _quantiser(encoding, count, silo),
        rounding_key=torch.from_numpy(rounding_key),
        **masks,
    )
    saturated, not_finite = counts.tolist()
    tail = torch.from_numpy(cpu.vector[len(delta) :].view(words.numpy().dtype).copy())
    kernels.add_masks_(tail, first=len(delta), **masks)
    assert torch.cat([words, tail]).numpy().tobytes() == want.tobytes()
    assert carried.numpy().tobytes() == cpu.residual.tobytes()
    assert (saturated, not_finite) == (cpu.saturated, 0)
    assert saturated > 0


@pytest.mark.parametrize("ring", [8, 16, 32])
def test_masks_of_a_pair_cancel_and_a_sum_decodes(ring):
    encoding, delta, residual, *_ = _session(ring, 3)
    encoding = Encoding(ring, 4, 100, encoding.sizes, encoding.clips)
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(_bytes(rng, 1, 32))
    total = 0
    for count, sign in ((60, 1), (40, -1)):
        words, _, _ = kernels.mask_add(
            torch.from_numpy(delta),
            torch.from_numpy(residual),
            _quantiser(encoding, count),
            rounding_key=torch.from_numpy(_bytes(rng, 32)),
            keys=keys,
            signs=torch.tensor([sign]),
        )
        total = total + words
    vector = encoding.zeros()
    vector[: len(delta)] = total.numpy().view(vector.dtype)
    clip = np.repeat(np.float32(encoding.clips), encoding.sizes)
    want = np.clip(delta.astype(np.float64) + residual, -clip, clip)
    mean = encoding.decode(vector).mean_delta
    assert (np.abs(mean - want) <= clip * (2 / encoding.scale + 1e-6)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(value):
    encoding, delta, residual, count, rounding_key, keys, signs = _session(16, 1)
    delta[7] = value
    _, _, counts = kernels.mask_add(
        torch.from_numpy(delta), torch.from_numpy(residual), _quantiser(encoding, count),
        rounding_key=torch.from_numpy(rounding_key), keys=torch.from_numpy(keys),
        signs=torch.from_numpy(signs),
    )  # fmt: skip
    assert counts[1] == 1


KEYS = {"keys": torch.zeros(2, 32, dtype=torch.uint8), "signs": torch.tensor([1, -1])}


def test_a_keystream_ends_after_2_to_the_32_blocks():
    word = torch.zeros(1, dtype=torch.int16)
    kernels.add_masks_(word, first=2**37 - 1, **KEYS)
    with pytest.raises(ValueError, match="2\\^32 blocks"):
        kernels.add_masks_(word, first=2**37, **KEYS)
    quantiser = kernels.Quantiser.of(
        ring=8, sizes=[2**38], clips=[1.0], count=1, total_count=1, scale=100
    )
    long = torch.empty(2**38, device="meta")  # 2^32 blocks of masks, twice as many of roundings
    on_meta = {name: value.to("meta") for name, value in KEYS.items()}
    with pytest.raises(ValueError, match="2\\^32 blocks"):
        kernels.mask_add(
            long, long, kernels.Quantiser(8, quantiser.total, *(x.to("meta") for x in (
                quantiser.ends, quantiser.up, quantiser.down, quantiser.bounds, quantiser.point))),
            rounding_key=torch.empty(32, dtype=torch.uint8, device="meta"), **on_meta,
        )  # fmt: skip


def test_refusals_say_what_was_wrong():
    words = torch.zeros(8, dtype=torch.int16)
    with pytest.raises(TypeError, match="words must be"):
        kernels.add_masks_(words.float(), **KEYS)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.add_masks_(words[::2], **KEYS)
    with pytest.raises(ValueError, match=r"keys must be \(N, 32\)"):
        kernels.add_masks_(words, keys=KEYS["keys"], signs=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not be negative"):
        kernels.add_masks_(words, first=-1, **KEYS)
    with pytest.raises(ValueError, match="ring must be 8, 16 or 32"):
        kernels.Quantiser.of(ring=64, sizes=[1], clips=[1.0], count=1, total_count=1, scale=1)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_vector_of_another_length_than_the_quantiser_s_is_refused(off_by, monkeypatch):
    def called(*_):
        raise AssertionError("the op must not see it: a GPU would read beyond the tensors")

    monkeypatch.setattr(sys.modules["kernels.mask_add"], "_mask_add", called)
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=[5, 3], clips=[1.0, 2.0], count=1, total_count=1, scale=9
    )
    delta = torch.zeros(8 + off_by)
    with pytest.raises(ValueError, match=f"delta has {8 + off_by} elements, the quantiser's .* 8"):
        kernels.mask_add(
            delta, delta, quantiser, rounding_key=torch.zeros(32, dtype=torch.uint8), **KEYS
        )


@pytest.mark.parametrize("sign", [0, 2, -3])
def test_a_sign_is_plus_or_minus_one(sign):
    words, signs = torch.zeros(8, dtype=torch.int16), torch.tensor([1, sign])
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=[8], clips=[1.0], count=1, total_count=1, scale=9
    )
    with pytest.raises(ValueError, match=rf"signs holds \[{sign}\]"):
        kernels.add_masks_(words, keys=KEYS["keys"], signs=signs)
    assert not words.any()  # refused before a mask was added
    with pytest.raises(ValueError, match=rf"signs holds \[{sign}\]"):
        kernels.mask_add(
            torch.zeros(8), torch.zeros(8), quantiser, keys=KEYS["keys"], signs=signs,
            rounding_key=torch.zeros(32, dtype=torch.uint8),
        )  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_is_positive_and_finite(clip):
    with pytest.raises(ValueError, match="one finite clip > 0"):
        kernels.Quantiser.of(
            ring=16, sizes=[4, 4], clips=[1.0, clip], count=1, total_count=1, scale=9
        )


def test_what_lies_on_another_device_is_refused():
    words = torch.zeros(8, dtype=torch.int16)
    for name in KEYS:
        with pytest.raises(ValueError, match=f"{name} is on meta, the data on cpu"):
            kernels.add_masks_(words, **(KEYS | {name: KEYS[name].to("meta")}))
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=[8], clips=[1.0], count=1, total_count=1, scale=9
    )
    delta, key = torch.zeros(8), torch.zeros(32, dtype=torch.uint8)
    for change in ({"rounding_key": key.to("meta")}, {"signs": KEYS["signs"].to("meta")}):
        with pytest.raises(ValueError, match="is on meta, the data on cpu"):
            kernels.mask_add(delta, delta, quantiser, **({"rounding_key": key} | KEYS | change))
    with pytest.raises(TypeError, match="delta must be torch.float32"):
        kernels.mask_add(delta.double(), delta, quantiser, rounding_key=key, **KEYS)


def test_one_graph_serves_every_length():
    def masked(words, keys, signs):
        kernels.add_masks_(words, keys=keys, signs=signs)
        return words + 0

    torch.compiler.reset()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (40, 70, 33):
            words = torch.arange(size, dtype=torch.int16)
            want = masked(words.clone(), *KEYS.values())
            torch._dynamo.mark_dynamic(words, 0)
            assert torch.equal(compiled(words, *KEYS.values()), want)


def test_opcheck():
    encoding, delta, residual, count, rounding_key, keys, signs = _session(16, 2)
    q = _quantiser(encoding, count)
    words = torch.zeros(70, dtype=torch.int16)
    key = torch.from_numpy(keys).view(torch.int32)
    sign = torch.from_numpy(signs)
    torch.library.opcheck(torch.ops.concilium.add_masks_.default, (words, key, sign, 3))
    arguments = (torch.from_numpy(delta), torch.from_numpy(residual), q.ends, q.up, q.down)
    arguments += (
        q.bounds,
        q.point,
        torch.from_numpy(rounding_key).view(torch.int32),
        key,
        sign,
        16,
    )
    torch.library.opcheck(torch.ops.concilium.mask_add.default, arguments)
