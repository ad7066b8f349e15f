"""A sum of encoded deltas decodes to the weighted mean of the deltas, and to nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.encoding import Encoding, next_clips
from study.integers import WORD

RINGS_AND_SILOS = st.one_of(
    st.tuples(st.just(8), st.integers(1, 126)),
    st.tuples(st.sampled_from([16, 32]), st.integers(1, 255)),
)


def f32(value: float) -> float:
    return float(np.float32(value))


def key(rng: np.random.Generator) -> bytes:
    return rng.bytes(32)


def encoding(ring=16, silos=4, total=4000, sizes=(5, 3), clips=(0.5, 2.0)) -> Encoding:
    return Encoding(ring, silos, total, sizes, clips)


def summed(enc, deltas, counts, rng, residuals=None):
    n = sum(enc.sizes)
    total, encoded = enc.zeros(), []
    for i, (delta, count) in enumerate(zip(deltas, counts, strict=True)):
        residual = np.zeros(n, np.float32) if residuals is None else residuals[i]
        encoded.append(enc.encode(delta, residual, count=count, loss=0.25, key=key(rng)))
        total += encoded[-1].vector
    return total, encoded


@settings(deadline=None, max_examples=150)
@given(RINGS_AND_SILOS, st.integers(0, 2**32), st.sampled_from([1e-9, 1e-3, 1.0, 1e6, 3e37]))
def test_the_sum_decodes_to_the_weighted_mean_within_one_unit_per_silo(shape, seed, size):
    ring, silos = shape
    rng = np.random.default_rng(seed)
    counts = [int(c) for c in rng.integers(1, 10_000, silos)]
    clips = (f32(1e-3), f32(0.7), f32(1e4))
    enc = encoding(ring, silos, sum(counts), (7, 1, 40), clips)
    deltas = [(size * rng.standard_normal(48)).astype(np.float32) for _ in counts]
    total, encoded = summed(enc, deltas, counts, rng)
    c = np.repeat(clips, enc.sizes)
    weights = np.array(counts) / sum(counts)
    exact = sum(w * np.clip(d.astype(float), -c, c) for w, d in zip(weights, deltas, strict=True))
    bound = silos * c / enc.scale + 3e-7 * c
    decoded = enc.decode(total)
    assert np.all(np.abs(decoded.mean_delta - exact) <= bound)
    assert decoded.saturated == sum(e.saturated for e in encoded)
    assert decoded.loss == pytest.approx(0.25, abs=silos * 2.0**-24)
    assert decoded.faults == 0


@pytest.mark.parametrize(("ring", "silos"), [(8, 126), (8, 3), (16, 255), (16, 4), (32, 255)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ring_does_not_wrap_when_every_element_of_every_silo_is_saturated(ring, silos, sign):
    rng = np.random.default_rng(silos)
    enc = encoding(ring, silos, 3 * silos, (2000,), (f32(0.1),))
    delta = np.full(2000, sign * 5.0, np.float32)
    total, _ = summed(enc, [delta] * silos, [3] * silos, rng)
    decoded = enc.decode(total)
    assert np.all(np.abs(decoded.mean_delta - sign * 0.1) <= 0.1 * (silos / enc.scale + 1e-6))
    assert decoded.saturated == 2000 * silos


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 255), st.sampled_from([8, 16, 32]), st.integers(0, 99))
def test_no_silo_ever_exceeds_its_share_of_the_ring(count, silos, ring, seed):
    silos = min(silos, 126) if ring == 8 else silos
    enc = encoding(ring, silos, 10**6, (4096,), (1.0,))
    most = -(-count * enc.scale // 10**6)
    rng = np.random.default_rng(seed)
    for size in (1.0, 3e38):
        delta = np.full(4096, size, np.float32)
        words = enc.encode(delta, np.zeros_like(delta), count=count, loss=0, key=key(rng)).vector
        assert words[:4096].view(f"i{ring // 8}").max() <= most


@pytest.mark.parametrize(("ring", "most"), [(16, 5e-4), (32, 1e-7)])
def test_the_mean_of_realistic_deltas_is_as_good_as_float64_fedavg(ring, most):
    rng = np.random.default_rng(3)
    sizes = (300, 64, 36_864, 64, 90_000, 128, 128, 16_384, 1)
    scales = np.repeat(10.0 ** rng.uniform(-4, -1.5, len(sizes)), sizes)
    common = rng.standard_normal(sum(sizes))
    deltas = [
        (scales * (common + rng.standard_normal(sum(sizes)))).astype(np.float32) for _ in range(4)
    ]
    counts = [1800, 420, 97, 650]
    exact = sum(c / sum(counts) * d.astype(float) for c, d in zip(counts, deltas, strict=True))
    enc = encoding(ring, 4, sum(counts), sizes, (1.0,) * len(sizes))
    enc = replace(enc, clips=next_clips(exact.astype(np.float32), enc, shrink=0.0))
    total, _ = summed(enc, deltas, counts, rng)
    error = np.linalg.norm(enc.decode(total).mean_delta - exact) / np.linalg.norm(exact)
    assert error <= most


def test_what_was_clipped_or_rounded_away_is_the_residual():
    rng = np.random.default_rng(5)
    for ring in (8, 16, 32):
        enc = encoding(ring, 4, 4000, (70_000, 3), (f32(0.01), f32(0.2)))
        delta = (0.02 * rng.standard_normal(70_003)).astype(np.float32)
        old = (0.001 * rng.standard_normal(70_003)).astype(np.float32)
        encoded = enc.encode(delta, old, count=1000, loss=0, key=key(rng))
        sent = enc.decode(encoded.vector).mean_delta.astype(float) * 4000 / 1000
        wanted = delta.astype(float) + old
        np.testing.assert_allclose(sent + encoded.residual, wanted, atol=2e-8)
        assert encoded.saturated == np.count_nonzero(np.abs(wanted[:70_000]) > f32(0.01)) + int(
            np.count_nonzero(np.abs(wanted[70_000:]) > f32(0.2))
        )


def test_error_feedback_delivers_in_time_what_one_round_could_not():
    rng = np.random.default_rng(7)
    enc = encoding(8, 2, 200, (1000,), (f32(0.01),))
    deltas = [(0.02 * rng.random(1000)).astype(np.float32), np.zeros(1000, np.float32)]
    residuals, mean = [np.zeros(1000, np.float32)] * 2, np.zeros(1000)
    for round_ in range(40):
        fresh = deltas if round_ == 0 else [np.zeros(1000, np.float32)] * 2
        total, encoded = summed(enc, fresh, [100, 100], rng, residuals)
        residuals = [e.residual for e in encoded]
        mean += enc.decode(total).mean_delta
    left = np.mean(residuals, axis=0)
    np.testing.assert_allclose(mean + left, np.mean(deltas, axis=0), atol=1e-7)
    assert np.abs(left).max() <= 0.01 / enc.scale


def test_rounding_is_unbiased():
    enc = encoding(8, 2, 2, (200_000,), (1.0,))
    delta = np.full(200_000, 0.3217 / enc.scale * 2, np.float32)
    vector = enc.encode(delta, np.zeros_like(delta), count=1, loss=0, key=bytes(32)).vector
    share = vector[:200_000].view(np.int8).mean()
    assert share == pytest.approx(0.3217, abs=5 * (0.25 / 200_000) ** 0.5)


@pytest.mark.parametrize("ring", [8, 16, 32])
@pytest.mark.parametrize("silo", [1, 2, 7, 10])
def test_rounding_is_unbiased_at_every_silo(ring, silo):
    enc = encoding(ring, 10, 10, (200_000,), (1.0,))
    delta = np.full(200_000, 0.3217 / enc.scale * 10, np.float32)
    zeros = np.zeros_like(delta)
    vector = enc.encode(delta, zeros, count=1, loss=0, key=bytes(32), silo=silo).vector
    share = vector[:200_000].view(f"<i{ring // 8}").mean()
    assert share == pytest.approx(0.3217, abs=5 * (0.25 / 200_000) ** 0.5)


@pytest.mark.parametrize("silos", [3, 4, 10, 32])
def test_silos_that_round_with_one_key_make_the_error_of_the_sum_smaller(silos):
    """Variance N/12 units² and at most a twelfth more, instead of N/6."""
    rng = np.random.default_rng(silos)
    enc = encoding(16, silos, silos, (100_000,), (1.0,))
    deltas = rng.normal(0, 0.3, (silos, 100_000)).astype(np.float32)
    zeros = np.zeros(100_000, np.float32)

    def variance(keys, present):
        total, exact = enc.zeros(), np.zeros(100_000)
        for i in present:
            place = i + 1 if len(set(keys)) == 1 else 1
            total += enc.encode(deltas[i], zeros, count=1, loss=0, key=keys[i], silo=place).vector
            exact += np.clip(deltas[i], -1, 1).astype(float) / silos
        return float(np.var((enc.decode(total).mean_delta - exact) * enc.scale))

    apart, together = [rng.bytes(32) for _ in range(silos)], [rng.bytes(32)] * silos
    assert variance(apart, range(silos)) == pytest.approx(silos / 6, rel=0.05)
    pairs = (silos + silos % 2) / 12
    assert variance(together, range(silos)) == pytest.approx(pairs, rel=0.05)
    if silos > 3:  # three tolerate no dropout
        assert variance(together, range(1, silos)) < 0.8 * variance(apart, range(1, silos))


@pytest.mark.parametrize("silos", [3, 4, 10, 32])
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_rounding_with_one_key_does_no_harm_where_all_silos_have_the_same_delta(silos, size):
    """Below a unit in the last place too, where the fractions are not uniform at all."""
    enc = encoding(8, silos, silos, (100_000,), (1.0,))
    delta = np.random.default_rng(silos).normal(0, size, 100_000).astype(np.float32)
    zeros = np.zeros_like(delta)

    def variance(together):
        total = enc.zeros()
        for i in range(silos):
            key, place = (bytes(32), i + 1) if together else (bytes([i] * 32), 1)
            total += enc.encode(delta, zeros, count=1, loss=0, key=key, silo=place).vector
        exact = np.clip(delta, -1, 1).astype(float)
        return float(np.var((enc.decode(total).mean_delta - exact) * enc.scale))

    assert variance(together=True) < variance(together=False)


def test_roundings_are_a_function_of_the_key():
    enc = encoding(sizes=(40_000,), clips=(1.0,))
    delta = np.random.default_rng(0).random(40_000, dtype=np.float32)
    a, b, c = (
        enc.encode(delta, np.zeros_like(delta), count=9, loss=0, key=k).vector.tobytes()
        for k in (bytes(32), bytes(32), bytes(31) + b"\1")
    )
    assert a == b != c


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 39_999])
def test_a_delta_that_is_not_finite_goes_in_as_zeros_with_the_fault_counter_at_one(poison, place):
    enc = encoding(sizes=(40_000,), clips=(1.0,))
    delta = np.ones(40_000, np.float32)
    delta[place] = poison
    old = np.full(40_000, 0.5, np.float32)
    encoded = enc.encode(delta, old, count=9, loss=1.0, key=bytes(32))
    assert encoded.fault
    assert encoded.residual is old
    decoded = enc.decode(encoded.vector)
    assert not decoded.mean_delta.any()
    assert (decoded.loss, decoded.saturated, decoded.faults) == (0.0, 0, 1)


@pytest.mark.parametrize(("ring", "silos"), [(8, 5), (16, 4), (32, 255)])
def test_a_sum_that_one_silo_voids_says_nothing_of_the_others_but_how_many_did(ring, silos):
    """Every word but the two flags is uniform: the voiding silo's random words, whoever adds."""
    enc = encoding(ring, silos, sizes=(40_000,), clips=(1.0,))
    rng = np.random.default_rng(1)
    delta = np.ones(40_000, np.float32)
    honest = enc.encode(delta, np.zeros_like(delta), count=4000, loss=1.0, key=bytes(32)).vector
    drawn = rng.bytes(enc.length * ring // 8)
    total = honest + enc.void(lambda n: drawn[:n])
    random = np.frombuffer(drawn, WORD[ring])
    assert (total[:-2] == honest[:-2] + random[:-2]).all()
    counts = np.bincount(total[:-2] >> ring - 4, minlength=16)
    assert counts.min() > 0.9 * len(total) / 16, "as uniform as random words are"
    decoded = enc.decode(total)
    assert (decoded.faults, decoded.void) == (1, 1)
    assert not decoded.mean_delta.any()
    assert decoded.loss == decoded.saturated == 0


def test_a_loss_that_is_not_finite_is_a_fault_too():
    enc = encoding()
    zeros = np.zeros(8, np.float32)
    assert enc.encode(zeros, zeros, count=9, loss=float("nan"), key=bytes(32)).fault


def test_an_enormous_loss_saturates_and_harms_nothing_else():
    enc = encoding(silos=2, total=2)
    zeros = np.zeros(8, np.float32)
    encoded = enc.encode(zeros, zeros, count=1, loss=1e30, key=bytes(32))
    decoded = enc.decode(encoded.vector + encoded.vector)
    assert decoded.loss == pytest.approx(2 * 2.0**16)
    assert decoded.faults == 0


def test_neither_delta_nor_residual_is_changed():
    enc = encoding()
    delta, residual = np.ones(8, np.float32), np.ones(8, np.float32)
    enc.encode(delta, residual, count=9, loss=0, key=bytes(32))
    assert (delta == 1).all()
    assert (residual == 1).all()


def test_a_silo_that_rests_changes_nothing():
    enc = encoding()
    decoded = enc.decode(enc.zeros())
    assert not decoded.mean_delta.any()
    assert decoded.loss == decoded.saturated == decoded.faults == 0
    assert enc.zeros().dtype == WORD[16]


def test_parameters_change_with_every_parameter():
    base = encoding()
    others = [
        encoding(ring=8),
        encoding(ring=32),
        encoding(silos=5),
        encoding(total=4001),
        encoding(sizes=(3, 5)),
        encoding(sizes=(8,), clips=(0.5,)),
        encoding(clips=(0.5, 1.0)),
        encoding(clips=(2.0, 0.5)),
    ]
    assert len({e.parameters() for e in [base, *others]}) == len(others) + 1
    assert base.parameters() == encoding().parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring": 8, "silos": 127}, "use a wider ring"),
        ({"clips": (0.5,)}, "one of each per tensor"),
        ({"sizes": (0, 8)}, "one of each per tensor"),
        ({"clips": (0.5, 0.0)}, r"clip = 0.0 is no float32"),
        ({"clips": (0.5, float("nan"))}, "clip = nan is no float32"),
        ({"clips": (0.5, 0.1)}, r"clip = 0.1 is no float32"),
        ({"total": 0}, "the census counted no sample"),
    ],
)
def test_an_encoding_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encoding(**change)


