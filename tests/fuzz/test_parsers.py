"""The fuzz targets with hypothesis: no seed breaks them, nor does what becomes of a seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.parsers import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_seeds_that_parse(target: str) -> None:
    assert seeds(target)
    for seed in seeds(target):
        TARGETS[target](seed)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_a_damaged_seed_parses_canonically_or_raises_the_one_error(
    target: str, data: st.DataObject
) -> None:
    raw = bytearray(data.draw(st.sampled_from(seeds(target))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        match data.draw(st.sampled_from(["set", "cut", "add"])):
            case "set" if raw:
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    TARGETS[target](bytes(raw))


@pytest.mark.parametrize("target", TARGETS)
@given(raw=st.binary(max_size=300))
def test_garbage_raises_the_one_error(target: str, raw: bytes) -> None:
    TARGETS[target](raw)
