"""Every parser that reads bytes of another party: one function each, and seeds from the vectors.

A target parses; what parses must encode to the same bytes, and what does not must raise the one
error of its kind. Anything else that escapes is a finding.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.errors import MalformedMessage
from secagg.ledger import Confirmed, Masked, Opened, Settled, decode_entry, encode_entry
from secagg.messages import Advert, Complaint, Confirm, Header, MaskedInput, Signed, Unmask
from secagg.roster import Roster
from study.invitation import Invitation, InvitationError
from study.quantity import (
    CensusWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    decode_work,
    encode_work,
)

Target = Callable[[bytes], None]
VECTORS = Path(__file__).parents[1] / "vectors" / "secure_sum"


def _canonical(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Target:
    def target(data: bytes) -> None:
        try:
            value = decode(data)
        except MalformedMessage:
            return
        if encode(value) != data:
            raise AssertionError(f"not canonical: {data.hex()} parsed as {value!r}")

    return target


def _invitation(data: bytes) -> None:
    try:
        token = data.decode("utf-8")
        found = Invitation.decode(token)
    except (InvitationError, UnicodeDecodeError):
        return
    if Invitation.decode(found.encode()) != found:
        raise AssertionError(f"an invitation changes when written again: {token!r}")


_MESSAGES = (Signed, Advert, Header, MaskedInput, Confirm, Unmask, Complaint)
_VALUES = (Certificate, SessionContext, Roster)
TARGETS: dict[str, Target] = {
    kind.__name__.lower(): _canonical(kind.decode, lambda value: value.encode())
    for kind in (*_MESSAGES, *_VALUES)
} | {
    "entry": _canonical(decode_entry, encode_entry),
    "work": _canonical(decode_work, encode_work),
    "invitation": _invitation,
}


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    return SEEDS[target]


def _sessions() -> list[dict[str, Any]]:
    files = sorted(VECTORS.glob("4-*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def _works() -> list[bytes]:
    sha = "0" * 64
    works = (
        CensusWork(),
        MomentsWork(total_count=70, network="tiny", sha256=sha, dimension=8, bound=4.5),
        TagsWork(total_count=70, images=16, slots=4096),
        ImagesWork(tags=sha, occupied=12, record_size=65),
        RoundWork(total_count=70, sizes=(3, 4), clips=(0.5, 1e-7)),
    )
    return [encode_work(work) for work in works]


def _invitations() -> list[bytes]:
    pem = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"
    certificate, key = (pem.format(kind).encode() for kind in ("CERTIFICATE", "PRIVATE KEY"))
    when = datetime(2030, 1, 1, tzinfo=UTC)
    token = Invitation("st-marys", "host:443", certificate, certificate, key, when).encode()
    return [token.encode()]


def _seeds() -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    bodies = {"advertise": "advert", "share": "header", "masked_input": "maskedinput"}
    bodies |= {"confirm": "confirm", "unmask": "unmask"}
    for session in _sessions():
        found["roster"].append(bytes.fromhex(session["roster"]))
        found["sessioncontext"].append(bytes.fromhex(session["context"]))
        found["certificate"].append(b64decode(session["certificate"]))
        for step, body in bodies.items():
            if step in session["silos"][0]:
                raw = b64decode(session["silos"][0][step])
                found["signed"].append(raw)
                found[body].append(Signed.decode(raw).body)
    context = SessionContext.decode(found["sessioncontext"][0])
    digest = bytes(32)
    entries = (
        Opened(context),
        Masked(digest, digest),
        Confirmed(digest, digest, (1, 2, 3, 4), (1, 2, 3), digest, b"locked"),
        Settled(digest, digest, True, False),
    )
    found["complaint"] = [Complaint(3).encode()]
    found["entry"] = [encode_entry(entry) for entry in entries]
    found["work"], found["invitation"] = _works(), _invitations()
    return found


SEEDS = _seeds()
