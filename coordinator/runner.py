"""A study from its start to its model; this file reads as the study runs.

Each step's result is stored under a key before the next begins (`once`), so a coordinator that
was restarted runs the same function again and finds what is done already done. Steps may thus run
twice, never half: what they leave are artifacts, which are named by their content, and sums,
which the silos' ledgers do not let happen twice.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import asdict

import structlog
from sqlalchemy.exc import DBAPIError

from coordinator import jobs, records, registry, results
from coordinator.aggregation import census_total
from coordinator.rounds import Rounds
from coordinator.steps import Json
from coordinator.store import Fenced
from coordinator.summing import Asked, RosterChanged, Stopped, StudyFailed
from coordinator.union import collect_union
from study.quantity import CensusWork, MomentsWork, moments_bound

log = structlog.get_logger()

_FINAL_GRID = 100
_LOOK_EVERY = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Runner(Rounds):
    """Runs one study. `run` returns when the study is over."""

    async def run(self) -> None:
        """Try until the study is finished, stopped or has failed for good."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._over(await self._until_over())
            except RosterChanged:
                continue
            except StudyFailed as error:
                return await self._over("failed", str(error))
            except Fenced:
                return  # another process runs the study now
            except Exception as error:
                # A full disk, a worker that died, a store that is locked: what was done is kept,
                # a person is told, and the step is tried again.
                log.exception("study.error", study=self._live.id)
                why = f"{type(error).__name__}: {error}; it is tried again by itself"
                # Where it is the store that fails, there is no place to tell it but the log.
                with suppress(DBAPIError):
                    await self._tools.store.do(records.set_error, self._live.id, why)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _until_over(self) -> str:
        """The state in which the study ended; RosterChanged: it goes on under another roster."""
        try:
            await self._study()
        except RosterChanged:
            await self._enter_epoch()
            raise
        except Stopped:
            await self._publish_what_there_is()
            return "stopped"
        return "finished"

    async def _study(self) -> None:
        await self.once(self._of_epoch("offer"), self._offer)
        await self._set_state("running")
        census = await self.once(self._of_epoch("census"), self._census)
        self._members = [self._live.roster.index_of(name) for name in census["silos"]]
        await self.once("moments", self._moments)
        auxiliary = await self.once("auxiliary", self._auxiliary)
        if "held_out" in auxiliary and self._plan.evaluation is not None:
            await self.once("auxiliary distance", lambda: self._auxiliary_distance(auxiliary))
            await self._report.write()
        model = await self.once("first model", self._first_model)
        for number in range(1, self._plan.rounds.count + 1):
            model = await self._round(number, model, census["count"], auxiliary)
            await self._report.write()
        await self.once("end", lambda: self._end(model))
        await self._report.write()

    # --- before the rounds

    async def _enter_epoch(self) -> None:
        """Go on under the roster that the operator wants. The sites accept it anew, counts are
        summed again, and the rounds go on from the model as it is."""
        self._live.enter_epoch(await self._tools.store.do(records.enter_epoch, self._live.id))
        roster = self._live.roster
        silos = [member.name for member in roster.members]
        log.info("study.epoch", study=self._live.id, epoch=roster.epoch, silos=silos)

    async def _offer(self) -> Json:
        """Wait until every site has answered, or the time for it is over; go on where enough of
        them accepted. In a later epoch the study waits until they did."""
        live = self._live
        await self._stage("waits for the sites' answers to the offer")
        until = await self._offered_at() + live.plan.deadlines.offer
        while True:
            await live.look_at_answers(self._tools.store)
            unanswered = await self._unanswered()
            accepted = [m.name for m in live.roster.members if live.takes_part_by_name(m.name)]
            enough = len(accepted) >= live.roster.threshold
            if not unanswered or time.time() >= until:
                if enough:
                    return {"accepted": accepted, "unanswered": unanswered}
                if live.roster.epoch == 1:
                    raise StudyFailed(self._too_few(accepted, unanswered))
                await self._tools.store.do(
                    records.set_error, live.id, self._too_few(accepted, unanswered)
                )
            await self._summing.may_go_on()
            self._summing.check_roster()
            await live.bell.wait(_LOOK_EVERY)

    async def _offered_at(self) -> float:
        return await self._tools.store.do(
            records.epoch_entered, self._live.id, self._live.roster.epoch
        )

    def _too_few(self, accepted: list[str], unanswered: list[str]) -> str:
        roster, answers = self._live.roster, self._live.answers
        no = "".join(f"; {site}: {a.rule}" for site, a in answers.items() if not a.takes_part)
        waited = f"; no answer from {', '.join(unanswered)}" if unanswered else ""
        mend = (
            "change the plan, or start it with other sites"
            if roster.epoch == 1
            else f"it goes on when more sites accept, or with another roster: `concilium study "
            f"roster {self._live.id}`"
        )
        return (
            f"{len(accepted)} of {roster.size} sites accepted roster {roster.epoch}, the threshold "
            f"is {roster.threshold}{no}{waited}: {mend}"
        )

    async def _unanswered(self) -> list[str]:
        """Sites that have not said yes or no, but for those that were shut out meanwhile."""
        known = {site.name: site for site in await self._tools.store.do(registry.all_sites)}
        names = [member.name for member in self._live.roster.members]
        return [n for n in names if n not in self._live.answers and known[n].status == "approved"]

    async def _census(self) -> Json:
        """Σñ. Who is not in it has no weight, and rests until the next roster epoch."""
        await self._stage("census")
        live = self._live
        members = [i for i in live.roster.indices if live.takes_part(i)]
        asked = Asked(CensusWork(), live.roster.epoch, members, patient=True)
        end = await self._summing.sum(asked)
        total = self._tools.artifacts.read(bytes.fromhex(end.sum))
        count = census_total(total, live.roster.size)
        if count == 0:
            raise StudyFailed("the census counted no image at any site: check the sites' data")
        silos, epoch = self._names(end.survivors), live.roster.epoch
        return {"count": count, "silos": silos, "epoch": epoch, "session": asdict(end)}

    async def _moments(self) -> Json:
        """Σf and Σffᵀ of all real images under the plan's feature network."""
        evaluation = self._plan.evaluation
        if evaluation is None:
            return {}
        await self._stage("moments of the real images")
        network, sha256 = evaluation.feature_network, evaluation.sha256
        files = self._home.feature_files()
        dimension = await self._worker.run(jobs.feature_dimension, network, sha256, files)
        census = await self._result(self._of_epoch("census"))
        work = MomentsWork(
            total_count=census["count"],
            network=network,
            sha256=sha256,
            dimension=dimension,
            bound=moments_bound(evaluation.feature_bound),
        )
        end = await self._summing.sum(Asked(work, self._live.roster.epoch, self._members))
        return {
            "sum": end.sum,
            "work": work.model_dump(),
            # Once in a study: later epochs have other rosters, and go on using this sum.
            "roster_size": self._live.roster.size,
            "silos": self._names(end.survivors),
            "session": asdict(end),
        }

    async def _auxiliary(self) -> Json:
        """The anonymous union of synthetic images, where the strategy corrects."""
        correction = self._plan.strategy.correction
        if correction is None:
            return {}
        await self._stage("auxiliary set")
        census = await self._result(self._of_epoch("census"))
        union = await collect_union(
            self._tools, self._summing, self._live, self._members, census["count"], self.once
        )
        return union

    async def _auxiliary_distance(self, auxiliary: Json) -> Json:
        """FID of the auxiliary set, before a round is spent on it: people may want another one, or
        none to be shared, where it is no better than what they expect of the model."""
        moments, path = await self._result("moments"), self._tools.artifacts.path
        fid = await self._worker.run(
            jobs.images_distance,
            [path(bytes.fromhex(auxiliary[part])) for part in ("held_out", "training")],
            path(bytes.fromhex(moments["sum"])),
            moments["work"],
            moments["roster_size"],
            len(moments["silos"]),
            self._home.feature_files(),
        )
        network, sha256 = (moments["work"][key] for key in ("network", "sha256"))
        log.info("study.auxiliary", study=self._live.id, images=auxiliary["images"], fid=fid)
        return {"fid": fid, "network": network, "network_sha256": sha256}

    async def _first_model(self) -> Json:
        await self._stage("first model")
        out = self._scratch("first.f32")
        sizes = await self._worker.run(jobs.first_model, self._text, out)
        model = await self._keep_model(out)
        clips, sizes = self._plan.first_clips(len(sizes)), sizes * self._plan.strategy.parts
        return {"model": model.hex(), "sizes": sizes, "clips": clips, "state": None}

    # --- the end

    async def _publish_what_there_is(self) -> None:
        """The model of the last round that was done, of a study that was stopped."""
        row = await self._tools.store.do(records.study, self._live.id)
        done = await self._tools.store.do(results.all_of, self._live.id)
        rounds = [v for k, v in done.items() if k.startswith("round ") and "moved" in v]
        for step in rounds:
            if row.model is not None and step["model"] == row.model.hex():
                return await self._write_model(step)

    async def _end(self, model: Json) -> Json:
        await self._stage("final model and samples")
        await self._write_model(model)
        return {"model": model["model"]}

    async def _write_model(self, model: Json) -> None:
        folder = self._home.study(self._live.id)
        path = self._tools.artifacts.path(bytes.fromhex(model["model"]))
        await self._worker.run(jobs.write_pipeline, self._text, path, folder / "model")
        await self._draw(model, _FINAL_GRID, folder / "samples.png")

    async def _set_state(self, state: str) -> None:
        await self._tools.store.do(records.set_state, self._live.id, state)
        self._live.row = await self._tools.store.do(records.study, self._live.id)

    async def _over(self, state: str, error: str | None = None) -> None:
        self._forget_corrections()  # first: a study that is over is not looked at again
        await self._tools.store.do(records.set_state, self._live.id, state, error)
        self._live.row = await self._tools.store.do(records.study, self._live.id)
        log.info("study.over", study=self._live.id, state=state, error=error)
        await self._report.write()
        self._live.bell.ring()
