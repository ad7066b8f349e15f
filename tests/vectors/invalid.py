"""Requests that silo 1 must refuse, on top of a valid session, each with its reason."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg.certificate import Certificate
from secagg.codec import blob, items, u8, u16, u32
from secagg.messages import Abort, Confirm, Header, Signed, Step
from secagg.roster import Roster
from tests.vectors import generate

BASE = "4-silos-all-stay-ring-8"


def cases() -> dict[str, Any]:
    base = json.loads((generate.FOLDER / f"{BASE}.json").read_text("utf-8"))
    return {
        "base": BASE,
        "silo": 1,
        "refused": [
            {"what": what, "request": request, "content": content, "reason": reason}
            for what, request, content, reason in _refused(base)
        ],
        "malformed": [
            {"what": what, "type": kind, "bytes": raw.hex()} for what, kind, raw in _malformed(base)
        ],
    }


Case = tuple[str, str, Any, str]
"""What is wrong, the kind of request, its content, the reason for refusing it."""


@dataclass(frozen=True)
class Session:
    """The valid session: its context's digest, the silos' identity keys and signed messages."""

    ctx: bytes
    roster: Roster
    keys: list[Ed25519PrivateKey]
    adverts: list[Signed]
    headers: list[Signed]
    confirms: list[Signed]

    @classmethod
    def of(cls, base: dict[str, Any]) -> Session:
        silos = base["silos"]
        seeds = [bytes.fromhex(silo["identity_seed"]) for silo in silos]
        keys = [Ed25519PrivateKey.from_private_bytes(seed) for seed in seeds]
        steps = ("advert", "share", "confirm")
        sent = ([Signed.decode(b64decode(silo[step])) for silo in silos] for step in steps)
        roster = Roster.decode(bytes.fromhex(base["roster"]))
        return cls(bytes.fromhex(base["ctx"]), roster, keys, *sent)

    def third(self, step: Step, body: bytes, sender: int = 3, ctx: bytes | None = None) -> Signed:
        """Signed by the third silo, whatever it says."""
        return Signed.by(self.keys[2], step, sender, self.ctx if ctx is None else ctx, body)

    def aborts(self, body: bytes) -> list[Signed]:
        """Of all silos but the first, who has signed none."""
        return [Signed.by(self.keys[i - 1], Step.ABORT, i, self.ctx, body) for i in (2, 3, 4)]

    @property
    def other_set(self) -> Signed:
        """The third silo's confirmation of fewer survivors."""
        theirs = Confirm.decode(self.confirms[2].body)
        return self.third(Step.CONFIRM, replace(theirs, survivors=(1, 2, 3)).encode())


def _refused(base: dict[str, Any]) -> Iterator[Case]:
    session = Session.of(base)
    yield from _adverts(session)
    yield from _headers(session)
    yield from _survivors()
    yield from _confirmations(session)
    yield from _certificates(session)


def _sets(session: Session, request: str, m: list[Signed]) -> Iterator[Case]:
    """What is wrong with any set of one message from each silo."""
    forged = replace(m[2], signature=bytes(64))
    stale = session.third(m[2].step, m[2].body, ctx=bytes(32))
    other = session.third(Step.COMPLAIN, m[2].body)
    stranger = session.third(m[2].step, m[2].body, sender=9)
    for what, messages, reason in (
        ("a forged signature", [*m[:2], forged, m[3]], "BAD_SIGNATURE"),
        ("signed for another session", [*m[:2], stale, m[3]], "BAD_SIGNATURE"),
        ("another's message under this name", [*m[:2], replace(m[3], sender=3), m[3]], ""),
        ("a message of another step", [*m[:2], other, m[3]], "WRONG_STEP"),
        ("a sender outside the roster", [*m[:3], stranger], "NOT_IN_ROSTER"),
        ("one silo twice", [*m[:3], m[2]], "DUPLICATE_SENDER"),
        ("out of order", [m[1], m[0], *m[2:]], "NOT_ASCENDING"),
        ("below the threshold", m[:2], "BELOW_THRESHOLD"),
    ):
        yield what, request, _relayed(messages), reason or "BAD_SIGNATURE"


