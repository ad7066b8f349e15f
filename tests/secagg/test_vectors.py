"""The committed sessions: replayed through the state machines, and computed anew from the page."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator
from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.errors import MalformedMessage, Refused
from secagg.events import (
    Adverts,
    Cancel,
    Confirmations,
    Deadline,
    Headers,
    Open,
    Received,
    Settle,
    SiloEvent,
    Survivors,
)
from secagg.messages import Parcel, Signed
from secagg.primitives import seal, usable
from secagg.roster import Roster
from secagg.silo import advertised
from tests.secagg import spec
from tests.secagg.spec import H, blob, bound, items, u
from tests.secagg.world import World
from tests.vectors.generate import FOLDER, SCENARIOS, stream, world_of


def sha(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def text(s: str) -> bytes:
    return blob(s.encode())


SESSIONS = {s.name: json.loads((FOLDER / f"{s.name}.json").read_text()) for s in SCENARIOS}
INVALID = json.loads((FOLDER / "invalid.json").read_text())


def recorded(monkeypatch: pytest.MonkeyPatch, silo: dict[str, Any]) -> None:
    """Sealing draws its own entropy: let it give the recorded ciphertexts, in order."""
    boxes = iter(
        b64decode(box)
        for _, parcel in sorted(silo["parcels"].items(), key=lambda kv: int(kv[0]))
        for box in (parcel["mailbox"], parcel["seed"])
        if box
    )
    monkeypatch.setattr(
        advertised, "seal", lambda s, key, info: next(boxes) if usable(key) else seal(s, key, info)
    )


def replayed(monkeypatch: pytest.MonkeyPatch, session: dict[str, Any]) -> World:
    """The session again; every message of every silo must be the recorded one."""
    context = SessionContext.decode(bytes.fromhex(session["context"]))
    world = world_of(session["name"], context.silos, context.ring)
    silos = {silo["index"]: silo for silo in session["silos"]}
    for step in ("advertise", "share", "masked_input", "confirm", "unmask", "abort"):
        if step == "abort" and not world.session.over:
            world.feed(Cancel("a person said so"))
        said = [i for i, silo in silos.items() if step in silo]
        for i in said:
            request = world.session.request_for(i)
            assert request is not None
            recorded(monkeypatch, silos[i])
            (sent,) = world.silos[i].deliver(request)
            assert sent.message.encode() == b64decode(silos[i][step])
            world.feed(Received(sent.message, sent.parcels))
        if step == "masked_input" and session["sum"] and len(said) < len(silos):
            world.feed(Deadline())
    return world


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_from_fixed_entropy_is_the_recorded_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SESSIONS[name]
    world = replayed(monkeypatch, session)
    assert world.session.over
    assert isinstance(world.session, coordinator.Summed | coordinator.Aborted)
    certificate = world.session.certificate
    assert certificate.encode() == b64decode(session["certificate"])
    assert list(certificate.survivors) == session["survivors"]
    assert (b"" if world.sum is None else world.sum.tobytes()).hex() == session["sum"]
    assert world.roster.fingerprint == session["fingerprint"]
    if world.sum is not None:
        assert (world.sum == world.expected(certificate.survivors)).all()


# --- the same from docs/secure-sum.md alone


class Page:
    """One silo of a session, computed from its fixed entropy by the second implementation."""

    def __init__(self, session: dict[str, Any], silo: dict[str, Any]) -> None:
        self.silo, self.i = silo, silo["index"]
        self.ctx = bytes.fromhex(session["ctx"])
        draw = stream(session["name"], self.i)
        self.identity = Ed25519PrivateKey.from_private_bytes(draw(32))
        self.ledger_key, self.input = draw(32), draw(32)
        self.r, self.b, mailbox_seed = draw(32), draw(32), draw(32)
        self.draws = [draw(33) for _ in range(200)]
        self.mailbox = spec.sealing_key(mailbox_seed, self.ctx, "mailbox")
        self.mask = spec.sealing_key(self.r, self.ctx, "mask")

    def says(self, step: int, body: bytes) -> bytes:
        return spec.signed(self.identity, step, self.i, self.ctx, body)

    def advert(self) -> bytes:
        return self.says(0, blob(self.mailbox[2]) + blob(self.mask[2]))

    def share(self, t1: bytes, u1: list[int], t: int) -> bytes:
        f_b, used = spec.polynomial(self.b, t, self.draws)
        f_r, _ = spec.polynomial(self.r, t, self.draws[used:])
        self.t1 = t1
        self.shares = {j: (spec.share(f_b, j), spec.share(f_r, j)) for j in u1}
        self.seeds = {j: spec.pair_seed(self.r, self.ctx, t1, self.i, j) for j in u1 if j > self.i}
        dealt = []
        for j in u1:
            parcel = self.silo["parcels"].get(str(j), {"mailbox": "", "seed": ""})
            mailbox, seed = b64decode(parcel["mailbox"]), b64decode(parcel["seed"])
            fields = (
                self.commit("share b", j, self.shares[j][0]),
                self.commit("share r", j, self.shares[j][1]),
                H("parcel", mailbox) if mailbox else b"",
                self.commit("seed", j, self.seeds[j]) if seed else b"",
                H("parcel", seed) if seed else b"",
            )
            dealt.append(u(16, j) + b"".join(map(blob, fields)))
        head = blob(t1) + blob(self.commit("r", 0, self.r)) + blob(self.commit("b", 0, self.b))
        return self.says(1, head + items(dealt))

    def commit(self, kind: str, j: int, x: bytes) -> bytes:
        return bound("commit/" + kind, self.ctx, self.t1, self.i, j, x)

    def opens(self, dealer: Page) -> bytes | None:
        """What `dealer` sealed for us: checks the shares, gives the seed if it deals one."""
        parcel = dealer.silo["parcels"][str(self.i)]
        info = bound("seal/mailbox", self.ctx, self.t1, dealer.i, self.i)
        both = spec.hpke_open(*self.mailbox[:2], b64decode(parcel["mailbox"]), info)
        assert both == b"".join(dealer.shares[self.i])
        if dealer.i > self.i:
            return None
        info = bound("seal/seed", self.ctx, self.t1, dealer.i, self.i)
        return spec.hpke_open(*self.mask[:2], b64decode(parcel["seed"]), info)


@dataclass
class Whole:
    """A session computed from the page: everything that all silos say, and the sum."""

    session: dict[str, Any]
    ring: int
    silos: dict[int, Page]
    inputs: dict[int, list[int]] = field(default_factory=dict)
    masked: dict[int, bytes] = field(default_factory=dict)
    t1: bytes = b""
    t2: bytes = b""

    @classmethod
    def of(cls, name: str) -> Whole:
        session = SESSIONS[name]
        silos = {silo["index"]: Page(session, silo) for silo in session["silos"]}
        return cls(session, int(name.rsplit("-", 1)[1]), silos)

    @property
    def ctx(self) -> bytes:
        return bytes.fromhex(self.session["ctx"])

    @property
    def t(self) -> int:
        return 2 * len(self.silos) // 3 + 1

    @property
    def u3(self) -> list[int]:
        return [i for i, page in self.silos.items() if "masked_input" in page.silo]

    @property
    def dropped(self) -> list[int]:
        return [i for i in self.silos if i not in self.u3]

    def check_context(self) -> None:
        n, t, session = len(self.silos), self.t, self.session
        c = min(2 * t - n - 1, t - 2)
        members = (
            text(f"site-{i}") + blob(page.identity.public_key().public_bytes_raw())
            for i, page in self.silos.items()
        )
        roster = text("vectors") + u(32, 1) + u(16, t) + u(16, c) + items(members)
        assert roster.hex() == session["roster"]
        self.roster_digest = H("roster", roster)
        assert self.roster_digest.hex() == session["roster_digest"]
        context = (
            text("vectors") + u(32, 1) + blob(H("roster", roster)) + u(16, n) + u(16, t) + u(16, c)
            + u(64, 1) + text("round") + u(32, 1) + blob(sha(b"plan")) + blob(sha(b"model"))
            + u(8, self.ring) + u(64, 5) + blob(sha(b"encoding")) + blob(bytes(32)) + items([])
            + blob(bytes(32))
        )  # fmt: skip
        assert context.hex() == session["context"]
        assert H("context", context) == self.ctx

    def check_dealing(self) -> None:
        adverts = {i: page.advert() for i, page in self.silos.items()}
        self.t1 = H("T1", self.ctx, *adverts.values())
        everybody = list(self.silos)
        headers = {i: p.share(self.t1, everybody, self.t) for i, p in self.silos.items()}
        self.t2 = H("T2", self.t1, *headers.values())
        for i, page in self.silos.items():
            silo = page.silo
            assert b64decode(silo["advertise"]) == adverts[i]
            assert b64decode(silo["share"]) == headers[i]
            assert silo["shares_b"] == {str(j): s[0].hex() for j, s in page.shares.items()}
            assert silo["pair_seeds"] == {str(j): s.hex() for j, s in page.seeds.items()}

    def check_inputs(self) -> None:
        ctx, ring = self.ctx, self.ring
        for i in self.u3:
            page = self.silos[i]
            silo, values = page.silo, spec.elements(page.input[: 5 * ring // 8], ring)
            self.inputs[i] = values
            assert spec.vector(values, ring).hex() == silo["input"]
            values = spec.added(values, spec.self_mask(page.b, ctx, self.t2, i), 1, ring)
            for j, other in self.silos.items():
                if j == i:
                    continue
                seed = page.opens(other) or page.seeds[j]
                key = spec.pair_mask(seed, ctx, self.t2, i, j)
                assert silo["pair_mask_keys"][str(j)] == key.hex()
                values = spec.added(values, key, 1 if i < j else -1, ring)
            masked = self.masked[i] = spec.vector(values, ring)
            assert masked.hex() == silo["masked"]
            body = blob(self.t2) + blob(sha(masked)) + u(64, len(masked))
            assert b64decode(silo["masked_input"]) == page.says(2, body)

    def check_abort(self) -> None:
        aborts = [
            page.says(5, blob(self.roster_digest))
            for page in self.silos.values()
            if "abort" in page.silo
        ]
        certificate = u(8, 2) + blob(self.ctx) + items(aborts)
        assert b64decode(self.session["certificate"]) == certificate

    def check_confirmations(self) -> None:
        said = blob(self.t2) + items(u(16, i) for i in self.u3)
        confirms = {i: self.silos[i].says(3, said + blob(sha(self.masked[i]))) for i in self.u3}
        for i, confirm in confirms.items():
            assert b64decode(self.silos[i].silo["confirm"]) == confirm
        certificate = u(8, 1) + blob(self.ctx) + items(confirms.values())
        assert b64decode(self.session["certificate"]) == certificate

    def released(self) -> dict[int, tuple[dict[int, bytes], dict[int, bytes]]]:
        """Who unmasked → its shares of b and of r."""
        found = {}
        for i in self.u3:
            if "unmask" not in self.silos[i].silo:
                continue
            of_b = {j: self.silos[j].shares[i][0] for j in self.u3}
            of_r = {j: self.silos[j].shares[i][1] for j in self.dropped}
            body = b"".join(
                items(u(16, j) + blob(s) for j, s in shares.items()) for shares in (of_b, of_r)
            )
            assert b64decode(self.silos[i].silo["unmask"]) == self.silos[i].says(4, body)
            found[i] = (of_b, of_r)
        return found

    def check_sum(self) -> None:
        ctx, ring, released = self.ctx, self.ring, self.released()
        chosen = list(released)[: self.t]
        assert len(chosen) == self.t
        total = [0] * 5
        for i in self.u3:
            words = spec.elements(self.masked[i], ring)
            total = [a + b for a, b in zip(total, words, strict=True)]
            b = spec.restore({x: released[x][0][i] for x in chosen})
            total = spec.added(total, spec.self_mask(b, ctx, self.t2, i), -1, ring)
        for d in self.dropped:
            r = spec.restore({x: released[x][1][d] for x in chosen})
            assert r == self.silos[d].r
            for i in self.u3:
                total = spec.added(total, self.left_by(d, i, r), -1 if i < d else 1, ring)
        assert spec.vector(total, ring).hex() == self.session["sum"]
        plain = [sum(column) for column in zip(*self.inputs.values(), strict=True)]
        assert spec.vector(plain, ring) == spec.vector(total, ring)

    def left_by(self, d: int, i: int, r: bytes) -> bytes:
        """The mask of the pair of survivor `i` and the silo `d` that was dropped."""
        low, high = min(i, d), max(i, d)
        dealer = self.silos[d]
        seed = spec.pair_seed(r, self.ctx, self.t1, d, i) if d == low else None
        seed = seed or dealer.opens(self.silos[i])
        assert seed is not None
        return spec.pair_mask(seed, self.ctx, self.t2, low, high)


@pytest.mark.parametrize("name", SESSIONS)
def test_the_page_alone_gives_the_recorded_session(name: str) -> None:
    whole = Whole.of(name)
    whole.check_context()
    whole.check_dealing()
    whole.check_inputs()
    if not whole.session["sum"]:
        whole.check_abort()
        return
    whole.check_confirmations()
    whole.check_sum()


# --- what must be refused


def event_of(case: dict[str, Any], parcels: dict[int, Parcel]) -> SiloEvent:
    content = case["content"]
    if case["request"] == "survivors":
        return Survivors(tuple(content))
    if case["request"] == "certificate":
        return Settle(Certificate.decode(b64decode(content)))
    messages = tuple(Signed.decode(b64decode(message)) for message in content)
    if case["request"] == "headers":
        return Headers(messages, parcels)
    return Adverts(messages) if case["request"] == "adverts" else Confirmations(messages)


@pytest.mark.parametrize("number", range(len(INVALID["refused"])))
def test_an_invalid_request_is_refused_for_the_recorded_reason(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, session = INVALID["refused"][number], SESSIONS[INVALID["base"]]
    silo, messages = session["silos"][0], {}
    for step in ("advertise", "share", "confirm"):
        messages[step] = tuple(Signed.decode(b64decode(s[step])) for s in session["silos"])
    boxes = {s["index"]: s["parcels"]["1"] for s in session["silos"][1:]}
    parcels = {
        j: Parcel(b64decode(box["mailbox"]), b64decode(box["seed"])) for j, box in boxes.items()
    }
    world = world_of(session["name"], 4, 8)
    site = world.silos[1]
    recorded(monkeypatch, silo)
    valid: dict[str, SiloEvent] = {
        "open": Open(world.session.context),
        "adverts": Adverts(messages["advertise"]),
        "headers": Headers(messages["share"], parcels),
        "survivors": Survivors((1, 2, 3, 4)),
        "confirmations": Confirmations(messages["confirm"]),
        "certificate": Settle(Certificate.decode(b64decode(session["certificate"]))),
    }
    for request, event in valid.items():
        if request == case["request"]:
            break
        site.deliver(event)
    before = site.state
    with pytest.raises(Refused) as caught:
        site.deliver(event_of(case, parcels))
    assert caught.value.reason.name == case["reason"]
    assert site.state is before
    recorded(monkeypatch, silo)
    site.deliver(valid[case["request"]])  # and the honest request is answered as before


@pytest.mark.parametrize("number", range(len(INVALID["malformed"])))
def test_malformed_bytes_are_refused(number: int) -> None:
    case = INVALID["malformed"][number]
    decode = {
        "message": Signed.decode,
        "certificate": Certificate.decode,
        "context": SessionContext.decode,
        "roster": Roster.decode,
    }[case["type"]]
    with pytest.raises(MalformedMessage):
        decode(bytes.fromhex(case["bytes"]))


def test_every_vector_file_is_read_here() -> None:
    assert {p.stem for p in Path(FOLDER).glob("*.json")} == {*SESSIONS, "invalid"}
