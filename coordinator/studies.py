"""The studies that are under way, as the service sees them: whom to ask what, and who answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import Connection

from coordinator import records
from coordinator.contacts import Bell
from coordinator.records import NoSuchStudy, StudyRow
from coordinator.sessions import Resuming, Session
from coordinator.store import Store
from coordinator.wire import BadRequest, task_of
from protos.v1 import coordination_pb2 as pb
from secagg import coordinator as core
from secagg.errors import Reason, Refused
from secagg.roster import Roster
from study.plan import Plan, load_plan


class Denied(Exception):
    """The caller may not do this; the text says why."""


@dataclass
class LiveStudy:
    """One study: its plan and roster, the session under way, and the bell that tells of changes."""

    row: StudyRow
    plan: Plan
    roster: Roster
    answers: dict[str, bool]
    certified: int
    """The last session that ended with a certificate."""
    last: int
    """The last session that was opened."""
    unfinished: int
    """The session that the store holds as open, or 0."""
    session: Session | None = None
    bell: Bell = field(default_factory=Bell)

    @property
    def id(self) -> str:
        return self.row.id

    @classmethod
    def load(cls, c: Connection, row: StudyRow) -> LiveStudy:
        """Inside `Store.run` or `Store.do`."""
        answers = {site: accepted for site, (accepted, _) in records.answers_of(c, row.id).items()}
        certified, open_now = records.last_certificate(c, row.id), records.live_session(c, row.id)
        return cls(
            row,
            load_plan(row.plan),
            Roster.decode(row.roster),
            answers,
            certified=certified[0] if certified else 0,
            last=records.next_number(c, row.id) - 1,
            unfinished=open_now.number if open_now else 0,
        )

    def index_of(self, site: str) -> int:
        """Raises Denied for a site outside the roster."""
        try:
            return self.roster.index_of(site)
        except KeyError:
            raise Denied(f"site '{site}' is not in the roster of study '{self.id}'") from None

    def session_of(self, number: int) -> Session | None:
        """The session a silo speaks of if it is under way, None if it is over.

        Raises BadRequest for one that there never was, Resuming where it is not known yet.
        """
        live = self.session
        if live is not None and number == live.row.number:
            return None if live.state.over else live
        if number > self.last:
            raise BadRequest(f"study '{self.id}' has no session {number}")
        if number == self.unfinished:
            raise Resuming(f"session {number} is being taken up again after a restart")
        return None

    async def task_for(self, store: Store, site: str, settled: int) -> pb.Task | None:
        """What `site` is to do next, or None where it has to wait."""
        index = self.index_of(site)
        if settled > self.certified:
            why = (
                f"site '{site}' has seen session {settled} end, this store knows of none after "
                f"{self.certified}: it was restored from a backup made before. What was summed "
                "since is lost, and no silo lets it be summed again, so the study cannot go on: "
                "restore a later backup, or stop it and start a new one from its plan"
            )
            await store.do(records.set_error, self.id, why)
            raise Refused(Reason.ROUND_NOT_NEW, why)
        # How earlier sessions ended comes first: a silo joins no new sum while it is in doubt.
        if settled < self.certified:
            found = await store.do(records.certificate_after, self.id, settled)
            if found is not None:
                number, certificate = found
                outcome = pb.Outcome(certificate=certificate)
                return pb.Task(study=self.id, session=number, outcome=outcome)
        live = self.session
        request = None if live is None else live.request_for(index)
        if live is not None and request is not None:
            why = live.state.why if isinstance(live.state, core.Aborting) else ""
            work, artifacts = live.row.work, live.artifacts
            return task_of(self.id, live.row.number, request, work, artifacts, why)
        if self.row.over and (live is None or live.state.over):
            return pb.Task(study=self.id, ended=self._ended())
        return None

    def _ended(self) -> pb.StudyEnded:
        reason = pb.StudyEnded.STOPPED
        if self.row.state == "finished":
            reason = pb.StudyEnded.FINISHED
        return pb.StudyEnded(reason=reason, model=self.row.model or b"")

    def offer_for(self, site: str) -> pb.Task | None:
        """The offer of this study, where `site` is asked and has not answered."""
        if self.row.state != "offered" or site in self.answers:
            return None
        if all(member.name != site for member in self.roster.members):
            return None
        offer = pb.Offer(plan=self.row.plan, roster=self.row.roster)
        return pb.Task(study=self.id, offer=offer)

    async def answer(self, store: Store, site: str, request: pb.AnswerOfferRequest) -> None:
        """Raises Refused for an answer to another plan or roster, or one that comes too late."""
        self.index_of(site)
        given = (request.plan_digest, request.roster_digest)
        if given != (self.plan.digest(), self.roster.digest):
            raise Refused(Reason.ROSTER_MISMATCH, "the answer is to another plan or roster")
        if self.answers.get(site) == request.accepted:
            return
        if self.row.state != "offered":
            raise Refused(
                Reason.ROUND_NOT_NEW, f"study '{self.id}' is {self.row.state}: it is too late"
            )
        await store.do(records.answer, self.id, site, request.accepted, request.rule)
        self.answers[site] = request.accepted
        self.bell.ring()


class Studies:
    """All studies of the coordinator, by id."""

    def __init__(self) -> None:
        self._live: dict[str, LiveStudy] = {}
        self.offers = Bell()
        """Rings when a study is there to be offered, and when a caller must look again."""

    def add(self, live: LiveStudy) -> None:
        self._live[live.id] = live
        self.offers.ring()

    def __contains__(self, name: str) -> bool:
        return name in self._live

    def of(self, name: str) -> LiveStudy:
        return self._live[name]

    def get(self, name: str, site: str) -> LiveStudy:
        """The study, for a site of its roster. Raises NoSuchStudy or Denied; a site outside it
        is told the same, whether there is such a study or not."""
        live = self._live.get(name)
        if live is None:
            raise NoSuchStudy(f"site '{site}' is not in the roster of study '{name}'")
        live.index_of(site)
        return live

    def all(self) -> list[LiveStudy]:
        return list(self._live.values())

    def wake(self) -> None:
        """Let every long poll look again."""
        self.offers.ring()
        for live in self._live.values():
            live.bell.ring()
