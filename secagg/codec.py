"""Canonical binary encoding: one value, one string of bytes, and no other.

Integers are big-endian and of fixed width; strings of bytes and lists carry a u32 length in front.
Whatever is hashed, signed or sealed is encoded this way, so two parties that hold the same value
hold the same hash, and no two different values share one (docs/secure-sum.md, "Encodings").
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeVar

from secagg.errors import MalformedMessage

T = TypeVar("T")


# `pack` refuses what does not fit, and what is no integer.
u8 = struct.Struct(">B").pack
u16 = struct.Struct(">H").pack
u32 = struct.Struct(">I").pack
u64 = struct.Struct(">Q").pack


def blob(value: bytes) -> bytes:
    return u32(len(value)) + value


def text(value: str) -> bytes:
    return blob(value.encode("utf-8"))


def items(encoded: Iterable[bytes]) -> bytes:
    parts = tuple(encoded)
    return u32(len(parts)) + b"".join(parts)


def indices(values: Iterable[int]) -> bytes:
    return items(u16(value) for value in values)


class Reader:
    """Reads one encoding front to back; every misfit is a `MalformedMessage`."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._at = 0

    def fixed(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise MalformedMessage(
                f"{self._what}: {length} bytes wanted at offset {self._at}, "
                f"{len(self._data) - self._at} left"
            )
        part = self._data[self._at : end]
        self._at = end
        return part

    def u8(self) -> int:
        return self.fixed(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.fixed(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.fixed(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.fixed(8), "big")

    def blob(self, at_most: int) -> bytes:
        length = self.u32()
        if length > at_most:
            raise MalformedMessage(f"{self._what}: a field of {length} bytes, at most {at_most}")
        return self.fixed(length)

    def exactly(self, length: int) -> bytes:
        """A blob whose length is fixed: a digest, a key, a signature."""
        value = self.blob(length)
        if len(value) != length:
            raise MalformedMessage(f"{self._what}: a field of {len(value)} bytes, not {length}")
        return value

    def optional(self, length: int, count: int) -> tuple[bytes, ...]:
        """`count` blobs in a row, each either empty or `length` bytes long.

        In one go, since the N headers of N receivers hold five times N² of them: read one by one
        they were a large part of the time of a session of a hundred silos.
        """
        data, at, full, empty = self._data, self._at, u32(length), u32(0)
        fields = []
        for _ in range(count):
            head, at = data[at : at + 4], at + 4
            if head == full:
                fields.append(data[at : at + length])
                at += length
            elif head == empty:
                fields.append(b"")
            else:
                raise MalformedMessage(f"{self._what}: a field is neither empty nor {length} bytes")
        if at > len(data):  # the last slice was a short one
            raise MalformedMessage(f"{self._what}: ends in the middle of a field")
        self._at = at
        return tuple(fields)

    def text(self, at_most: int) -> str:
        try:
            return self.blob(at_most).decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedMessage(f"{self._what}: text is not UTF-8") from error

    def items(self, read: Callable[[], T], at_most: int) -> tuple[T, ...]:
        count = self.u32()
        if count > at_most:
            raise MalformedMessage(f"{self._what}: a list of {count}, at most {at_most}")
        return tuple(read() for _ in range(count))

    def indices(self, at_most: int) -> tuple[int, ...]:
        """A set of roster indices: strictly ascending, so that one set has one encoding."""
        values = self.items(self.u16, at_most)
        if any(a >= b for a, b in pairwise(values)):
            raise MalformedMessage(f"{self._what}: roster indices are not strictly ascending")
        return values

    def finish(self) -> None:
        if self._at != len(self._data):
            raise MalformedMessage(
                f"{self._what}: {len(self._data) - self._at} bytes too many at the end"
            )
