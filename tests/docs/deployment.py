"""Runs what a page tells people to type, in order, against a deployment on this machine.

Every sh block of a page is run, but for those with `<!-- not run: why -->` right before them. What
a page cannot know is put in: the address, the folder of the images, and TOKEN and STUDY, which are
what `invite` and `study start` printed. Commands that do not end by themselves (`serve`, `run`,
`join`) go on in the background, and are looked at when the page is over.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from concilium.demo.federation import free_port
from secagg.roster import Roster

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```sh\n(?P<text>.*?)```", re.S)
_STAYS = ("concilium coordinator serve", "concilium silo run", "concilium silo join")
# Other sites of the studies; the last one never answers an offer.
_OTHERS = ("harbour", "lakeside", "northgate", "westfield")
_ANSWERING = _OTHERS[:-1]
_INVITE = "concilium coordinator invite st-marys"
_INIT = "concilium coordinator init --address coordinator.example.org:7443"


@dataclass(frozen=True)
class Block:
    """A block of commands, and why it is not run, if it is not."""

    text: str
    why_not: str | None

    @property
    def commands(self) -> list[str]:
        """Without comments; a line that ends in a backslash goes on in the next."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [c for line in lines if (c := line.partition("  #")[0].strip()) and c[0] != "#"]


def blocks(page: Path) -> list[Block]:
    """The sh blocks of a page, in order."""
    found = _BLOCK.finditer(page.read_text("utf-8"))
    return [Block(match["text"], match["why"]) for match in found]


@dataclass
class Deployment:
    """HOME of the people on a page, three other sites, and what runs in the background."""

    folder: Path
    known: dict[str, str] = field(default_factory=dict)
    background: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    _others_joined: bool = False

    def __post_init__(self) -> None:
        port = free_port()
        self._images(self.folder / "images.npz")
        (self.folder / "work").mkdir()
        (self.folder / "work" / "study").symlink_to(ROOT / "study")
        self._small_plan(self.folder / "small.toml")
        self.known = {
            "coordinator.example.org:7443": f"127.0.0.1:{port}",
            "/data/images": str(self.folder / "images.npz"),
            "study/plans/digits.toml": str(self.folder / "small.toml"),
        }
        bin_ = self.folder / "bin"
        bin_.mkdir()
        (bin_ / "concilium").write_text(f'#!/bin/sh\nexec {sys.executable} -m concilium "$@"\n')
        (bin_ / "concilium").chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        ours = {"HOME": str(self.folder / "home"), "PATH": path, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **ours, "PYTHONPATH": str(ROOT)}

    def play(self, commands: list[str]) -> None:
        """Run the commands of a page; where it shows one side only, the other does its part."""
        if not any("coordinator init" in command for command in commands):
            for command in (_INIT, "concilium coordinator serve", _INVITE):
                self.run(command)
        approves = any("coordinator approve" in command for command in commands)
        starts = any("study start" in command for command in commands)
        for command in commands:
            if "STUDY" in command and "STUDY" not in self.known and not starts:
                self.run("concilium study start study/plans/digits.toml")
            self.run(command)
            if "silo join" in command and not approves:
                self.run("concilium coordinator approve st-marys")

    def run(self, command: str) -> None:
        """Run one command of a page; raises AssertionError where it fails."""
        for name, value in self.known.items():
            command = command.replace(name, value)
        if command.startswith(_STAYS):
            return self._stay(command)
        if "study start" in command:
            self._others_join()
        output = self._shell(command)
        if "coordinator invite" in command:
            self.known["TOKEN"] = output.strip()
        if "coordinator approve" in command:
            self._joins_end()
        if "silo leave" in command:
            page = "concilium coordinator status --json"
            self._until(lambda: '"answer": "left"' in self._shell(page))
        if "study start" in command:
            self.known["STUDY"] = output.split()[1].rstrip(";")
            self._offered(1)
        if found := re.match(r"roster (\d+) of", output):
            self._offered(int(found[1]))

    def _shell(self, command: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder / "work",
            env=env or self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        # `doctor` says by 1 that it found something, which at this machine it may.
        fine = (0, 1) if "silo doctor" in command else (0,)
        said = f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.returncode in fine, f"{said}\n{self.logs()}"
        assert "Traceback" not in done.stderr, said
        return done.stdout

    def _stay(self, command: str, env: dict[str, str] | None = None) -> None:
        log = self.folder / f"background-{len(self.background)}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder / "work",
                env=env or self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.background.append((command, process))
        if "serve" in command:
            self._until(lambda: self._succeeds("concilium coordinator health"))
        if "join" in command and env is None:
            self._until(lambda: "pending" in self._shell("concilium coordinator sites"))
        if "silo run" in command and env is None:
            self._until(lambda: "runs" in self._shell("concilium silo status"))

    def _succeeds(self, command: str) -> bool:
        bash = ["bash", "-c", command]
        return not subprocess.run(bash, env=self.env, capture_output=True, check=False).returncode

    def _joins_end(self) -> None:
        for command, process in self.background:
            if "silo join" in command:
                process.wait(60)

    def _others_join(self) -> None:
        """A study needs three sites; those that are not on the page join by themselves."""
        for name in () if self._others_joined else _OTHERS:
            env = self._env_of(name)
            self._shell(f"concilium silo init {name} --data {self.folder / 'images.npz'}", env)
            token = self._shell(f"concilium coordinator invite {name}").strip()
            self._stay(f"concilium silo join {token}", env)
            waiting = re.compile(rf"^{name} +pending", re.M)
            self._until(lambda w=waiting: w.search(self._shell("concilium coordinator sites")))
            self._shell(f"concilium coordinator approve {name}")
            self._joins_end()
            self._stay("concilium silo run", env)
        self._others_joined = True

    def _offered(self, epoch: int) -> None:
        """What was offered has arrived everywhere, and the others accept it."""
        study = self.known["STUDY"]
        for name in (*_ANSWERING, ""):
            env = self._env_of(name) if name else self.env
            home = Path(env.get("CONCILIUM_SILO_HOME", Path(env["HOME"]) / ".concilium/silo"))
            if not (home / "enrolment.json").exists() or self._left(home, study):
                continue
            offer = home / "studies" / study / "offer.roster"
            self._until(lambda o=offer: o.exists() and Roster.decode(o.read_bytes()).epoch == epoch)
            if name:
                self._shell(f"concilium silo approve {study}", env)

    @staticmethod
    def _left(home: Path, study: str) -> bool:
        return (home / "studies" / study / "leave.json").exists()

    def _env_of(self, name: str) -> dict[str, str]:
        return {**self.env, "CONCILIUM_SILO_HOME": str(self.folder / "others" / name)}

    def _until(self, check: object, seconds: float = 60.0) -> None:
        assert callable(check)
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.3)

    def logs(self) -> str:
        """The end of what every background command wrote."""
        found = sorted(self.folder.glob("background-*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in found)

    def close(self) -> None:
        """End what runs; a command that ended by itself did so with status 0."""
        ended = [(c, p.poll()) for c, p in self.background]
        for _, process in reversed(self.background):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for _, process in self.background:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert all(code in (None, 0) for _, code in ended), f"{ended}\n{self.logs()}"

    def _images(self, path: Path) -> None:
        rng = np.random.default_rng(3)
        np.savez(path, images=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8))

    def _small_plan(self, path: Path) -> None:
        shutil.copy(ROOT / "tests" / "docs" / "small.toml", path)
