"""Four silo processes, a coordinator process, SIGKILL: what a study promises, on real sockets.

One study is run once; its rounds meet one disaster each, and each test reads one promise off what
it left behind:

    round 1   riverside is killed after it shared its keys
    round 2   lakeside is killed after its upload was committed
    round 3   northgate and st-marys are killed after they shared their keys, and come back
    round 4   nothing happens
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concilium.datasets import digits
from concilium.demo.federation import NAMES, Federation
from concilium.partition import dirichlet
from coordinator import admin
from coordinator.artifacts import Artifacts
from diffusion.frechet import fid, moments
from study.plan import load_plan
from tests.e2e.keeper import Keeper

PLAN = Path(__file__).with_name("plan.toml")
FAILPOINTS = {
    "riverside": "after-share:round=1",
    "lakeside": "after-upload:round=2",
    "northgate": "after-share:round=3",
    "st-marys": "after-share:round=3",
}
LIMIT_SECONDS = 600.0  # of agents that give way to whatever else this machine does
# Images are numbered within a seed; FID measures those from here on, the grids those from 0.
FIRST_MEASURED = 1_000_000


@dataclass
class Outcome:
    """What is left when the study is over."""

    federation: Federation
    study: str
    status: admin.StudyStatus
    errors: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.status.folder

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text("utf-8"))
        return found

    def results(self) -> dict[str, dict[str, Any]]:
        store = sqlite3.connect(self.federation.coordinator_home / "store.sqlite")
        rows = store.execute("select key, value from results where study = ?", (self.study,))
        return {key: json.loads(value) for key, value in rows}

    def artifact(self, step: str, name: str) -> np.ndarray[Any, Any]:
        """An array (.npy) that the coordinator keeps."""
        digest = bytes.fromhex(self.results()[step][name])
        found: np.ndarray[Any, Any] = np.load(
            Artifacts(self.federation.coordinator_home / "artifacts").path(digest)
        )
        return found

    def kept(self, silo: str, quantity: str, dtype: str) -> np.ndarray[Any, Any]:
        raw = (self.federation.out / "kept" / f"{silo}.{quantity}").read_bytes()
        return np.frombuffer(raw, np.dtype(dtype))


def _found(out: Path) -> Federation:
    labelled = digits()
    # Who is silent is waited for here, so that a silo which is being started is not left out.
    federation = Federation(out, NAMES[:4], absent_after=120.0)
    for name, part in zip(
        federation.names, dirichlet(labelled.labels, 4, alpha=0.3, seed=7), strict=True
    ):
        federation.found_silo(name, labelled.images[part], labelled.labels[part])
        site = federation.silo_home(name) / "site.toml"
        text = site.read_text("utf-8")
        assert '"round"]' in text
        site.write_text(text.replace('"round"]', '"round", "evaluation"]'), "utf-8")
    federation.found_coordinator()
    federation.enrol()
    return federation


def _follow(federation: Federation, study: str, outcome: list[str]) -> admin.StudyStatus:
    """Bring killed silos back, as an operator would: one at once, two once the abort is told."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        status = next(s for s in admin.status(federation.coordinator_home).studies if s.id == study)
        if status.error and status.error not in outcome:
            outcome.append(status.error)
        dead = [n for n in federation.names if federation.processes[n].popen.poll() is not None]
        told = any("northgate" in e and "st-marys" in e for e in outcome)
        for name in dead:
            if told or name in ("riverside", "lakeside"):
                federation.start(name)
        if status.state in ("finished", "stopped", "failed"):
            return status
        time.sleep(0.1)
    raise AssertionError(f"not over after {LIMIT_SECONDS:.0f} s: {status}")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    out = tmp_path_factory.mktemp("federation")
    with _found(out) as federation:
        keeper = Keeper(out / "silos", out / "kept")
        keeper.start()
        for name in federation.names:
            federation.start(name, {"CONCILIUM_FAILPOINT": FAILPOINTS[name]})
        study = admin.start_study(federation.coordinator_home, PLAN)
        errors: list[str] = []
        status = _follow(federation, study, errors)
        keeper.stop()
        models = [federation.silo_home(n) / "studies" / study / "model" for n in federation.names]
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not all((m / "unet").exists() for m in models):
            time.sleep(0.2)
        yield Outcome(federation, study, status, errors)


pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 120)


def test_the_study_ends_with_all_its_rounds(outcome: Outcome) -> None:
    assert outcome.status.state == "finished"
    assert [r["round"] for r in outcome.report()["rounds"]] == [1, 2, 3, 4]


def test_a_silo_killed_after_sharing_is_left_out_and_the_round_ends(outcome: Outcome) -> None:
    survivors = outcome.report()["rounds"][0]["survivors"]
    assert survivors == ["lakeside", "northgate", "st-marys"]


def test_a_silo_killed_after_its_upload_was_committed_is_in_the_sum(outcome: Outcome) -> None:
    assert outcome.report()["rounds"][1]["survivors"] == sorted(NAMES[:4])


def test_two_gone_are_an_abort_that_names_them_the_threshold_and_what_to_do(
    outcome: Outcome,
) -> None:
    told = [e for e in outcome.errors if "northgate" in e and "st-marys" in e]
    assert told
    assert "the threshold is 3" in told[0]
    assert "Bring a missing silo's agent back" in told[0]
    assert outcome.report()["rounds"][2]["survivors"] == sorted(NAMES[:4])


@pytest.mark.parametrize("round_", [1, 2, 3, 4])
def test_every_sum_is_exact_to_the_last_bit(outcome: Outcome, round_: int) -> None:
    summed = outcome.results()[f"round {round_:05} sum"]
    vectors = [outcome.kept(silo, f"round-{round_}", "<u2") for silo in summed["silos"]]
    total = np.sum(vectors, axis=0, dtype=np.uint16)
    assert len(total) > 10_000
    assert any(np.any(vector != vectors[0]) for vector in vectors)
    assert hashlib.sha256(total.tobytes()).hexdigest() == summed["session"]["sum"]


def test_the_census_is_the_sum_of_the_coarse_counts(outcome: Outcome) -> None:
    vectors = [outcome.kept(silo, "census-1", "<u4") for silo in NAMES[:4]]
    total = np.sum(vectors, axis=0, dtype=np.uint32)
    census = outcome.results()["census"]
    assert hashlib.sha256(total.tobytes()).hexdigest() == census["session"]["sum"]
    assert census["count"] == 470 + 380 + 390 + 260


def test_fid_by_sums_is_the_pooled_fid(outcome: Outcome) -> None:
    from diffusion.features.network import load_feature_network

    drawn = _drawn(outcome)
    network = load_feature_network("digits")
    pooled = moments(network.extract(digits().images))
    expected = fid(moments(network.extract(drawn)), pooled)
    assert outcome.report()["rounds"][3]["fid"] == pytest.approx(expected, rel=1e-4)


def test_so_is_that_of_the_auxiliary_set(outcome: Outcome) -> None:
    from diffusion.features.network import load_feature_network

    network = load_feature_network("digits")
    union = np.concatenate([outcome.artifact("auxiliary", p) for p in ("training", "held_out")])
    pooled = moments(network.extract(digits().images))
    told = outcome.report()["auxiliary"]
    assert told["images"] == len(union)
    assert told["fid"] == pytest.approx(fid(moments(network.extract(union)), pooled), rel=1e-4)


def _drawn(outcome: Outcome) -> np.ndarray[Any, Any]:
    """The samples of the last round that the study evaluated, drawn once more."""
    from diffusion.execution import choose_execution
    from diffusion.labels import even_labels
    from diffusion.model import load_pipeline
    from diffusion.sampling import sample

    plan = load_plan(PLAN)
    model = load_pipeline(outcome.folder / "model").unet
    return sample(
        model,
        64,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=plan.study.seed,
        execution=choose_execution("cpu", 1),
        labels=even_labels(64, 10),
        first_index=FIRST_MEASURED,
    )


