import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

import kernels
from kernels.noise import block_size, philox


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the known-answer vectors that come with Random123 (Salmon et al.): philox4x32, 10 rounds
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    even, odd = (torch.tensor([[counter[i]], [counter[i + 2]]]) for i in (0, 1))
    even, odd = philox(even, odd, torch.tensor(_signed(key[0] | key[1] << 32)))
    assert (even[0].item(), odd[0].item(), even[1].item(), odd[1].item()) == answer


def test_blocks_pad_a_sample_by_little():
    """Noise is computed for what lies beyond a sample in its last block, too."""
    assert block_size(3 * 32 * 32) == 1024  # three, where two of 2,048 would be a quarter padding
    assert block_size(3 * 64 * 64) == block_size((1 << 31) + 16) == 2048
    for elements in range(1, 20_000):
        block = block_size(elements)
        assert 64 <= block <= 2048
        assert block & (block - 1) == 0
        if elements > 512:  # at least 16 elements to a thread: 128 bits of uint8
            least = min(-elements % other for other in (512, 1024, 2048))
            assert block >= 512
            assert -elements % block - least < elements / 16


def _box_muller_float64(key, sample_id, step, elements):
    """The formula of the module's docstring, one counter at a time, in Python's float64."""
    mask, draws = 0xFFFFFFFF, []
    for group in range(-(-elements // 4)):
        even = torch.tensor([[group], [(sample_id >> 32) & mask]])
        odd = torch.tensor([[sample_id & mask], [step & mask]])
        even, odd = philox(even, odd, torch.tensor(key))
        for i in (0, 1):
            u = float(np.float32(np.float32(even[i].item()) + np.float32(0.5))) / 2**32
            phi = 2 * math.pi * (odd[i].item() >> 8) / 2**24
            r = math.sqrt(-2 * math.log(u))
            draws += [r * math.cos(phi), r * math.sin(phi)]
    return torch.tensor(draws[:elements], dtype=torch.float64)


@pytest.mark.parametrize("sample_id", [0, -1, 2**62 + 3])
def test_normals_are_box_muller_of_philox(sample_id):
    key = kernels.derive_key(3, "formula")
    got = kernels.normal(
        (1, 61), key=torch.tensor(key), sample_id=torch.tensor([sample_id]), step=torch.tensor(9)
    )
    expected = _box_muller_float64(key, sample_id, 9, 61)
    torch.testing.assert_close(got[0].double(), expected, rtol=2e-6, atol=2e-6)


def test_every_part_of_the_counter_and_key_changes_the_draws():
    def draw(key=1, sample_id=2, step=3):
        parts = {"key": torch.tensor(key), "step": torch.tensor(step)}
        return kernels.normal((1, 64), sample_id=torch.tensor([sample_id]), **parts)

    base = draw()
    others = [
        draw(key=0), draw(key=1 + 2**32), draw(key=1 - 2**63),
        draw(sample_id=3), draw(sample_id=2 + 2**32), draw(sample_id=2 - 2**63), draw(step=4),
    ]  # fmt: skip
    for other in others:
        assert (other == base).float().mean() < 0.1
    assert torch.equal(draw(step=3 + 2**32), base)  # only the low 32 bits of a step count


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 4, 5, 63, 64, 65])
def test_a_short_sample_is_the_beginning_of_a_long_one(stream, elements):
    s = stream(2)
    long = kernels.normal((2, 70), **s.named)
    assert torch.equal(kernels.normal((2, elements), **s.named), long[:, :elements])


