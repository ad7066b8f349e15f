"""One round of a study: sum, aggregate, perhaps correct, show, measure."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import asdict
from pathlib import Path

import structlog

from coordinator import jobs, results
from coordinator.aggregation import aggregate, mean_comparison, round_input
from coordinator.sessions import SessionEnd
from coordinator.steps import Json, Steps
from coordinator.summing import Asked, StudyFailed
from study.quantity import AuxiliaryImages, EvaluationWork, RoundWork, evaluation_bins
from study.sections import Evaluation
from study.strategies import RoundRecord

log = structlog.get_logger()

_GRID = 40
_CORRECTS_FOR = 30.0  # seconds until a correction keeps what it has: the most a restart costs


class Rounds(Steps):
    """The steps of a round, in the order in which they are taken."""

    async def _round(self, number: int, model: Json, count: int, auxiliary: Json) -> Json:
        """Sum, aggregate, perhaps correct, show, measure."""
        key = f"round {number:05}"
        shared = None
        if "shared" in auxiliary and await self._shares(number):
            images = auxiliary["images"] - auxiliary["held_out_images"]
            shared = AuxiliaryImages(sha256=auxiliary["shared"], images=images)
        work = RoundWork(
            total_count=count,
            sizes=tuple(model["sizes"]),
            clips=tuple(model["clips"]),
            auxiliary=shared,
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
            if self._plan.strategy.stops_sharing and number < self._plan.rounds.count:
                await self.once(f"{key} sharing", lambda: self._decide_sharing(number))
        await self.once(f"{key} tidy", lambda: self._tidy(model, step))
        return step

    async def _sum_round(self, number: int, model: Json, work: RoundWork) -> Json:
        sha256 = await self._round_input(model)
        shared = [] if work.auxiliary is None else [bytes.fromhex(work.auxiliary.sha256)]
        asked = Asked(work, number, self._members, model=sha256, artifacts=[sha256, *shared])
        end: SessionEnd = await self._summing.sum(asked)
        silos, epoch = self._names(end.survivors), self._live.roster.epoch
        shares = work.auxiliary is not None
        return {"silos": silos, "epoch": epoch, "shared": shares, "session": asdict(end)}

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
        if step.void:
            raise StudyFailed(
                f"round {number} cannot be read: {step.void} silos made its sum random, because "
                "the model that they were sent cannot be trained (its first steps are not finite): "
                "lower optimizer.learning_rate in the plan and start anew"
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
        summed = await self._result(f"round {number:05} sum")
        now = RoundRecord(number, loss, **_of_the_silos(summed, step))
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
            summed, model = (done[f"round {earlier:05} {step}"] for step in ("sum", "model"))
            silos = _of_the_silos(summed, model)
            history.append(
                RoundRecord(earlier, decision["loss"], after, decision["correct"], **silos)
            )
        return history

    async def _correct(self, number: int, step: Json, auxiliary: Json) -> Json:
        """K steps on the auxiliary images, the held-out loss after them, and whether they stay."""
        correction = self._plan.strategy.correction
        assert correction is not None  # noqa: S101 - decided by the same strategy
        last = number == self._plan.rounds.count
        steps, rate = self._plan.correction_steps(number), self._plan.correction_rate(number)
        path, out = self._tools.artifacts.path, self._scratch("corrected.f32")
        stage = f"round {number} of {self._plan.rounds.count}: correction"
        await self._stage(stage)
        done, training = 0, 0.0
        # In parts, between which an operator may pause or stop the study.
        while done < steps:
            done, training = await self._worker.run(
                jobs.correct,
                self._machine,
                self._text,
                path(bytes.fromhex(step["model"])),
                path(bytes.fromhex(auxiliary["training"])),
                self._labels(auxiliary, "training"),
                steps,
                rate,
                correction.averages(last),
                number,
                _CORRECTS_FOR,
                self._home.corrections(self._live.id) / f"{number:05}-{step['model']}",
                out,
            )
            if done < steps:
                await self._stage(f"{stage}, {done:,} of {steps:,} steps")
                await self._summing.may_go_on()
        held_out = path(bytes.fromhex(auxiliary["held_out"]))
        after = await self._worker.run(
            jobs.held_out_loss,
            self._machine,
            self._text,
            out,
            held_out,
            self._labels(auxiliary, "held_out"),
        )
        changed: Json = {
            "steps": steps,
            "learning_rate": rate,
            "training_loss": training,
            "loss_after": after,
            "kept": True,
        }
        if self._plan.evaluation is not None and correction.judges(last):
            changed |= await self._judge(path(bytes.fromhex(step["model"])), out)
        if changed["kept"]:
            changed["model"] = (await self._keep_model(out)).hex()
        else:
            out.unlink()
        return {**step, **changed}

    async def _shares(self, number: int) -> bool:
        """Whether the silos of this round train on the auxiliary images as well: what was decided
        when the model was last evaluated."""
        every = self._plan.evaluation.every if self._plan.evaluation else number
        evaluated = (number - 1) // every * every
        if not self._plan.strategy.stops_sharing or evaluated == 0:
            return True
        decided = await self._result(f"round {evaluated:05} sharing")
        return decided is None or bool(decided["share"])

    async def _decide_sharing(self, number: int) -> Json:
        """Ask the strategy, by the FIDs so far and that of the auxiliary set."""
        evaluated = [k for k in range(1, number + 1) if self._plan.evaluates(k)]
        fids = [(await self._result(f"round {k:05} evaluation"))["fid"] for k in evaluated]
        of_set = (await self._result("auxiliary distance"))["fid"]
        decision = self._plan.strategy.shares(fids, self._plan.evaluations, of_set)
        log.info("sharing", study=self._live.id, round=number, **asdict(decision))
        return asdict(decision)

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
            self._home.feature_files(),
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
            self._home.feature_files(),
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
        self._forget_corrections()
        return {"dropped": len(ours)}

    def _forget_corrections(self) -> None:
        """Drop what corrections that are over, or will not be ended, have kept."""
        shutil.rmtree(self._home.corrections(self._live.id), ignore_errors=True)


def _of_the_silos(summed: Json, step: Json) -> Json:
    """Their loss in a round, and whose it is: a new epoch has other weights."""
    loss = None if step["faults"] else step["loss"]
    whose = summed["epoch"], summed.get("shared", False), *summed["silos"]
    return {"silo_loss": loss, "silos": whose}
