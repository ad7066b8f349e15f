"""How the deltas of a simulated round become one: averaged as they are, or by the secure sum.

`SecureSum` runs the real parties of `secagg`, coordinator and silos, in this process: the states,
signatures, key transport and masks of the service, with function calls in place of the network.
The roundings of the encoding are drawn from the simulation's seed, so the sum is the same each time
although the keys are not: masks cancel.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator, silo
from secagg.context import NO_HASH
from secagg.events import (
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
from secagg.masking import DTYPES, Vector, apply_masks
from secagg.primitives import Secret
from secagg.roster import Member, Roster
from secagg.silo import SiloParty, SiloState
from study.plan import Plan
from study.quantity import Work, session_context


class SumFailed(Exception):
    """A session among parties that are all honest and alive ended without a sum: a defect."""


@dataclass
class _Silo:
    state: SiloState
    vector: Vector
    masked: Vector | None = None

    def deliver(self, event: SiloEvent) -> list[Send]:
        self.state, effects = self.state.handle(event)
        sent: list[Send] = []
        for effect in effects:
            match effect:
                case Record():
                    pass  # no ledger survives the process, and nothing here is secret
                case Send():
                    sent.append(effect)
                case MaskInput(keys):
                    self.masked = self.vector.copy()
                    apply_masks(self.masked, keys)
                    content = self.masked.tobytes()
                    digest = hashlib.sha256(content).digest()
                    sent += self.deliver(InputMasked(digest, len(content)))
        return sent


@dataclass
class SecureSum:
    """The secure sums of one simulated study, over all of its silos."""

    plan: Plan
    names: Sequence[str]

    def __post_init__(self) -> None:
        keys = [Ed25519PrivateKey.generate() for _ in self.names]
        quorum = self.plan.validate_roster(len(self.names))
        members = tuple(
            Member(name, key.public_key().public_bytes_raw())
            for name, key in zip(self.names, keys, strict=True)
        )
        self.roster = Roster(self.plan.study.name, 1, *quorum, members)
        self._parties = {
            index: silo.start(
                SiloParty(self.roster, index, key, Secret(os.urandom(32)), os.urandom)
            )
            for index, key in zip(self.roster.indices, keys, strict=True)
        }
        self._session, self._previous = 0, NO_HASH

    def sum(
        self,
        work: Work,
        round: int,
        vectors: Mapping[int, Vector],
        *,
        model: bytes = NO_HASH,
        reservation: bytes = NO_HASH,
        survivors: tuple[int, ...] = (),
    ) -> Vector:
        """Σ of the vectors, one per roster index, in the ring that the work has."""
        self._session += 1
        context = session_context(
            self.roster,
            self.plan.digest(),
            self.plan.secure_sum.ring,
            work,
            session=self._session,
            round=round,
            model=model,
            reservation=reservation,
            survivors=survivors,
            previous=self._previous,
        )
        silos = {i: _Silo(self._parties[i], vectors[i]) for i in self.roster.indices}
        session, total = _drive(coordinator.open_session(self.roster, context), silos)
        for index, party in silos.items():
            request = session.request_for(index)
            if isinstance(request, Settle):
                party.deliver(request)
                self._previous = request.certificate.digest
            self._parties[index] = party.state
        return total


def _drive(
    session: coordinator.CoordinatorState, silos: Mapping[int, _Silo]
) -> tuple[coordinator.CoordinatorState, Vector]:
    """Let everyone answer until the sum is there."""
    total: Vector | None = None
    moved = True
    while moved:
        moved = False
        for index, party in silos.items():
            request = session.request_for(index)
            if request is None or isinstance(request, Settle):
                continue
            for sent in party.deliver(request):
                session, effects = session.handle(Received(sent.message, sent.parcels))
                moved = True
                for effect in effects:
                    match effect:
                        case Unveil():
                            total = _unveil(session, effect, silos)
                        case Ended(why):
                            raise SumFailed(why)
    if total is None:
        raise SumFailed(f"the session stopped in {type(session).__name__}")
    return session, total


def _unveil(
    session: coordinator.CoordinatorState, effect: Unveil, silos: Mapping[int, _Silo]
) -> Vector:
    total = np.zeros(session.context.length, DTYPES[session.context.ring])
    for index in effect.survivors:
        masked = silos[index].masked
        if masked is None:
            raise SumFailed(f"silo {index} survived without an input")
        total += masked
    apply_masks(total, effect.keys)
    return total