DRAWS = {
    "normal": lambda **s: kernels.normal((len(s["sample_id"]), 3, 5, 5), **s),
    "uniform": lambda **s: kernels.uniform((len(s["sample_id"]), 3, 5), **s),
    "timesteps": lambda **s: kernels.timesteps(1000, **s),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_noise_is_independent_of_batch_order_and_split(draw, order, cut):
    key, step = torch.tensor(kernels.derive_key(1, "order")), torch.tensor(11)
    ids = torch.arange(6) * 2**31
    whole = draw(key=key, sample_id=ids, step=step)
    shuffled = ids[torch.tensor(order)]
    parts = [draw(key=key, sample_id=part, step=step) for part in (shuffled[:cut], shuffled[cut:])]
    assert torch.equal(torch.cat(parts), whole[torch.tensor(order)])


def test_an_empty_batch_has_draws_of_its_shape(stream):
    nothing = stream(0).named
    assert kernels.normal((0, 3), **nothing).shape == (0, 3)
    assert kernels.uniform((0, 3), **nothing).shape == (0, 3)
    assert kernels.timesteps(1000, **nothing).shape == (0,)


def test_chunked_work_gives_the_bits_of_whole_work(stream, monkeypatch):
    s = stream(7)
    whole = kernels.normal((7, 3, 11, 13), **s.named)
    monkeypatch.setattr("kernels.noise._CHUNK", 100)
    assert torch.equal(kernels.normal((7, 3, 11, 13), **s.named), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_noise_is_the_rounded_float32_noise(stream, dtype):
    s = stream(2)
    full = kernels.normal((2, 100), **s.named)
    assert torch.equal(kernels.normal((2, 100), dtype=dtype, **s.named), full.to(dtype))


def _draws(count: int, chunk: int = 1 << 20):
    key = torch.tensor(kernels.derive_key(2026, "goodness of fit"))
    for i in range(count // chunk):
        yield kernels.normal(
            (1, chunk), key=key, sample_id=torch.tensor([i]), step=torch.tensor(0)
        ).flatten()


def _check_moments(n, sums):
    """The first four moments, each within five of its standard errors."""
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(sums[power] / n - expected) < 5 * math.sqrt(variance / n), power


def test_a_million_normals_fit_the_normal_distribution():
    (x,) = (d.double() for d in _draws(1 << 20))
    _check_moments(x.numel(), {p: x.pow(p).sum().item() for p in (1, 2, 3, 4)})
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    pairs = x.view(-1, 4)
    correlation = torch.corrcoef(pairs.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(pairs.shape[0])
    assert abs((x[:-1] * x[1:]).mean()) < 5 / math.sqrt(x.numel())


@pytest.mark.slow
def test_a_hundred_million_normals_fit_the_normal_distribution():
    edges = torch.tensor(stats.norm.ppf(np.linspace(0, 1, 1001)[1:-1]), dtype=torch.float32)
    counts = torch.zeros(1000, dtype=torch.int64)
    sums, n, beyond = dict.fromkeys((1, 2, 3, 4), 0.0), 0, 0
    for x in _draws(100 << 20):
        counts += torch.bincount(torch.bucketize(x, edges), minlength=1000)
        wide = x.double()
        for p in sums:
            sums[p] += wide.pow(p).sum().item()
        beyond += int((x.abs() > 5).sum())
        n += x.numel()
    _check_moments(n, sums)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    expected = 2 * stats.norm.sf(5) * n  # about 60: the tail is there
    assert abs(beyond - expected) < 5 * math.sqrt(expected)


def test_uniforms_fill_the_unit_interval(stream):
    u = kernels.uniform((1, 1 << 18), **stream(1).named).double().flatten()
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_uniforms_and_normals_of_one_key_are_independent(stream):
    s = stream(1)
    u = kernels.uniform((1, 1 << 18), **s.named).flatten()
    e = kernels.normal((1, 1 << 18), **s.named).flatten()
    for a, b in ((u, e), (u, e.abs())):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(u.numel())


@pytest.mark.parametrize("steps", [1, 7, 1000, 2**31])
def test_timesteps_are_the_integer_part_of_the_uniform_word(steps):
    ids, key, step = torch.arange(4096), torch.tensor(5), torch.tensor(2)
    t = kernels.timesteps(steps, key=key, sample_id=ids, step=step)
    u = kernels.uniform((4096, 1), key=key, sample_id=ids, step=step)[:, 0].double()
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() < steps
    assert torch.all(t >= (u * steps).floor())
    assert torch.all(t <= ((u + 2**-24) * steps).floor())


def test_timesteps_are_evenly_spread():
    ids = torch.arange(200_000)
    t = kernels.timesteps(1000, key=torch.tensor(5), sample_id=ids, step=torch.tensor(0))
    assert stats.chisquare(torch.bincount(t, minlength=1000).numpy()).pvalue > 1e-3


def test_derived_keys_are_stable_and_differ_by_seed_and_purpose():
    keys = {kernels.derive_key(s, p) for s in range(50) for p in ("noise", "timesteps", "")}
    assert len(keys) == 150
    assert kernels.derive_key(0, "training noise") == kernels.derive_key(0, "training noise")
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_normal_passes_opcheck(stream):
    s = stream(3)
    for shape, dtype in (([3, 2, 5, 5], torch.float32), ([3], torch.bfloat16)):
        torch.library.opcheck(torch.ops.concilium.normal.default, (shape, *s.triple, dtype))
    torch.library.opcheck(torch.ops.concilium.uniform_words.default, ([3, 5], *s.triple))


def test_errors_say_what_was_wrong(stream):
    s = stream(2)
    wrong = [
        (TypeError, "key must be a tensor", {"key": 3}),
        (TypeError, "sample_id must be a tensor .*, got list", {"sample_id": [0, 1]}),
        (TypeError, "key must be torch.int64, got torch.int32", {"key": torch.tensor(1).int()}),
        (ValueError, "step must hold a single number", {"step": torch.tensor([1, 2])}),
        (ValueError, "one number per sample", {"sample_id": torch.arange(3)}),
        (ValueError, "is on meta, the data on cpu", {"key": torch.tensor(1, device="meta")}),
        (TypeError, "dtype must be one of", {"dtype": torch.float64}),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            kernels.normal((2, 3), **(s.named | change))
    for draw in (lambda **s: kernels.uniform((2, 3), **s), lambda **s: kernels.timesteps(9, **s)):
        with pytest.raises(TypeError, match="sample_id must be a tensor .*, got list"):
            draw(**(s.named | {"sample_id": [0, 1]}))
        for name in ("key", "step"):
            with pytest.raises(ValueError, match=f"{name} is on meta, the data on cpu"):
                draw(**(s.named | {name: s.named[name].to("meta")}))
            with pytest.raises(TypeError, match=f"{name} must be torch.int64"):
                draw(**(s.named | {name: s.named[name].int()}))
        with pytest.raises(TypeError, match="sample_id must be torch.int64"):
            draw(**(s.named | {"sample_id": s.sample_id.float()}))
    with pytest.raises(ValueError, match="batch dimension"):
        kernels.normal((), **s.named)
    with pytest.raises(ValueError, match="split the sample"):
        kernels.normal((2, 2**34 + 4), **s.named)
    with pytest.raises(ValueError, match="num_train_timesteps must be 1 to"):
        kernels.timesteps(0, **s.named)
