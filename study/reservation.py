"""The anonymous union: images of all silos in one set, and nobody learns whose is whose.

Two secure sums. In the first every silo adds random non-zero 32-bit tags at random slots of a
long vector (one per image it brings). A silo that finds its own tag intact in the sum owns that
slot; where tags met, nobody does. In the second every silo adds its images, each in the record of
a slot it owns, the occupied slots being renumbered without gaps; a record is a marker byte 1 and
the image's bytes, in a conditional study with the label's before them: a label travels as the image
does, and as little as that of an image is it known whose it is.

What the sums show. The k slots of a silo are drawn independently, repetitions included, so that
the first sum is distributed as Σk independent draws by *one* silo: it depends on Σk alone, not on
how the images are split. (Distinct slots per silo would not do: the number of collisions would
tell how uneven the split is.) Slots stay in the order they were drawn and images go into them in
that order, so that the position of an image says nothing about its place in the silo's own list.
The second sum adds to this the union and which occupied slots are empty, hence collided: those
depend on the draws alone.

Lost to collisions: with S = `slots_per_image`, a tag meets another with probability 1 − exp(−1/S)
(12 % at S = 8). Where two tags meet neither is intact, for none is zero. Among three, the sum of
two is zero with probability 2^-32: then the third wins rightly. A slot that seems won by more than
one, or filled by none, has a marker other than 1 and is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

LABEL_BYTES = 2
_LABEL = np.dtype("<u2")

Entropy: TypeAlias = Callable[[int], bytes]
"""n → n unpredictable bytes; `secrets.token_bytes` in production."""


def share(images: int, count: int, total_count: int) -> int:
    """How many of M = `images` a silo brings: round(M · ñ_i / Σñ), halves up."""
    return (2 * images * count + total_count) // (2 * total_count)


@dataclass(frozen=True)
class Reservation:
    """A silo's draw: image j wants slot `slots[j]` and marks it with `tags[j]`."""

    slots: NDArray[np.int64]
    tags: NDArray[np.uint32]
    length: int
    """Slots in all: `slots_per_image` · M."""

    def vector(self) -> NDArray[np.uint32]:
        """uint32 [length], the silo's part of the first sum."""
        tagged = np.zeros(self.length, dtype=np.uint32)
        np.add.at(tagged, self.slots, self.tags)  # drawn twice: both tags are spoilt, as they must
        return tagged

    def won(self, total: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """bool [k]: whether tag j stands intact in the first sum, so that image j has its slot.

        Raises ValueError for a sum of another shape or dtype.
        """
        if total.shape != (self.length,) or total.dtype != np.uint32:
            raise ValueError(f"sum is {total.dtype}{list(total.shape)}, not uint32[{self.length}]")
        return np.asarray(total[self.slots] == self.tags)


def reserve(images: int, length: int, entropy: Entropy) -> Reservation:
    """Draw a slot out of `length` and a non-zero tag for each of `images` images.

    Eight bytes each, reduced: no value is more likely than another by more than 2^-31.
    """
    drawn = np.frombuffer(entropy(16 * images), dtype="<u8").reshape(2, images)
    slots = (drawn[0] % np.uint64(length)).astype(np.int64)
    tags = (1 + drawn[1] % np.uint64(2**32 - 1)).astype(np.uint32)
    return Reservation(slots, tags, length)


def renumber(total: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The occupied slots of the first sum, ascending: record r of the second is for the r-th."""
    return np.flatnonzero(total)


def images_vector(
    images: NDArray[np.uint8], reservation: Reservation, total: NDArray[np.uint32]
) -> NDArray[np.uint8]:
    """uint8 [occupied · (1 + s)], the silo's part of the second sum.

    `images` is uint8 [k, …] with s bytes each, image j for slot j of the reservation; those whose
    slot was not won are left out. `total` is the first sum. Raises ValueError where images and
    slots differ in number.
    """
    if len(images) != len(reservation.slots):
        raise ValueError(f"{len(images)} images for {len(reservation.slots)} reserved slots")
    occupied, won = renumber(total), reservation.won(total)
    flat = images.reshape(len(images), math.prod(images.shape[1:]))
    records = np.zeros((len(occupied), 1 + flat.shape[1]), dtype=np.uint8)
    places = np.searchsorted(occupied, reservation.slots[won])
    records[places, 0] = 1
    records[places, 1:] = flat[won]
    return records.ravel()


def collect(total: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The union, uint8 [n, *shape], from the second sum: every record whose marker is 1.

    Raises ValueError where the sum is not a whole number of records.
    """
    size = 1 + math.prod(shape)
    if total.size % size:
        raise ValueError(f"{total.size} bytes are no whole number of records of {size}")
    records = total.reshape(-1, size)
    return records[records[:, 0] == 1, 1:].reshape(-1, *shape)


def with_labels(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [k, LABEL_BYTES + s]: each image (uint8 [k, …], s bytes) after its label, 0 … 65,535,
    in little-endian order."""
    front = labels.astype(_LABEL).view(np.uint8).reshape(len(images), LABEL_BYTES)
    return np.concatenate([front, images.reshape(len(images), math.prod(images.shape[1:]))], axis=1)


def as_records(images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """uint8 [k, …], contiguous: what a file of images holds, each after its label if it has one."""
    return np.ascontiguousarray(images if labels is None else with_labels(images, labels))


def split_labels(
    records: NDArray[np.uint8], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The inverse of `with_labels`: images uint8 [k, *shape] and labels int64 [k]."""
    labels = np.ascontiguousarray(records[:, :LABEL_BYTES]).view(_LABEL)[:, 0].astype(np.int64)
    return records[:, LABEL_BYTES:].reshape(len(records), *shape), labels
