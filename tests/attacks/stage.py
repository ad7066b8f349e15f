"""What an attack needs: one real agent, the other silos of its roster, and the coordinator's state.

The agent under attack is `silo.agent.run` as it runs in production, with its files and its log. The
other silos are `secagg.silo` with their identity keys, so that whatever a coordinator in league
with them could relay can be made. The coordinator's side of the protocol is `secagg.coordinator`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.wire import parcels_of, task_of
from protos.v1 import coordination_pb2 as pb
from secagg import coordinator, silo
from secagg.certificate import Certificate
from secagg.context import NO_HASH, SessionContext
from secagg.errors import Reason
from secagg.events import Deadline, Received, Settle, SiloEvent, Unveil
from secagg.ledger import Entry, decode_entry
from secagg.masking import DTYPES, apply_masks
from secagg.messages import Abort, Signed, Step
from secagg.primitives import Secret
from secagg.roster import Member, Roster
from silo import agent
from silo.home import SiloHome, StudyHome
from silo.log import configure_logging
from study.plan import Plan, load_plan
from study.quantity import RoundWork, Work, encode_work, session_context
from tests.attacks.liar import Liar, Said
from tests.secagg.world import SiloWorld

NAMES = ("east", "north", "south", "west", "zenith")
ME = 3
"""The index of the agent under attack, `south`: it deals to some and is dealt to by others."""
OTHERS = tuple(i for i in range(1, 6) if i != ME)
STUDY = "trial"
E = TypeVar("E", bound=SiloEvent)


class Agent:
    """The agent of a home, in this process: it can be stopped and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        configure_logging(self.home / "agent.log")
        self._running = asyncio.create_task(agent.run(self.home))

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
            self._running = None

    @property
    def study(self) -> StudyHome:
        return SiloHome(self.home).study(STUDY)

    def log(self) -> list[dict[str, Any]]:
        text = (self.home / "agent.log").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def ledger(self) -> bytes:
        return self.study.ledger.read_bytes()


@dataclass
class Federation:
    """Roster and plan, and the keys of all silos but the one under attack."""

    plan: Plan
    roster: Roster
    identities: dict[int, Ed25519PrivateKey]

    @classmethod
    def make(cls, plan: Plan, identity: bytes, names: Sequence[str] = NAMES) -> Federation:
        keys = {i: Ed25519PrivateKey.generate() for i in range(1, len(names) + 1) if i != ME}
        members = tuple(
            Member(name, keys[i].public_key().public_bytes_raw() if i in keys else identity)
            for i, name in enumerate(names, start=1)
        )
        quorum = plan.validate_roster(len(names))
        roster = Roster(STUDY, 1, quorum.threshold, quorum.colluders, members)
        return cls(plan, roster, keys)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "plan.toml").write_text(self.plan.toml())
        (folder / "roster").write_bytes(self.roster.encode())
        for i, key in self.identities.items():
            (folder / f"{i}.key").write_bytes(key.private_bytes_raw())

    @classmethod
    def load(cls, folder: Path) -> Federation:
        keys = {
            int(path.stem): Ed25519PrivateKey.from_private_bytes(path.read_bytes())
            for path in folder.glob("*.key")
        }
        roster = Roster.decode((folder / "roster").read_bytes())
        return cls(load_plan((folder / "plan.toml").read_text()), roster, keys)

    def offer(self, roster: Roster | None = None) -> pb.Task:
        return pb.Task(
            study=STUDY,
            offer=pb.Offer(plan=self.plan.toml(), roster=(roster or self.roster).encode()),
        )


