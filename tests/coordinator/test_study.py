"""A whole study over real sockets: sums are exact whoever vanishes, and the outputs are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import admin, jobs
from diffusion.execution import choose_execution
from diffusion.features.network import load_feature_network
from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.labels import classes_of
from diffusion.model import build_model, load_pipeline, load_vector
from diffusion.sampling import sample
from study.plan import load_plan
from tests.coordinator.agent import COUNTS, TestSilo, Vanish, nothing
from tests.coordinator.federation import Federation


async def test_a_study_ends_with_a_model_although_silos_vanish_and_the_coordinator_restarts(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        lost = {"after SHARE": "round 2", "after MASKED_INPUT": "round 3"}

        async def vanish(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if quantity == lost.get(where):
                raise Vanish

        async def restart(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if (where, quantity) == ("before ADVERTISE", "round 3"):
                silo.hook = nothing
                await federation.restart()

        silos[0].hook, silos[1].hook = restart, vanish
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=3))

        def revive() -> bool:
            if not silos[1].alive:
                silos[1].start()
            return federation.study(study).state == "finished"

        await federation.until(lambda: not silos[1].alive, 90)
        await federation.until(lambda: federation.result(study, "round 00002 sum"))
        await federation.until(revive, 150)

        names = [silo.name for silo in silos]
        assert federation.exact(study, "census", "census 1") == names
        assert federation.exact(study, "round 00001 sum", "round 1") == names
        assert federation.exact(study, "round 00002 sum", "round 2") == [
            name for name in names if name != "site-2"
        ]
        assert federation.exact(study, "round 00003 sum", "round 3") == names

        await federation.until(lambda: all(study in silo.ended for silo in silos))
        folder = federation.study(study).folder
        report = json.loads((folder / "report.json").read_text())
        assert [r["survivors"] for r in report["rounds"]][1] == ["site-1", "site-3", "site-4"]
        assert report["images"] == 400
        assert (folder / "model" / "unet" / "config.json").exists()
        assert (folder / "grids" / "round-003.png").exists()
        assert "data:image/png" in (folder / "index.html").read_text()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


SHA256 = FEATURE_NETWORKS["digits"].sha256
FEDDDPM_PLUS = f"""
[warm_up]
steps = 1

[auxiliary]
images = 40
max_attempts = 3

[strategy]
kind = "fedddpm_plus"
correction_steps = 2
auxiliary_share = 0.0
first_correction_steps = 0
correct_last = true
window = 1
tau = 0.9

