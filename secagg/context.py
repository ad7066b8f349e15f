"""What one session sums, and for whom: everything that two silos must agree on before they mask.

The digest of the context is signed with every message and enters every mask key. Silos that were
shown different contexts (another model, plan, roster, encoding, session) therefore make masks that
do not cancel, and the coordinator gets noise instead of a difference (arXiv 2111.07380).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from secagg.codec import Reader, blob, indices, text, u8, u16, u32, u64
from secagg.errors import InvalidParameters, MalformedMessage
from secagg.primitives import HASH_BYTES, digest
from secagg.roster import MAX_SILOS, Roster

RINGS = (8, 16, 32)
# ChaCha20 counts 64-byte blocks in 32 bits (RFC 8439 §2.3): a longer keystream would repeat.
MAX_VECTOR_BYTES = 2**32 * 64
NO_HASH = bytes(HASH_BYTES)
_MAX_PURPOSE = 32


@dataclass(frozen=True, order=True, slots=True)
class Quantity:
    """Q: what is being summed. One Q is summed once (docs/secure-sum.md, "Never twice")."""

    purpose: str
    round: int

    def __str__(self) -> str:
        return f"{self.purpose} {self.round}"


@dataclass(frozen=True)
class SessionContext:
    """One session: the roster's digest and parameters, Q, and what the vector means.

    `plan`, `model`, `encoding`, `reservation` and `previous` are SHA-256 digests (32 bytes, zeros
    where there is none): the study plan, the input model as the silo itself read it, the encoding
    parameters, the slot reservation, and the certificate that ended the previous session.
    `ring` is b of Z_2^b, `length` the number of elements. `survivors`, where not empty, is the
    exact set that may be summed: the silos that the reservation was made with.
    """

    study: str
    epoch: int
    roster: bytes
    silos: int
    threshold: int
    colluders: int
    session: int
    quantity: Quantity
    plan: bytes
    model: bytes
    ring: int
    length: int
    encoding: bytes
    reservation: bytes = NO_HASH
    survivors: tuple[int, ...] = ()
    previous: bytes = NO_HASH

    def __post_init__(self) -> None:
        hashes = (self.roster, self.plan, self.model, self.encoding, self.reservation)
        if any(len(h) != HASH_BYTES for h in (*hashes, self.previous)):
            raise InvalidParameters(f"a digest of the context is not {HASH_BYTES} bytes long")
        if self.ring not in RINGS:
            raise InvalidParameters(f"ring {self.ring}: choose one of {RINGS}")
        if not 0 < self.vector_bytes <= MAX_VECTOR_BYTES:
            raise InvalidParameters(
                f"a vector of {self.length} elements of {self.ring} bits does not fit one "
                f"keystream of {MAX_VECTOR_BYTES} bytes"
            )
        if self.session < 1 or not 0 < len(self.quantity.purpose.encode()) <= _MAX_PURPOSE:
            raise InvalidParameters("a session number starts at 1 and its quantity has a purpose")

    @property
    def vector_bytes(self) -> int:
        return self.length * (self.ring // 8)

    def encode(self) -> bytes:
        return (
            text(self.study)
            + u32(self.epoch)
            + blob(self.roster)
            + u16(self.silos)
            + u16(self.threshold)
            + u16(self.colluders)
            + u64(self.session)
            + text(self.quantity.purpose)
            + u32(self.quantity.round)
            + blob(self.plan)
            + blob(self.model)
            + u8(self.ring)
            + u64(self.length)
            + blob(self.encoding)
            + blob(self.reservation)
            + indices(self.survivors)
            + blob(self.previous)
        )

    @classmethod
    def decode(cls, data: bytes) -> SessionContext:
        """Raises `MalformedMessage`; parse then encode gives the same bytes."""
        r = Reader(data, "session context")
        head = (r.text(200), r.u32(), r.exactly(HASH_BYTES), r.u16(), r.u16(), r.u16(), r.u64())
        quantity = Quantity(r.text(_MAX_PURPOSE), r.u32())
        body = (r.exactly(HASH_BYTES), r.exactly(HASH_BYTES), r.u8(), r.u64())
        bound = (r.exactly(HASH_BYTES), r.exactly(HASH_BYTES), r.indices(MAX_SILOS))
        previous = r.exactly(HASH_BYTES)
        r.finish()
        try:
            return cls(*head, quantity, *body, *bound, previous)
        except InvalidParameters as error:
            raise MalformedMessage(f"session context: {error}") from error

    @cached_property
    def digest(self) -> bytes:
        """ctx."""
        return digest("context", self.encode())

    def agrees_with(self, roster: Roster) -> bool:
        """Whether the session is for exactly this roster."""
        return (
            self.roster == roster.digest
            and self.study == roster.study
            and self.epoch == roster.epoch
            and (self.silos, self.threshold, self.colluders)
            == (roster.size, roster.threshold, roster.colluders)
        )
