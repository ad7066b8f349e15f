"""A coordinator and its silos as operating-system processes on this machine.

The processes know each other through gRPC with mutual TLS on loopback, and through nothing else.
This program plays the people: it invites, compares fingerprints, approves, and starts the study.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

import silo.admin
from concilium.datasets import Images, Labels
from coordinator import admin
from coordinator.config import Home, config_text
from silo.identity import Enrolment

NAMES = (
    "st-marys",
    "northgate",
    "lakeside",
    "riverside",
    "hillcrest",
    "eastmoor",
    "westfield",
    "southbank",
    "greenvale",
    "harbour",
)
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


class ProcessDied(Exception):
    """A process of the federation ended by itself."""


@dataclass
class Process:
    """One running part, and where it writes its log."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raises `ProcessDied` with the end of the log if the process has ended."""
        if self.popen.poll() is None:
            return
        tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-15:])
        raise ProcessDied(f"{self.name} ended with status {self.popen.returncode}:\n{tail}")


@dataclass
class Federation:
    """Everything below one folder: coordinator/, silos/<name>/, data/<name>.npz, logs/."""

    out: Path
    names: Sequence[str]
    absent_after: float = 6.0
    """Seconds of silence after which the coordinator stops waiting for a silo: few, because nobody
    on this machine waits for a hospital's network."""
    processes: dict[str, Process] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def coordinator_home(self) -> Path:
        return self.out / "coordinator"

    def silo_home(self, name: str) -> Path:
        return self.out / "silos" / name

    def found_coordinator(self) -> str:
        """Make the authority and the store, and start the service; returns the fingerprint."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        fingerprint = admin.init(self.coordinator_home, address, listen=address)
        home = Home(self.coordinator_home)
        # All silos and the coordinator's worker share this machine's cores.
        ours = {"worker_threads": 1, "absent_after": self.absent_after}
        config = home.config().model_copy(update=ours)
        home.config_file.write_text(config_text(config), "utf-8")
        self.start("coordinator")
        self._wait_for(port)
        return fingerprint

    def found_silo(
        self, name: str, images: Images, labels: Labels | None = None, threads: int = 1
    ) -> None:
        """Write the silo's images, their labels where they have any, and its site.toml."""
        data = self.out / "data" / f"{name}.npz"
        data.parent.mkdir(parents=True, exist_ok=True)
        # One channel: [n, h, w], as MedMNIST stores greyscale.
        if labels is None:
            np.savez(data, images=images[:, 0])
        else:
            np.savez(data, images=images[:, 0], labels=labels)
        silo.admin.init(
            self.silo_home(name),
            name=name,
            data=data,
            format="npz",
            device=None,
            threads=threads,
            automatic=True,
        )

    def enrol(self) -> dict[str, str]:
        """Invite, join and approve every silo; returns the fingerprints that were compared.

        A site is approved only where the fingerprint that its own join shows is the one that the
        coordinator was handed: what two people do by phone.
        """
        shown: dict[str, list[str]] = {name: [] for name in self.names}
        with ThreadPoolExecutor(len(self.names)) as pool:
            joins = {name: pool.submit(self._join, name, shown[name]) for name in self.names}
            while not all(join.done() for join in joins.values()):
                for site in admin.pending(self.coordinator_home):
                    seen = " ".join(shown[site.name])
                    if site.fingerprint is not None and site.fingerprint in seen:
                        admin.approve(self.coordinator_home, site.name)
                self.check()
                time.sleep(0.1)
            _raise_first(list(joins.values()))
        approved = admin.sites(self.coordinator_home)
        return {site.name: site.fingerprint or "" for site in approved}

    def _join(self, name: str, shown: list[str]) -> Enrolment:
        token = admin.invite(self.coordinator_home, name)
        return asyncio.run(silo.admin.join(self.silo_home(name), token, shown.append))

    def start(self, name: str, environment: dict[str, str] | None = None) -> Process:
        """Start the coordinator or a silo's agent, or start it again."""
        if name == "coordinator":
            arguments = ["coordinator", "serve", "--home", str(self.coordinator_home)]
        else:
            arguments = ["silo", "run", "--home", str(self.silo_home(name))]
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            popen = subprocess.Popen(
                [sys.executable, "-m", "concilium", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches us first, and we end them in order
            )
        self.processes[name] = Process(name, log, popen)
        return self.processes[name]

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would."""
        process = self.processes.pop(name)
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait()

    def check(self) -> None:
        """Raises `ProcessDied` if any process has ended by itself."""
        for process in self.processes.values():
            process.check()

    def stop(self) -> None:
        """SIGTERM to silos, then to the coordinator; SIGKILL to what does not listen."""
        silos = [p for name, p in self.processes.items() if name != "coordinator"]
        others = [p for name, p in self.processes.items() if name == "coordinator"]
        for group in (silos, others):
            for process in group:
                process.popen.terminate()
            for process in group:
                try:
                    process.popen.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.popen.kill()
                    process.popen.wait()
        self.processes.clear()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise ProcessDied(f"the coordinator did not listen within {_START_SECONDS:.0f} s")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on.

    Below the range that systems hand out to connections and to whoever asks for any port: what is
    free there now is not given to somebody else by chance before it is bound.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _raise_first(futures: Sequence[Future[Enrolment]]) -> None:
    for future in futures:
        future.result()
