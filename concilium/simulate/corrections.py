"""The coordinator's part of a simulated round of FedDDPM: decide, correct, judge.

Reads as `coordinator/rounds.py` does; what is trained is what `diffusion.calibration` trains.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.simulate.measure import Ruler
from concilium.simulate.memo import Arrays, Memo, digest_array
from diffusion.batches import Shared
from diffusion.calibration import calibrate
from diffusion.execution import Execution
from diffusion.labels import Labels
from diffusion.loss import fixed_loss
from diffusion.model import build_model, load_vector, to_vector
from study.plan import Plan
from study.strategies import Correction, RoundRecord

Json = dict[str, Any]
Vector = NDArray[np.float32]
Images = NDArray[np.uint8]
Labelled = tuple[Images, Labels | None]
"""Images, with their labels where the model is conditional."""


class Corrections:
    """The corrections of one study on its auxiliary set.

    A part of the set is held back: the trigger watches the loss on it, and neither corrections nor
    silos ever train on it.
    """

    def __init__(
        self,
        plan: Plan,
        rule: Correction,
        auxiliary: Labelled,
        *,
        memo: Memo,
        ruler: Ruler,
        execution: Execution,
        common: Json,
    ) -> None:
        self._plan, self._rule = plan, rule
        self._memo, self._ruler, self._execution, self._common = memo, ruler, execution, common
        images = len(auxiliary[0])
        held = rule.held_back(images)
        if images <= held:
            raise ValueError(
                f"the auxiliary set holds {images} images, too few to hold {held} out: raise "
                "auxiliary.images in the plan"
            )
        self._watched, self._training = (
            _part(auxiliary, part) for part in (slice(held), slice(held, None))
        )

    def shared(self) -> Shared | None:
        """What silos are sent to train on, where the strategy has them do so."""
        part = self._plan.strategy.local_rules().auxiliary_share
        return Shared(*self._training, part) if part else None

    def decide(
        self,
        number: int,
        model: Vector,
        history: list[RoundRecord],
        silo_loss: float | None,
        sharing: bool,
    ) -> tuple[Vector, RoundRecord, list[Json]]:
        """The model after the decision of this round, its record, and the lines about it."""
        before = self._held_out_loss(model)
        now = RoundRecord(number, before, silo_loss=silo_loss, silos=(sharing,))
        last = number == self._plan.rounds.count
        decision = self._plan.strategy.decide([*history, now], last)
        lines: list[Json] = [
            {"event": "decision", "round": number, "loss": before, **asdict(decision)}
        ]
        if not decision.correct:
            return model, now, lines
        corrected = self._correct(number, model)
        after = self._held_out_loss(corrected["model"])
        kept: Json = {"kept": True}
        if self._plan.evaluation is not None and self._rule.judges(last):
            kept = self._judge(model, corrected["model"])
        lines.append(
            {
                "event": "correction",
                "round": number,
                "steps": self._plan.correction_steps(number),
                "training_loss": float(corrected["loss"]),
                "loss_after": after,
                **kept,
            }
        )
        record = replace(now, aux_loss_after=after, corrected=True)
        return corrected["model"] if kept["kept"] else model, record, lines

    def _judge(self, aggregate: Vector, corrected: Vector) -> Json:
        before, after = (self._ruler.judged_fid(model) for model in (aggregate, corrected))
        return {"fid_before": before, "fid_after": after, "kept": after < before}

    def _held_out_loss(self, model: Vector) -> float:
        inputs = {
            **self._common,
            "what": "held-out loss",
            "given": digest_labelled(model, self._watched),
            "seed": self._plan.study.seed,
        }
        return float(self._memo.get(inputs, lambda: {"loss": self._loss(model)})["loss"])

    def _loss(self, model: Vector) -> NDArray[Any]:
        network, (images, labels) = build_model(self._plan.model), self._watched
        load_vector(network, model)
        loss = fixed_loss(
            network,
            images,
            schedule=self._plan.schedule,
            objective=self._plan.objective,
            seed=self._plan.study.seed,
            execution=self._execution,
            labels=labels,
        )
        return np.array(loss)

    def _correct(self, number: int, model: Vector) -> Arrays:
        plan, (images, labels) = self._plan, self._training
        last = number == plan.rounds.count
        steps, rate = plan.correction_steps(number), plan.correction_rate(number)
        average = self._rule.averages(last)
        inputs = {
            **self._common,
            "what": "correction",
            "given": digest_labelled(model, self._training),
            "optimizer": plan.optimizer.model_dump(mode="json"),
            "correction": [steps, rate, average],
            "seed": plan.study.seed + number,
        }

        def compute() -> Arrays:
            network = build_model(plan.model)
            load_vector(network, model)
            result = calibrate(
                network,
                images,
                labels=labels,
                steps=steps,
                learning_rate=rate,
                schedule=plan.schedule,
                objective=plan.objective,
                optimizer=plan.optimizer,
                seed=plan.study.seed + number,
                execution=self._execution,
            )
            corrected = result.ema if average else to_vector(network)
            return {"model": corrected, "loss": np.array(result.loss_sum / result.steps)}

        return self._memo.get(inputs, compute)


def _part(of: Labelled, part: slice) -> Labelled:
    images, labels = of
    return images[part], None if labels is None else labels[part]


def digest_labelled(model: Vector, of: Labelled) -> str:
    """The digest of a model and of images with their labels, if any."""
    images, labels = of
    return digest_array(model, images) if labels is None else digest_array(model, images, labels)
