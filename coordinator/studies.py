"""The studies that are under way, as the service sees them: whom to ask what, and who answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection

from coordinator import records
from coordinator.contacts import Bell
from coordinator.records import Answer, NoSuchStudy, SessionRow, StudyRow
from coordinator.sessions import Resuming, Session
from coordinator.store import Store
from coordinator.wire import BadRequest, task_of
from protos.v1 import coordination_pb2 as pb
from secagg import coordinator as core
from secagg.errors import Reason, Refused
from secagg.roster import Roster
from study.plan import Plan, load_plan

# People think again, but each answer is an entry of the audit log, which nobody may fill.
_MOST_ANSWERS = 20


class Denied(Exception):
    """The caller may not do this; the text says why."""


@dataclass
class LiveStudy:
    """One study: plan and rosters, the session under way, and the bell that tells of changes."""

    row: StudyRow
    plan: Plan
    rosters: dict[int, Roster]
    """By epoch; the last is the study's now."""
    answers: dict[str, Answer]
    """What the sites said to the offer under this roster."""
    certified: int
    """The last session of this roster that ended with a certificate."""
    last: int
    """The last session that was opened."""
    unfinished: int
    """The session that the store holds as open, or 0."""
    session: Session | None = None
    bell: Bell = field(default_factory=Bell)
    changes: Counter[str] = field(default_factory=Counter)
    """How often each site answered the offer since this process has the study."""
    forgotten: str = ""
    """What a site has seen that this store does not know of."""

    @property
    def id(self) -> str:
        return self.row.id

    @classmethod
    def load(cls, c: Connection, row: StudyRow) -> LiveStudy:
        """Inside `Store.run` or `Store.do`."""
        epoch = Roster.decode(row.roster).epoch
        certified = records.last_certified(c, row.id, epoch)
        open_now = records.live_session(c, row.id)
        return cls(
            row,
            load_plan(row.plan),
            records.rosters_of(c, row.id),
            records.answers_of(c, row.id, epoch),
            certified=certified.number if certified else 0,
            last=records.next_number(c, row.id) - 1,
            unfinished=open_now.number if open_now else 0,
        )

    @property
    def roster(self) -> Roster:
        """The roster of the epoch that the study is in."""
        return self.rosters[max(self.rosters)]

    def enter_epoch(self, row: StudyRow) -> None:
        """The study goes on under the roster of `row`: it is offered anew, and nothing is asked of
        anybody before it was accepted. Its last session has ended."""
        roster = Roster.decode(row.roster)
        if roster.epoch == self.roster.epoch:
            self.row = row
            return
        self.row, self.answers, self.certified, self.session = row, {}, 0, None
        self.changes.clear()
        self.forgotten = ""
        self.rosters[roster.epoch] = roster
        self.bell.ring()

    def operator_wants(self, row: StudyRow) -> None:
        """Take over from a row of the store what the command line writes, and nothing else: the
        row may have been read before the runner's last change."""
        wanted = row.next_roster
        if wanted is not None and Roster.decode(wanted).epoch <= self.roster.epoch:
            wanted = None
        if (self.row.wanted, self.row.next_roster) != (row.wanted, wanted):
            self.row = replace(self.row, wanted=row.wanted, next_roster=wanted)
            self.bell.ring()

    def index_of(self, site: str) -> int:
        """Raises Denied for a site outside the roster."""
        try:
            return self.roster.index_of(site)
        except KeyError:
            raise Denied(f"site '{site}' is not in the roster of study '{self.id}'") from None

    def knows(self, site: str) -> bool:
        """Whether the study was ever offered to `site`."""
        return any(m.name == site for roster in self.rosters.values() for m in roster.members)

    def takes_part(self, index: int) -> bool:
        """Whether the member accepted this roster, and has not left since."""
        return self.takes_part_by_name(self.roster.member(index).name)

    def takes_part_by_name(self, site: str) -> bool:
        said = self.answers.get(site)
        return said is not None and said.takes_part

    def check_number(self, number: int) -> None:
        """Raises BadRequest for a session that there never was."""
        if number > self.last:
            raise BadRequest(f"study '{self.id}' has no session {number}")

    def session_of(self, number: int) -> Session | None:
        """The session a silo speaks of if it is under way, None if it is over.

        Raises BadRequest for one that there never was, Resuming where it is not known yet.
        """
        live = self.session
        if live is not None and number == live.row.number:
            return None if live.state.over else live
        self.check_number(number)
        if number == self.unfinished:
            raise Resuming(f"session {number} is being taken up again after a restart")
        return None

    async def task_for(self, store: Store, site: str, epoch: int, settled: int) -> pb.Task | None:
        """What `site`, which has pinned the roster of `epoch`, is to do next, or None where it has
        to wait."""
        now = self.roster.epoch
        if epoch > now or settled > (self.certified if epoch == now else self.last):
            raise await self._of_an_older_backup(store, site, epoch, settled)
        if epoch not in self.rosters or all(m.name != site for m in self.rosters[epoch].members):
            raise Denied(f"site '{site}' is not in roster {epoch} of study '{self.id}'")
        # How earlier sessions ended comes first: a silo joins no new sum while it is in doubt. And
        # before it pins another roster, for there a certificate of this one proves nothing.
        if epoch != now or settled < self.certified:
            found = await store.do(records.certified_after, self.id, epoch, settled)
            if found is not None:
                return _outcome(found)
        if epoch != now:
            removed = pb.StudyEnded(reason=pb.StudyEnded.REMOVED)
            gone = all(member.name != site for member in self.roster.members)
            return pb.Task(study=self.id, ended=removed) if gone else None
        live = self.session
        request = None if live is None else live.request_for(self.index_of(site))
        if live is not None and request is not None:
            why = live.state.why if isinstance(live.state, core.Aborting) else ""
            work, artifacts = live.row.work, live.artifacts
            return task_of(self.id, live.row.number, request, work, artifacts, why)
        if self.row.over and (live is None or live.state.over):
            return pb.Task(study=self.id, ended=self._ended())
        return None

    async def _of_an_older_backup(
        self, store: Store, site: str, epoch: int, settled: int
    ) -> Refused:
        """What tells a silo, and the operator, that this store has forgotten what silos know."""
        seen = f"roster {epoch}" if epoch > self.roster.epoch else f"session {settled} end"
        last = self.roster.epoch if epoch > self.roster.epoch else self.certified
        why = (
            f"site '{site}' has seen {seen}, this store knows of none after {last}: it was "
            "restored from a backup made before. What was summed since is lost, and no silo lets "
            "it be summed again, so the study cannot go on: restore a later backup, or stop it and "
            "start a new one from its plan"
        )
        # The first that was said, for it is one problem: each other text is an entry of the audit
        # log, and a site could say another one in each call.
        self.forgotten = self.forgotten or why
        await store.do(records.set_error, self.id, self.forgotten)
        return Refused(Reason.ROUND_NOT_NEW, why)

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
        """Raises Refused for an answer to another plan or roster, or one that comes too late, and
        Denied where the site changed it too often."""
        self.index_of(site)
        given = (request.plan_digest, request.roster_digest)
        if given != (self.plan.digest(), self.roster.digest):
            raise Refused(Reason.ROSTER_MISMATCH, "the answer is to another plan or roster")
        before = self.answers.get(site)
        if before is not None and before.accepted == request.accepted:
            return
        if self.row.state != "offered":
            raise Refused(
                Reason.ROUND_NOT_NEW, f"study '{self.id}' is {self.row.state}: it is too late"
            )
        if self.changes[site] >= _MOST_ANSWERS:
            raise Denied(
                f"site '{site}' changed its answer to study '{self.id}' {_MOST_ANSWERS} times: "
                "the last one stands. Call the study centre, which can offer the study anew"
            )
        self.changes[site] += 1
        epoch, accepted, rule = self.roster.epoch, request.accepted, request.rule
        await store.do(records.answer, self.id, epoch, site, accepted, rule)
        await self.look_at_answers(store)

    async def leave(self, store: Store, site: str, reason: str) -> None:
        """The institution takes part no more; said twice it changes nothing."""
        if self.row.over or all(member.name != site for member in self.roster.members):
            return
        await store.do(records.leave, self.id, self.roster.epoch, site, reason)
        await self.look_at_answers(store)
        live = self.session
        if live is not None and not live.state.over:
            await live.refuse(self.index_of(site), site, f"left the study: {reason}")

    async def look_at_answers(self, store: Store) -> None:
        """See what the sites said, or the operator in their place."""
        before = self.answers
        self.answers = await store.do(records.answers_of, self.id, self.roster.epoch)
        if self.answers != before:
            self.bell.ring()


