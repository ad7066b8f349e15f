"""The study plan: everything that all sites agree on before the first round, as one TOML file.

Each section is a frozen pydantic model that refuses unknown keys; `Plan.toml()` is the canonical
text of what was understood and `Plan.digest()` its hash, the same for every formatting of the
same plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError, model_validator

from diffusion.spec import (
    ModelSpec,
    ObjectiveSpec,
    OptimizerSpec,
    SamplerSpec,
    ScheduleSpec,
    Spec,
    shared_rows,
)
from study.problems import PlanError, explain
from study.reservation import LABEL_BYTES
from study.sections import (
    Auxiliary,
    Data,
    Deadlines,
    Evaluation,
    Quorum,
    Rounds,
    SecureSum,
    Study,
    WarmUp,
)
from study.strategies import AnyStrategy, Correction, FedAvg, FedDDPMPlus


class Plan(Spec):
    """A study plan. Sections without a default must be there."""

    study: Study
    secure_sum: SecureSum = SecureSum()
    deadlines: Deadlines = Deadlines()
    data: Data
    model: ModelSpec
    schedule: ScheduleSpec = ScheduleSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    sampler: SamplerSpec = SamplerSpec()
    warm_up: WarmUp | None = None
    auxiliary: Auxiliary | None = None
    rounds: Rounds
    strategy: AnyStrategy = FedAvg()
    evaluation: Evaluation | None = None

    @property
    def record_size(self) -> int:
        """Bytes of one record of the anonymous union (`study.reservation`)."""
        channels, height, width = self.data.shape
        label = 0 if self.model.classes is None else LABEL_BYTES
        return 1 + label + channels * height * width

    def evaluates(self, round: int) -> bool:
        """Whether the model of this round, 1 … rounds.count, is evaluated."""
        every = self.evaluation.every if self.evaluation else 0
        return bool(every) and (round % every == 0 or round == self.rounds.count)

    @property
    def evaluations(self) -> int:
        """How many rounds are evaluated."""
        every, count = self.evaluation.every if self.evaluation else 0, self.rounds.count
        return -(-count // every) if every else 0

    def may_stop_sharing(self, round: int) -> bool:
        """Whether the silos of this round may be asked to train on their own images alone though
        the strategy has an auxiliary_share: not before an evaluation could tell that they should.
        """
        first = min(self.evaluation.every, self.rounds.count) if self.evaluation else round
        return self.strategy.stops_sharing and round > first

    @property
    def first_clip(self) -> float:
        """The clip of every tensor in the first round, a float32 value.

        By default learning_rate · local_steps: where AdamW takes a parameter whose gradient stays
        the same. A gradient that grows can take it further; that is clipped, counted and carried.
        """
        given = self.rounds.first_clip
        bound = self.optimizer.learning_rate * self.rounds.local_steps
        return float(np.float32(bound if given is None else given))

    def first_clips(self, tensors: int) -> tuple[float, ...]:
        """The clips of a model of so many tensors in the first round, for all parts of the vector.

        Half of SCAFFOLD's vector is Δc_i, in the first round a mean of gradients none of which is
        longer than gradient_clip, which therefore is the clip of their elements.
        """
        control = float(np.float32(self.optimizer.gradient_clip))
        clips = [self.first_clip, control][: self.strategy.parts]
        return tuple(clip for clip in clips for _ in range(tensors))

    def working(self, round: int, silos: int) -> frozenset[int]:
        """Roster indices, 1 … N, of the silos that train in a round; the others send zeros.

        m = ⌈participation · N⌉ of them, those whose SHA-256 of (seed, round, index) is smallest:
        without bias, and decided before the study began.
        """
        return working_silos(self.study.seed, round, silos, self.rounds.participation)

    def optimizer_of(self, round: int) -> OptimizerSpec:
        """The local optimiser of a round, 1 … rounds.count: lr_r = lr · f^((r − 1)/(R − 1))."""
        rate = self.optimizer.learning_rate * self._decay(round)
        return self.optimizer.model_copy(update={"learning_rate": rate})

    @property
    def _correction(self) -> Correction:
        if (correction := self.strategy.correction) is None:
            raise ValueError(f"{self.strategy.kind} does not correct")
        return correction

    def correction_steps(self, round: int) -> int:
        """The steps of a correction after a round, 1 … rounds.count."""
        return self._correction.steps_in(round, self.rounds.count, self.rounds.local_steps)

    def correction_rate(self, round: int) -> float:
        """The learning rate of a correction after a round; it falls as the silos' does."""
        rate = self._correction.learning_rate
        return (self.optimizer.learning_rate if rate is None else rate) * self._decay(round)

    def _decay(self, round: int) -> float:
        passed = (round - 1) / max(1, self.rounds.count - 1)
        return float(self.rounds.final_learning_rate**passed)

    def toml(self) -> str:
        """The canonical text: every key with its value, in the order of the models."""
        lines: list[str] = []
        for name, section in self.model_dump(mode="json", exclude_none=True).items():
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in section.items()]
        return "\n".join(lines[1:]) + "\n"

    def digest(self) -> bytes:
        """SHA-256 of the canonical text: 32 bytes."""
        return text_digest(self.toml())

    def validate_roster(self, silos: int) -> Quorum:
        """t and c for N = `silos`; raises PlanError where the plan cannot be run with so many."""
        quorum = self.secure_sum.quorum(silos)
        room = min(2 ** (self.secure_sum.ring - 1) - 2, 255)
        if silos > room:
            where, ring = f"a roster of {silos}", self.secure_sum.ring
            fix = "use 16" if ring == 8 else "that is the most a study can have"
            raise PlanError(where, f"secure_sum.ring = {ring} has room for {room} silos: {fix}")
        self._check_participation(silos, quorum)
        return quorum

    def _check_participation(self, silos: int, quorum: Quorum) -> None:
        """Whoever drops out, and whoever colludes, two silos that worked are left in every sum:
        m − (N − t) − c ≥ 2. Zeros hide nobody, and everybody knows who sent them."""
        working = len(self.working(1, silos))
        needed = silos - quorum.threshold + quorum.colluders + 2
        if self.rounds.participation < 1.0 and working < needed:
            raise PlanError(
                f"a roster of {silos}",
                f"rounds.participation = {self.rounds.participation} lets {working} silos work; "
                f"with threshold = {quorum.threshold} and colluders = {quorum.colluders} it takes "
                f"{needed} for two honest ones to be left in every sum: use more, or a higher "
                "threshold, or fewer colluders",
            )

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        for key in ("image_size", "channels"):
            if getattr(self.model, key) != getattr(self.data, key):
                raise ValueError(
                    f"model.{key} = {getattr(self.model, key)} differs from data.{key} = "
                    f"{getattr(self.data, key)}: leave it out of [model]"
                )
        try:
            self.sampler.check_against(self.schedule)
        except ValueError as error:
            raise ValueError(f"sampler.{error}") from error
        names = self.data.class_names
        if names is not None and (len(set(names)), len(names)) != (self.model.classes,) * 2:
            raise ValueError(
                f"data.class_names has {len(names)} names, {len(set(names))} of them different, "
                f"but model.classes = {self.model.classes}: write each class once, or leave it out"
            )
        if self.model.classes is None and self.sampler.guidance != 1.0:
            raise ValueError(
                f"sampler.guidance = {self.sampler.guidance} needs a model with classes: leave it "
                "out, or set model.classes"
            )
        if self.strategy.correction and self.auxiliary is None:
            raise ValueError(
                f'strategy.kind = "{self.strategy.kind}" corrects on auxiliary images: '
                "add [auxiliary] with `images = …`, or use another strategy"
            )
        watches_silos = isinstance(self.strategy, FedDDPMPlus) and self.strategy.signal == "silos"
        if watches_silos and self.rounds.participation < 1.0:
            raise ValueError(
                f'strategy.signal = "silos" compares rounds of the same silos, but with '
                f"rounds.participation = {self.rounds.participation} others train in each: use "
                'signal = "auxiliary", or let all of them train'
            )
        share, batch = self.strategy.local_rules().auxiliary_share, self.optimizer.batch_size
        if share and shared_rows(share, batch) < 1:
            raise ValueError(
                f"strategy.auxiliary_share = {share} of optimizer.batch_size = {batch} is no whole "
                "image: raise either, or write auxiliary_share = 0, so that no site is sent the "
                "images of others for nothing"
            )
        if self.auxiliary and self.warm_up is None:
            raise ValueError(
                "warm_up is missing, but [auxiliary] samples the local models it trains: "
                "add [warm_up] with `steps = …`"
            )
        return self


