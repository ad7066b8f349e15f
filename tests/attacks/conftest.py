"""The stage of the attacks: made once for the session, a fresh copy of it for every test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from silo import agent, participation
from tests.attacks.liar import Liar
from tests.attacks.stage import Agent, Federation, Stage, keep_logging, sha256


@dataclass(frozen=True)
class Template:
    """What `tests.attacks.template` left."""

    folder: Path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("template")
    command = [sys.executable, "-m", "tests.attacks.template", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return Template(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An agent waits after each refusal, longer and longer; here it need not."""
    monkeypatch.setattr(participation, "_LONGEST_DELAY", 0.0)
    monkeypatch.setattr(participation, "_FIRST_DELAY", 0.0)
    monkeypatch.setattr(agent, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(agent, "_RETRY_SECONDS", 0.05)
    put_back = keep_logging()
    yield
    put_back()


async def _stage(made: Template, begin: str, folder: Path) -> AsyncIterator[Stage]:
    template, kept = made.folder, made.folder / begin
    home = folder / "south"
    shutil.copytree(kept / "home", home)
    liar = Liar(template / "centre", (template / "address").read_text())
    model = (template / "model").read_bytes()
    liar.artifacts[sha256(model)] = model
    victim = Agent(home)
    number, previous = int((kept / "number").read_text()), (kept / "previous").read_bytes()
    await liar.start()
    await victim.start()
    yield Stage(liar, victim, Federation.load(template / "federation"), number, previous)
    await victim.stop()
    await liar.stop()


@pytest.fixture
async def fresh(template: Template, tmp_path: Path) -> AsyncIterator[Stage]:
    async for stage in _stage(template, "fresh", tmp_path):
        yield stage


@pytest.fixture
async def counted(template: Template, tmp_path: Path) -> AsyncIterator[Stage]:
    async for stage in _stage(template, "counted", tmp_path):
        yield stage
