"""The agent: dials in, answers offers, and takes part in every study that this site accepted.

One process, one event loop, no torch. It can be killed at any moment and started again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from protos.v1 import coordination_pb2 as pb
from secagg.silo import SiloParty
from silo.client import Client
from silo.config import SiloConfig, load_config
from silo.enrolment import renew, way_of
from silo.errors import ConfigError, EnrolmentError, SiloError
from silo.files import lock
from silo.heads import Heads
from silo.home import SiloHome, StudyHome
from silo.identity import Enrolment, Identity, load_enrolment, load_or_make_identity
from silo.log import LogStyle, configure_logging
from silo.memory import keep_private
from silo.metrics import Metrics
from silo.offers import (
    BadOffer,
    Decision,
    Terms,
    decide,
    digests_of,
    keep_offer,
    newer_offer,
    offered_terms,
    pin,
    pinned_terms,
    stored_decision,
)
from silo.participation import Participation, Tools, in_doubt
from silo.quantities import Quantities
from silo.status import Status
from silo.worker import Worker
from study.memory import keep_buffers, keep_what_is_there

log = structlog.get_logger(__name__)

_WAIT_SECONDS = 20
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 5.0
_RENEW_CHECK_SECONDS = 600.0
_LONGEST_RULE = 200
_MOST_OFFERS = 100
_TOO_MANY = f"offer: {_MOST_OFFERS} studies that nobody here has accepted are kept already"


@dataclass(frozen=True)
class Running:
    """A study that this agent takes part in."""

    terms: Terms
    decided: int
    """When its decision.json was written: a later one may mean other terms."""
    task: asyncio.Task[None]

    @property
    def over(self) -> bool:
        return self.task.done()


class Agent:
    """The parts of a running agent."""

    def __init__(
        self, home: SiloHome, config: SiloConfig, identity: Identity, enrolment: Enrolment
    ) -> None:
        self._home, self._config, self._identity = home, config, identity
        self._enrolment = enrolment
        status = Status(home.status, config.site.name, enrolment.address)
        client = Client(way_of(enrolment, identity, config.coordinator), status.contact)
        heads = Heads(home.heads, identity.signing, config.site.name)
        self._tools = Tools(client, Worker(config.resources), status, config, heads)
        self._studies: dict[str, Running] = {}
        self._parts: dict[str, Participation] = {}
        self._metrics = Metrics(lambda: status.values)
        self._wait = 0  # the first answer comes at once, and shows that the way is open

    async def run(self) -> None:
        """Until cancelled."""
        self._tools.status.certificate(self._enrolment.expires)
        if self._config.agent.metrics:
            serve_metrics(self._metrics, self._config.agent.metrics)
        keep_what_is_there()
        log.info("agent started", site=self._config.site.name, coordinator=self._enrolment.address)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forever(self._look_for_decisions))
                group.create_task(self._forever(self._look_for_offers))
                group.create_task(self._forever(self._keep_certificate))
        finally:
            await self._stop()

    async def _stop(self) -> None:
        running = [study.task for study in self._studies.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._tools.worker.kill()
        await asyncio.to_thread(self._metrics.close)
        await self._tools.client.close()
        self._tools.status.stopped()
        log.info("agent stopped")

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat `step`; what goes wrong in it is logged and tried again, and never ends the
        agent: at three in the morning nobody is there to start it."""
        while True:
            try:
                await step()
            except SiloError as error:
                log.warning("not done", step=getattr(step, "__name__", ""), reason=str(error))
                self._tools.status.contact(str(error))
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:
                log.exception("step failed", step=getattr(step, "__name__", ""))
                await asyncio.sleep(_RETRY_SECONDS)

    async def _look_for_offers(self) -> None:
        task = await self._tools.client.next_task("", 0, self._wait)
        self._wait = _WAIT_SECONDS
        if task.WhichOneof("task") != "offer":
            return
        if self._too_many_offers(task.study):
            log.error("offer not kept", study=task.study, reason=_TOO_MANY)
            await self._tell(task.study, digests_of(task.offer), rule=_TOO_MANY)
            await asyncio.sleep(_RETRY_SECONDS)
            return
        study = self._home.study(task.study)
        try:
            terms = keep_offer(study, task.offer)
        except BadOffer as error:
            log.error("offer cannot be used", reason=str(error))
            await self._tell(study.name, digests_of(task.offer), rule=f"offer: {error}")
            await asyncio.sleep(_RETRY_SECONDS)
            return
        decision = decide(study, terms, self._config, self._identity.public)
        if decision is None:
            self._wait_for_person(study, terms)
            await asyncio.sleep(_LOOK_SECONDS)
            return
        await self._answer(study, terms, decision)

    def _too_many_offers(self, study: str) -> bool:
        """Each study that is offered costs this site a folder and the coordinator nothing."""
        known = list(self._home.studies())
        undecided = sum(not place.roster.exists() for place in known)
        return undecided >= _MOST_OFFERS and all(place.name != study for place in known)

    def _wait_for_person(self, study: StudyHome, terms: Terms) -> None:
        shown = {"state": "waits for approval", "title": terms.plan.study.title}
        self._tools.status.study(study.name, **shown)

    async def _answer(self, study: StudyHome, terms: Terms, decision: Decision) -> None:
        """Pin what was accepted before saying so: from then on nothing else is taken part in."""
        if decision.accepted and not await self._pin(study, terms):
            await asyncio.sleep(_LOOK_SECONDS)  # it is offered again
            return
        await self._tell(study.name, terms.digests, decision.accepted, decision.rule)
        state = "accepted" if decision.accepted else decision.rule
        self._tools.status.study(study.name, state=state, title=terms.plan.study.title)
        log.info("offer answered", study=study.name, answer=state)

    async def _tell(
        self, study: str, digests: tuple[bytes, bytes], accepted: bool = False, rule: str = ""
    ) -> None:
        plan, roster = digests
        request = pb.AnswerOfferRequest(
            study=study,
            plan_digest=plan,
            roster_digest=roster,
            accepted=accepted,
            rule=_printable(rule),
        )
        await self._tools.client.answer_offer(request)

    async def _pin(self, study: StudyHome, terms: Terms) -> bool:
        """Pin what was accepted, once nothing under the roster before is in doubt; whether it is
        pinned. Until then the study goes on under that roster, which gets it the certificates."""
        part = self._parts.get(study.name)
        if pinned_terms(study) not in (None, terms):
            if part is not None and part.in_doubt:
                return False
            await self._halt(study)
            if in_doubt(study):
                return False
        pin(study, terms)
        return True

    async def _halt(self, study: StudyHome) -> None:
        running = self._studies.get(study.name)
        if running is not None:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)

    async def _look_for_decisions(self) -> None:
        """Start what was accepted, here or by a person, and what ran before a restart."""
        for study in self._home.studies():
            decided = study.decision.stat().st_mtime_ns if study.decision.exists() else 0
            known = self._studies.get(study.name)
            over = study.ended.exists() and not self._is_back(study)
            if over or (known and known.decided == decided and not known.over):
                continue
            offered, decision = offered_terms(study), stored_decision(study)
            pinned = True
            if offered and decision and decision.accepted and decision.about(offered):
                pinned = self._allows(study, offered) and await self._pin(study, offered)
            await self._take_part(study, decided if pinned else 0)
        await asyncio.sleep(_LOOK_SECONDS)

    def _allows(self, study: StudyHome, terms: Terms) -> bool:
        """The policy comes first, also where a person's word came later than its answer."""
        if pinned_terms(study) == terms:
            return True
        decision = decide(study, terms, self._config, self._identity.public)
        return decision is not None and decision.accepted

    def _is_back(self, study: StudyHome) -> bool:
        """Whether a study that ended for this site alone was accepted again, under a new roster."""
        offered, decision, pinned = offered_terms(study), stored_decision(study), None
        if offered and decision and decision.accepted and decision.about(offered):
            pinned = pinned_terms(study)
        return pinned is not None and newer_offer(study, pinned) is not None

    async def _take_part(self, study: StudyHome, decided: int) -> None:
        terms, known = pinned_terms(study), self._studies.get(study.name)
        if terms is None:
            return
        if known is not None and (known.over or known.terms != terms):
            await self._halt(study)
            known = None
        task = known.task if known else asyncio.create_task(self._run_study(study, terms))
        self._studies[study.name] = Running(terms, decided, task)

    async def _run_study(self, study: StudyHome, terms: Terms) -> None:
        identity = self._identity
        try:
            index = terms.roster.index_of(self._config.site.name)
            party = SiloParty(terms.roster, index, identity.signing, identity.ledger, os.urandom)
            tools = self._tools
            quantities = Quantities(
                self._home, study, terms.plan, self._config, tools.worker, index
            )
            part = Participation(tools, study, terms, party, quantities)
            self._parts[study.name] = part
            await part.run()
        except (SiloError, KeyError) as error:
            log.error("study stopped here", study=study.name, reason=str(error))
            self._tools.status.study(study.name, state="stopped", trouble=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
        except Exception:
            log.exception("study failed here", study=study.name)
            await asyncio.sleep(_RETRY_SECONDS)
        finally:
            self._parts.pop(study.name, None)

    async def _keep_certificate(self) -> None:
        if datetime.now(UTC) >= self._enrolment.renewal_due():
            self._enrolment = await renew(
                self._home, self._identity, self._tools.client, self._config.coordinator
            )
            log.info("certificate renewed", expires=self._enrolment.expires.isoformat())
            self._tools.status.certificate(self._enrolment.expires)
        left = (self._enrolment.renewal_due() - datetime.now(UTC)).total_seconds()
        await asyncio.sleep(max(1.0, min(left, _RENEW_CHECK_SECONDS)))


def serve_metrics(metrics: Metrics, address: str) -> None:
    """Raises ConfigError where the address cannot be had."""
    try:
        metrics.serve(address)
    except OSError as error:
        raise ConfigError(
            f"[agent] metrics = {address!r} cannot be bound ({error.strerror}): another "
            "program has the port, or the address is not this machine's"
        ) from error


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:_LONGEST_RULE]


