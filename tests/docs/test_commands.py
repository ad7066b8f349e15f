"""Every command that the documentation shows is run, in the order in which it is shown."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.deployment import ROOT, Deployment, blocks

PAGES = sorted(
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    if any(block.why_not is None for block in blocks(page))
)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_works(page: Path, deployment: Deployment) -> None:
    run = [block for block in blocks(page) if block.why_not is None]
    deployment.play([command for block in run for command in block.commands])


def test_what_is_not_run_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.why_not is not None]
    assert all(len(block.why_not or "") > 10 for block in skipped)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", ["concilium-coordinator", "concilium-silo"])
def test_the_units_are_what_systemd_understands_and_are_hardened(unit: str, tmp_path: Path) -> None:
    source = (ROOT / "deploy" / "systemd" / f"{unit}.service").read_text("utf-8")
    program = tmp_path / "concilium"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / f"{unit}.service"
    file.write_text(source.replace("/opt/concilium/bin/concilium", str(program)))
    verify = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # 10 is a service without any protection, below 2 systemd itself calls it "OK".
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(file)]
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-600:]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Prometheus's promtool")
def test_the_alert_rules_are_what_prometheus_understands() -> None:
    rules = ROOT / "deploy" / "prometheus-alerts.yml"
    done = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_explained_and_names_metrics_that_there_are() -> None:
    text = (ROOT / "deploy" / "prometheus-alerts.yml").read_text("utf-8")
    page = (ROOT / "docs" / "operate.md").read_text("utf-8")
    sources = [(ROOT / side / "metrics.py").read_text("utf-8") for side in ("coordinator", "silo")]
    for alert in re.findall(r"alert: (\w+)", text):
        assert f"`{alert}`" in page
    for metric in set(re.findall(r"\b(concilium_\w+)", text)):
        short = metric.removeprefix("concilium_silo_").removeprefix("concilium_")
        assert any(re.search(rf'"(concilium_)?{short}"', source) for source in sources), metric
