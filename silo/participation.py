"""One study at this site, from its acceptance to its end: ask for the next task, answer it.

Nothing here has to survive a crash: the ledger, the vectors and the certificates do, and the
coordinator asks again for whatever it did not get.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import structlog

from protos.v1 import coordination_pb2 as pb
from secagg.certificate import Certificate
from secagg.context import Quantity, SessionContext
from secagg.errors import MalformedMessage, Refused, UnexpectedEvent
from secagg.events import (
    Open,
    Send,
    Settle,
)
from secagg.ledger import History
from secagg.messages import MaskedInput, Step
from secagg.silo import SiloParty
from silo import failpoints
from silo.client import Client
from silo.config import SiloConfig
from silo.errors import (
    DataError,
    ProposalRefused,
    RefusedByCoordinator,
    SessionOver,
    WorkFailed,
)
from silo.files import read_json, write_json
from silo.heads import Heads, LogRewritten
from silo.home import StudyHome
from silo.ledger import LedgerFile
from silo.model_size import parameter_count
from silo.offers import Terms, newer_offer
from silo.orders import PublishModel
from silo.outcomes import Outcomes
from silo.pins import Pins
from silo.proposal import Artifact, Pinned, Proposal, check_open
from silo.protocol import Protocol
from silo.quantities import Quantities
from silo.status import Status
from silo.wire import event_of, submission_of
from silo.worker import Progress, Worker
from study.memory import give_back

_WAIT_SECONDS = 20
_LOOK_SECONDS = 5.0
_LONGEST_REASON = 500
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 15.0
# What no honest coordinator asks of this site.
_REFUSED = (Refused, ProposalRefused, UnexpectedEvent, MalformedMessage)
# What may be different the next time: a session that is over, a full disk.
_PASSING = (RefusedByCoordinator, SessionOver, OSError)
_MOST_REFUSALS = 1000
# Each takes an entry of the ledger here, and costs whoever proposes it nothing.
_MOST_SESSIONS = 1 << 16
_POINTS = {
    Step.ADVERTISE: "after-advertise",
    Step.SHARE: "after-share",
    Step.MASKED_INPUT: "after-upload",
    Step.CONFIRM: "after-confirm",
}


@dataclass(frozen=True)
class Tools:
    """What every study of this agent uses."""

    client: Client
    worker: Worker
    status: Status
    config: SiloConfig
    heads: Heads


class Participation:
    """This site's part in one study."""

    def __init__(
        self, tools: Tools, study: StudyHome, terms: Terms, party: SiloParty, quantities: Quantities
    ) -> None:
        """Raises LedgerError where the study's ledger is in use or damaged."""
        self._tools, self._study, self.terms, self._party = tools, study, terms, party
        self._quantities = quantities
        self._ledger = LedgerFile(study.ledger, study.name)
        self._protocol = Protocol(party, self._ledger, study.masked, study.shares_key)
        self._outcomes = Outcomes(study.outcomes(terms.roster.epoch))
        self._pins = Pins(study, terms.roster.epoch)
        self._delay = _FIRST_DELAY
        self._reports: set[asyncio.Task[None]] = set()
        self._refused: set[tuple[int, str]] = set()
        self._log = structlog.get_logger(__name__).bind(study=study.name)

    @property
    def in_doubt(self) -> bool:
        """Whether a masked input of this site is in a session that nothing proves the end of."""
        return bool(self._protocol.history.in_doubt)

    async def run(self) -> None:
        """Until the study has ended, or this site has left it."""
        self._show(state="running", title=self.terms.plan.study.title, trouble=None)
        try:
            while not self._study.ended.exists():
                await self._once()
        finally:
            self._protocol.close()
        self._show(state="ended", phase="", activity=self._doubt())

    def _doubt(self) -> str:
        """What a person should know of a study that is over."""
        numbers = [str(r.context.session) for r in self._protocol.history.in_doubt]
        return f"nothing proved how session {', '.join(numbers)} ended" if numbers else ""

    async def _once(self) -> None:
        """One task. What went wrong is told to whoever has to act, and asked for again later."""
        task = None
        try:
            if self._study.leave.exists() and not self.in_doubt:
                return await self._leave()
            task = await self._next_task(_WAIT_SECONDS)
            await self._answer(task)
        except _REFUSED as error:
            await self._refuse(task, error, str(error))
        except (DataError, WorkFailed) as error:
            # The text may hold paths and file names; it stays in this site's own log.
            await self._refuse(task, error, "this site could not compute its contribution")
        except _PASSING as error:
            await self._wait_after(error)
        else:
            self._delay = _FIRST_DELAY

    async def _next_task(self, wait: int) -> pb.Task:
        name, epoch = self._study.name, self.terms.roster.epoch
        return await self._tools.client.next_task(name, self._outcomes.settled, wait, epoch)

    async def _leave(self) -> None:
        """Tell the study centre, then end. What is in doubt was settled first: the others' sum may
        need this site, and a later study could otherwise never know."""
        stored = read_json(self._study.leave) or {}
        await self._tools.client.leave_study(self._study.name, str(stored.get("reason", "")))
        self._log.info("left the study")
        await asyncio.to_thread(self._quantities.end)
        write_json(self._study.ended, {"reason": "left", "model": ""})

    async def _refuse(self, task: pb.Task | None, error: Exception, reason: str) -> None:
        """Into this site's log and to the study centre, once for each session and reason: a
        second attempt of another kind in the same session is not to be lost behind the first."""
        key = (task.session, str(error)) if task is not None else (0, "")
        if task is not None and task.session and key not in self._refused:
            if len(self._refused) >= _MOST_REFUSALS:
                self._refused.clear()
            self._refused.add(key)
            self._log.error(
                "refused", session=task.session, task=task.WhichOneof("task"), reason=str(error)
            )
            try:
                said = "".join(c for c in reason if c.isprintable())[:_LONGEST_REASON]
                await self._tools.client.report_refusal(self._study.name, task.session, said)
            except RefusedByCoordinator as answer:
                self._log.warning("refusal not taken", reason=str(answer))
        await self._wait_after(error)

    async def _wait_after(self, error: Exception) -> None:
        self._show(trouble=str(error))
        self._log.warning("not answered", error=type(error).__name__, reason=str(error))
        await asyncio.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)

    async def _answer(self, task: pb.Task) -> None:
        kind = task.WhichOneof("task")
        match kind:
            case None | "idle":
                self._show(phase="waiting", activity="", step=0, steps=0)
            case "ended":
                await self._end(task.ended)
            case "open":
                await self._open(task)
            case "outcome":
                await self._settle(task)
            case _:
                self._show(session=task.session, phase=kind, activity="", trouble=None)
                sends = await asyncio.to_thread(self._protocol.handle, event_of(task))
                await self._send(task, sends)

    async def _open(self, task: pb.Task) -> None:
        """Step 0: check, prepare, advertise. Nothing is promised before the vector is there."""
        under_way = self._protocol.session
        if under_way is not None and under_way.encode() == task.open.context:
            sends = await asyncio.to_thread(self._protocol.handle, Open(under_way))
            return await self._send(task, sends)
        self._check_consent()
        if len(self._protocol.history.sessions) >= _MOST_SESSIONS:
            raise ProposalRefused(f"this site has opened {_MOST_SESSIONS} sessions of the study")
        proposal = check_open(task.session, task.open, self._pinned())
        self._protocol.history.check_open(proposal.context)
        context = proposal.context
        self._pins.keep(proposal)
        self._show(
            session=context.session, quantity=str(context.quantity), phase="open", trouble=None
        )
        vector = await self._while_wanted(task.session, self._prepare(proposal))
        await self._send(task, await asyncio.to_thread(self._protocol.open, context, vector))

    async def _prepare(self, proposal: Proposal) -> Path:
        """The files that the work needs, then the vector."""
        wanted = {artifact.sha256.hex() for artifact in proposal.artifacts}
        self._quantities.forget_artifacts(wanted)
        if wanted:
            self._show(activity="fetching")
        return await self._quantities.prepare(
            proposal,
            self.terms.roster,
            [await self._fetch(artifact) for artifact in proposal.artifacts],
            lambda progress: self._report(proposal.context, progress),
        )

    def _check_consent(self) -> None:
        """Nothing new is begun once a person wants to leave, or has yet to see a later roster."""
        if self._study.leave.exists():
            raise ProposalRefused("this site leaves the study")
        newer = newer_offer(self._study, self.terms)
        if newer is not None:
            raise ProposalRefused(
                f"roster {newer.roster.epoch} was offered, roster {self.terms.roster.epoch} is "
                "pinned: this site takes part again when a person has accepted the new one"
            )

    async def _while_wanted(self, session: int, prepared: Coroutine[None, None, Path]) -> Path:
        """The vector; raises SessionOver when the coordinator goes on without waiting for it.

        Hours of training for a session that is over would make this site late for the next, and so
        would a download; nor does a person who wants to leave have to wait for either.
        """
        work = asyncio.ensure_future(prepared)
        over = asyncio.ensure_future(self._until_over(session))
        try:
            await asyncio.wait({work, over}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                why = "this site leaves" if self._study.leave.exists() else "it went on without it"
                raise SessionOver(f"session {session}: the contribution was dropped: {why}")
            return work.result()
        finally:
            for task in (work, over):
                task.cancel()
            await asyncio.gather(work, over, return_exceptions=True)

    async def _until_over(self, session: int) -> None:
        """Returns when the coordinator has twice in a row wanted something else of this site (once
        can be a coordinator that has just started), or this site leaves."""
        misses = 0
        while misses < 2 and not self._study.leave.exists():
            await asyncio.sleep(_LOOK_SECONDS)
            task = await self._next_task(0)
            wanted = task.session == session and task.WhichOneof("task") == "open"
            misses = 0 if wanted else misses + 1

    def _pinned(self) -> Pinned:
        policy = self._tools.config.policy
        withheld: set[str] = set()
        if not policy.auxiliary_samples:
            withheld |= {"tags", "images"}
        shares = self.terms.plan.strategy.local_rules().auxiliary_share > 0.0
        if shares and not policy.auxiliary_among_sites:
            # Accepted under another policy: nothing more of it, whoever else joins.
            withheld |= {"tags", "images", "round"}
        return Pinned(
            self.terms.plan,
            self.terms.roster,
            tuple(p for p in policy.purposes if p not in withheld),
            self._outcomes.previous,
            self._counted(),
            self._pins.total,
            self._outcomes.tags(self._protocol.history),
            any(quantity.purpose == "images" for quantity in self._summed()),
            self._pins.shared,
        )

    def _counted(self) -> bool:
        return Quantity("census", self.terms.roster.epoch) in self._summed()

    def _summed(self) -> set[Quantity]:
        """What this site is in a sum of."""
        records = self._protocol.history.sessions.values()
        return {r.context.quantity for r in records if r.settled and r.settled.included}

    async def _fetch(self, artifact: Artifact) -> Path:
        target = self._study.artifact(artifact.sha256)
        await self._tools.client.download(
            self._study.name, artifact.sha256, target, at_most=artifact.size
        )
        if (size := target.stat().st_size) != artifact.size:
            raise ProposalRefused(
                f"artifact {artifact.sha256.hex()} has {size} bytes, the plan says {artifact.size}"
            )
        return target

    async def _send(self, task: pb.Task, sends: list[Send]) -> None:
        """Hand in messages; before the masked input's, the vector that it speaks of."""
        context = self._protocol.session
        for send in sends:
            if send.message.step is Step.MASKED_INPUT and context is not None:
                self._show(activity="uploading")
                path = self._protocol.masked_vector(context)
                digest = MaskedInput.decode(send.message.body).vector
                await self._tools.client.upload(self._study.name, task.session, path, digest)
            await self._tools.client.submit(submission_of(task, send))
            if context is not None and send.message.step in _POINTS:
                failpoints.reach(_POINTS[send.message.step], context.quantity)

    async def _settle(self, task: pb.Task) -> None:
        """A certificate: verified, recorded, its consequences drawn; then it counts as settled."""
        certificate = Certificate.decode(task.outcome.certificate)
        record = await asyncio.to_thread(self._protocol.settle, Settle(certificate))
        if record is None and self._protocol.opened(task.session):
            raise ProposalRefused(
                f"the certificate is of another session {task.session} than this site's: "
                "views were split"
            )
        if record is not None:
            if record.context.session != task.session:
                raise ProposalRefused(f"the certificate of session {record.context.session}")
            await asyncio.to_thread(self._quantities.settle, record)
        self._outcomes.add(task.session, certificate)
        how = "summed" if certificate.is_sum else "aborted"
        names = self.terms.roster.names(certificate.survivors)
        self._log.info("session settled", session=task.session, outcome=how, survivors=names)
        self._show(session=task.session, phase=how, activity="")
        if task.outcome.HasField("log"):
            await self._countersign(task.outcome.log)
        await asyncio.to_thread(give_back)

    async def _countersign(self, log: pb.LogHead) -> None:
        """Vouch for the audit log as it was when the session ended. One that is missed, since this
        process ends here for example, is covered by the next."""
        try:
            sign = self._tools.heads.sign
            head = await asyncio.to_thread(sign, log.place, log.digest.hex())
            request = pb.CountersignRequest(
                study=self._study.name, log=log, signature=bytes.fromhex(head.signature)
            )
            await self._tools.client.countersign(request)
        except (LogRewritten, RefusedByCoordinator) as error:
            self._log.error("audit log not countersigned", reason=str(error))
            self._show(trouble=str(error))

    async def _end(self, ended: pb.StudyEnded) -> None:
        reason = pb.StudyEnded.Reason.Name(ended.reason).lower()
        if ended.model:
            await self._publish(ended.model)
        await asyncio.to_thread(self._quantities.end)
        self._log.info("study ended", reason=reason)
        write_json(self._study.ended, {"reason": reason, "model": ended.model.hex()})

    async def _publish(self, digest: bytes) -> None:
        target = self._study.artifact(digest)
        size = 4 * parameter_count(self.terms.plan.model)
        await self._tools.client.download(self._study.name, digest, target, at_most=size)
        order = PublishModel(
            self._tools.worker.machine, self.terms.plan.toml(), target, self._study.model
        )
        progress = self._study.work / "progress"
        await self._tools.worker.run(order, progress, lambda _: None)

    def _report(self, context: SessionContext, progress: Progress) -> None:
        self._show(activity=progress.activity, step=progress.step, steps=progress.steps)
        request = pb.ReportProgressRequest(
            study=self._study.name,
            session=context.session,
            activity=progress.activity,
            step=progress.step,
            steps=progress.steps,
        )
        report = asyncio.create_task(self._tools.client.report_progress(request))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    def _show(self, **values: object) -> None:
        self._tools.status.study(self._study.name, **values)


def in_doubt(study: StudyHome) -> bool:
    """`Participation.in_doubt` of a study that no agent has open. Raises LedgerError otherwise."""
    ledger = LedgerFile(study.ledger, study.name)
    try:
        return bool(History.of(ledger.entries()).in_doubt)
    finally:
        ledger.close()
