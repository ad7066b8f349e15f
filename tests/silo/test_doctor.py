"""`silo doctor` on a site that is well, and on one that is not in each of the ways it knows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from concilium.cli import main
from concilium.demo.federation import free_port
from silo import admin
from silo.doctor import Finding, examine
from silo.files import write_json
from tests.fuzz import parsers
from tests.silo.centre import Centre, enrol, make_site
from tests.silo.proxy import ConnectProxy
from tests.silo.studies import FEDAVG


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[Centre]:
    made = Centre(tmp_path / "centre")
    await made.start()
    yield made
    await made.stop()


async def findings(home: Path) -> dict[str, Finding]:
    """Those before the device, which takes seconds to look at."""

    def look() -> dict[str, Finding]:
        found = takewhile(lambda finding: finding.check != "data", examine(home))
        return {finding.check: finding for finding in found}

    return await asyncio.to_thread(look)


async def test_a_site_that_is_well_is_told_so_with_what_a_plan_would_cost(
    centre: Centre, tmp_path: Path
) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    admin.check(home, image_size=8)
    (tmp_path / "plan.toml").write_text(FEDAVG)
    command = ["silo", "doctor", "--home", str(home), "--plan", str(tmp_path / "plan.toml")]
    shown = await asyncio.to_thread(CliRunner().invoke, main, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    found = {finding["check"]: finding for finding in json.loads(shown.stdout)}
    assert {name for name, finding in found.items() if finding["level"] != "ok"} <= {
        "disk",
        "memory",
    }
    assert f"{centre.address} answers" in found["port"]["text"]
    assert "24 images cached" in found["data"]["text"]
    assert found["device"]["text"].startswith("cpu")
    assert "a training step" in found["time"]["text"]
    assert "sent" in found["traffic"]["text"]
    assert "agree" in found["clock"]["text"]


def test_a_site_that_has_not_begun_is_told_what_comes_next(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    (tmp_path / "north.npz").unlink()
    home.chmod(0o755)
    found = {}
    for finding in examine(home):
        found[finding.check] = finding
        if finding.check == "data":
            break
    assert found["enrolment"].level == "warning"
    assert "join TOKEN" in found["enrolment"].mend
    assert found["data"].level == "problem"
    assert found["keys"].mend == f"chmod 700 {home}"


def set_policy(home: Path, rules: str) -> None:
    """In place of what `init` wrote there."""
    file = home / "site.toml"
    before, _, after = file.read_text().partition("[policy]")
    file.write_text(f"{before}[policy]\n{rules}\n[resources]{after.partition('[resources]')[2]}")


def test_what_the_policy_has_against_a_plan_is_told_before_it_is_offered(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    (tmp_path / "plan.toml").write_text(FEDAVG)

    def look() -> Finding:
        found = examine(home, plan_file=tmp_path / "plan.toml", silos=5)
        return next(finding for finding in found if finding.check == "policy")

    assert look().level == "ok"
    set_policy(home, 'largest_rounds = 2\npurposes = ["census"]')
    assert look().level == "problem"
    assert "largest_rounds: 3 rounds, at most 2; purposes: it sums 'round'" in look().text


def test_each_file_of_a_feature_network_is_read(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    files = [f"{name}.safetensors" for name in ("ours", "other", "torn", "no")]
    set_policy(home, f'feature_networks = ["ours"]\nfeature_files = {files}')
    for name in ("ours", "other"):
        (home / f"{name}.safetensors").write_bytes(parsers.seeds("network")[0])
    (home / "torn.safetensors").write_bytes(b"torn")
    found = takewhile(lambda finding: finding.check != "data", examine(home))
    ours, other, torn, no = (finding for finding in found if finding.check == "features")
    assert (ours.level, other.level) == ("ok", "warning")
    assert 'add "other" to feature_networks' in other.mend
    assert (torn.level, no.level) == ("problem", "problem")
    assert "torn.safetensors is no feature network" in torn.text
    assert "no.safetensors: No such file" in no.text


async def test_each_step_of_the_way_that_fails_is_named(centre: Centre, tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    assert (await findings(home))["service"].level == "ok"

    def moved(address: str) -> None:
        write_json(home / "enrolment.json", {"site": "north", "address": address})

    moved("nowhere.invalid:7443")
    assert (await findings(home))["name"].level == "problem"
    moved(f"127.0.0.1:{free_port()}")
    assert "cannot be reached" in (await findings(home))["port"].text
    stranger = Centre(tmp_path / "stranger")
    await stranger.start()
    moved(stranger.address)
    assert "another authority" in (await findings(home))["tls"].text
    await stranger.stop()
    moved(centre.address)
    strict = ConnectProxy("ward:secret")
    await strict.start()
    with (home / "site.toml").open("a") as file:
        file.write(f'[coordinator]\nproxy = "{strict.url()}"\n')
    assert "wants a name" in (await findings(home))["proxy"].text
    await strict.stop()


@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (45, "warning"), (-400, "problem")])
async def test_a_clock_that_is_wrong_is_told_by_how_much(
    centre: Centre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, level: str
) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    shifted = SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr("silo.doctor.time", shifted)
    began = time.monotonic()
    clock = (await findings(home))["clock"]
    took = time.monotonic() - began
    assert clock.level == level
    if ahead:
        said = int(clock.text.split(" s ")[0].rpartition(" ")[2])
        assert abs(ahead) - took - 1 <= said <= abs(ahead) + took + 1
        assert ("ahead of" if ahead > 0 else "behind") in clock.text


async def test_a_revoked_site_is_told_by_the_coordinator(centre: Centre, tmp_path: Path) -> None:
    from coordinator import admin as centre_admin

    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    centre_admin.revoke(centre.home, "north")
    async with asyncio.timeout(60):
        while (service := (await findings(home))["service"]).level == "ok":
            await asyncio.sleep(0.2)
    assert service.level == "problem"
    assert "revoked" in service.text


def test_a_plan_that_is_none_is_refused_in_one_sentence(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    (tmp_path / "plan.toml").write_text(FEDAVG.replace("count = 3", "count = 0"))
    shown = CliRunner().invoke(
        main, ["silo", "doctor", "--home", str(home), "--plan", str(tmp_path / "plan.toml")]
    )
    assert shown.exit_code == 1
    assert "rounds.count = 0" in shown.output
    assert "Traceback" not in shown.output
    shown = CliRunner().invoke(main, ["silo", "doctor", "--home", str(home), "--study", "none"])
    assert "no study 'none' was offered" in shown.output
