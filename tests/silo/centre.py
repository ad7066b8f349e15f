"""A real coordinator on loopback and real agents, in this process or in their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from concilium.demo.federation import free_port
from coordinator import admin as centre_admin
from coordinator.server import CoordinatorServer
from silo import admin
from silo.home import SiloHome


class Centre:
    """A coordinator in `folder`; it can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.home, self.address = folder, f"127.0.0.1:{free_port()}"
        centre_admin.init(folder, self.address, self.address)
        config = folder / "coordinator.toml"
        config.write_text(config.read_text().replace("absent_after = 30.0", "absent_after = 3.0"))
        self.server: CoordinatorServer | None = None

    async def start(self) -> None:
        self.server = CoordinatorServer(self.home)
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(grace=0.1)
            self.server = None

    async def approve(self, name: str) -> str:
        """Wait until `name` has handed in its request, and let it in; the fingerprint shown."""
        while True:
            for site in await asyncio.to_thread(centre_admin.pending, self.home):
                if site.name == name:
                    await asyncio.to_thread(centre_admin.approve, self.home, name)
                    return site.fingerprint or ""
            await asyncio.sleep(0.05)


def make_site(folder: Path, name: str, images: int = 24) -> Path:
    """The home of a site with a few noisy images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name) + images)
    np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (images, 8, 8), dtype=np.uint8))
    home = folder / name
    admin.init(home, name=name, data=folder / f"{name}.npz", threads=1, automatic=True)
    return home


async def enrol(centre: Centre, home: Path, name: str) -> None:
    token = centre_admin.invite(centre.home, name)
    joining = asyncio.create_task(admin.join(home, token, lambda _: None))
    await centre.approve(name)
    await joining


class AgentProcess:
    """The agent of a home as an operating-system process."""

    def __init__(self, home: Path, failpoint: str = "") -> None:
        self.home = home
        with open(home / "stderr.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _AGENT, str(home)],
                stderr=log,
                env={**os.environ, "CONCILIUM_FAILPOINT": failpoint, "PYTHONPATH": str(Path.cwd())},
            )

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


_AGENT = (
    "import sys; from pathlib import Path; from silo.agent import main; main(Path(sys.argv[1]))"
)


async def until_exit(agent: AgentProcess, seconds: float = 60.0) -> int:
    async with asyncio.timeout(seconds):
        while (code := agent.process.poll()) is None:
            await asyncio.sleep(0.1)
    return code


def stop_all(agents: Iterable[AgentProcess]) -> None:
    for agent in agents:
        agent.kill()


def study_of(home: Path):  # type: ignore[no-untyped-def]
    """The only study of a site."""
    (study,) = SiloHome(home).studies()
    return study