async def run(home: Path) -> None:
    """Run the agent of `home` until SIGTERM or SIGINT.

    Raises SiloError where it cannot begin: wrong site.toml, not enrolled, another agent running.
    """
    os.umask(0o077)
    place = SiloHome(home)
    config = load_config(place)
    held = lock(place.lock)
    try:
        enrolment = load_enrolment(place)
        enrolment.check()
        if enrolment.site != config.site.name:
            raise EnrolmentError(
                f"this site joined as {enrolment.site!r} but [site] name is {config.site.name!r}"
            )
        agent = Agent(place, config, load_or_make_identity(place), enrolment)
        await _until_signal(agent)
    finally:
        os.close(held)


async def _until_signal(agent: Agent) -> None:
    loop, work = asyncio.get_running_loop(), asyncio.ensure_future(agent.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    with suppress(asyncio.CancelledError):
        await work


def main(home: Path, style: LogStyle = "auto") -> None:
    """The agent as a process: logs to standard error and to HOME/agent.log.

    Raises ConfigError where there is no agent's folder yet, or its site.toml is wrong.
    """
    load_config(SiloHome(home))  # before a log is made in a folder that may not be there
    configure_logging(home / "agent.log", style)
    keep_private()
    keep_buffers()
    asyncio.run(run(home))
