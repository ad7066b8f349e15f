"""What happens to machines: a full disk or store, a clock set back, an idle line that is cut."""

from __future__ import annotations

import asyncio
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from coordinator import admin, sessions
from coordinator.audit import verified
from coordinator.config import Home
from coordinator.store import Store, note
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from silo.client import Client, Way
from tests.coordinator import postgres
from tests.coordinator.agent import TestSilo, nothing
from tests.coordinator.federation import Federation, shortened
from tests.proxy import Proxy


async def test_a_full_disk_is_told_to_the_silos_and_the_sum_is_made_when_there_is_room(
    tmp_path: Path,
) -> None:
    """The disk is a real one: a small file system where the uploads go."""
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        spool = Home(federation.home).spool
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(spool)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a file system")
        try:
            for silo in silos:
                silo.start()
            study = admin.start_study(federation.home, federation.plan(deadline=60.0))
            await federation.until(lambda: all(silo.errors for silo in silos))
            for silo in silos:
                assert silo.errors[0].startswith("RESOURCE_EXHAUSTED: the study centre's disk is")
                assert "goes on where it stopped when there is room" in silo.errors[0]
            assert federation.study(study).phase == "collecting"
        finally:
            subprocess.run(["umount", "--lazy", str(spool)], check=True)
        await federation.until(lambda: federation.result(study, "census"))
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert federation.result(study, "census")["session"]["number"] == 1


def test_a_transaction_for_which_the_store_has_no_room_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    store.run(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1").all())
    with pytest.raises(OperationalError, match="disk is full"):
        store.run(note, "large", text="x" * 1_000_000)
    assert store.run(verified).entries == 0
    store.run(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1000000").all())
    store.run(note, "large", text="x" * 1_000_000)
    assert store.run(verified).entries == 1
    store.close()


async def test_contacts_that_cannot_be_written_are_told_once_and_keep_no_revocation_waiting(
    tmp_path: Path,
) -> None:
    with capture_logs() as logs:
        async with Federation(tmp_path) as federation:
            await federation.join("site-1")
            store = Store(f"sqlite:///{federation.home / 'store.sqlite'}")
            store.run(lambda c: c.exec_driver_sql("DROP TABLE traffic"))
            store.close()
            credentials = federation.silos["site-1"].credentials
            async with credentials.channel(federation.address) as channel:
                stub = CoordinationStub(channel)

                async def is_let_in() -> bool:
                    try:
                        await stub.NextTask(pb.NextTaskRequest())
                    except grpc.aio.AioRpcError as error:
                        return error.code() != grpc.StatusCode.PERMISSION_DENIED
                    return True

                for _ in range(20):  # each leaves bytes to be counted
                    assert await is_let_in()
                    await asyncio.sleep(0.1)
                admin.revoke(federation.home, "site-1")
                async with asyncio.timeout(20):
                    while await is_let_in():
                        await asyncio.sleep(0.1)
    lost = [line for line in logs if line["event"] == "contacts.lost"]
    assert len(lost) == 1
    assert logs[-1]["event"] == "coordinator.stopped"


async def test_a_clock_that_is_set_back_makes_no_step_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One silo never answers, and is not out of contact yet: only the deadline closes the step."""
    async with Federation(tmp_path, absent_after=30.0) as federation:
        silos = await federation.join_four()

        async def stay_silent(_silo: TestSilo, where: str) -> None:
            if where == "open":
                await asyncio.Event().wait()

        silos[2].hook = stay_silent
        for silo in silos:
            silo.start()
        plan = shortened(federation.plan(), "advertise", 8)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).present == 3)

        class SetBack:
            @staticmethod
            def time() -> float:
                return time.time() - 3600

        monkeypatch.setattr(sessions, "time", SetBack)
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert federation.exact(study, "census", "census 1") == ["site-1", "site-2", "site-4"]


async def test_lines_that_are_cut_when_idle_cost_nothing_but_a_new_call(tmp_path: Path) -> None:
    async with Federation(tmp_path, absent_after=5.0) as federation:
        silos = await federation.join_four()
        proxy = Proxy(federation.address)
        await proxy.start()
        proxy.patience = 0.7
        go = asyncio.Event()

        async def wait(silo: TestSilo, where: str) -> None:
            if where == "before CONFIRM":
                silo.hook = nothing
                await go.wait()

        silos[0].hook = wait
        for silo in silos:
            silo.address = proxy.address
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=60.0))
        await federation.until(lambda: federation.study(study).present == 3 and proxy.cuts > 10)
        go.set()
        await federation.until(lambda: federation.result(study, "census"))
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert not any(silo.errors for silo in silos)
        for silo in silos:
            await silo.kill()
        await proxy.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("keepalive", "cut"), [(10, False), (60, True)])
async def test_pings_keep_a_quiet_line_open_through_a_firewall_that_forgets_such(
    tmp_path: Path, keepalive: int, cut: bool
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1")
        made = federation.silos["site-1"].credentials
        proxy, seen = Proxy(federation.address), list[str | None]()
        await proxy.start()
        proxy.patience = 13.0
        way = Way(proxy.address, made.authority, made.certificate, made.key, keepalive=keepalive)
        client = Client(way, seen.append)
        answered = False
        with suppress(TimeoutError):
            async with asyncio.timeout(35):
                await client.next_task("", 0, 25)  # nobody says a word for so long
                answered = True
        assert answered is not cut
        assert (proxy.cuts > 0) is cut
        assert any(trouble is not None for trouble in seen) is cut
        await client.close()
        await proxy.stop()


async def test_a_database_that_goes_away_for_a_while_holds_the_study_up_no_longer(
    tmp_path: Path, postgres_server: postgres.Server
) -> None:
    database = postgres_server.new_database()
    async with Federation(tmp_path, absent_after=10.0, database=database) as federation:
        silos = await federation.join_four()
        here, go = asyncio.Event(), asyncio.Event()

        async def wait(silo: TestSilo, where: str) -> None:
            if where == "before upload":
                silo.hook = nothing
                here.set()
                await go.wait()

        silos[0].hook = wait
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=60.0))
        await asyncio.wait_for(here.wait(), 60)
        await asyncio.to_thread(postgres_server.halt)
        go.set()
        await asyncio.sleep(2.0)  # the service and the silos find it gone, and try again
        await asyncio.to_thread(postgres_server.start)
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert federation.result(study, "census")["session"]["number"] == 1
