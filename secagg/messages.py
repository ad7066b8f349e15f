"""The signed messages of the five steps, and the two certificates (docs/secure-sum.md, "Messages").

A message is `Signed(step, sender, body, signature)`; the signature covers
`(label, step, sender, ctx, body)`, so it means nothing in another session, step or mouth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import primitives
from secagg.codec import Reader, blob, indices, items, u8, u16, u64
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.primitives import HASH_BYTES, PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Secret
from secagg.roster import MAX_SILOS, Roster
from secagg.shamir import SHARE_BYTES

MAX_BODY = 1 << 20


class Step(IntEnum):
    ADVERTISE = 0
    SHARE = 1
    MASKED_INPUT = 2
    CONFIRM = 3
    UNMASK = 4
    ABORT = 5
    COMPLAIN = 6


@dataclass(frozen=True)
class Signed:
    """One message on the wire."""

    step: Step
    sender: int
    body: bytes
    signature: bytes

    def encode(self) -> bytes:
        return u8(self.step) + u16(self.sender) + blob(self.body) + blob(self.signature)

    @classmethod
    def decode(cls, data: bytes) -> Signed:
        reader = Reader(data, "signed message")
        message = cls.read(reader)
        reader.finish()
        return message

    @classmethod
    def read(cls, reader: Reader) -> Signed:
        step, sender = reader.u8(), reader.u16()
        body, signature = reader.blob(MAX_BODY), reader.exactly(SIGNATURE_BYTES)
        if step not in Step.__members__.values():
            raise MalformedMessage(f"signed message: no step {step}")
        return cls(Step(step), sender, body, signature)

    @classmethod
    def by(cls, key: Ed25519PrivateKey, step: Step, sender: int, ctx: bytes, body: bytes) -> Signed:
        return cls(step, sender, body, primitives.sign(key, _to_sign(step, sender, ctx, body)))

    def check(self, roster: Roster, ctx: bytes, step: Step) -> None:
        """Raises `Refused` unless a member of the roster signed this for `step` of session ctx."""
        if self.sender not in roster.indices:
            raise Refused(Reason.NOT_IN_ROSTER, f"sender {self.sender}")
        name = roster.member(self.sender).name
        if self.step != step:
            raise Refused(Reason.WRONG_STEP, f"{name} sent {self.step.name}, not {step.name}")
        signed = _to_sign(self.step, self.sender, ctx, self.body)
        if not primitives.verify(roster.member(self.sender).identity, self.signature, signed):
            raise Refused(Reason.BAD_SIGNATURE, f"{step.name} of {name}", accused=self.sender)


def _to_sign(step: Step, sender: int, ctx: bytes, body: bytes) -> bytes:
    return blob(primitives.LABEL) + u8(step) + u16(sender) + blob(ctx) + blob(body)


def check_set(messages: Sequence[Signed], roster: Roster, ctx: bytes, step: Step) -> None:
    """A step as the coordinator relays it: in ascending order of sender, one each, all signed."""
    senders = [message.sender for message in messages]
    if len(set(senders)) != len(senders):
        raise Refused(Reason.DUPLICATE_SENDER, f"step {step.name}")
    if senders != sorted(senders):
        raise Refused(Reason.NOT_ASCENDING, f"step {step.name}")
    for message in messages:
        message.check(roster, ctx, step)


def transcript(tag: str, before: bytes, messages: Iterable[Signed]) -> bytes:
    """T1 = H("T1", ctx, adverts) and T2 = H("T2", T1, headers), messages in order of sender."""
    return primitives.digest(tag, before, *(message.encode() for message in messages))


@dataclass(frozen=True)
class Advert:
    """Step 0: the public halves of the mailbox key and of the mask key."""

    mailbox: bytes
    mask: bytes

    def encode(self) -> bytes:
        return blob(self.mailbox) + blob(self.mask)

    @classmethod
    def decode(cls, body: bytes) -> Advert:
        reader = Reader(body, "advert")
        keys = reader.exactly(PUBLIC_KEY_BYTES), reader.exactly(PUBLIC_KEY_BYTES)
        reader.finish()
        return cls(*keys)


class Dealt(NamedTuple):
    """What a header says of the parcel for one receiver: digests and commitments, 32 bytes each.

    `seed` and `seed_parcel` are empty towards receivers of a lower index (they deal the seed of
    that pair) and towards oneself, `mailbox_parcel` is empty towards oneself.
    """

    receiver: int
    share_b: bytes
    share_r: bytes
    mailbox_parcel: bytes
    seed: bytes
    seed_parcel: bytes

    def encode(self) -> bytes:
        fields = (self.share_b, self.share_r, self.mailbox_parcel, self.seed, self.seed_parcel)
        return u16(self.receiver) + b"".join(blob(field) for field in fields)

    @classmethod
    def read(cls, reader: Reader) -> Dealt:
        return cls(reader.u16(), *reader.optional(HASH_BYTES, 5))


@dataclass(frozen=True)
class Header:
    """Step 1: T1, H(r), H(b), and per receiver in U1 what was dealt to it (ascending)."""

    t1: bytes
    commit_r: bytes
    commit_b: bytes
    dealt: tuple[Dealt, ...]

    def encode(self) -> bytes:
        return (
            blob(self.t1)
            + blob(self.commit_r)
            + blob(self.commit_b)
            + items(entry.encode() for entry in self.dealt)
        )

    @classmethod
    def decode(cls, body: bytes) -> Header:
        reader = Reader(body, "header")
        t1, commit_r, commit_b = (reader.exactly(HASH_BYTES) for _ in range(3))
        dealt = reader.items(lambda: Dealt.read(reader), MAX_SILOS)
        reader.finish()
        receivers = [entry.receiver for entry in dealt]
        if receivers != sorted(set(receivers)):
            raise MalformedMessage("header: receivers are not strictly ascending")
        return cls(t1, commit_r, commit_b, dealt)

    def to(self, receiver: int) -> Dealt:
        """What a member of U1 was dealt; who reads a header checked first that it deals to U1."""
        return self.dealt[self.receivers.index(receiver)]

    @property
    def receivers(self) -> tuple[int, ...]:
        return tuple(entry.receiver for entry in self.dealt)


@dataclass(frozen=True)
class Parcel:
    """The ciphertexts of one dealer for one receiver, as relayed; bound by the dealer's header."""

    mailbox: bytes
    seed: bytes


