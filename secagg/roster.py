"""The pinned roster: who takes part, and how many of them may be absent or dishonest."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property

from secagg.codec import Reader, blob, items, text, u16, u32
from secagg.errors import InvalidParameters, MalformedMessage
from secagg.primitives import digest

IDENTITY_BYTES = 32
MAX_SILOS = 255
_MAX_TEXT = 200


@dataclass(frozen=True)
class Member:
    """One institution: its name in the study and its Ed25519 identity (32 raw bytes)."""

    name: str
    identity: bytes


@dataclass(frozen=True)
class Roster:
    """N members in ascending order of name; a member's index is its place, from 1 to N.

    `threshold` (t) is how many silos a sum needs to end; `colluders` (c) how many may work with a
    lying coordinator. Raises `InvalidParameters` unless 2t > N + c and t − c ≥ 2:

    * 2t > N + c: two sets of t confirmations share an honest silo, and an honest silo confirms one
      set only, so no session is ever unmasked over two survivor sets (Bonawitz et al. 2017, §6.2).
      The same bound makes UNMASK and ABORT exclude each other once t silos signed ABORT.
    * t − c ≥ 2: at least two honest inputs are in every sum.
    """

    study: str
    epoch: int
    threshold: int
    colluders: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        n, t, c = len(self.members), self.threshold, self.colluders
        names = [member.name for member in self.members]
        if not 3 <= n <= MAX_SILOS:
            raise InvalidParameters(f"a roster has 3 to {MAX_SILOS} silos, this one has {n}")
        if names != sorted(set(names)):
            raise InvalidParameters("roster names must be distinct and in order")
        # A person compares the printed roster: no name may move the cursor or hide another line.
        if not all(name and name.isprintable() for name in (self.study, *names)):
            raise InvalidParameters("names of study and silos must be printable and not empty")
        if len({member.identity for member in self.members}) != n:
            raise InvalidParameters("two silos of the roster share one identity key")
        if any(len(member.identity) != IDENTITY_BYTES for member in self.members):
            raise InvalidParameters(f"an identity is {IDENTITY_BYTES} bytes of Ed25519 public key")
        if c < 0 or not 2 * t > n + c or not t - c >= 2 or t > n:
            raise InvalidParameters(
                f"N = {n}, t = {t}, c = {c} break 2t > N + c, t − c ≥ 2 or t ≤ N; "
                f"with {n} silos use t = {default_threshold(n)}, "
                f"c = {largest_colluders(n, default_threshold(n))}"
            )

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def indices(self) -> range:
        return range(1, self.size + 1)

    def member(self, index: int) -> Member:
        return self.members[index - 1]

    def index_of(self, name: str) -> int:
        """The roster index of `name`; raises `KeyError`."""
        for index in self.indices:
            if self.member(index).name == name:
                return index
        raise KeyError(name)

    def names(self, indices: tuple[int, ...] | list[int]) -> str:
        return ", ".join(self.member(i).name for i in indices) or "nobody"

    def encode(self) -> bytes:
        members = (text(member.name) + blob(member.identity) for member in self.members)
        return (
            text(self.study)
            + u32(self.epoch)
            + u16(self.threshold)
            + u16(self.colluders)
            + items(members)
        )

    @classmethod
    def decode(cls, data: bytes) -> Roster:
        """Raises `MalformedMessage` for foreign bytes and for an unsafe roster."""
        reader = Reader(data, "roster")
        study, epoch = reader.text(_MAX_TEXT), reader.u32()
        threshold, colluders = reader.u16(), reader.u16()
        members = reader.items(
            lambda: Member(reader.text(_MAX_TEXT), reader.exactly(IDENTITY_BYTES)), MAX_SILOS
        )
        reader.finish()
        try:
            return cls(study, epoch, threshold, colluders, members)
        except InvalidParameters as error:
            raise MalformedMessage(f"roster: {error}") from error

    @cached_property
    def digest(self) -> bytes:
        return digest("roster", self.encode())

    @property
    def fingerprint(self) -> str:
        """200 bits of the digest in 40 base32 characters, in groups of four to be read aloud."""
        letters = base64.b32encode(self.digest[:25]).decode("ascii")
        return " ".join(letters[i : i + 4] for i in range(0, len(letters), 4))


def default_threshold(silos: int) -> int:
    """t = ⌊2N/3⌋ + 1."""
    return 2 * silos // 3 + 1


def largest_colluders(silos: int, threshold: int) -> int:
    """The largest c with 2t > N + c and t − c ≥ 2 (negative where there is none)."""
    return min(2 * threshold - silos - 1, threshold - 2)
