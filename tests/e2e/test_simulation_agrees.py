"""The service and the simulation, given the same plan, images and secrets, make the same model.

Three silo processes and a coordinator process run two rounds of SCAFFOLD of which each is worked by
two of the silos; then the rounds are simulated. What differs is the entropy of the masks, which
cancel, so the models agree to the last bit. The same for a study whose silos also train on the
auxiliary images, in the order in which the service happened to unite them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from concilium.datasets import digits
from concilium.demo.federation import NAMES, Federation
from concilium.partition import Partition
from concilium.simulate import silos
from concilium.simulate.memo import Memo
from concilium.simulate.spec import Point, Simulation
from concilium.simulate.study import Study
from coordinator import admin, results
from coordinator.artifacts import Artifacts
from coordinator.config import Home
from coordinator.store import Store
from diffusion.model import build_model, initialise, load_pipeline, to_vector
from study.plan import load_plan

PLAN = """
[study]
name = "both"
title = "The same study twice"
seed = 12

[deadlines]
advertise = 120
share = 30
input = 30
confirm = 30
unmask = 30

[data]
image_size = 8

[model]
block_out_channels = [8, 8]
attention = [false, false]
mid_attention = false
norm_num_groups = 4

[optimizer]
batch_size = 16

[sampler]
steps = 5

[secure_sum]
ring = 32
colluders = 0                         # with one, all three would have to work in every round

[rounds]
count = 2
local_steps = 3
"""
SCAFFOLD = """participation = 0.6

[strategy]
kind = "scaffold"
"""
SHARED = """
[warm_up]
steps = 2

[auxiliary]
images = 40

[strategy]
kind = "fedddpm_plus"
"""
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Served:
    """What a real study left."""

    model: np.ndarray
    secrets: dict[str, bytes]
    homes: dict[str, Path]
    """A folder of the study at each silo."""
    union: np.ndarray | None
    """The auxiliary set: what was held out, then what silos and coordinator train on."""


def run_service(out: Path, parts: dict[str, np.ndarray], text: str) -> Served:
    """A real study of the plan `text` to its end."""
    plan = out / "plan.toml"
    plan.write_text(text, "utf-8")
    with Federation(out, sorted(parts), absent_after=120.0) as federation:
        for name, images in parts.items():
            federation.found_silo(name, images)
        federation.found_coordinator()
        federation.enrol()
        for name in parts:
            federation.start(name)
        study = admin.start_study(federation.coordinator_home, plan)
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            federation.check()
            status = admin.status(federation.coordinator_home).studies[0]
            if status.state in ("finished", "failed"):
                break
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        assert status.state == "finished", status.error
        model = to_vector(load_pipeline(status.folder / "model").unet)
        homes = {name: federation.silo_home(name) / "studies" / study for name in parts}
        while not all((home / "ended.json").exists() for home in homes.values()):
            assert time.monotonic() < deadline, "a silo has not heard of the end"
            time.sleep(0.1)
        secrets = {name: (home / "seed").read_bytes() for name, home in homes.items()}
        home = Home(federation.coordinator_home)
        store = Store(home.database(home.config()))
        united = store.run(results.result, study, "auxiliary")
        store.close()
        union = None
        if "training" in united:
            path = Artifacts(home.artifacts).path
            named = [bytes.fromhex(united[part]) for part in ("held_out", "training")]
            union = np.concatenate([np.load(path(sha256)) for sha256 in named])
        return Served(model, secrets, homes, union)


@pytest.mark.timeout(LIMIT_SECONDS + 120)
def test_service_and_simulation_make_the_same_model_by_scaffold_with_silos_that_rest(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)  # as the silos have it
    plan = load_plan(PLAN + SCAFFOLD)
    assert {i for n in (1, 2) for i in plan.working(n, 3)} == {1, 2, 3}
    served, simulated = both(tmp_path, PLAN + SCAFFOLD)
    rested = [n for n, home in served.homes.items() if not (home / "control.npy").exists()]
    assert not rested, "over both rounds every silo has worked"
    np.testing.assert_array_equal(simulated, served.model)


@pytest.mark.timeout(LIMIT_SECONDS + 120)
def test_so_they_do_where_silos_train_on_the_auxiliary_images_too(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    served, simulated = both(tmp_path, PLAN + SHARED)
    assert served.union is not None
    np.testing.assert_array_equal(simulated, served.model)


def both(folder: Path, text: str) -> tuple[Served, np.ndarray]:
    """What the service made, and the model that the simulation makes of the same."""
    labelled, plan = digits(), load_plan(text)
    names = sorted(NAMES[:3])
    split = Partition(labels="classes", classes=4).split(labelled.labels, 3, seed=1)
    parts = {name: labelled.images[part] for name, part in zip(names, split, strict=True)}
    served = run_service(folder, parts, text)

    simulation = Simulation(data="digits", silos=3, secure_sum=True)
    point = Point("both", "federated", plan, simulation, plan.study.seed)
    federation = silos.Federation(
        tuple(parts.values()),
        tuple(labelled.labels[part] for part in split),
        tuple(served.secrets[name] for name in names),
    )
    study = Study(point, federation, Memo(folder / "memo"), silos.Here())
    if served.union is not None:
        # Slots are drawn from the system's entropy; the order of the images follows from them.
        united = {"images": served.union, "tag_bytes": np.array(0), "image_bytes": np.array(0)}
        study._auxiliary = lambda: united  # type: ignore[method-assign]
    rounds = [event["round"] for event in study.events() if event["event"] == "round"]
    assert rounds == [1, 2]

    first = build_model(plan.model)
    initialise(first, plan.study.seed)
    assert np.linalg.norm(study.model - to_vector(first)) > 0.1
    return served, study.model