def text_digest(text: str) -> bytes:
    """SHA-256 of a plan's canonical text: 32 bytes."""
    return hashlib.sha256(b"concilium/plan/1\n" + text.encode()).digest()


def working_silos(seed: int, round: int, silos: int, participation: float) -> frozenset[int]:
    """See `Plan.working`."""
    # 0.7 · 10 is a little more than 7 in binary, and must not make 8 of 10.
    number = max(1, math.ceil(participation * silos - 1e-9))
    order = sorted(range(1, silos + 1), key=lambda index: _draw(seed, round, index))
    return frozenset(order[:number])


def _draw(seed: int, round: int, index: int) -> bytes:
    return hashlib.sha256(f"concilium/working/1 {seed} {round} {index}".encode()).digest()


def load_plan(source: Path | str | Mapping[str, Any]) -> Plan:
    """The plan in a file (a Path), in a text (a str), or in sections that were parsed already.

    Raises PlanError, which says for every problem where it is, what was given and what to write
    instead.
    """
    where = str(source) if isinstance(source, Path) else "plan"
    try:
        raw = _sections(source)
    except OSError as error:
        raise PlanError(where, f"cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise PlanError(where, f"byte {error.start} is no UTF-8: save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        # Beside TOMLDecodeError: an integer of thousands of digits, a table a thousand tables deep.
        raise PlanError(where, f"is no TOML: {error}") from error
    _take_image_shape_from_data(raw)
    try:  # as JSON, where strict still takes an array for a tuple and 1 for 1.0
        return Plan.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise PlanError(where, *explain(error, Plan)) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(where, f"no plan looks like this: {error}") from error


def _sections(source: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {name: dict(section) for name, section in source.items()}
    return tomllib.loads(source.read_text("utf-8") if isinstance(source, Path) else source)


def _take_image_shape_from_data(raw: dict[str, Any]) -> None:
    data, model = raw.get("data"), raw.get("model")
    if isinstance(data, dict) and isinstance(model, dict):
        for key in ("image_size", "channels"):
            if key in data:
                model.setdefault(key, data[key])


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)  # booleans, integers and strings as in TOML