class Studies:
    """All studies of the coordinator, by id."""

    def __init__(self) -> None:
        self._live: dict[str, LiveStudy] = {}
        self.offers = Bell()
        """Rings when a study is there to be offered, and when a caller must look again."""
        self._turn = 0

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
        if live is None or not live.knows(site):
            raise NoSuchStudy(f"site '{site}' is not in the roster of study '{name}'")
        return live

    def offer_for(self, site: str) -> pb.Task | None:
        """A study that `site` has not answered; each in turn, since one may wait for a person for
        days."""
        open_now = [study.offer_for(site) for study in self._live.values()]
        offers = [offer for offer in open_now if offer is not None]
        self._turn += 1
        return offers[self._turn % len(offers)] if offers else None

    def all(self) -> list[LiveStudy]:
        return list(self._live.values())

    def wake(self) -> None:
        """Let every long poll look again."""
        self.offers.ring()
        for live in self._live.values():
            live.bell.ring()


def _outcome(ended: SessionRow) -> pb.Task:
    outcome = pb.Outcome(certificate=ended.certificate or b"")
    if ended.log_place and ended.log_digest:
        head = pb.LogHead(place=ended.log_place, digest=bytes.fromhex(ended.log_digest))
        outcome.log.CopyFrom(head)
    return pb.Task(study=ended.study, session=ended.number, outcome=outcome)