def test_arrays_and_counts_that_do_not_belong_are_refused():
    enc = encoding()
    good = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"delta is float64\[8\], not float32\[8\]"):
        enc.encode(good.astype(float), good, count=1, loss=0, key=bytes(32))
    with pytest.raises(ValueError, match=r"residual is float32\[7\]"):
        enc.encode(good, good[:7], count=1, loss=0, key=bytes(32))
    for count in (0, 4001):
        with pytest.raises(ValueError, match=f"count = {count} is outside"):
            enc.encode(good, good, count=count, loss=0, key=bytes(32))
    with pytest.raises(ValueError, match="sum is uint16"):
        enc.decode(enc.zeros()[:-1])


def test_clips_follow_the_largest_mean_delta_of_each_tensor():
    enc = encoding(sizes=(3, 2), clips=(1.0, 2.0))
    mean = np.array([0.25, -0.5, 0.0, 1.5, -0.25], np.float32)
    assert next_clips(mean, enc) == (1.5, 3.0)
    assert next_clips(mean, enc, level=0.0) == (1.0, 3.0)


def test_words_of_32_bits_leave_the_silos_more_room():
    mean = np.array([0.25, -0.5, 0.0, 1.5, -0.25], np.float32)
    narrow, wide = (encoding(ring, sizes=(3, 2), clips=(1.0, 2.0)) for ring in (16, 32))
    assert next_clips(mean, wide) == tuple(4 * clip for clip in next_clips(mean, narrow))


