"""A correction that takes long: done in parts, gone on with after a restart, ended when told."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from coordinator import admin, jobs, rounds
from coordinator.config import Home
from study.plan import load_plan
from tests.coordinator.federation import PLAN, Federation
from tests.coordinator.test_study import FEDDDPM_PLUS

HERE = jobs.Machine("cpu", 1)
LONG = re.sub(r"(?<=\ncorrection_steps = )2", "1000000", FEDDDPM_PLUS)


def corrected(folder: Path, seconds: list[float], *, average: bool) -> tuple[list[int], bytes]:
    """The steps done after each part, and what the last of them left."""
    plan = load_plan(PLAN.format(rounds=1, deadline=20.0, more=FEDDDPM_PLUS)).toml()
    model, images = folder / "model.f32", folder / "images.npy"
    kept, out = folder / "kept" / "round-1", folder / "out.f32"
    jobs.first_model(plan, model)
    np.save(images, np.random.default_rng(1).integers(0, 256, (8, 1, 4, 4), dtype=np.uint8))
    done = [
        jobs.correct(HERE, plan, model, images, None, 5, 1e-3, average, 1, part, kept, out)[0]
        for part in seconds
    ]
    return done, out.read_bytes()


@pytest.mark.parametrize("average", [False, True])
def test_in_however_many_parts_it_ends_in_the_same_bits(tmp_path: Path, average: bool) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    at_once, whole = corrected(tmp_path / "whole", [3600.0], average=average)
    by_and_by, parts = corrected(tmp_path / "parts", [0.0] * 5, average=average)
    assert (at_once, by_and_by) == ([5], [1, 2, 3, 4, 5])
    assert whole == parts
    assert not (tmp_path / "whole" / "kept").exists()


def test_one_whose_checkpoint_cannot_be_read_starts_over(tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "round-1"
    kept.parent.mkdir()
    kept.write_bytes(b"half of it")
    assert corrected(tmp_path, [0.0, 0.0, 3600.0], average=False)[0] == [1, 2, 5]


async def test_it_goes_on_after_a_restart_and_ends_when_an_operator_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "_CORRECTS_FOR", 0.2)
    async with Federation(tmp_path) as federation:
        for silo in await federation.join_four():
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=1, more=LONG))
        corrections = Home(federation.home).corrections(study)

        def steps() -> int:
            told = re.search(r"correction, ([\d,]+) of 1,000,000 steps", stage())
            return int(told[1].replace(",", "")) if told else 0

        def stage() -> str:
            return federation.study(study).stage

        done = await federation.until(steps)
        await federation.stop()
        done = max(done, steps())
        assert len(list(corrections.iterdir())) == 1
        await federation.start()
        # Were it begun anew, it would have to pass a smaller number first.
        later = await federation.until(lambda: steps() not in (0, done) and steps())
        assert later > done

        admin.stop_study(federation.home, study)
        await federation.until(lambda: federation.study(study).state == "stopped")
        assert not corrections.exists()
        aggregate = federation.result(study, "round 00001 model")["model"]
        assert federation.artifact(aggregate).exists()
        assert (federation.study(study).folder / "model").exists()