@dataclass
class Stage:
    """A session under way: who it is with, and what everybody has said in it."""

    liar: Liar
    victim: Agent
    federation: Federation
    number: int
    """Of the last session."""
    previous: bytes = NO_HASH
    peers: dict[int, SiloWorld] = field(default_factory=dict)
    session: coordinator.CoordinatorState = field(init=False)
    work: Work = field(init=False)
    inputs: dict[int, bytes] = field(default_factory=dict)
    """The masked vector of each silo, as it was uploaded."""
    sum: bytes = b""
    artifacts: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        for i, key in self.federation.identities.items():
            party = silo.SiloParty(self.roster, i, key, Secret(os.urandom(32)), os.urandom)
            nothing = np.zeros(0, np.uint8)
            self.peers[i] = SiloWorld(party, silo.start(party), nothing)

    @property
    def roster(self) -> Roster:
        return self.federation.roster

    @property
    def ctx(self) -> bytes:
        return self.session.context.digest

    async def restart(self) -> None:
        """The agent ends and begins again, with what it had on disk."""
        await self.victim.stop()
        await self.liar.alone()
        await self.victim.start()

    def context(self, work: Work, round: int = 1, **changes: Any) -> SessionContext:
        """The context that honest silos compute; the next session's, unless changed."""
        values: dict[str, Any] = {"session": self.number + 1, "round": round}
        values |= {"previous": self.previous, **changes}
        plan = self.federation.plan
        return session_context(self.roster, plan.digest(), plan.secure_sum.ring, work, **values)

    def open(self, work: Work, round: int = 1, **changes: Any) -> SessionContext:
        """A new session at the coordinator; no silo has heard of it yet."""
        context = self.context(work, round, **changes)
        self.session = coordinator.open_session(self.roster, context)
        self.work, self.number = work, context.session
        self.artifacts = [context.model] if isinstance(work, RoundWork) else []
        self.inputs.clear()
        dtype = DTYPES[context.ring]
        for peer in self.peers.values():
            drawn = np.random.default_rng(peer.party.index).bytes(context.vector_bytes)
            peer.vector = np.frombuffer(drawn, dtype)
        return context

    def task(self, request: SiloEvent) -> pb.Task:
        if isinstance(request, Settle):
            outcome = pb.Outcome(certificate=request.certificate.encode())
            return pb.Task(study=STUDY, session=self.number, outcome=outcome)
        work = encode_work(self.work)
        return task_of(STUDY, self.number, request, work, self.artifacts, "")

    async def ask(self, request: SiloEvent) -> Said:
        """What the agent under attack says to a request of this session."""
        return await self.liar.ask(self.task(request))

    async def step(self, *skip: int) -> None:
        """Everybody who is asked something now, but those in `skip`, answers it honestly."""
        asked = [i for i in self.roster.indices if i not in skip]
        requests = {i: self.session.request_for(i) for i in asked}
        for index, request in requests.items():
            if request is not None and not self.session.over:
                await self.answer(index, request)

    async def answer(self, index: int, request: SiloEvent) -> None:
        """One silo answers, and the coordinator takes it."""
        if index == ME:
            said = await self.ask(request)
            assert said.refusals == []
            if said.uploaded:
                self.inputs[ME] = bytes(said.uploaded)
            for submitted in said.submitted:
                message = Signed.decode(submitted.signed)
                self.feed(Received(message, parcels_of(submitted.parcels)))
            return
        peer = self.peers[index]
        for sent in peer.deliver(request):
            if sent.message.step is Step.MASKED_INPUT and peer.upload is not None:
                self.inputs[index] = peer.upload.tobytes()
            self.feed(Received(sent.message, sent.parcels))

    def feed(self, event: Received | Deadline) -> None:
        self.session, effects = self.session.handle(event)
        for effect in effects:
            if isinstance(effect, Unveil):
                context = self.session.context
                total = np.zeros(context.length, DTYPES[context.ring])
                for i in effect.survivors:
                    total += np.frombuffer(self.inputs[i], total.dtype)
                apply_masks(total, effect.keys)
                self.sum = total.tobytes()

    async def until(self, phase: type[coordinator.CoordinatorState], *absent: int) -> None:
        """Honest steps until the coordinator is in `phase`, without the silos in `absent`."""
        while not isinstance(self.session, phase):
            before = self.session
            await self.step(*absent)
            if self.session is before:
                self.feed(Deadline())

    async def settle(self) -> Certificate:
        """The certificate goes to everybody."""
        assert isinstance(self.session, coordinator.Summed)
        certificate = self.session.certificate
        said = await self.ask(Settle(certificate))
        assert said.refusals == []
        for peer in self.peers.values():
            peer.deliver(Settle(certificate))
        self.previous = certificate.digest
        return certificate

    def request(self, kind: type[E], index: int = ME) -> E:
        """What an honest coordinator asks of a silo now."""
        request = self.session.request_for(index)
        assert isinstance(request, kind)
        return request

    def sign(self, index: int, step: Step, body: bytes, ctx: bytes | None = None) -> Signed:
        """A message of a silo that is in league with the coordinator."""
        return Signed.by(self.federation.identities[index], step, index, ctx or self.ctx, body)

    def abort(self, index: int, ctx: bytes | None = None) -> Signed:
        return self.sign(index, Step.ABORT, Abort(self.roster.digest).encode(), ctx)

    def entries(self) -> list[Entry]:
        """What the agent's ledger holds, read from the file."""
        content, at, found = self.victim.ledger(), len(b"concilium ledger 1\n"), []
        while at < len(content):
            length = int.from_bytes(content[at : at + 4], "big")
            found.append(decode_entry(content[at + 8 : at + 8 + length]))
            at += 8 + length + 32
        return found

    async def refuses(
        self, asked: SiloEvent | pb.Task, reason: Reason | str, *, again: bool = False
    ) -> None:
        """The three things that every attack has to meet with: nothing left the silo and nothing
        was promised in its ledger; its own log says why; the coordinator was told.

        `again`: the same was refused before in this session for the same reason, which is told
        once; the log has another line all the same.
        """
        ledger, before = self.victim.ledger(), len(self.victim.log())
        task = asked if isinstance(asked, pb.Task) else self.task(asked)
        said = await self.liar.ask(task)
        words = reason.value if isinstance(reason, Reason) else reason
        assert said.messages == []
        assert not said.uploaded
        assert self.victim.ledger() == ledger
        assert [session for session, _ in said.refusals] == [task.session] * (not again)
        assert all(words in told for _, told in said.refusals)
        lines = [line for line in self.victim.log()[before:] if words in line.get("reason", "")]
        events = ["not answered"] if again else ["refused", "not answered"]
        assert [line["event"] for line in lines] == events

    async def harmless(self, asked: SiloEvent) -> None:
        """The session goes on as if the attack had not been: the silo's state is as it was."""
        await self.answer(ME, asked)

    def shares_of(self, said: Said) -> set[tuple[str, int]]:
        """Whose shares of which secret an UNMASK gave away."""
        from secagg.messages import Unmask

        found: set[tuple[str, int]] = set()
        for message in said.messages:
            if message.step is Step.UNMASK:
                unmask = Unmask.decode(message.body)
                found |= {("b", owner) for owner, _ in unmask.shares_b}
                found |= {("r", owner) for owner, _ in unmask.shares_r}
        return found


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def keep_logging() -> Any:
    """What `configure_logging` changes in this process, to be put back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level

    def put_back() -> None:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()

    return put_back