[evaluation]
feature_network = "digits"
sha256 = "{SHA256}"
feature_bound = 64.0
samples = 16
every = 2
"""


async def test_a_conditional_study_corrects_on_labelled_images_and_publishes_its_classes(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        for silo in silos:
            silo.start()
        more = FEDDDPM_PLUS.replace("fedddpm_plus", "fedddpm") + "at_silos = true\n"
        plan = federation.plan(rounds=1, more=more)
        text = re.sub(r"(?<=correction_steps = 2\n)(\w+ = .+\n)+", "", plan.read_text())
        text = text.replace("[model]", "[model]\nclasses = 3")
        plan.write_text(text.replace("steps = 2", "steps = 2\nguidance = 1.5", 1))
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "finished", 150)

        auxiliary = federation.result(study, "auxiliary")
        sent = {
            image[2:].tobytes(): int(image[0])
            for silo in silos
            for taking in silo.studies.values()
            for image in taking.images
        }
        united = 0
        for part in ("training", "held_out"):
            images = np.load(federation.artifact(auxiliary[part]))
            labels = np.load(federation.artifact(auxiliary[f"{part}_labels"]))
            assert images.shape[1:] == (1, 4, 4)
            assert [sent[image.tobytes()] for image in images] == labels.tolist()
            assert labels.max() < 3, "labels that are none were left out"
            united += len(images)
        assert 15 <= united == auxiliary["images"] <= 32
        assert sum(auxiliary["labels"]) == united
        assert federation.result(study, "round 00001 corrected")["training_loss"] > 0
        # What the silos measured is summed exactly; one of the four had too few images for it.
        found = federation.result(study, "round 00001 comparison")
        assert federation.exact(study, "round 00001 comparison", "evaluation 1") == [
            silo.name for silo in silos
        ]
        assert found["measured"] == 3
        assert found["kid"] == pytest.approx(-0.25, abs=1e-8)
        assert 0 < found["coverage"] < 1
        assert len(found["losses"]) == 10
        assert {len(silo.samples) for silo in silos} == {16 * 16}
        (line,) = json.loads((federation.study(study).folder / "report.json").read_text())["rounds"]
        assert line["fid"] > 0
        assert line["network_sha256"] == SHA256
        assert line["kid"] == found["kid"]
        page = (federation.study(study).folder / "index.html").read_text()
        assert "KID, mean over silos" in page
        assert "by timestep, round 1" in page
        pipeline = load_pipeline(federation.study(study).folder / "model")
        assert classes_of(pipeline.unet) == 3


async def test_a_silo_that_marks_more_slots_than_all_may_does_not_become_the_auxiliary_set(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        silos[3].greed = 200
        for silo in silos:
            silo.start()
        plan = federation.plan(rounds=2, more=FEDDDPM_PLUS)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "failed", 150)
        assert "a silo offers more than its share" in federation.study(study).error


async def test_a_round_that_a_silo_voids_ends_the_study_with_the_reason(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        silos[1].voids = True
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=2))
        await federation.until(lambda: federation.study(study).state == "failed")
        error = federation.study(study).error
        assert "round 1 cannot be read: 1 silos made its sum random" in error


async def test_fedddpm_plus_unites_images_decides_corrects_and_measures(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def vanish(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if (where, quantity) == ("before upload", "images 1"):
                raise Vanish

        silos[2].hook = vanish
        for silo in silos:
            silo.start()
        plan = federation.plan(rounds=2, more=FEDDDPM_PLUS)
        study = admin.start_study(federation.home, plan)

        def revive() -> bool:
            if not silos[2].alive:
                silos[2].start()
            return federation.study(study).state == "finished"

        await federation.until(revive, 150)
        # The second sum lacked a silo of the first: both were void and slots were drawn anew.
        assert federation.result(study, "images 1")["session"]["kind"] == "aborted"
        assert federation.result(study, "images 2")["session"]["kind"] == "summed"
        assert federation.exact(study, "census", "census 1") == [silo.name for silo in silos]

        auxiliary = federation.result(study, "auxiliary")
        offered = {
            image.tobytes()
            for silo in silos
            for taking in silo.studies.values()
            for image in taking.images
        }
        union = [
            image.tobytes()
            for part in ("training", "held_out")
            for image in np.load(federation.artifact(auxiliary[part]))
        ]
        assert 20 <= len(union) == len(set(union)) <= 40
        assert set(union) <= offered

        report = json.loads((federation.study(study).folder / "report.json").read_text())
        first, second = report["rounds"]
        assert first["decision"]["correct"] is False
        assert second["decision"]["correct"] is True
        assert second["decision"]["numbers"]["tau"] == 0.9
        judged = second["correction"]
        assert judged["training_loss"] > 0
        assert judged["kept"] == (judged["fid_after"] < judged["fid_before"])
        assert "fid" not in first
        assert second["fid"] > 0
        assert report["auxiliary"]["images"] == len(union)
        assert report["auxiliary"]["network_sha256"] == second["network_sha256"]
        events = [
            json.loads(line)
            for line in (federation.study(study).folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert events[0] == {"event": "auxiliary", **report["auxiliary"]}
        kinds = [event["event"] for event in events[1:]]
        assert kinds == ["round", "decision", "round", "decision", "correction", "evaluation"]
        told = {(event["event"], event["round"]): event for event in events[1:]}
        for number, line in ((1, first), (2, second)):
            assert told["decision", number] | line["decision"] == told["decision", number]
        assert {"window", "tau"} <= set(told["decision", 2]["numbers"])
        assert told["correction", 2]["steps"] == 2
        assert told["correction", 2]["learning_rate"] > 0


async def test_silos_are_asked_to_share_until_the_model_is_near_the_set_also_after_a_restart(
    tmp_path: Path,
) -> None:
    sharing = {"auxiliary_share = 0.0": "auxiliary_share = 0.5\nshare_until = 100.0"}
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def restart(silo: TestSilo, where: str) -> None:
            if where == "after MASKED_INPUT" and "round 2" in silo.shared:
                silo.hook = nothing
                await federation.restart()

        silos[0].hook = restart
        for silo in silos:
            silo.start()
        more = FEDDDPM_PLUS.replace("every = 2", "every = 1")
        for old, new in sharing.items():
            more = more.replace(old, new)
        plan = federation.plan(rounds=4, more=more)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "finished", 150)

        rounds = json.loads((federation.study(study).folder / "report.json").read_text())["rounds"]
        fids, of_set = (
            [line["fid"] for line in rounds],
            federation.result(study, "auxiliary distance")["fid"],
        )
        strategy = load_plan(plan).strategy
        decided = [strategy.shares(fids[:k], 4, of_set).share for k in (1, 2, 3)]
        assert [line["sharing"]["share"] for line in rounds[:3]] == decided
        assert decided[0] is False
        assert "sharing" not in rounds[3], "no round follows"
        wanted = {f"round {k}": share for k, share in enumerate([True, *decided], start=1)}
        assert [silo.shared for silo in silos] == [wanted] * 4
        summed = [federation.result(study, f"round {k:05} sum") for k in (1, 2, 3, 4)]
        assert [one["shared"] for one in summed] == list(wanted.values())
        told = (federation.study(study).folder / "metrics.jsonl").read_text()
        assert told.count('"event": "sharing"') == 3
        page = (federation.study(study).folder / "index.html").read_text()
        assert "○ = then silos train on their own images alone" in page


def features_of_the_first_model(plan_text: str, images: int, folder: Path) -> np.ndarray[Any, Any]:
    """Of images that the first model draws, about the network's center: float64 (images, d)."""
    plan, path = load_plan(plan_text), folder / "first.f32"
    jobs.first_model(plan_text, path)
    model = build_model(plan.model)
    load_vector(model, np.fromfile(path, dtype="<f4"))
    drawn = sample(
        model,
        images,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=plan.study.seed,
        execution=choose_execution("cpu", 1),
    )
    network = load_feature_network("digits")
    return network.extract(drawn).astype(np.float64) - network.public_center()


async def test_a_last_correction_that_does_harm_is_not_published(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        for silo in silos:
            silo.start()
        plan = federation.plan(rounds=1, more=FEDDDPM_PLUS)
        harmful = "correction_steps = 2\ncorrection_learning_rate = 1.0"
        text = plan.read_text()
        assert "correction_steps = 2" in text
        text = text.replace("correction_steps = 2", harmful)
        plan.write_text(text)
        # The silos' images look like what the first model draws, from which the silos' deltas (some
        # 0.01 a weight) lead hardly away, and the correction (1.0 a weight and step) far.
        for silo in silos:
            silo.features = features_of_the_first_model(text, COUNTS[silo.name], tmp_path)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "finished", 150)

        corrected = federation.result(study, "round 00001 corrected")
        assert corrected["fid_after"] > corrected["fid_before"]
        assert corrected["kept"] is False
        aggregate = federation.result(study, "round 00001 model")["model"]
        assert federation.result(study, "end")["model"] == aggregate
        assert federation.artifact(aggregate).exists()
        (line,) = json.loads((federation.study(study).folder / "report.json").read_text())["rounds"]
        assert line["correction"]["kept"] is False
