"""Coverage is its definition, has its expected value, and sees a missing mode."""

from __future__ import annotations

import numpy as np
import pytest

import diffusion.coverage
from diffusion.coverage import coverage, covered, neighbour_radii


def test_a_case_small_enough_to_draw() -> None:
    real = np.array([[0.0], [1.0], [3.0], [10.0]])
    np.testing.assert_allclose(neighbour_radii(real, 1), [1.0, 1.0, 2.0, 7.0])
    np.testing.assert_allclose(neighbour_radii(real, 2), [3.0, 2.0, 3.0, 9.0])
    samples = np.array([[0.5], [16.0]])  # 0.5 lies near 0 and 1 only, 16 near 10
    radii = neighbour_radii(real, 1)
    assert covered(real, samples, radii).tolist() == [True, True, False, True]
    assert coverage(real, samples, neighbours=1) == 0.75
    on_the_edge = np.array([[5.0]])  # exactly 2 from 3: not inside
    assert not covered(real, on_the_edge, radii)[2]


def test_it_is_the_definition_computed_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion.coverage, "_BLOCK", 7)
    draw = np.random.default_rng(0)
    real, samples = draw.normal(size=(40, 3)), draw.normal(0.5, 1.0, size=(25, 3))
    hits = 0
    for i, x in enumerate(real):
        others = sorted(np.linalg.norm(x - y) for j, y in enumerate(real) if j != i)
        hits += min(np.linalg.norm(x - y) for y in samples) < others[5 - 1]
    assert coverage(real, samples) == pytest.approx(hits / 40)


def test_equal_distributions_give_the_expected_value_of_the_paper() -> None:
    """E = 1 − Π_{i=1..k} (N − i)/(N + M − i), whatever the distribution."""
    draw, n, m, k = np.random.default_rng(1), 300, 200, 3
    expected = 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    values = [
        coverage(draw.normal(size=(n, 2)), draw.normal(size=(m, 2)), neighbours=k)
        for _ in range(20)
    ]
    assert np.mean(values) == pytest.approx(expected, abs=0.02)


def test_a_missing_mode_is_seen_and_a_collapsed_sampler_covers_nothing() -> None:
    draw = np.random.default_rng(2)
    modes = [draw.normal(place, 1.0, size=(100, 4)) for place in (0.0, 50.0)]
    real = np.concatenate(modes)
    only_one = draw.normal(0.0, 1.0, size=(400, 4))
    assert coverage(real, only_one) == pytest.approx(0.5, abs=0.05)
    assert coverage(real, np.repeat(real[:1], 400, axis=0)) < 0.1


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="5 nearest neighbours of each of 5 features"):
        coverage(np.zeros((5, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no sample"):
        coverage(np.zeros((9, 2)), np.zeros((0, 2)))
