"""What an encoding leaves out is put into a later round once, whatever happens between.

Four silo processes and a coordinator process. The local steps change nothing (their learning rate
is lost in a float32), so all that a silo has to say is what it is given as the remainder of earlier
rounds, in words of 8 bits that cannot hold it in one round. Every round meets a disaster:

    round 1   st-marys is killed after its upload was committed: it is in the sum
    round 2   northgate is killed after it shared its keys: the sum is without it
    round 3   lakeside and riverside are killed there: the session is aborted and tried again
    round 4   nothing happens
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from concilium.demo.federation import NAMES, Federation
from coordinator import admin
from silo.home import SiloHome
from silo.model_size import parameter_count
from study.integers import coarse_count
from study.plan import load_plan
from study.quantity import RoundWork, decode_work
from tests.e2e.keeper import Keeper

PLAN = """
[study]
name = "remainder"
title = "Nothing but what is left over"
seed = 5

[deadlines]
advertise = 120
share = 20
input = 15
confirm = 15
unmask = 20

[data]
image_size = 8

[model]
block_out_channels = [8, 8]
attention = [false, false]
mid_attention = false
norm_num_groups = 4

[optimizer]
learning_rate = 1e-30
batch_size = 4

[sampler]
steps = 1

[secure_sum]
ring = 8

[rounds]
count = 4
local_steps = 1
first_clip = 0.01
"""
FAILPOINTS = {
    "st-marys": "after-upload:round=1",
    "northgate": "after-share:round=2",
    "lakeside": "after-share:round=3",
    "riverside": "after-share:round=3",
}
ROUNDS, COUNT = (1, 2, 3, 4), 20
LIMIT_SECONDS = 600.0


def found(out: Path) -> Federation:
    federation = Federation(out, NAMES[:4], absent_after=120.0)
    for name in federation.names:
        federation.found_silo(name, np.zeros((COUNT, 1, 8, 8), np.uint8))
    federation.found_coordinator()
    federation.enrol()
    return federation


def follow(federation: Federation, study: str) -> None:
    """Bring killed silos back, the two of round 3 once their session is given up."""
    deadline = time.monotonic() + LIMIT_SECONDS
    told = False
    while time.monotonic() < deadline:
        status = next(s for s in admin.status(federation.coordinator_home).studies if s.id == study)
        told = told or "lakeside" in (status.error or "")
        for name in federation.names:
            gone = federation.processes[name].popen.poll() is not None
            if gone and (told or name in ("st-marys", "northgate")):
                federation.start(name)
        if status.state in ("finished", "failed"):
            assert status.state == "finished", status.error
            assert told, "the session of round 3 was given up, with the reason"
            return
        time.sleep(0.1)
    raise AssertionError(f"not over after {LIMIT_SECONDS:.0f} s: {status}")


def summed(federation: Federation) -> dict[int, tuple[RoundWork, tuple[int, ...]]]:
    """Round → its work, and the roster indices of the silos in its sum."""
    store = sqlite3.connect(federation.coordinator_home / "store.sqlite")
    rows = store.execute("select quantity, work, outcome from sessions where outcome is not null")
    rounds = {}
    for quantity, raw, outcome in rows:
        end = json.loads(outcome)
        work = decode_work(raw)
        if end["kind"] == "summed" and isinstance(work, RoundWork):
            rounds[int(quantity.split()[1])] = work, tuple(end["survivors"])
    store.close()
    return rounds


def said(vector: Path, work: RoundWork) -> NDArray[np.float64]:
    """What a silo's words mean: q · c / (w · S)."""
    words = np.fromfile(vector, "<i1")[: sum(work.sizes)].astype(np.float64)
    share = coarse_count(COUNT) / work.total_count * (127 - 4)
    units: NDArray[np.float64] = words * np.repeat(np.array(work.clips), work.sizes)
    return units / share


@pytest.mark.timeout(LIMIT_SECONDS + 120)
def test_what_was_left_over_is_neither_lost_nor_given_twice(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN, "utf-8")
    n = parameter_count(load_plan(PLAN).model)
    given = {
        name: np.random.default_rng(i).normal(0, 0.05, n).astype(np.float32)
        for i, name in enumerate(NAMES[:4])
    }
    with found(tmp_path) as federation:
        study = admin.start_study(federation.coordinator_home, plan)
        homes = {name: SiloHome(federation.silo_home(name)).study(study) for name in given}
        for name, remainder in given.items():
            np.save(homes[name].residual, remainder)
        keeper = Keeper(tmp_path / "silos", tmp_path / "kept")
        keeper.start()
        for name in given:
            federation.start(name, {"CONCILIUM_FAILPOINT": FAILPOINTS[name]})
        follow(federation, study)
        keeper.stop()
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not all(h.ended.exists() for h in homes.values()):
            time.sleep(0.1)
        rounds = summed(federation)
        assert sorted(rounds) == list(ROUNDS)
        order = sorted(given)
        assert order[1] == "northgate"
        assert 2 not in rounds[2][1]
        for index, name in enumerate(order, start=1):
            # On a busy machine a silo may be late for another round too, and then counts as gone.
            present = [r for r in ROUNDS if index in rounds[r][1]]
            kept = {r: tmp_path / "kept" / f"{name}.round-{r}" for r in present}
            parts = [said(vector, rounds[r][0]) for r, vector in kept.items()]
            assert len(parts) >= 2
            assert all(np.any(part) for part in parts)
            left = np.load(homes[name].residual)
            assert not np.array_equal(left, given[name])
            np.testing.assert_allclose(np.sum(parts, axis=0) + left, given[name], atol=2e-6)
