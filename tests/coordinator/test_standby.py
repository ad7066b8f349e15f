"""Two coordinators on one store, as processes: one serves, the other waits and takes over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from concilium.demo.federation import free_port
from coordinator import admin
from coordinator.audit import verified
from coordinator.config import Home, config_text
from coordinator.store import Store
from tests.coordinator.agent import TestSilo, nothing
from tests.coordinator.served import Coordinator, Served
from tests.proxy import Proxy


class Pair(Served):
    """Two coordinators of one folder; silos reach, through the proxy, whom it points to."""

    async def start(self) -> None:
        config = Home(self.home).config().model_copy(update={"takeover_after": 12.0})
        (self.home / "coordinator.toml").write_text(config_text(config))
        self.listen = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.pair = [self.launch(0)]
        self.proxy = Proxy(self.listen[0])
        await self.proxy.start(self.address)
        await self.until(lambda: "coordinator.started" in self.said(0))
        self.pair.append(self.launch(1))
        await self.until(lambda: "coordinator.standby" in self.said(1))

    def launch(self, which: int) -> Coordinator:
        log = self.home.parent / f"coordinator-{which}.log"
        return Coordinator(self.home, log, None, "--listen", self.listen[which])

    def said(self, which: int) -> str:
        log = self.home.parent / f"coordinator-{which}.log"
        return log.read_text() if log.exists() else ""

    def point_to(self, which: int) -> None:
        """What the operator's load balancer or floating address does."""
        self.proxy.target = self.listen[which]
        self.proxy.cut()

    async def stop(self) -> None:
        for coordinator in self.pair:
            coordinator.process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(coordinator.end)
        await self.proxy.stop()

    def log_is_whole(self) -> bool:
        store = Store(Home(self.home).database(Home(self.home).config()))
        try:
            return store.run(verified).entries > 0
        finally:
            store.close()


def slow(database: str) -> Any:
    return pytest.param(database, marks=pytest.mark.slow)


@asynccontextmanager
async def running_study(folder: Path, database: str) -> AsyncIterator[tuple[Pair, str]]:
    """A pair and a study that has got as far as the masked inputs of its census, of which one is
    held back until the pair's `go` is set."""
    async with Pair(folder, absent_after=20.0, database=database) as pair:
        silos = await pair.join_four()
        here = asyncio.Event()
        pair.go = asyncio.Event()

        async def wait(silo: TestSilo, where: str) -> None:
            if where == "before upload":
                silo.hook = nothing
                here.set()
                await pair.go.wait()

        silos[2].hook = wait
        for silo in silos:
            silo.start()
        study = admin.start_study(pair.home, pair.plan(deadline=60.0))
        await asyncio.wait_for(here.wait(), 120)
        yield pair, study


async def ends_exactly(pair: Pair, study: str) -> None:
    await pair.until(lambda: pair.result(study, "census"))
    assert len(pair.exact(study, "census", "census 1")) == 4
    assert pair.result(study, "census")["session"]["number"] == 1
    assert pair.log_is_whole()


@pytest.mark.parametrize("database", ["sqlite", slow("postgresql")], indirect=True)
async def test_a_standby_goes_on_where_a_killed_coordinator_stopped(
    tmp_path: Path, database: str
) -> None:
    async with running_study(tmp_path, database) as (pair, study):
        pair.pair[0].end(signal.SIGKILL)
        pair.point_to(1)
        pair.go.set()
        await ends_exactly(pair, study)
        # The one that died comes back as the standby of the other, and may take over again.
        pair.pair[0] = pair.launch(0)
        await pair.until(lambda: "coordinator.standby" in pair.said(0))
        assert pair.pair[1].end() == 0
        pair.point_to(0)
        await pair.until(lambda: pair.said(0).count("coordinator.started") == 2)


@pytest.mark.parametrize("database", [slow("sqlite"), "postgresql"], indirect=True)
async def test_a_coordinator_that_stood_still_finds_itself_replaced_and_ends_without_harm(
    tmp_path: Path, database: str
) -> None:
    async with running_study(tmp_path, database) as (pair, study):
        old = pair.pair[0].process
        old.send_signal(signal.SIGSTOP)
        await pair.until(lambda: "coordinator.started" in pair.said(1))
        pair.point_to(1)
        pair.go.set()
        await pair.until(lambda: pair.study(study).phase in ("confirming", "unmasking", ""))
        old.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(old.wait, 60) == 1
        assert "another coordinator has taken over" in pair.said(0)
        await ends_exactly(pair, study)
