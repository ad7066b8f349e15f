"""The service and the simulation, given the same plan, images and secrets, make the same model.

Three silo processes and a coordinator process run two rounds of SCAFFOLD of which each is worked by
two of the silos; then the rounds are simulated. What differs is the entropy of the masks, which
cancel, so the models agree to the last bit.
"""

from __future__ import annotations

import time
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
from coordinator import admin
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
participation = 0.6

[strategy]
kind = "scaffold"
"""
LIMIT_SECONDS = 180.0


def run_service(out: Path, parts: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, bytes]]:
    """The final model of a real study, and the secret of each silo."""
    plan = out / "plan.toml"
    plan.write_text(PLAN, "utf-8")
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
        rested = [n for n, home in homes.items() if not (home / "control.npy").exists()]
        assert not rested, "over both rounds every silo has worked"
        return model, {name: (home / "seed").read_bytes() for name, home in homes.items()}


@pytest.mark.timeout(LIMIT_SECONDS + 120)
def test_service_and_simulation_make_the_same_model_by_scaffold_with_silos_that_rest(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)  # as the silos have it
    labelled, plan = digits(), load_plan(PLAN)
    assert {i for n in (1, 2) for i in plan.working(n, 3)} == {1, 2, 3}
    names = sorted(NAMES[:3])
    split = Partition(labels="classes", classes=4).split(labelled.labels, 3, seed=1)
    parts = {name: labelled.images[part] for name, part in zip(names, split, strict=True)}
    model, secrets = run_service(tmp_path, parts)

    simulation = Simulation(data="digits", silos=3, secure_sum=True)
    point = Point("both", "federated", plan, simulation, plan.study.seed)
    federation = silos.Federation(
        tuple(parts.values()),
        tuple(labelled.labels[part] for part in split),
        tuple(secrets[name] for name in names),
    )
    study = Study(point, federation, Memo(tmp_path / "memo"), silos.Here())
    assert [event["round"] for event in study.events()] == [1, 2]

    first = build_model(plan.model)
    initialise(first, plan.study.seed)
    moved = np.linalg.norm(study.model - to_vector(first))
    assert moved > 0.1
    np.testing.assert_array_equal(study.model, model)
