"""One simulated study; this file reads as `coordinator/runner.py` does.

What a silo computes is what `silo.jobs` computes, what the coordinator makes of the sum is what
`coordinator.aggregation` makes of it, and the strategy is asked the same questions. Every step's
result is kept in a `Memo`, so that a simulation that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.simulate.alone import train_alone
from concilium.simulate.corrections import Corrections, Labelled, digest_labelled
from concilium.simulate.measure import Measured, Ruler
from concilium.simulate.memo import Arrays, Memo, digest_array
from concilium.simulate.silos import (
    Federation,
    Pool,
    RoundTask,
    UnionTask,
    execution_of,
    train_round,
    union,
)
from concilium.simulate.spec import Point
from concilium.simulate.summing import SecureSum
from coordinator.aggregation import unbiased
from diffusion.batches import Shared
from diffusion.model import build_model, initialise, parameter_layout, to_vector
from silo.jobs.round import rounding_key
from study.encoding import next_clips
from study.quantity import AuxiliaryImages, RoundWork, delta_encoding, encode_work
from study.reservation import as_records
from study.strategies import RoundRecord

Json = dict[str, Any]
Vector = NDArray[np.float32]
Images = NDArray[np.uint8]
_UNION_COUNTS = ("tag_bytes", "image_bytes", "drawn", "dropped")


class Study:
    """A study of N silos. `events` yields what happened, one line of metrics.jsonl each."""

    def __init__(self, point: Point, federation: Federation, memo: Memo, pool: Pool) -> None:
        self._point, self._plan, self._memo, self._pool = point, point.plan, memo, pool
        self._federation = federation
        self.model: Vector = np.zeros(0, np.float32)
        """The global model, as far as `events` was read."""
        self._execution = execution_of(point.simulation.precision)
        self._ruler = Ruler(point.plan, federation, memo, self._execution, point.simulation)
        self._shared: Shared | None = None
        self._auxiliary_fid: float | None = None
        self._common = {
            "data": federation.digest,
            "precision": point.simulation.precision,
            **{
                part: getattr(point.plan, part).model_dump(mode="json")
                for part in ("model", "schedule", "objective")
            },
        }
        if point.plan.model.classes is not None:
            self._common["labels"] = digest_array(*federation.labels)
        self._secure = (
            SecureSum(point.plan, federation.names) if point.simulation.secure_sum else None
        )

    def events(self) -> Iterator[Json]:
        """The study from its start to its model."""
        auxiliary = corrections = None
        if self._plan.strategy.correction or self._point.training == "auxiliary":
            union = self._auxiliary()
            auxiliary = union["images"], union.get("labels")
            if self._point.training == "federated":
                corrections = self._corrections(auxiliary)
            measured = self._measured(union["images"])
            self._auxiliary_fid = measured.get("fid")
            yield {
                "event": "auxiliary",
                "images": len(union["images"]),
                # The last two are not in a memo of before they were counted.
                **{name: int(union[name]) for name in _UNION_COUNTS if name in union},
                **measured,
            }
        unseen = self._federation.unseen
        if unseen is not None and self._plan.evaluation is not None:
            images = unseen.images[: self._plan.evaluation.samples]
            yield {"event": "unseen", "images": len(images), **self._measured(images)}
        if self._point.training == "federated":
            yield from self._rounds(corrections)
        else:
            yield from self._alone(auxiliary)

    def _measured(self, images: Images) -> Json:
        return {} if self._plan.evaluation is None else self._ruler.of_images(images).line()

    # --- federated rounds

    def _corrections(self, auxiliary: Labelled) -> Corrections | None:
        rule = self._plan.strategy.correction
        if rule is None:
            return None
        return Corrections(
            self._plan,
            rule,
            auxiliary,
            memo=self._memo,
            ruler=self._ruler,
            execution=self._execution,
            common=self._common,
        )

    def _rounds(self, corrections: Corrections | None) -> Iterator[Json]:
        plan = self._plan
        network = build_model(plan.model)
        initialise(network, plan.study.seed)
        model = to_vector(network)
        tensors = [int(np.prod(shape, dtype=np.int64)) for _, shape, _ in parameter_layout(network)]
        state = plan.strategy.initial_state(model.size)
        clips = plan.first_clips(len(tensors))
        sizes = tuple(tensors) * plan.strategy.parts
        kept: Mapping[str, NDArray[Any]] = {}
        history: list[RoundRecord] = []
        fids: list[float] = []
        self._shared = corrections.shared() if corrections else None
        steps = {"local_steps": 0, "correction_steps": 0}
        for number in range(1, plan.rounds.count + 1):
            given = plan.strategy.round_input(state, model)
            work = RoundWork(
                total_count=self._federation.total,
                sizes=sizes,
                clips=clips,
                auxiliary=self._named_shared(),
            )
            summed = self._round(number, given, work, kept)
            kept = {name: summed[name] for name in ("residual", "control") if name in summed}
            mean = unbiased(plan, summed["mean"], model.size, number, self._federation.size)
            state, after = plan.strategy.aggregate(state, model, mean, number)
            steps["local_steps"] += plan.rounds.local_steps
            moved = float(np.linalg.norm(after.astype(np.float64) - model))
            model = after.astype(np.float32, copy=False)
            clips = tuple(summed["clips"].tolist())
            loss = float(summed["loss"])
            counters = {name: int(summed[name]) for name in ("saturated", "faults")}
            yield {"event": "round", "round": number, "loss": loss, "moved": moved, **counters}
            if corrections is not None:
                told = None if counters["faults"] else loss
                model, record, lines = corrections.decide(
                    number, model, history, told, self._shared is not None
                )
                history.append(record)
                yield from lines
                for line in lines:
                    steps["correction_steps"] += line.get("steps", 0)
            self.model = model
            if self._plan.evaluates(number):
                measured = self._ruler.of_model(model)
                digest = hashlib.sha256(model.astype("<f4").tobytes()).hexdigest()
                also = {**steps, "model": digest, **self._of_one(model, number)}
                yield self._evaluation(number, measured, also)
                fids.append(measured.fid)
                follow = number < plan.rounds.count
                if corrections is not None and plan.strategy.stops_sharing and follow:
                    said = plan.strategy.shares(fids, plan.evaluations, self._auxiliary_fid)
                    self._shared = corrections.shared() if said.share else None
                    yield {"event": "sharing", "round": number, **asdict(said)}

    def _round(
        self, number: int, given: Vector, work: RoundWork, kept: Mapping[str, NDArray[Any]]
    ) -> Arrays:
        plan = self._plan
        inputs = {
            **self._common,
            "what": "round",
            "round": number,
            "given": digest_array(given),
            "optimizer": plan.optimizer_of(number).model_dump(mode="json"),
            "steps": plan.rounds.local_steps,
            **self._rules(given),
            "working": sorted(plan.working(number, self._federation.size)),
            "kept": {name: digest_array(array) for name, array in kept.items()},
            "secure": [plan.secure_sum.ring, *work.clips] if self._secure else None,
        }
        return self._memo.get(inputs, lambda: self._sum_round(number, given, work, kept))

    def _rules(self, given: Vector) -> Json:
        rules = asdict(self._plan.strategy.local_rules())
        if self._shared is None:
            # Rounds without shared images are what they were before there were any: those that a
            # memo holds from then are not trained again.
            return {"rules": {k: v for k, v in rules.items() if k != "auxiliary_share"}}
        return {
            "rules": rules,
            "shared": digest_labelled(given, (self._shared.images, self._shared.labels)),
        }

    def _sum_round(
        self, number: int, given: Vector, work: RoundWork, kept: Mapping[str, NDArray[Any]]
    ) -> Arrays:
        federation, plan = self._federation, self._plan
        working = sorted(plan.working(number, federation.size))
        control = kept.get("control")
        if control is None and plan.strategy.local_rules().control:
            control = np.zeros((federation.size, given.size // 2), np.float32)
        labels = federation.labels_for(plan)
        tasks = [
            RoundTask(
                self._point,
                number,
                federation.secrets[index - 1],
                given,
                federation.images[index - 1],
                labels[index - 1],
                None if control is None else control[index - 1],
                self._shared,
            )
            for index in working
        ]
        trained = dict(zip(working, self._pool.map(train_round, tasks), strict=True))
        changes = {index: done["change"] for index, done in trained.items()}
        losses = {index: float(done["loss"]) for index, done in trained.items()}
        if self._secure is None:
            result = self._averaged(changes, losses)
        else:
            result = self._securely(number, given, work, changes, losses, kept.get("residual"))
        result["loss"] = result["loss"] * federation.size / len(working)
        if control is not None:
            control = control.copy()
            for index, done in trained.items():
                control[index - 1] = done["control"]
            result["control"] = control
        return result

    def _averaged(self, changes: Mapping[int, Vector], losses: Mapping[int, float]) -> Arrays:
        """Σ w_i δ_i in float64, of silos whose delta is finite."""
        shares = self._federation.shares
        finite = {i: change for i, change in changes.items() if np.isfinite(change).all()}
        mean = np.zeros(next(iter(changes.values())).size)
        for index, change in finite.items():
            mean += shares[index - 1] * change
        return {
            "mean": mean.astype(np.float32),
            "loss": np.array(sum(shares[i - 1] * losses[i] for i in finite)),
            "clips": np.zeros(0),
            "saturated": np.array(0),
            "faults": np.array(len(changes) - len(finite)),
        }

    def _securely(
        self,
        number: int,
        given: Vector,
        work: RoundWork,
        changes: Mapping[int, Vector],
        losses: Mapping[int, float],
        residual: NDArray[Any] | None,
    ) -> Arrays:
        """The same through the encoding and the parties of the secure sum."""
        federation, plan = self._federation, self._plan
        if self._secure is None:
            raise AssertionError("asked only where there is a secure sum")
        encoding = delta_encoding(work, federation.size, plan.secure_sum.ring)
        carried = np.zeros((federation.size, given.size), np.float32)
        if residual is not None:
            carried[:] = residual
        model = hashlib.sha256(given.astype("<f4").tobytes()).digest()
        key = rounding_key(encode_work(work), model.hex())
        vectors = {index: encoding.zeros() for index in range(1, federation.size + 1)}
        for index, change in changes.items():
            encoded = encoding.encode(
                change,
                carried[index - 1].copy(),
                count=federation.counts[index - 1],
                loss=losses[index],
                key=key,
                silo=index,
            )
            vectors[index], carried[index - 1] = encoded.vector, encoded.residual
        decoded = encoding.decode(self._secure.sum(work, number, vectors, model=model))
        clips = next_clips(decoded.mean_delta, encoding, parts=plan.strategy.parts)
        return {
            "mean": decoded.mean_delta,
            "loss": np.array(decoded.loss),
            "clips": np.array(clips),
            "saturated": np.array(decoded.saturated),
            "faults": np.array(decoded.faults),
            "residual": carried,
        }

    def _named_shared(self) -> AuxiliaryImages | None:
        """As the work of a round names them: the rounding of the deltas is drawn by it."""
        if self._shared is None:
            return None
        records = as_records(self._shared.images, self._shared.labels)
        sha256 = hashlib.sha256(records.data).hexdigest()
        return AuxiliaryImages(sha256=sha256, images=len(records))

    # --- the auxiliary set, and the ends of the scale

    def _auxiliary(self) -> Arrays:
        """The anonymous union of samples of the silos' local models."""
        task = UnionTask(self._point, self._federation, self._common)
        return union(task, self._memo, self._pool, self._secure)

    def _alone(self, auxiliary: Labelled | None) -> Iterator[Json]:
        """One model on all images, on the auxiliary set, or one per silo on its own."""
        federation, kind = self._federation, self._point.training
        labels = federation.labels_for(self._plan)
        sets: list[Labelled] = list(zip(federation.images, labels, strict=True))
        if kind == "central":
            known = [own for own in labels if own is not None]
            sets = [(np.concatenate(federation.images), np.concatenate(known) if known else None)]
        elif kind == "auxiliary" and auxiliary is not None:
            sets = [auxiliary]
        rounds = [n for n in range(1, self._plan.rounds.count + 1) if self._plan.evaluates(n)]
        models = train_alone(self._point, self._common, sets, rounds, self._memo, self._pool)
        for row, number in enumerate(rounds):
            measured = self._ruler.of_models([weights[row] for weights in models])
            steps = {"local_steps": number * self._plan.rounds.local_steps, "correction_steps": 0}
            # Of several models, one per silo, neither a loss nor an accuracy would be a model's.
            also = self._of_one(models[0][row], number) if len(models) == 1 else {}
            yield self._evaluation(number, measured, steps | also)

    def _of_one(self, model: Vector, number: int) -> Json:
        """Loss by timestep, and accuracy in the last round of a conditional study."""
        found: Json = {"losses": self._ruler.losses_of_model(model)}
        if self._plan.model.classes is not None and number == self._plan.rounds.count:
            found |= self._ruler.accuracy_of_model(model)
        return found

    def _evaluation(self, number: int, measured: Measured, also: Json) -> Json:
        return {"event": "evaluation", "round": number, **measured.line(), **also}
