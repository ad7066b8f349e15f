"""A study from its start to its model; this file reads as the study runs.

Each step's result is stored under a key before the next begins (`once`), so a coordinator that
was restarted runs the same function again and finds what is done already done. Steps may thus run
twice, never half: what they leave are artifacts, which are named by their content, and sums,
which the silos' ledgers do not let happen twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError

from coordinator import jobs, records, registry, results
from coordinator.aggregation import aggregate, census_total, mean_comparison, round_input
from coordinator.config import Home
from coordinator.jobs import Machine
from coordinator.report import Report
from coordinator.sessions import SessionEnd, Tools
from coordinator.store import Fenced
from coordinator.studies import LiveStudy
from coordinator.summing import Asked, RosterChanged, Stopped, StudyFailed, Summing
from coordinator.union import collect_union
from coordinator.worker import Worker
from study.quantity import (
    CensusWork,
    EvaluationWork,
    MomentsWork,
    RoundWork,
    evaluation_bins,
    moments_bound,
)
from study.sections import Evaluation
from study.strategies import RoundRecord

log = structlog.get_logger()

Json = dict[str, Any]
_GRID, _FINAL_GRID = 40, 100
_LOOK_EVERY = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Runner:
    """Runs one study. `run` returns when the study is over."""

    def __init__(
        self,
        home: Home,
        tools: Tools,
        worker: Worker,
        machine: Machine,
        live: LiveStudy,
        absent_after: float,
    ) -> None:
        self._home, self._tools, self._worker, self._machine = home, tools, worker, machine
        self._live, self._plan, self._text = live, live.plan, live.row.plan
        self._summing = Summing(tools, live, absent_after)
        self._report = Report(home.study(live.id), tools.store, live)
        self._members: list[int] = []

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
        model = await self.once("first model", self._first_model)
        for number in range(1, self._plan.rounds.count + 1):
            model = await self._round(number, model, census["count"], auxiliary)
            await self._report.write()
        await self.once("end", lambda: self._end(model))
        await self._report.write()

    # --- before the rounds

    def _of_epoch(self, key: str) -> str:
        """The key of a step that is done once per roster epoch."""
        epoch = self._live.roster.epoch
        return key if epoch == 1 else f"{key} of epoch {epoch}"

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
        try:
            dimension = await self._worker.run(jobs.feature_dimension, network, sha256)
        except ValueError as error:
            raise StudyFailed(str(error)) from error
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
        """The anonymous union of synthetic images (DESIGN §5), where the strategy corrects."""
        correction = self._plan.strategy.correction
        if correction is None:
            return {}
        await self._stage("auxiliary set")
        census = await self._result(self._of_epoch("census"))
        union = await collect_union(
            self._tools, self._summing, self._live, self._members, census["count"], self.once
        )
        return union

    async def _first_model(self) -> Json:
        await self._stage("first model")
        out = self._scratch("first.f32")
        sizes = await self._worker.run(jobs.first_model, self._text, out)
        model = await self._keep_model(out)
        clips, sizes = self._plan.first_clips(len(sizes)), sizes * self._plan.strategy.parts
        return {"model": model.hex(), "sizes": sizes, "clips": clips, "state": None}

    # --- one round

    async def _round(self, number: int, model: Json, count: int, auxiliary: Json) -> Json:
        """Sum, aggregate, perhaps correct, show, measure."""
        key = f"round {number:05}"
        work = RoundWork(
            total_count=count, sizes=tuple(model["sizes"]), clips=tuple(model["clips"])
        )
        await self._stage(f"round {number} of {self._plan.rounds.count}")
        end = await self.once(f"{key} sum", lambda: self._sum_round(number, model, work))
        step = await self.once(f"{key} model", lambda: self._aggregate(number, model, work, end))
        if "held_out" in auxiliary:
            decision = await self.once(
                f"{key} decision", lambda: self._decide(number, step, auxiliary)
            )
            if decision["correct"]:
                step = await self.once(
                    f"{key} corrected", lambda: self._correct(number, step, auxiliary)
                )
        await self.once(f"{key} grid", lambda: self._grid(number, step))
        if self._plan.evaluates(number):
            await self._evaluate(number, step)
        await self.once(f"{key} tidy", lambda: self._tidy(model, step))
        return step

    async def _sum_round(self, number: int, model: Json, work: RoundWork) -> Json:
        sha256 = await self._round_input(model)
        asked = Asked(work, number, self._members, model=sha256, artifacts=[sha256])
        end: SessionEnd = await self._summing.sum(asked)
        silos, epoch = self._names(end.survivors), self._live.roster.epoch
        return {"silos": silos, "epoch": epoch, "session": asdict(end)}

    async def _round_input(self, model: Json) -> bytes:
        """What the silos start from; its digest is the `model` of the session."""
        name = bytes.fromhex(model["model"])
        state = bytes.fromhex(model["state"]) if model["state"] else None
        given = await asyncio.to_thread(round_input, self._tools.artifacts, self._plan, name, state)
        if given != name:
            await self._record(given, "model", published=True)
        return given

    async def _aggregate(self, number: int, model: Json, work: RoundWork, end: Json) -> Json:
        state = bytes.fromhex(model["state"]) if model["state"] else None
        step = await asyncio.to_thread(
            aggregate,
            self._tools.artifacts,
            self._plan,
            work,
            self._live.roster.size,
            round=number,
            model=bytes.fromhex(model["model"]),
            state=state,
            total=bytes.fromhex(end["session"]["sum"]),
        )
        if step.model.hex() == model["model"]:
            raise StudyFailed(
                f"round {number} changed nothing (the deltas of {step.faults} silos were not "
                "finite): lower optimizer.learning_rate in the plan and start anew"
            )
        await self._publish(step.model)
        await self._record(step.state, "state")
        numbers = {k: getattr(step, k) for k in ("clips", "loss", "saturated", "faults", "moved")}
        return {
            "model": step.model.hex(),
            "state": step.state.hex(),
            "sizes": model["sizes"],
            **numbers,
        }

    async def _decide(self, number: int, step: Json, auxiliary: Json) -> Json:
        """Measure the aggregate on images that no correction sees, and ask the strategy."""
        path = self._tools.artifacts.path
        loss = await self._worker.run(
            jobs.held_out_loss,
            self._machine,
            self._text,
            path(bytes.fromhex(step["model"])),
            path(bytes.fromhex(auxiliary["held_out"])),
            self._labels(auxiliary, "held_out"),
        )
        now = RoundRecord(number, loss, silo_loss=step["loss"])
        history = [*await self._history(number), now]
        last = number == self._plan.rounds.count
        decision = self._plan.strategy.decide(history, last)
        log.info("decision", study=self._live.id, round=number, **asdict(decision))
        return {"loss": loss, **asdict(decision)}

    async def _history(self, number: int) -> list[RoundRecord]:
        history = []
        for earlier in range(1, number):
            done = await self._tools.store.do(results.of_rounds, self._live.id, earlier, earlier)
            decision = done[f"round {earlier:05} decision"]
            after = done.get(f"round {earlier:05} corrected", {}).get("loss_after")
            silos = done[f"round {earlier:05} model"]["loss"]
            history.append(
                RoundRecord(earlier, decision["loss"], after, decision["correct"], silos)
            )
        return history

    async def _correct(self, number: int, step: Json, auxiliary: Json) -> Json:
        """K steps on the auxiliary images, the held-out loss after them, and whether they stay."""
        correction = self._plan.strategy.correction
        assert correction is not None  # noqa: S101 - decided by the same strategy
        await self._stage(f"round {number} of {self._plan.rounds.count}: correction")
        last = number == self._plan.rounds.count
        path, out = self._tools.artifacts.path, self._scratch("corrected.f32")
        training = await self._worker.run(
            jobs.correct,
            self._machine,
            self._text,
            path(bytes.fromhex(step["model"])),
            path(bytes.fromhex(auxiliary["training"])),
            self._labels(auxiliary, "training"),
            correction.steps_in(number, last),
            self._plan.correction_rate(number),
            correction.averages(last),
            number,
            out,
        )
        held_out = path(bytes.fromhex(auxiliary["held_out"]))
        after = await self._worker.run(
            jobs.held_out_loss,
            self._machine,
            self._text,
            out,
            held_out,
            self._labels(auxiliary, "held_out"),
        )
        changed: Json = {"training_loss": training, "loss_after": after, "kept": True}
        if self._plan.evaluation is not None and correction.judges(last):
            changed |= await self._judge(path(bytes.fromhex(step["model"])), out)
        if changed["kept"]:
            changed["model"] = (await self._keep_model(out)).hex()
        else:
            out.unlink()
        return {**step, **changed}

    async def _judge(self, aggregate: Path, corrected: Path) -> Json:
        """A correction that does not bring samples nearer to the silos' images is not kept."""
        moments = await self._result("moments")
        before, after = await self._worker.run(
            jobs.judged_distances,
            self._machine,
            self._text,
            [aggregate, corrected],
            self._tools.artifacts.path(bytes.fromhex(moments["sum"])),
            moments["work"],
            moments["roster_size"],
            len(moments["silos"]),
        )
        return {"fid_before": before, "fid_after": after, "kept": after < before}

    def _labels(self, auxiliary: Json, part: str) -> Path | None:
        """The labels of a part of the auxiliary set, where the model is conditional."""
        sha256 = auxiliary.get(f"{part}_labels")
        return None if sha256 is None else self._tools.artifacts.path(bytes.fromhex(sha256))

    async def _grid(self, number: int, step: Json) -> Json:
        png = self._home.study(self._live.id) / "grids" / f"round-{number:03}.png"
        await self._draw(step, _GRID, png)
        return {"grid": f"grids/{png.name}"}

    async def _evaluate(self, number: int, step: Json) -> None:
        """Samples of the global model, measured here and, where the plan says so, at the silos."""
        key, evaluation = f"round {number:05}", self._plan.evaluation
        assert evaluation is not None  # noqa: S101 - `Plan.evaluates`
        drawn = await self.once(f"{key} samples", lambda: self._draw_samples(step, evaluation))
        await self.once(f"{key} evaluation", lambda: self._distance(drawn, evaluation))
        if evaluation.at_silos:
            await self.once(
                f"{key} comparison", lambda: self._compare(number, step, drawn, evaluation)
            )

    async def _draw_samples(self, step: Json, evaluation: Evaluation) -> Json:
        model, out = bytes.fromhex(step["model"]), self._scratch("samples.u8")
        path = self._tools.artifacts.path(model)
        await self._worker.run(jobs.draw_samples, self._machine, self._text, path, out)
        sha256 = await asyncio.to_thread(self._tools.artifacts.adopt, out)
        await self._record(sha256, "samples", published=evaluation.at_silos)
        return {"samples": sha256.hex()}

    async def _distance(self, drawn: Json, evaluation: Evaluation) -> Json:
        """FID of the global model against the distribution of all silos' images."""
        moments = await self._result("moments")
        path = self._tools.artifacts.path
        fid = await self._worker.run(
            jobs.frechet_distance,
            self._text,
            path(bytes.fromhex(drawn["samples"])),
            path(bytes.fromhex(moments["sum"])),
            moments["work"],
            moments["roster_size"],
            len(moments["silos"]),
        )
        return {
            "fid": fid,
            "samples": evaluation.samples,
            "network": evaluation.feature_network,
            "network_sha256": evaluation.sha256,
        }

    async def _compare(self, number: int, step: Json, drawn: Json, evaluation: Evaluation) -> Json:
        """The means over the silos of what each measures with its own images."""
        await self._stage(f"round {number} of {self._plan.rounds.count}: evaluation at the silos")
        work = EvaluationWork(
            samples=drawn["samples"],
            images=evaluation.samples,
            network=evaluation.feature_network,
            sha256=evaluation.sha256,
            bins=evaluation_bins(self._plan.schedule.num_train_timesteps),
        )
        model, samples = bytes.fromhex(step["model"]), bytes.fromhex(drawn["samples"])
        asked = Asked(work, number, self._members, model=model, artifacts=[model, samples])
        end = await self._summing.sum(asked)
        total = self._tools.artifacts.read(bytes.fromhex(end.sum))
        found = mean_comparison(total, work, self._live.roster.size, len(end.survivors))
        return {**found, "silos": self._names(end.survivors), "session": asdict(end)}

    async def _tidy(self, before: Json, after: Json) -> Json:
        """Drop what no later step reads: the sum of this round, and the model before its input."""
        moments = await self._result("moments")
        named = (before["model"], after["model"], after["state"], moments.get("sum"))
        keep = {bytes.fromhex(name) for name in named if name}
        roles = ("model", "state", "sum", "samples")
        store, name = self._tools.store, self._live.id
        done, ours = await store.do(results.done_with, name, roles, keep)
        # The files first: a row whose file is gone is struck after a restart, a file without a row
        # would be found by nobody.
        for sha256 in ours:
            await asyncio.to_thread(self._tools.artifacts.remove, sha256)
        await store.do(results.forget_artifacts, name, done)
        return {"dropped": len(ours)}

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

    async def _draw(self, model: Json, images: int, png: Path) -> None:
        path = self._tools.artifacts.path(bytes.fromhex(model["model"]))
        await self._worker.run(jobs.draw_grid, self._machine, self._text, path, images, png)

    # --- what every step needs

    async def once(self, key: str, step: Callable[[], Awaitable[Json]]) -> Json:
        """The stored result of a step, or that of running it now, stored."""
        found: Json | None = await self._result(key)
        if found is not None:
            return found
        await self._summing.may_go_on()
        started = time.time()
        result = await step()
        result["seconds"] = round(time.time() - started, 3)
        await self._tools.store.do(results.put_result, self._live.id, key, result)
        return result

    async def _result(self, key: str) -> Any:  # Json, or None before the step is done
        return await self._tools.store.do(results.result, self._live.id, key)

    async def _stage(self, stage: str) -> None:
        await self._tools.store.do(records.set_stage, self._live.id, stage)
        log.info("study.stage", study=self._live.id, stage=stage)

    async def _set_state(self, state: str) -> None:
        await self._tools.store.do(records.set_state, self._live.id, state)
        self._live.row = await self._tools.store.do(records.study, self._live.id)

    async def _over(self, state: str, error: str | None = None) -> None:
        await self._tools.store.do(records.set_state, self._live.id, state, error)
        self._live.row = await self._tools.store.do(records.study, self._live.id)
        log.info("study.over", study=self._live.id, state=state, error=error)
        await self._report.write()
        self._live.bell.ring()

    async def _keep_model(self, file: Path) -> bytes:
        sha256 = await asyncio.to_thread(self._tools.artifacts.adopt, file)
        await self._publish(sha256)
        return sha256

    async def _publish(self, sha256: bytes) -> None:
        """Let the silos have a model."""
        await self._record(sha256, "model", published=True)
        await self._tools.store.do(records.set_model, self._live.id, sha256)

    async def _record(self, sha256: bytes, role: str, *, published: bool = False) -> None:
        size = self._tools.artifacts.path(sha256).stat().st_size
        await self._tools.store.do(
            results.record_artifact, self._live.id, sha256, role, size, published=published
        )

    def _scratch(self, name: str) -> Path:
        # The worker of a process that was taken over from may still be at the same job.
        return self._home.scratch / f"{self._tools.store.epoch}-{self._live.id}-{name}"

    def _names(self, indices: tuple[int, ...]) -> list[str]:
        return [self._live.roster.member(i).name for i in indices]
