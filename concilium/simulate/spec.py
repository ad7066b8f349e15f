"""A simulation file: a study plan, and a [simulation] table that says what to vary.

    [simulation]
    data = "digits"                    # or "fashion-mnist", or a path (concilium/datasets.py)
    silos = 5
    seeds = [1, 2, 3]                  # of partition, first model, training and sampling
    partition = {labels = "classes", classes = 2}

    [[simulation.run]]                 # one study per run and seed
    name = "fedprox"
    plan.strategy = {kind = "fedprox", mu = 0.1}     # what differs from the plan of the file

Without a run the plan itself is simulated once per seed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from concilium.partition import Partition
from diffusion.features.file import FeatureFileError, check_names, read_network
from diffusion.spec import Spec
from study.plan import Plan, load_plan
from study.problems import PlanError, explain
from study.sections import Evaluation

Training = Literal["federated", "central", "local", "auxiliary"]


class Run(Spec):
    """[[simulation.run]]: one study, as a difference from the plan of the file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Names the run's folder and its row of a table."""

    training: Training = "federated"
    """Federated rounds, or one of the ends of the scale: one model on all images, one model per
    silo on its own, one model on the auxiliary set."""

    plan: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Sections of the plan, with the keys that are different in this run. A [strategy] replaces
    the whole section."""

    partition: Partition | None = None
    """Instead of the simulation's."""

    silos: Annotated[int, Field(ge=1, le=255)] | None = None
    """Instead of the simulation's."""

    secure_sum: bool | None = None
    """Instead of the simulation's."""

    falling_rate: bool | None = None
    """Instead of the simulation's."""

    audit: bool | None = None
    """Instead of the simulation's."""


class Simulation(Spec):
    """[simulation]: silos, data, seeds and runs."""

    data: Annotated[str, Field(min_length=1)]
    """"digits", "fashion-mnist", or a file or folder that a silo could read; with labels where
    partition or model need them."""

    silos: Annotated[int, Field(ge=1, le=255)]
    """How many."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Each run is made once per seed."""

    partition: Partition = Partition()
    """How the images are spread over the silos."""

    images: Annotated[int, Field(ge=20)] | None = None
    """Only so many images of the data set, drawn by the seed; absent = all."""

    precision: Literal["auto", "float32"] = "auto"
    """"auto" computes as a silo would; small models are faster in "float32", also where there are
    matrix units."""

    secure_sum: bool = False
    """Whether rounds go through the secure sum's parties and the plan's ring, instead of being
    averaged in float32."""

    falling_rate: bool = False
    """Whether the learning rate of "central", "local" and "auxiliary" falls over their rounds as it
    does in the federated ones (rounds.final_learning_rate); else it stays, and their average
    alone settles."""

    audit: bool = True
    """Whether silos drop samples too near to their training images before these are united. Only a
    simulation can leave it out, to see what it costs; a silo has no such switch."""

    feature_file: Path | None = None
    """The feature network, <name>.safetensors, where the plan names one that does not ship with the
    project; a relative path starts at this file's folder."""

    run: tuple[Run, ...] = ()
    """What to simulate."""

    @field_validator("feature_file")
    @classmethod
    def _has_a_name(cls, file: Path | None) -> Path | None:
        check_names([file] if file else [])
        return file

    @property
    def feature_files(self) -> tuple[Path, ...]:
        """As silos and coordinator have them."""
        return (self.feature_file,) if self.feature_file else ()


class _Table(Spec):
    """What a simulation file has besides the plan."""

    simulation: Simulation


@dataclass(frozen=True)
class Point:
    """One study with one seed: everything that its numbers depend on."""

    name: str
    training: Training
    plan: Plan
    simulation: Simulation
    seed: int

    @property
    def label(self) -> str:
        """Name and seed: what its folder is called."""
        return f"{self.name}-{self.seed}"

    @property
    def needs_labels(self) -> tuple[str, str] | None:
        """The setting that needs a label for every image, and what to do without; None where none
        does."""
        if self.plan.model.classes is not None:
            return "model.classes", "leave it out"
        spread = self.simulation.partition.labels
        return None if spread == "iid" else (f'partition labels = "{spread}"', 'write "iid"')


@dataclass(frozen=True)
class Sweep:
    """A simulation file."""

    simulation: Simulation
    plan: Mapping[str, Any]
    """The plan's sections as they were written."""

    def points(self) -> Iterator[Point]:
        """Every run with every seed: all runs with the first seed, then all with the second, …

        Raises PlanError for a run that makes no plan.
        """
        for seed in self.simulation.seeds:
            for run in self.simulation.run or (Run(name="study"),):
                yield self._point(run, seed)

    def _point(self, run: Run, seed: int) -> Point:
        merged = {name: dict(section) for name, section in self.plan.items()}
        for name, section in run.plan.items():
            merged[name] = dict(section) if name == "strategy" else merged.get(name, {}) | section
        merged["study"] = merged.get("study", {}) | {"seed": seed}
        changes = {
            key: value
            for key in ("partition", "silos", "secure_sum", "falling_rate", "audit")
            if (value := getattr(run, key)) is not None
        }
        simulation = self.simulation.model_copy(update={**changes, "run": (), "seeds": (seed,)})
        try:
            plan = load_plan(merged)
            if plan.model.classes is not None and run.training == "local":
                raise PlanError(
                    "training",
                    '"local" needs an unconditional model, since the model of one silo knows the '
                    "classes of that silo alone: leave out model.classes",
                )
            if plan.auxiliary is None and run.training == "auxiliary":
                raise PlanError(
                    "training",
                    '"auxiliary" needs an auxiliary set: add [auxiliary] with `images = …` and '
                    "[warm_up] with `steps = …`, or train otherwise",
                )
            if simulation.secure_sum and run.training == "federated":
                plan.validate_roster(simulation.silos)
            if plan.evaluation is not None:
                _check_network(plan.evaluation, simulation)
        except PlanError as error:
            raise PlanError(f'run "{run.name}"', str(error)) from error
        return Point(run.name, run.training, plan, simulation, seed)


def _check_network(wanted: Evaluation, simulation: Simulation) -> None:
    name, sha256, files = wanted.feature_network, wanted.sha256, simulation.feature_files
    try:
        read_network(name, sha256, files, where="feature_file of [simulation]")
    except FeatureFileError as error:
        raise PlanError("evaluation", str(error)) from error


def load_sweep(path: Path) -> Sweep:
    """Raises PlanError, which says where the file is wrong and what to write instead."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(str(path), f"cannot be read as TOML: {error}") from error
    table = raw.pop("simulation", None)
    if table is None:
        raise PlanError(str(path), "has no [simulation]: add it, with data = … and silos = …")
    try:
        written = json.dumps({"simulation": table}, default=str)
        simulation = _Table.model_validate_json(written).simulation
    except ValidationError as error:
        raise PlanError(str(path), *explain(error, _Table)) from error
    if simulation.feature_file is not None:
        file = path.parent.absolute() / simulation.feature_file.expanduser()
        simulation = simulation.model_copy(update={"feature_file": file})
    sweep = Sweep(simulation, raw)
    names = [run.name for run in simulation.run]
    if len(set(names)) != len(names):
        raise PlanError(str(path), "two runs have the same name: rename one")
    list(sweep.points())  # every run is a plan, or none is begun
    return sweep
