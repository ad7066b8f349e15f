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
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from diffusion.spec import (
    ModelSpec,
    ObjectiveSpec,
    OptimizerSpec,
    SamplerSpec,
    ScheduleSpec,
    Spec,
)
from study.problems import PlanError, explain
from study.reservation import LABEL_BYTES
from study.strategies import AnyStrategy, FedAvg

ClassName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Seconds = Annotated[float, Field(gt=0.0, le=30 * 86_400)]


class Study(Spec):
    """[study]: who this is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Short name: lower-case letters, digits and hyphens."""

    title: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
    """One line for people."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """The first model is derived from it at every site."""


class Quorum(NamedTuple):
    """Threshold t and tolerated colluding silos c of a study with a given roster."""

    threshold: int
    colluders: int


class SecureSum(Spec):
    """[secure_sum]: what the secure sum tolerates, and the width of its words."""

    threshold: Annotated[int, Field(ge=2, le=255)] | None = None
    """t: silos that must stay for a sum to be revealed; absent = floor(2N/3) + 1."""

    colluders: Annotated[int, Field(ge=0, le=255)] | None = None
    """c: silos that may be in league with the coordinator; absent = as many as possible."""

    ring: Literal[8, 16, 32] = 16
    """Bits per parameter on the wire."""

    def quorum(self, silos: int) -> Quorum:
        """t and c for a roster of N silos; raises PlanError unless 2t > N + c and t − c ≥ 2.

        2t > N + c: any two sets of t silos share one that is honest, and it unmasks only once.
        t − c ≥ 2: what c colluders subtract from a sum leaves at least two silos in it.
        """
        N, where = silos, f"[secure_sum] with a roster of {silos}"
        if N < 3:
            raise PlanError(where, "of two silos each can compute the other's part: invite more")
        t = 2 * N // 3 + 1 if self.threshold is None else self.threshold
        if t > N:
            raise PlanError(where, f"threshold = {t} exceeds the {N} silos: use at most {N}")
        most = min(2 * t - N - 1, t - 2)
        if most < 0:
            fix = f"use at least {N // 2 + 1}, or leave it out"
            raise PlanError(where, f"threshold = {t} is no majority (2t > N + c): {fix}")
        c = most if self.colluders is None else self.colluders
        if c > most:
            fix = f"use at most {most}" + (", or a higher threshold" if t < N else "")
            rule = f"too many for threshold = {t} (2t > N + c and t − c ≥ 2)"
            raise PlanError(where, f"colluders = {c} is {rule}: {fix}")
        return Quorum(t, c)


class Deadlines(Spec):
    """[deadlines]: seconds after which the coordinator closes an offer, or a step of a session."""

    offer: Seconds = 14 * 86_400.0
    """For the sites' answers: then the study goes without those that gave none."""

    advertise: Seconds = 900.0
    """From the task to the adverts: local training, sampling and encoding happen here."""

    share: Seconds = 60.0
    """Key shares."""

    input: Seconds = 300.0
    """The upload of the masked vector."""

    confirm: Seconds = 60.0
    """Confirmations of who is in the sum."""

    unmask: Seconds = 60.0
    """What unmasking needs."""


class Data(Spec):
    """[data]: the images every site brings, as uint8."""

    image_size: Annotated[int, Field(ge=4, le=1024)]
    """Height and width in pixels; sites resize to it."""

    channels: Annotated[int, Field(ge=1, le=16)] = 1
    """1 = greyscale, 3 = RGB."""

    class_names: tuple[ClassName, ...] | None = None
    """Names of the classes of a conditional model, in the order of their labels; needed where sites
    name classes (folders, CIFAR), since each numbers only those that it has."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.image_size, self.image_size


class WarmUp(Spec):
    """[warm_up]: the local DDPM that each silo samples its auxiliary images from."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Training steps from the study's first model, on the silo's own images: the most that are
    taken, and the time that is taken whatever the criterion below finds."""

    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """w: the model has converged when the loss of the silo's own held-out images was not improved
    in so many checks; absent = all steps are taken."""

    improvement: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """x: by how much, relative to the best loss so far, a check has to be better to count."""

    check_every: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Steps between two checks."""

    held_out: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of the silo's images that is watched instead of trained on, where there is patience."""


class Auxiliary(Spec):
    """[auxiliary]: the anonymous union of locally sampled images."""

    images: Annotated[int, Field(ge=10, le=1_000_000)]
    """M: images wanted in all; each silo makes its share by the coarse counts."""

    slots_per_image: Annotated[int, Field(ge=2, le=64)] = 8
    """Places drawn from, per image wanted: at 8, one image in eight is lost to a collision."""

    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Reservations before the union goes on without the silos that keep vanishing."""

    audit_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """A sample nearer to a training image than this quantile of the nearest-neighbour distances
    within the site's own images is dropped."""


class Rounds(Spec):
    """[rounds]: the federated rounds."""

    count: Annotated[int, Field(ge=1, le=100_000)]
    """Number of model rounds."""

    local_steps: Annotated[int, Field(ge=1, le=1_000_000)]
    """Training steps per silo and round: the same everywhere, so that time tells nothing."""

    final_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Local learning rate of the last round as a share of the first round's; a geometric sequence
    between them. Late rounds with small steps drift apart less."""

    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the silos that work in a round, the same number in each; who rests sends zeros.
    Drawn from study.seed, so that everyone knows who and nobody can choose."""

    first_clip: Annotated[float, Field(ge=1e-6, le=100.0)] | None = None
    """Largest change of a parameter in the first round (later clips follow the aggregates);
    absent = learning_rate · local_steps."""


class Evaluation(Spec):
    """[evaluation]: FID by securely summed features, and what only silos can measure."""

    feature_network: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    """Name of the feature network."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of its weights: 64 lower-case hexadecimal digits."""

    feature_bound: Annotated[float, Field(gt=0.0, le=1e6)] = 2.0
    """Largest magnitude of a feature; what exceeds it is clipped and counted."""

    samples: Annotated[int, Field(ge=2, le=1_000_000)]
    """Images sampled from the global model; FID depends on it."""

    every: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Evaluate after every so many rounds, and after the last."""

    at_silos: bool = False
    """Whether each silo compares the samples, and the model, with its own images, and the mean of
    KID, coverage, near-copies and loss by timestep is summed. A site's policy has to allow it."""


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
    def copy_quantile(self) -> float:
        """The quantile of the memorisation audit, also without an auxiliary set."""
        return self.auxiliary.audit_quantile if self.auxiliary else 0.05

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
        passed = (round - 1) / max(1, self.rounds.count - 1)
        rate = self.optimizer.learning_rate * self.rounds.final_learning_rate**passed
        return self.optimizer.model_copy(update={"learning_rate": rate})

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
