"""Silos and a coordinator in one process, joined by nothing but events: the tests drive it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator, silo
from secagg.context import NO_HASH, Quantity, SessionContext
from secagg.events import (
    CoordinatorEvent,
    Deadline,
    Ended,
    InputMasked,
    MaskInput,
    Received,
    Record,
    Send,
    Settle,
    SiloEvent,
    Unveil,
)
from secagg.ledger import Entry, History
from secagg.masking import DTYPES, MaskKey, Vector, apply_masks
from secagg.primitives import Secret, digest
from secagg.roster import Member, Roster, default_threshold, largest_colluders

Entropy = Callable[[int], bytes]


def make_roster(
    n: int, threshold: int | None = None, colluders: int | None = None
) -> tuple[Roster, list[Ed25519PrivateKey]]:
    keys = [Ed25519PrivateKey.generate() for _ in range(n)]
    t = threshold or default_threshold(n)
    c = largest_colluders(n, t) if colluders is None else colluders
    members = tuple(
        Member(f"site-{i:03d}", key.public_key().public_bytes_raw())
        for i, key in enumerate(keys, start=1)
    )
    return Roster("trial", 1, t, c, members), keys


def make_context(roster: Roster, /, **changes: object) -> SessionContext:
    values: dict[str, object] = {
        "study": roster.study,
        "epoch": roster.epoch,
        "roster": roster.digest,
        "silos": roster.size,
        "threshold": roster.threshold,
        "colluders": roster.colluders,
        "session": 1,
        "quantity": Quantity("round", 1),
        "plan": digest("test", b"plan"),
        "model": digest("test", b"model"),
        "ring": 16,
        "length": 1000,
        "encoding": digest("test", b"encoding"),
    }
    values |= changes
    quantity = values["quantity"]
    if isinstance(quantity, Quantity) and quantity.purpose != "round" and "model" not in changes:
        values["model"] = NO_HASH
    return SessionContext(**values)  # type: ignore[arg-type]


@dataclass
class SiloWorld:
    """One silo: its state, its ledger on 'disk', the vector it would sum and the upload it made."""

    party: silo.SiloParty
    state: silo.SiloState
    vector: Vector
    disk: list[Entry] = field(default_factory=list)
    upload: Vector | None = None
    alive: bool = True
    mask_keys: list[bytes] = field(default_factory=list)

    def deliver(self, event: SiloEvent) -> list[Send]:
        """Handle an event and carry out its effects; returns what is to be sent, in order."""
        self.state, effects = self.state.handle(event)
        sent: list[Send] = []
        for effect in effects:
            match effect:
                case Record(entry):
                    self.disk.append(entry)
                case Send():
                    sent.append(effect)
                case MaskInput(keys):
                    sent += self._mask(keys)
        return sent

    def _mask(self, keys: Sequence[MaskKey]) -> list[Send]:
        self.mask_keys += [mask.key.reveal() for mask in keys]
        masked = self.vector.copy()
        apply_masks(masked, keys)
        self.upload = masked
        return self.deliver(InputMasked(hashlib.sha256(masked.tobytes()).digest(), masked.nbytes))

    def restart(self) -> None:
        """What a crash leaves: the ledger."""
        self.state = silo.resume(self.party, History.of(self.disk))
        self.alive = True


@dataclass
class World:
    """A roster of silos and one coordinator session over them."""

    roster: Roster
    silos: dict[int, SiloWorld]
    session: coordinator.CoordinatorState
    sum: Vector | None = None
    ended: Ended | None = None

    def feed(self, event: CoordinatorEvent) -> None:
        self.session, effects = self.session.handle(event)
        for effect in effects:
            match effect:
                case Unveil(survivors, keys):
                    total = np.zeros(self.session.context.length, DTYPES[self.session.context.ring])
                    for i in survivors:
                        upload = self.silos[i].upload
                        assert upload is not None
                        total += upload
                    apply_masks(total, keys)
                    self.sum = total
                case Ended():
                    self.ended = effect

    def pump(self, only: Callable[[int], bool] = lambda _: True) -> None:
        """Let every living silo answer what it is asked until nothing moves any more."""
        moved = True
        while moved:
            moved = False
            for index, site in self.silos.items():
                request = self.session.request_for(index)
                if request is None or isinstance(request, Settle) or not site.alive:
                    continue
                if not only(index):
                    continue
                for sent in site.deliver(request):
                    self.feed(Received(sent.message, sent.parcels))
                    moved = True

    def settle(self, only: int = 0) -> None:
        """The certificate to everybody who is there, or to one silo."""
        for index, site in self.silos.items():
            if only not in (0, index):
                continue
            request = self.session.request_for(index)
            if site.alive and isinstance(request, Settle):
                site.deliver(request)

    def kill(self, *indices: int) -> None:
        for index in indices:
            self.silos[index].alive = False

    def deadline(self) -> None:
        self.feed(Deadline())

    def expected(self, survivors: Sequence[int]) -> Vector:
        total = np.zeros(self.session.context.length, DTYPES[self.session.context.ring])
        for i in survivors:
            total += self.silos[i].vector
        return total

    def reopen(self, **changes: object) -> None:
        """A new session over the same silos."""
        context = make_context(self.roster, **changes)
        self.session = coordinator.open_session(self.roster, context)
        self.sum = self.ended = None
        for site in self.silos.values():
            site.upload = None

    def run_until(self, phase: type[coordinator.CoordinatorState]) -> None:
        """Let everybody who is there go on until the coordinator is in this state."""
        self.pump(lambda _: not isinstance(self.session, phase))
        assert isinstance(self.session, phase)

    def reserve(self, survivors: tuple[int, ...], ring: int = 8) -> None:
        """A sum of tags over `survivors`, and the session of images that it is for."""
        self.reopen(quantity=Quantity("tags", 1), ring=32)
        self.run_until(coordinator.Sharing)
        self.kill(*(i for i in self.silos if i not in survivors))
        for _ in range(3):
            self.pump()
            if not self.session.over:
                self.deadline()
        self.settle()
        for site in self.silos.values():
            site.alive = True
            site.vector = site.vector.astype(DTYPES[ring])
        self.reopen(
            session=2,
            quantity=Quantity("images", 1),
            ring=ring,
            survivors=survivors,
            reservation=digest("test", b"tags"),
        )


def make_world(
    n: int = 4, seed: int = 0, entropy: Entropy = os.urandom, **changes: object
) -> World:
    roster, keys = make_roster(n)
    context = make_context(roster, **changes)
    rng = np.random.default_rng(seed)
    dtype = DTYPES[context.ring]
    silos = {}
    for index, key in enumerate(keys, start=1):
        party = silo.SiloParty(roster, index, key, Secret(os.urandom(32)), entropy)
        vector = np.frombuffer(rng.bytes(context.vector_bytes), dtype)
        silos[index] = SiloWorld(party, silo.start(party), vector)
    return World(roster, silos, coordinator.open_session(roster, context))
