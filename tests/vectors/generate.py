"""Writes tests/vectors/secure_sum/*.json: `python -m tests.vectors.generate`.

Complete sessions with every intermediate value. All entropy is fixed: silo i of session `name`
draws from SHAKE-256("concilium vector/" || name || "/" || i). HPKE ciphertexts cannot be (sealing
takes its own entropy), so they are recorded, and a new run writes other ones.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator, keys, shamir, silo
from secagg.context import Quantity, SessionContext
from secagg.events import Adverts, Cancel, Deadline, Headers, Received, Send
from secagg.masking import DTYPES
from secagg.messages import Step, transcript
from secagg.primitives import LABEL, Secret
from secagg.roster import Member, Roster, default_threshold, largest_colluders
from tests.secagg.world import SiloWorld, World

FOLDER = Path(__file__).parent / "secure_sum"
LENGTH = 5


@dataclass(frozen=True)
class Scenario:
    """`late` silos never upload; `silent` silos are gone when shares are asked for."""

    silos: int
    ring: int
    what: str
    late: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    abort: bool = False

    @property
    def name(self) -> str:
        return f"{self.silos}-silos-{self.what}-ring-{self.ring}"


SCENARIOS = (
    Scenario(4, 8, "all-stay"),
    Scenario(4, 16, "dropout-before-upload", late=(2,)),
    Scenario(4, 32, "dropout-before-unmask", silent=(3,)),
    Scenario(4, 16, "aborted", abort=True),
    Scenario(7, 32, "all-stay"),
    Scenario(7, 8, "dropout-before-upload", late=(3, 6)),
    Scenario(7, 16, "dropout-before-unmask", silent=(1, 7)),
    Scenario(7, 32, "aborted", abort=True),
)


def stream(name: str, index: int) -> Callable[[int], bytes]:
    """The fixed entropy of one silo: consecutive bytes of one SHAKE-256 output."""
    whole = hashlib.shake_256(f"concilium vector/{name}/{index}".encode()).digest(1 << 16)
    at = 0

    def draw(length: int) -> bytes:
        nonlocal at
        at += length
        return whole[at - length : at]

    return draw


def world_of(name: str, silos: int, ring: int) -> World:
    """Identity key, ledger key and input come first from each silo's stream, 32 bytes each."""
    draws = {i: stream(name, i) for i in range(1, silos + 1)}
    identities = {i: Ed25519PrivateKey.from_private_bytes(draw(32)) for i, draw in draws.items()}
    t = default_threshold(silos)
    members = tuple(
        Member(f"site-{i}", key.public_key().public_bytes_raw()) for i, key in identities.items()
    )
    roster = Roster("vectors", 1, t, largest_colluders(silos, t), members)
    context = SessionContext(
        *("vectors", 1, roster.digest, silos, t, roster.colluders, 1, Quantity("round", 1)),
        plan=hashlib.sha256(b"plan").digest(),
        model=hashlib.sha256(b"model").digest(),
        ring=ring,
        length=LENGTH,
        encoding=hashlib.sha256(b"encoding").digest(),
    )
    sites = {}
    for i, draw in draws.items():
        party = silo.SiloParty(roster, i, identities[i], Secret(draw(32)), draw)
        vector = np.frombuffer(draw(32)[: context.vector_bytes], DTYPES[ring])
        sites[i] = SiloWorld(party, silo.start(party), vector)
    return World(roster, sites, coordinator.open_session(roster, context))


