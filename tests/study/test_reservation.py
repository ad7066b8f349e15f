"""The union is the images whose slots did not collide; its sums do not say whose they are."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.reservation import (
    Reservation,
    collect,
    images_vector,
    renumber,
    reserve,
    share,
    split_labels,
    with_labels,
)

SHAPE = (1, 2, 3)


def entropy(seed: int):
    return np.random.default_rng(seed).bytes


def add(vectors):
    return np.sum(np.stack(vectors), axis=0, dtype=vectors[0].dtype)


def union(split, length, seed):
    """Both sums of one union of random images; (reservations, images, first sum, collected)."""
    rng = np.random.default_rng(seed)
    draws = [reserve(k, length, rng.bytes) for k in split]
    images = [rng.integers(0, 256, (k, *SHAPE), dtype=np.uint8) for k in split]
    first = add([d.vector() for d in draws])
    second = add([images_vector(i, d, first) for i, d in zip(images, draws, strict=True)])
    return draws, images, first, collect(second, SHAPE)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 400), st.integers(0, 2**32)
)
def test_the_union_is_exactly_the_images_whose_slots_did_not_collide(split, length, seed):
    draws, images, first, collected = union(split, length, seed)
    slots = np.concatenate([d.slots for d in draws])
    alone = np.bincount(slots, minlength=length)[slots] == 1
    expected = np.concatenate(images)[alone]
    order = np.argsort(slots[alone])
    np.testing.assert_array_equal(collected, expected[order])
    assert len(renumber(first)) == len(np.unique(slots))


def test_every_silo_sends_the_full_length_whatever_it_won():
    draws, images, first, _ = union([0, 1, 30], 64, 1)
    for own, draw in zip(images, draws, strict=True):
        assert images_vector(own, draw, first).size == len(renumber(first)) * 7


def test_exchanging_the_silos_leaves_both_sums_as_they_were():
    rng = np.random.default_rng(3)
    draws = [reserve(k, 200, rng.bytes) for k in (20, 3, 11)]
    images = [rng.integers(0, 256, (len(d.slots), *SHAPE), dtype=np.uint8) for d in draws]
    sums = []
    for order in ([0, 1, 2], [2, 0, 1]):
        first = add([draws[i].vector() for i in order])
        sums.append((first, add([images_vector(images[i], draws[i], first) for i in order])))
    for one, other in zip(*sums, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_sum_depends_on_the_number_of_images_alone_and_not_on_their_split():
    """The very same draws, dealt out to the silos in any way, make the very same sum."""
    drawn = np.random.default_rng(0)
    slots, tags = drawn.bytes(8 * 50), drawn.bytes(8 * 50)

    def dealt(split):
        at, vectors = 0, []
        for k in split:
            piece = slice(8 * at, 8 * (at + k))
            vectors.append(reserve(k, 60, lambda n, p=piece: slots[p] + tags[p]).vector())
            at += k
        return add(vectors)

    even, uneven = dealt([10] * 5), dealt([46, 1, 1, 1, 1])
    np.testing.assert_array_equal(even, uneven)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**32))
def test_both_sums_are_functions_of_the_draws_alone_whoever_makes_them(owners, seed):
    """Any assignment of the same (slot, tag, image) to silos gives the same two sums, and the draws
    are independent and equally distributed at every silo: so the coordinator's view has the same
    distribution whatever silo contributed what."""
    rng = np.random.default_rng(seed)
    everything = reserve(len(owners), 90, rng.bytes)
    images = rng.integers(0, 256, (len(owners), *SHAPE), dtype=np.uint8)

    def view(owner):
        parts = [np.flatnonzero(owner == silo) for silo in range(6)]
        draws = [Reservation(everything.slots[p], everything.tags[p], 90) for p in parts]
        first = add([draw.vector() for draw in draws])
        own = [images_vector(images[p], d, first) for p, d in zip(parts, draws, strict=True)]
        return first, add(own)

    given, shuffled, alone = np.array(owners), rng.permutation(owners), np.zeros(len(owners))
    for other in (shuffled, alone):
        for one, two in zip(view(given), view(other), strict=True):
            np.testing.assert_array_equal(one, two)


def test_positions_do_not_tell_the_order_of_a_silos_own_list():
    rng = np.random.default_rng(5)
    correlation = []
    for _ in range(300):
        draw = reserve(40, 320, rng.bytes)
        correlation.append(np.corrcoef(np.arange(40), draw.slots)[0, 1])
    assert abs(np.mean(correlation)) < 5 / np.sqrt(300 * 39)


def test_slots_are_uniform_and_tags_never_zero():
    draw = reserve(200_000, 50, entropy(2))
    counts = np.bincount(draw.slots, minlength=50)
    assert ((counts - 4000) ** 2 / 4000).sum() < 110  # chi-square, 49 degrees of freedom, p ≈ 1e-6
    assert draw.tags.all()
    extremes = reserve(3, 7, lambda n: b"\x00" * 24 + b"\xff" * 16 + b"\x00" * 8)
    assert extremes.tags.all()


def test_one_image_in_eight_is_lost_at_eight_slots_per_image():
    _, _, _, collected = union([2500] * 4, 80_000, 9)
    assert len(collected) == pytest.approx(10_000 * np.exp(-1 / 8), rel=0.02)


def test_a_record_that_two_silos_claim_is_dropped():
    record = np.array([1, 9, 9, 9, 9, 9, 9], np.uint8)
    assert len(collect(record + record, SHAPE)) == 0
    assert len(collect(np.concatenate([record, np.zeros(7, np.uint8)]), SHAPE)) == 1


def test_shares_follow_the_coarse_counts():
    counts = [1800, 420, 97, 650]
    shares = [share(1000, c, sum(counts)) for c in counts]
    assert shares == [607, 142, 33, 219]
    assert share(1000, 0, 10) == 0


def test_what_does_not_fit_together_is_refused():
    draw = reserve(3, 10, secrets.token_bytes)
    with pytest.raises(ValueError, match="2 images for 3 reserved slots"):
        images_vector(np.zeros((2, *SHAPE), np.uint8), draw, draw.vector())
    with pytest.raises(ValueError, match=r"sum is uint32\[9\], not uint32\[10\]"):
        draw.won(np.zeros(9, np.uint32))
    with pytest.raises(ValueError, match="8 bytes are no whole number of records of 7"):
        collect(np.zeros(8, np.uint8), SHAPE)


def test_labels_travel_with_their_images():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, size=(40, *SHAPE), dtype=np.uint8)
    labels = draw.integers(0, 1000, size=40)
    mine = reserve(40, 400, entropy(5))
    first = mine.vector()
    records = collect(
        images_vector(with_labels(images, labels), mine, first), (2 + np.prod(SHAPE),)
    )
    found, known = split_labels(records, SHAPE)
    sent = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert len(found) == mine.won(first).sum() > 30
    assert all(sent[image.tobytes()] == label for image, label in zip(found, known, strict=True))
