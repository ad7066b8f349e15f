"""Real processes: a site leaves, another joins a running study, and all are killed meanwhile."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import silo.admin
from concilium.demo.federation import Federation
from coordinator import admin
from coordinator.config import Home, config_text
from secagg.roster import Roster
from study.audit_log import read_heads
from study.integers import coarse_count
from tests.e2e.test_federation import Keeper
from tests.silo.studies import FEDAVG

NAMES = ("lakeside", "northgate", "riverside", "st-marys")
IMAGES = {
    "lakeside": 1937,
    "northgate": 1489,
    "riverside": 1361,
    "st-marys": 2143,
    "hillcrest": 1673,
}
METRICS = "127.0.0.1:{port}"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def images_of(name: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(name))
    return rng.integers(0, 256, (IMAGES[name], 1, 8, 8), dtype=np.uint8)


class Study:
    """The federation, and what a person at each place would look at."""

    def __init__(self, federation: Federation, id: str, metrics: str) -> None:
        self.federation, self.id, self.metrics = federation, id, metrics
        self.scraped: list[str] = []
        self.told = ""

    def status(self) -> admin.StudyStatus:
        home = self.federation.coordinator_home
        return next(s for s in admin.status(home).studies if s.id == self.id)

    def results(self) -> dict[str, Any]:
        store = sqlite3.connect(self.federation.coordinator_home / "store.sqlite")
        rows = store.execute("select key, value from results where study = ?", (self.id,))
        return {key: json.loads(value) for key, value in rows}

    def until(self, check: Callable[[], object], seconds: float = 180.0) -> None:
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end, self.status()
            self.scrape()
            time.sleep(0.2)

    def scrape(self) -> None:
        try:
            with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as page:
                self.scraped.append(page.read().decode())
        except OSError:
            pass  # the coordinator is being restarted

    def offered(self, name: str) -> int:
        path = self.federation.silo_home(name) / "studies" / self.id / "offer.roster"
        return Roster.decode(path.read_bytes()).epoch if path.exists() else 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    out = tmp_path_factory.mktemp("epochs")
    with Federation(out, NAMES, absent_after=4.0) as federation:
        for name in NAMES:
            federation.found_silo(name, images_of(name))
        federation.found_coordinator()
        federation.enrol()
        home, port = Home(federation.coordinator_home), 20_000 + hash(str(out)) % 20_000
        config = home.config().model_copy(update={"metrics": METRICS.format(port=port)})
        home.config_file.write_text(config_text(config))
        federation.kill("coordinator")
        federation.start("coordinator")
        keeper = Keeper(out / "silos", out / "kept")
        keeper.start()
        for name in NAMES:
            federation.start(name)
        (out / "plan.toml").write_text(FEDAVG.replace("count = 3", "count = 8"))
        made = Study(federation, "", METRICS.format(port=port))
        made.id = admin.start_study(federation.coordinator_home, out / "plan.toml")
        live(made)
        keeper.stop()
        yield made


def live(study: Study) -> None:
    """What happens to the study, from its offer to its end."""
    federation, home = study.federation, study.federation.coordinator_home
    study.until(lambda: "round 00002 model" in study.results())
    admin.pause_study(home, study.id)  # or its rounds would be over before the newcomer is in
    silo.admin.leave(federation.silo_home("st-marys"), study.id, "the ward is being rebuilt")
    study.until(lambda: {s.name: s.answer for s in study.status().silos}["st-marys"] == "left")
    federation.names = (*NAMES, "hillcrest")
    federation.found_silo("hillcrest", images_of("hillcrest"))
    enrol_one(federation, "hillcrest")
    admin.change_roster(home, study.id, add=["hillcrest"])
    admin.resume_study(home, study.id)
    study.until(lambda: study.offered("lakeside") == 2)
    federation.kill("coordinator")
    federation.kill("lakeside")
    study.told = silo.admin.roster(federation.silo_home("lakeside"), study.id)
    silo.admin.approve(federation.silo_home("lakeside"), study.id)
    federation.start("coordinator")
    federation.start("hillcrest")
    for name in ("northgate", "riverside", "hillcrest"):
        study.until(lambda name=name: study.offered(name) == 2)  # type: ignore[misc]
        silo.admin.approve(federation.silo_home(name), study.id)
    federation.start("lakeside")
    study.until(lambda: "census of epoch 2" in study.results())
    federation.kill("coordinator")
    federation.start("coordinator")
    federation.kill("lakeside")
    federation.start("lakeside")
    study.until(lambda: over(study))
    models = [federation.silo_home(n) / "studies" / study.id / "ended.json" for n in STAY]
    study.until(lambda: all(model.exists() for model in models))


STAY = ("hillcrest", "lakeside", "northgate", "riverside")


def over(study: Study) -> bool:
    return study.status().state in ("finished", "failed", "stopped")


def enrol_one(federation: Federation, name: str) -> None:
    names, federation.names = federation.names, (name,)
    federation.enrol()
    federation.names = names


def test_the_study_ends_with_the_newcomer_in_it_and_without_the_leaver(study: Study) -> None:
    assert study.status().state == "finished"
    results = study.results()
    assert results["census of epoch 2"]["silos"] == sorted(STAY)
    epochs = [results[f"round {n:05} sum"]["epoch"] for n in range(1, 9)]
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (1, 2)
    for number in range(1, 9):
        summed = results[f"round {number:05} sum"]
        assert ("hillcrest" in summed["silos"]) <= (summed["epoch"] == 2)
        assert ("st-marys" in summed["silos"]) <= (summed["epoch"] == 1)
    assert "hillcrest" in results["round 00008 sum"]["silos"]


def test_counts_are_summed_once_in_each_epoch_and_exactly(study: Study) -> None:
    first = sum(coarse_count(IMAGES[name]) for name in NAMES)
    second = sum(coarse_count(IMAGES[name]) for name in STAY)
    results = study.results()
    assert results["census"]["count"] == first
    assert results["census of epoch 2"]["count"] == second
    store = sqlite3.connect(study.federation.coordinator_home / "store.sqlite")
    query = "select quantity from sessions where phase = 'summed' and quantity like 'census%'"
    assert sorted(row[0] for row in store.execute(query)) == ["census 1", "census 2"]


@pytest.mark.parametrize("number", range(1, 9))
def test_every_rounds_sum_is_exact_and_starts_from_the_model_before(
    study: Study, number: int
) -> None:
    summed = study.results()[f"round {number:05} sum"]
    kept = study.federation.out / "kept"
    vectors = [
        np.frombuffer((kept / f"{name}.round-{number}").read_bytes(), "<u2")
        for name in summed["silos"]
    ]
    total = np.sum(vectors, axis=0, dtype=np.uint16)
    assert hashlib.sha256(total.tobytes()).hexdigest() == summed["session"]["sum"]


def test_the_leaver_kept_its_ledger_and_has_no_model(study: Study) -> None:
    place = study.federation.silo_home("st-marys") / "studies" / study.id
    assert json.loads((place / "ended.json").read_text())["reason"] == "left"
    assert (place / "ledger").stat().st_size > 0
    assert not (place / "model").exists()


def test_the_final_model_is_at_every_site_and_diffusers_loads_it(study: Study) -> None:
    import torch
    from diffusers import DDPMPipeline

    folders = [study.status().folder / "model"]
    folders += [study.federation.silo_home(n) / "studies" / study.id / "model" for n in STAY]
    states = [DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in folders]
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_every_site_signed_the_audit_log_and_it_verifies(study: Study) -> None:
    home = study.federation.coordinator_home
    heads = [
        head
        for name in (*STAY, "st-marys")
        for head in read_heads(silo.admin.heads(study.federation.silo_home(name)))
    ]
    found = admin.verify_audit(home, heads)
    assert set(found.heads) == {*STAY, "st-marys"}
    assert found.countersigned == max(head.place for head in heads)


def test_no_metric_and_no_log_of_the_coordinator_tells_a_count_or_an_update(study: Study) -> None:
    """Counts of images, exact and coarse, and the norms of what each silo sent, in plain digits."""
    federation, kept = study.federation, study.federation.out / "kept"
    secrets = {str(count) for count in IMAGES.values()}
    secrets |= {str(coarse_count(count)) for count in IMAGES.values()}
    for vector in kept.glob("*.round-*"):
        words = np.frombuffer(vector.read_bytes(), "<i2").astype(np.float64)
        secrets |= {f"{np.linalg.norm(words):.4g}", f"{np.abs(words).sum():.0f}"}
    logs = [federation.processes["coordinator"].log.read_text("utf-8", "replace")]
    assert study.scraped
    for text in [*logs, *study.scraped]:
        numbers = set(_numbers(text))
        assert not numbers & secrets, numbers & secrets
    assert f'concilium_study_round{{study="{study.id}"}}' in study.scraped[-1]


def _numbers(text: str) -> Iterator[str]:
    """Numbers that stand for themselves: values of metrics, and of keys in JSON lines."""
    for line in text.splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            for key in ("timestamp", "session", "number"):
                values.pop(key, None)
            yield from (str(v) for v in values.values() if isinstance(v, int | float))
        elif line and not line.startswith("#"):
            value = line.rpartition(" ")[2]
            try:
                yield f"{float(value):g}"
            except ValueError:
                continue


def test_who_approves_a_new_roster_reads_who_changed_and_what_a_recount_exposes(
    study: Study,
) -> None:
    assert "joined       hillcrest" in study.told
    assert "left         st-marys" in study.told
    assert "their difference is its count" in study.told