class Recorder:
    """Runs a scenario and notes what every silo drew, derived, sent and received."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.world = world_of(scenario.name, scenario.silos, scenario.ring)
        self.notes: dict[int, dict[str, Any]] = {i: {} for i in self.world.silos}
        self.t1 = b""

    def run(self) -> dict[str, Any]:
        world, scenario = self.world, self.scenario
        self._step(coordinator.Advertising)
        self._step(coordinator.Sharing)
        self._step(coordinator.Collecting, without=scenario.late)
        if scenario.abort:
            world.feed(Cancel("a person said so"))
            self._step(coordinator.Aborting)
        else:
            if scenario.late:
                world.feed(Deadline())
            self._step(coordinator.Confirming)
            self._step(coordinator.Unmasking, without=scenario.silent)
        return self._written()

    def _step(
        self, state: type[coordinator.CoordinatorState], without: tuple[int, ...] = ()
    ) -> None:
        assert isinstance(self.world.session, state)
        for i, site in self.world.silos.items():
            request = None if i in without else self.world.session.request_for(i)
            if request is None:
                continue
            before = site.state
            if isinstance(request, Adverts):
                self._note_secrets(i, before, request)
            if isinstance(request, Headers):
                self._note_masks(i, before, request)
            for sent in site.deliver(request):
                self._note_sent(i, sent)
                self.world.feed(Received(sent.message, sent.parcels))

    def _note_secrets(self, i: int, state: Any, request: Adverts) -> None:
        ctx = self.world.session.context.digest
        self.t1 = transcript("T1", ctx, request.messages)
        draw = stream(self.scenario.name, i)
        draw(96)  # identity key, ledger key, input
        draws = {"r": draw(32), "b": draw(32), "mailbox_seed": draw(32)}
        note = self.notes[i]
        note |= {key: value.hex() for key, value in draws.items()}
        note["advert"] = packed(state.advert.encode())
        t, members = self.world.roster.threshold, [m.sender for m in request.messages]
        for kind in ("b", "r"):
            shares = shamir.split(Secret(draws[kind]), t, members, draw)
            note[f"shares_{kind}"] = {str(j): s.reveal().hex() for j, s in shares.items()}
        note["pair_seeds"] = {
            str(j): keys.pair_seed(Secret(draws["r"]), ctx, self.t1, i, j).reveal().hex()
            for j in members
            if j > i
        }

    def _note_masks(self, i: int, state: Any, request: Headers) -> None:
        """The state machine itself derives the keys; its `MaskInput` is noted."""
        after, (effect,) = replace(
            state, r=Secret(state.r.reveal()), b=Secret(state.b.reveal())
        ).handle(request)
        others = [m.sender for m in request.messages if m.sender != i]
        own, *pairs = effect.keys
        self.notes[i]["self_mask_key"] = own.key.reveal().hex()
        self.notes[i]["pair_mask_keys"] = {
            str(j): mask.key.reveal().hex() for j, mask in zip(others, pairs, strict=True)
        }
        assert isinstance(after, silo.SiloState)

    def _note_sent(self, i: int, sent: Send) -> None:
        note, message = self.notes[i], sent.message
        note[message.step.name.lower()] = packed(message.encode())
        if message.step is Step.SHARE:
            note["parcels"] = {
                str(j): {"mailbox": packed(p.mailbox), "seed": packed(p.seed)}
                for j, p in sorted(sent.parcels.items())
            }
        if message.step is Step.MASKED_INPUT:
            upload = self.world.silos[i].upload
            assert upload is not None
            note["masked"] = upload.tobytes().hex()

    def _written(self) -> dict[str, Any]:
        world, context = self.world, self.world.session.context
        assert isinstance(world.session, coordinator.Summed | coordinator.Aborted)
        certificate = world.session.certificate
        silos = []
        for i, site in world.silos.items():
            fixed = {
                "index": i,
                "identity_seed": site.party.identity.private_bytes_raw().hex(),
                "input": site.vector.tobytes().hex(),
            }
            silos.append(fixed | self.notes[i])
        t2 = (
            next(
                entry.t2
                for site in world.silos.values()
                for entry in site.disk
                if hasattr(entry, "t2")
            )
            if certificate.is_sum
            else b""
        )
        return {
            "label": LABEL.decode(),
            "name": self.scenario.name,
            "entropy": "silo i draws from SHAKE-256('concilium vector/' || name || '/' || i)",
            "roster": world.roster.encode().hex(),
            "roster_digest": world.roster.digest.hex(),
            "fingerprint": world.roster.fingerprint,
            "context": context.encode().hex(),
            "ctx": context.digest.hex(),
            "t1": self.t1.hex(),
            "t2": t2.hex(),
            "survivors": list(certificate.survivors),
            "sum": "" if world.sum is None else world.sum.tobytes().hex(),
            "certificate": packed(certificate.encode()),
            "silos": silos,
        }


def packed(value: bytes) -> str:
    """Messages, ciphertexts and certificates: base64."""
    return b64encode(value).decode()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for scenario in SCENARIOS:
        write(scenario.name, Recorder(scenario).run())
    from tests.vectors.invalid import cases

    write("invalid", cases())


def write(name: str, content: object) -> None:
    (FOLDER / f"{name}.json").write_text(text_of(content), "utf-8")


def text_of(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    main()
