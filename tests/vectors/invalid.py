"""Requests that silo 1 must refuse, on top of a valid session, each with its reason."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg.certificate import Certificate
from secagg.codec import blob, items, u8, u16, u32
from secagg.messages import Confirm, Header, Signed, Step
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


def _refused(base: dict[str, Any]) -> Iterator[Case]:
    ctx = bytes.fromhex(base["ctx"])
    keys = [
        Ed25519PrivateKey.from_private_bytes(bytes.fromhex(s["identity_seed"]))
        for s in base["silos"]
    ]

    def of(step: str) -> list[Signed]:
        return [Signed.decode(b64decode(s[step])) for s in base["silos"]]

    def sets(request: str, m: list[Signed]) -> Iterator[Case]:
        forged = replace(m[2], signature=bytes(64))
        stale = Signed.by(keys[2], m[2].step, 3, bytes(32), m[2].body)
        other = Signed.by(keys[2], Step.COMPLAIN, 3, ctx, m[2].body)
        stranger = Signed.by(keys[2], m[2].step, 9, ctx, m[2].body)
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

    adverts, headers, confirms = of("advert"), of("share"), of("confirm")
    yield from sets("adverts", adverts)
    yield "our own is missing", "adverts", _relayed(adverts[1:]), "OWN_MESSAGE_CHANGED"
    no_key = Signed.by(keys[2], Step.ADVERTISE, 3, ctx, adverts[2].body[:-32] + bytes(32))
    yield "a key of low order", "adverts", _relayed([*adverts[:2], no_key, adverts[3]]), "BAD_KEY"
    yield from sets("headers", headers)
    yield "our own is missing", "headers", _relayed(headers[1:]), "OWN_MESSAGE_CHANGED"
    header = Header.decode(headers[2].body)
    for what, changed, reason in (
        ("another transcript", replace(header, t1=bytes(32)), "TRANSCRIPT_MISMATCH"),
        ("deals to other silos", replace(header, dealt=header.dealt[:3]), "BAD_COMMITMENT"),
        (
            "a share that is not the committed one",
            replace(header, dealt=(replace(header.dealt[0], share_b=bytes(32)), *header.dealt[1:])),
            "BAD_COMMITMENT",
        ),
        (
            "a ciphertext that is not the signed one",
            replace(
                header,
                dealt=(replace(header.dealt[0], mailbox_parcel=bytes(32)), *header.dealt[1:]),
            ),
            "BAD_CIPHERTEXT",
        ),
    ):
        bad = Signed.by(keys[2], Step.SHARE, 3, ctx, changed.encode())
        yield what, "headers", _relayed([*headers[:2], bad, headers[3]]), reason
    for what, survivors, reason in (
        ("a silo from outside", [1, 2, 3, 5], "NOT_A_SUBSET"),
        ("without us", [2, 3, 4], "SELF_NOT_INCLUDED"),
        ("below the threshold", [1, 2], "BELOW_THRESHOLD"),
        ("out of order", [2, 1, 3], "NOT_ASCENDING"),
        ("one silo twice", [1, 1, 2, 3], "NOT_ASCENDING"),
    ):
        yield what, "survivors", survivors, reason
    yield from sets("confirmations", confirms)
    theirs = Confirm.decode(confirms[2].body)
    other_set = Signed.by(
        keys[2], Step.CONFIRM, 3, ctx, replace(theirs, survivors=(1, 2, 3)).encode()
    )
    yield (
        "another set",
        "confirmations",
        _relayed([*confirms[:2], other_set, confirms[3]]),
        "TRANSCRIPT_MISMATCH",
    )
    few = Certificate(Step.CONFIRM, ctx, tuple(confirms[:2]))
    yield "too few signatures", "certificate", generate.packed(few.encode()), "BAD_CERTIFICATE"
    mixed = Certificate(Step.CONFIRM, ctx, (*confirms[:2], other_set, confirms[3]))
    yield "two sets", "certificate", generate.packed(mixed.encode()), "BAD_CERTIFICATE"
    not_aborts = Certificate(Step.ABORT, ctx, tuple(confirms))
    yield "no ABORTs", "certificate", generate.packed(not_aborts.encode()), "BAD_CERTIFICATE"


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