@dataclass(frozen=True)
class MaskedInput:
    """Step 2: the digest and byte length of the masked vector, which travels by upload."""

    t2: bytes
    vector: bytes
    size: int

    def encode(self) -> bytes:
        return blob(self.t2) + blob(self.vector) + u64(self.size)

    @classmethod
    def decode(cls, body: bytes) -> MaskedInput:
        reader = Reader(body, "masked input")
        message = cls(reader.exactly(HASH_BYTES), reader.exactly(HASH_BYTES), reader.u64())
        reader.finish()
        return message


@dataclass(frozen=True)
class Confirm:
    """Step 3: T2, the one survivor set U3 that the sender will unmask, and its own H(input)."""

    t2: bytes
    survivors: tuple[int, ...]
    vector: bytes

    def encode(self) -> bytes:
        return blob(self.t2) + indices(self.survivors) + blob(self.vector)

    @classmethod
    def decode(cls, body: bytes) -> Confirm:
        reader = Reader(body, "confirmation")
        t2, survivors = reader.exactly(HASH_BYTES), reader.indices(MAX_SILOS)
        message = cls(t2, survivors, reader.exactly(HASH_BYTES))
        reader.finish()
        return message


@dataclass(frozen=True)
class Unmask:
    """Step 4: the sender's shares of b for every silo of U3 and of r for every silo of U2 ∖ U3."""

    shares_b: tuple[tuple[int, Secret], ...]
    shares_r: tuple[tuple[int, Secret], ...]

    def encode(self) -> bytes:
        return b"".join(
            items(u16(owner) + blob(share.reveal()) for owner, share in shares)
            for shares in (self.shares_b, self.shares_r)
        )

    @classmethod
    def decode(cls, body: bytes) -> Unmask:
        reader = Reader(body, "unmask")

        def share() -> tuple[int, Secret]:
            return reader.u16(), Secret(reader.exactly(SHARE_BYTES))

        message = cls(reader.items(share, MAX_SILOS), reader.items(share, MAX_SILOS))
        reader.finish()
        for shares in (message.shares_b, message.shares_r):
            owners = [owner for owner, _ in shares]
            if owners != sorted(set(owners)):
                raise MalformedMessage("unmask: owners are not strictly ascending")
        return message


@dataclass(frozen=True)
class Abort:
    """The session is given up under this roster: the sender will never unmask it.

    A silo has one identity key and a ledger for each study. Its signature would mean the same in
    all of them, but only the ledger of the session's own study knows whether it unmasked: so it
    says for which roster, which holds the study, and counts for no other.
    """

    roster: bytes

    def encode(self) -> bytes:
        return blob(self.roster)

    @classmethod
    def decode(cls, body: bytes) -> Abort:
        reader = Reader(body, "abort")
        message = cls(reader.exactly(HASH_BYTES))
        reader.finish()
        return message


@dataclass(frozen=True)
class Complaint:
    """Instead of step 2: `accused` dealt something that its own signed header contradicts."""

    accused: int

    def encode(self) -> bytes:
        return u16(self.accused)

    @classmethod
    def decode(cls, body: bytes) -> Complaint:
        reader = Reader(body, "complaint")
        message = cls(reader.u16())
        reader.finish()
        return message