def test_a_clip_that_cuts_off_the_mean_itself_gives_more_room():
    enc = encoding(sizes=(3, 2), clips=(0.5, 2.0))
    mean = np.array([0.25, -0.5, 0.0, 1.5, -0.25], np.float32)
    assert next_clips(mean, enc, level=0.0) == (1.5, 3.0)


def test_a_round_without_deltas_does_not_close_the_clips():
    enc = encoding(sizes=(3, 2), clips=(0.5, 2.0))
    assert next_clips(np.zeros(5, np.float32), enc) == (0.125, 0.5)


def test_a_clip_that_saturates_opens_again_within_a_few_rounds():
    rng, n = np.random.default_rng(1), 500
    delta = rng.uniform(-0.1, 0.1, n).astype(np.float32)
    enc = encoding(16, 2, 2, (n,), (f32(1e-3),))
    residuals = [np.zeros(n, np.float32)] * 2
    rounds = 0
    while enc.clips[0] < np.abs(delta).max():
        total, encoded = summed(enc, [delta] * 2, [1, 1], rng, residuals)
        residuals = [e.residual for e in encoded]
        enc = replace(enc, clips=next_clips(enc.decode(total).mean_delta, enc))
        rounds += 1
    assert rounds <= 8


def test_next_clips_are_always_valid_clips():
    enc = encoding(sizes=(2, 2), clips=(2.0**-50, 2.0**50))
    for magnitude in (0.0, 1e-30, 1e30):
        replace(enc, clips=next_clips(np.full(4, magnitude, np.float32), enc))