def _adverts(session: Session) -> Iterator[Case]:
    m = session.adverts
    yield from _sets(session, "adverts", m)
    yield "our own is missing", "adverts", _relayed(m[1:]), "OWN_MESSAGE_CHANGED"
    no_key = session.third(Step.ADVERTISE, m[2].body[:-32] + bytes(32))
    yield "a key of low order", "adverts", _relayed([*m[:2], no_key, m[3]]), "BAD_KEY"


def _headers(session: Session) -> Iterator[Case]:
    m = session.headers
    yield from _sets(session, "headers", m)
    yield "our own is missing", "headers", _relayed(m[1:]), "OWN_MESSAGE_CHANGED"
    header = Header.decode(m[2].body)
    ours, others = header.dealt[0], header.dealt[1:]
    share, parcel = ours._replace(share_b=bytes(32)), ours._replace(mailbox_parcel=bytes(32))
    for what, changed, reason in (
        ("another transcript", replace(header, t1=bytes(32)), "TRANSCRIPT_MISMATCH"),
        ("deals to other silos", replace(header, dealt=header.dealt[:3]), "BAD_COMMITMENT"),
        (
            "a share that is not the committed one",
            replace(header, dealt=(share, *others)),
            "BAD_COMMITMENT",
        ),
        (
            "a ciphertext that is not the signed one",
            replace(header, dealt=(parcel, *others)),
            "BAD_CIPHERTEXT",
        ),
    ):
        bad = session.third(Step.SHARE, changed.encode())
        yield what, "headers", _relayed([*m[:2], bad, m[3]]), reason


def _survivors() -> Iterator[Case]:
    for what, survivors, reason in (
        ("a silo from outside", [1, 2, 3, 5], "NOT_A_SUBSET"),
        ("without us", [2, 3, 4], "SELF_NOT_INCLUDED"),
        ("below the threshold", [1, 2], "BELOW_THRESHOLD"),
        ("out of order", [2, 1, 3], "NOT_ASCENDING"),
        ("one silo twice", [1, 1, 2, 3], "NOT_ASCENDING"),
    ):
        yield what, "survivors", survivors, reason


def _confirmations(session: Session) -> Iterator[Case]:
    m = session.confirms
    yield from _sets(session, "confirmations", m)
    messages = [*m[:2], session.other_set, m[3]]
    yield "another set", "confirmations", _relayed(messages), "TRANSCRIPT_MISMATCH"


def _certificates(session: Session) -> Iterator[Case]:
    m = session.confirms
    second = replace(session.roster, study="second")
    for what, step, messages in (
        ("too few signatures", Step.CONFIRM, m[:2]),
        ("two sets", Step.CONFIRM, [*m[:2], session.other_set, m[3]]),
        ("no ABORTs", Step.ABORT, m),
        ("ABORTs of another study", Step.ABORT, session.aborts(Abort(second.digest).encode())),
        ("ABORTs that name no roster", Step.ABORT, session.aborts(b"")),
    ):
        certificate = Certificate(step, session.ctx, tuple(messages))
        packed = generate.packed(certificate.encode())
        yield what, "certificate", packed, "BAD_CERTIFICATE"


def _malformed(base: dict[str, Any]) -> Iterator[tuple[str, str, bytes]]:
    advert = b64decode(base["silos"][0]["advert"])
    certificate = b64decode(base["certificate"])
    context, roster = bytes.fromhex(base["context"]), bytes.fromhex(base["roster"])
    for kind, raw in (
        ("message", advert),
        ("certificate", certificate),
        ("context", context),
        ("roster", roster),
    ):
        yield "a byte too many", kind, raw[-200:] if len(raw) > 4000 else raw + b"\0"
        yield "a byte too few", kind, raw[:100]
    yield "no such step", "message", u8(7) + u16(1) + blob(b"") + blob(bytes(64))
    yield "a short signature", "message", u8(5) + u16(1) + blob(b"") + blob(bytes(63))
    yield "a length beyond the limit", "message", u8(5) + u16(1) + u32(1 << 21)
    yield "no such kind", "certificate", u8(3) + blob(bytes(32)) + items([])


def _relayed(messages: list[Signed]) -> list[str]:
    return [generate.packed(message.encode()) for message in messages]