def test_what_the_silos_measured_is_the_mean_of_their_measures(outcome: Outcome) -> None:
    from diffusion.evaluation import compare
    from diffusion.execution import choose_execution
    from diffusion.features.network import load_feature_network
    from diffusion.model import load_pipeline

    plan, drawn, labelled = load_plan(PLAN), _drawn(outcome), digits()
    model = load_pipeline(outcome.folder / "model").unet
    found = [
        compare(
            model,
            drawn,
            labelled.images[part],
            load_feature_network("digits"),
            schedule=plan.schedule,
            objective=plan.objective,
            seed=plan.study.seed,
            execution=choose_execution("cpu", 1),
            labels=labelled.labels[part],
        )
        for part in dirichlet(labelled.labels, 4, alpha=0.3, seed=7)
    ]
    line = outcome.report()["rounds"][3]
    assert line["measured"] == 4
    assert line["kid"] == pytest.approx(np.mean([c.kid for c in found]), rel=1e-3)
    assert line["coverage"] == pytest.approx(np.mean([c.coverage for c in found]), abs=0.01)
    assert line["copies"] == pytest.approx(np.mean([c.copies for c in found]), abs=0.01)
    means = np.mean([c.losses for c in found], axis=0)
    assert line["losses"] == pytest.approx(means, rel=0.02)
    assert "kid" not in outcome.report()["rounds"][0], "evaluated every second round"


def test_the_union_of_a_conditional_study_has_labels(outcome: Outcome) -> None:
    auxiliary = outcome.report()["auxiliary"]
    assert len(auxiliary["labels"]) == 10
    assert sum(auxiliary["labels"]) == auxiliary["images"] > 20


def test_a_site_can_read_what_its_audit_found(outcome: Outcome) -> None:
    from silo.admin import status

    for name in NAMES[:4]:
        home = outcome.federation.silo_home(name)
        shown = status(home)["studies"][outcome.study]["audit"]
        assert "synthetic images dropped as too near a real one" in shown
        pool = home / "studies" / outcome.study / "pool"
        assert list(pool.glob("audit-*-leaving.png"))


def test_triggers_were_evaluated_on_real_numbers(outcome: Outcome) -> None:
    decisions = [r["decision"] for r in outcome.report()["rounds"]]
    assert all(d["reason"] for d in decisions)
    judged = [d for d in decisions if "improvement" in d["numbers"]]
    assert judged
    for decision in judged:
        numbers = decision["numbers"]
        now, then = numbers["loss"], numbers["loss_then"]
        assert numbers["improvement"] == pytest.approx((then - now) / then)
        assert decision["correct"] == (numbers["improvement"] < numbers["tau"])
    assert any(d["correct"] for d in decisions)


def test_diffusers_loads_what_the_study_and_the_silos_publish(outcome: Outcome) -> None:
    import torch
    from diffusers import DDPMPipeline

    folders = [outcome.folder / "model"]
    folders += [
        outcome.federation.silo_home(n) / "studies" / outcome.study / "model" for n in NAMES[:4]
    ]
    states = [DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in folders]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_the_report_has_all_that_it_promises(outcome: Outcome) -> None:
    report, folder = outcome.report(), outcome.folder
    assert set(report["bytes"]) == set(NAMES[:4])
    assert all(way["from_silo"] > 0 and way["to_silo"] > 0 for way in report["bytes"].values())
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    for name in ("samples.png", "metrics.jsonl", "index.html", "grids/round-001.png"):
        assert (folder / name).stat().st_size > 0
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        json.loads(line)


def test_a_waiting_agent_holds_no_torch(outcome: Outcome) -> None:
    for name in NAMES[:4]:
        pid = outcome.federation.processes[name].popen.pid
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text("utf-8")


def test_nothing_secret_is_in_any_log(outcome: Outcome) -> None:
    logs = [p.read_text("utf-8", "replace") for p in outcome.federation.out.glob("logs/*.log")]
    logs += [p.read_text("utf-8", "replace") for p in outcome.federation.out.glob("silos/*/*.log")]
    for home in (outcome.federation.silo_home(n) for n in NAMES[:4]):
        secret = (home / "keys" / "ledger.key").read_bytes()
        assert all(secret.hex() not in log and repr(secret)[2:-1] not in log for log in logs)
    assert all("PRIVATE KEY" not in log for log in logs)
