"""Counters and counts are summed exactly, whatever the ring and the number of silos."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from study.integers import WORD, Field, Integers, census, coarse_count

RINGS_AND_SILOS = st.one_of(
    st.tuples(st.just(8), st.integers(1, 128)),
    st.tuples(st.sampled_from([16, 32]), st.integers(1, 255)),
)


@given(RINGS_AND_SILOS, st.lists(st.integers(1, 70), min_size=1, max_size=4), st.data())
def test_the_wrapped_sum_of_limbs_is_the_exact_sum_of_integers(shape, widths, data):
    ring, silos = shape
    fields = tuple(Field(f"f{i}", bits) for i, bits in enumerate(widths))
    integers = Integers(ring, silos, fields)
    present = data.draw(st.integers(0, silos))
    few = [
        {f.name: data.draw(st.integers(0, (1 << f.bits) - 1)) for f in fields}
        for _ in range(min(present, 3))
    ]
    full = {f.name: (1 << f.bits) - 1 for f in fields}
    values = few + [full] * (present - len(few))
    total = np.zeros(integers.length, WORD[ring])
    for value in values:
        total += integers.encode(value)
    assert integers.decode(total) == {f.name: sum(v[f.name] for v in values) for f in fields}


def test_an_integer_that_does_not_fit_its_field_is_refused_by_name():
    integers = Integers(16, 4, (Field("faults", 1),))
    for value in (-1, 2):
        with pytest.raises(ValueError, match=f"faults = {value} does not fit 1 bits"):
            integers.encode({"faults": value})


def test_more_silos_than_words_have_room_for_are_refused():
    Integers(8, 128, (Field("x", 3),))
    with pytest.raises(ValueError, match="use a wider ring"):
        Integers(8, 129, (Field("x", 3),))


def test_the_census_adds_255_large_counts_exactly():
    encoding = census(255)
    total = np.zeros(encoding.length, np.uint32)
    for _ in range(255):
        total += encoding.encode({"count": 990_000_000})
    assert encoding.decode(total) == {"count": 255 * 990_000_000}


@pytest.mark.parametrize(
    ("count", "coarse"),
    [(0, 0), (7, 7), (42, 42), (99, 99), (104, 100), (105, 110), (995, 1000), (1797, 1800)],
)
def test_counts_are_rounded_to_two_significant_digits(count, coarse):
    assert coarse_count(count) == coarse


@given(st.integers(1, 10**9))
def test_coarsening_is_idempotent_and_within_five_percent(count):
    coarse = coarse_count(count)
    assert coarse_count(coarse) == coarse
    assert abs(coarse - count) <= 0.05 * count


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="fewer than 0"):
        coarse_count(-1)
