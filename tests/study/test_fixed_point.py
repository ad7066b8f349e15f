"""Feature moments are summed to float64's precision, and what was clipped is not kept quiet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.fixed_point import FixedPoint


@settings(deadline=None)
@given(st.integers(1, 255), st.integers(0, 2**32), st.sampled_from([1e-6, 1.0, 3.7e9]), st.data())
def test_the_sum_is_within_half_a_step_per_silo(silos, seed, bound, data):
    rng = np.random.default_rng(seed)
    present = data.draw(st.integers(1, silos))
    encoding = FixedPoint(silos, 20, bound)
    values = bound * rng.uniform(-1, 1, (present, 20))
    values[:, 0], values[:, 1], values[:, 2] = bound, -bound, 0.0
    total = np.zeros(encoding.length, np.uint32)
    for row in values:
        total += encoding.encode(row)
    decoded = encoding.decode(total, present)
    assert np.abs(decoded.values - values.sum(axis=0)).max() <= present * bound * 2.0**-47
    assert (decoded.clipped, decoded.faults) == (0, 0)


def test_moments_of_three_silos_are_those_of_the_pooled_features():
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((n, 16)) for n in (40, 9, 351)]
    encoding = FixedPoint(3, 16 + 256, bound=400 * 64.0)
    total = np.zeros(encoding.length, np.uint32)
    for f in features:
        total += encoding.encode(np.concatenate([f.sum(axis=0), (f.T @ f).ravel()]))
    pooled = np.concatenate(features)
    moments = encoding.decode(total, 3).values
    np.testing.assert_allclose(moments[:16], pooled.sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(moments[16:].reshape(16, 16), pooled.T @ pooled, atol=1e-9)


def test_values_beyond_the_bound_are_clipped_and_counted():
    encoding = FixedPoint(4, 3, bound=1.0)
    decoded = encoding.decode(encoding.encode(np.array([2.0, -7.0, 0.5])), 1)
    np.testing.assert_allclose(decoded.values, [1.0, -1.0, 0.5])
    assert decoded.clipped == 2


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_values_that_are_not_finite_go_in_as_zeros_with_the_fault_counter_at_one(poison):
    encoding = FixedPoint(4, 3, bound=1.0)
    total = encoding.encode(np.array([poison, 0.5, 0.5])) + encoding.encode(np.full(3, 0.25))
    decoded = encoding.decode(total, 2)
    np.testing.assert_allclose(decoded.values, 0.25)
    assert decoded.faults == 1


def test_a_sum_that_one_silo_voids_says_nothing_of_the_others():
    encoding = FixedPoint(4, 3, bound=1.0)
    drawn = np.random.default_rng(2).bytes(4 * encoding.length)
    honest = encoding.encode(np.full(3, 0.25))
    total = encoding.void(lambda n: drawn[:n]) + honest
    assert (total[:-2] == np.frombuffer(drawn, "<u4")[:-2] + honest[:-2]).all()
    decoded = encoding.decode(total, 2)
    assert (decoded.faults, decoded.void, decoded.clipped) == (1, 1, 0)
    assert not decoded.values.any()


def test_parameters_change_with_every_parameter():
    base = FixedPoint(4, 3, 1.0, 48)
    others = [FixedPoint(5, 3, 1.0), FixedPoint(4, 4, 1.0), FixedPoint(4, 3, 2.0)]
    others.append(FixedPoint(4, 3, 1.0, 40))
    assert len({e.parameters() for e in [base, *others]}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 3, 1.0, 53), "bits = 53"),
        ((4, 3, 0.0), "bound = 0.0"),
        ((4, 3, float("inf")), "bound = inf"),
        ((0, 3, 1.0), "silos = 0"),
        ((4, 0, 1.0), "size = 0"),
    ],
)
def test_an_encoding_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(*arguments)


def test_vectors_and_sets_that_do_not_belong_are_refused():
    encoding = FixedPoint(4, 3, 1.0)
    with pytest.raises(ValueError, match=r"values have shape \[4\]"):
        encoding.encode(np.zeros(4))
    vector = encoding.encode(np.zeros(3))
    with pytest.raises(ValueError, match="sum is uint32"):
        encoding.decode(vector[:-1], 1)
    for summed in (0, 5):
        with pytest.raises(ValueError, match=f"summed = {summed} is outside"):
            encoding.decode(vector, summed)
