"""How an agent is watched at its institution: metrics for a monitor, log lines for people."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from concilium.demo.federation import free_port
from coordinator import admin as centre_admin
from silo.agent import run
from tests.silo.centre import Centre, enrol, make_site
from tests.silo.studies import FEDAVG


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        return str(page.read().decode())


async def until(ready: Callable[[], bool], seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(ready):
            await asyncio.sleep(0.1)


async def test_an_agent_s_metrics_say_who_has_to_act_and_nothing_of_the_images(
    tmp_path: Path,
) -> None:
    centre, home = Centre(tmp_path / "centre"), make_site(tmp_path, "north", images=37)
    await centre.start()
    port = free_port()
    config = home / "site.toml"
    text = config.read_text().replace("automatic = true", "automatic = false")
    config.write_text(f'{text}\n[agent]\nmetrics = "127.0.0.1:{port}"\n')
    for name in ("north", "east", "south"):
        await enrol(centre, home if name == "north" else make_site(tmp_path, name), name)
    (tmp_path / "plan.toml").write_text(FEDAVG)
    study = centre_admin.start_study(centre.home, tmp_path / "plan.toml")
    agent = asyncio.create_task(run(home))
    try:
        waits = f'concilium_silo_study_waits_for_approval{{study="{study}"}} 1.0'
        await until(lambda: _answers(port) and waits in scrape(port))
        said = scrape(port)
        assert "concilium_silo_trouble 0.0" in said
        assert f'concilium_silo_study_step{{study="{study}"}} 0.0' in said
        assert re.search(r"^concilium_silo_last_contact_seconds 1\.\d+e\+09$", said, re.M)
        names = set(re.findall(r"^(concilium_\w+)", said, re.M))
        shown = ("last_contact_seconds", "certificate_expires_seconds", "trouble", "study_trouble")
        work = ("study_waits_for_approval", "study_step")
        assert names == {f"concilium_silo_{name}" for name in (*shown, *work)}
        # times and the study's identifier are digits too
        said = re.sub(r"\d\.\d+e\+09", "", said).replace(study, "")
        assert "37" not in said, "the count of images"
        await centre.stop()
        await until(lambda: "concilium_silo_trouble 1.0" in scrape(port))
    finally:
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        await centre.stop()
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def _answers(port: int) -> bool:
    try:
        return bool(scrape(port))
    except OSError:
        return False


class Terminal:
    """A command whose output goes to a terminal."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "concilium", *command],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)

    def shows(self, words: str) -> bool:
        while words not in self.text:
            try:
                self.text += os.read(self._ours, 1 << 12).decode()
            except OSError:  # it has ended
                return False
        return True

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self._ours)


def test_log_lines_on_a_terminal_are_for_people_and_elsewhere_json(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre")
    home = make_site(tmp_path, "north")
    coordinator = Terminal("coordinator", "serve", "--home", str(centre.home))
    assert coordinator.shows("coordinator.started"), coordinator.text
    asyncio.run(enrol(centre, home, "north"))
    agent = Terminal("silo", "run", "--home", str(home))
    assert agent.shows("agent started"), agent.text
    agent.end()
    coordinator.end()
    for terminal in (coordinator, agent):
        assert "\x1b[" in terminal.text, "colours"
        assert not any(line.startswith("{") for line in terminal.text.splitlines())
    lines = [json.loads(line) for line in (home / "agent.log").read_text().splitlines()]
    assert lines[0]["event"] == "agent started"
    assert lines[0]["site"] == "north"
    assert "\x1b" not in (home / "agent.log").read_text()
