"""A feature network that does not ship: missing at the study centre, it is missed at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator import admin
from coordinator.admin import AdminError
from coordinator.config import ConfigError, Home
from diffusion.features.pinned import FEATURE_NETWORKS
from tests.coordinator.federation import Federation
from tests.networks import make_network

EVALUATION = """
[evaluation]
feature_network = "{name}"
sha256 = "{sha256}"
feature_bound = 64.0
samples = 8
"""


def name_files(home: Path, *files: str) -> None:
    config = home / "coordinator.toml"
    text = config.read_text()
    assert "feature_files = []" in text
    config.write_text(text.replace("feature_files = []", f"feature_files = {json.dumps(files)}"))


async def test_a_study_is_measured_by_the_network_that_its_plan_pins(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        for silo in await federation.join_four():
            silo.start()
        sha256 = make_network(federation.home / "own.safetensors")
        more = EVALUATION.format(name="own", sha256=sha256)
        plan = federation.plan(more=more)
        with pytest.raises(AdminError, match="get own.safetensors and name it in feature_files"):
            admin.start_study(federation.home, plan)
        assert admin.list_studies(federation.home) == []
        name_files(federation.home, "own.safetensors")  # of a service that runs
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "finished", 240)
        report = json.loads((federation.study(study).folder / "report.json").read_text())
        measured = report["rounds"][0]
        assert measured["fid"] > 0.0
        assert sha256 in json.dumps(report)


@pytest.mark.parametrize(
    ("name", "sha256", "said"),
    [
        ("own", "ab" * 32, "own.safetensors has SHA-256 .*, expected abab"),
        ("mri", "ab" * 32, 'feature network "mri" is not here'),
        ("digits", "ab" * 32, "not the one that this version ships"),
    ],
)
def test_another_network_than_the_plan_s_is_refused_before_a_site_is_asked(
    name: str, sha256: str, said: str, tmp_path: Path
) -> None:
    federation = Federation(tmp_path)
    make_network(federation.home / "own.safetensors")
    name_files(federation.home, "own.safetensors")
    plan = federation.plan(more=EVALUATION.format(name=name, sha256=sha256))
    with pytest.raises(AdminError, match=said):
        admin.start_study(federation.home, plan)
    assert admin.list_studies(federation.home) == []


def test_no_file_stands_in_for_a_network_that_ships(tmp_path: Path) -> None:
    home = Federation(tmp_path).home
    for name in FEATURE_NETWORKS:
        text = (home / "coordinator.toml").read_text()
        name_files(home, f"nets/{name}.safetensors")
        with pytest.raises(ConfigError, match=f'feature_files: "{name}" ships with the project'):
            Home(home).config()
        (home / "coordinator.toml").write_text(text)
    name_files(home, "nets/own.safetensors", "/x/other.safetensors")
    found = Home(home).feature_files()
    assert found == ((home / "nets" / "own.safetensors").resolve(), Path("/x/other.safetensors"))
