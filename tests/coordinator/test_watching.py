"""How a coordinator is watched: probes, metrics, status pages; several offers at one site."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from concilium.demo.federation import free_port
from concilium.demo.watch import watching
from concilium.status import coordinator_page, coordinator_values
from coordinator import admin, results
from coordinator.config import Home
from coordinator.server import ServerError, health_of
from coordinator.store import Store
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from tests.coordinator.federation import Federation


async def test_a_probe_may_ask_for_the_whole_and_for_each_service_and_watch_it_end(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1")
        assert await health_of(federation.home) == "SERVING"
        async with federation.silos["site-1"].credentials.channel(federation.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "concilium.v1.Coordination", "concilium.v1.Enrolment"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Check(health_pb2.HealthCheckRequest(service="other"))
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            seen = [(await watch.read()).status]
            stopping = asyncio.create_task(federation.stop())
            seen.append((await watch.read()).status)
            assert [health_pb2.HealthCheckResponse.ServingStatus.Name(s) for s in seen] == [
                "SERVING",
                "NOT_SERVING",
            ]
            await stopping
        with pytest.raises(ServerError, match="is the service running"):
            await health_of(federation.home)


async def test_metrics_say_what_the_status_says_and_are_off_unless_asked_for(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path)
    assert admin.status(federation.home).studies == ()
    port = free_port()
    config = federation.home / "coordinator.toml"
    config.write_text(config.read_text().replace("# metrics =", f'metrics = "127.0.0.1:{port}"'))
    async with federation:
        await federation.join("site-1", "site-2", "site-3")
        study = admin.start_study(federation.home, federation.plan())
        federation.silos["site-1"].start()
        await federation.until(lambda: federation.study(study).awaited == ("site-2", "site-3"))
        text = await asyncio.to_thread(scrape, port)
        assert f'concilium_study_state{{state="offered",study="{study}"}} 1.0' in text
        assert f'concilium_study_awaited{{study="{study}"}} 2.0' in text
        assert f'concilium_study_threshold{{study="{study}"}} 3.0' in text
        assert "concilium_sites_approved 3.0" in text
        now = admin.status(federation.home)
        entries = next(line for line in text.splitlines() if line.startswith("concilium_audit_log"))
        assert 0 < float(entries.split()[1]) <= now.log_entries
        expires = 'concilium_site_certificate_expires_seconds{site="site-2"}'
        shown = next(line for line in text.splitlines() if line.startswith(expires))
        assert float(shown.split()[1]) == pytest.approx(now.sites[1].certificate_expires)
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        return str(page.read().decode())


async def test_a_site_is_told_of_every_study_that_waits_for_it_not_of_the_first_alone(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1", "site-2", "site-3")
        plan = federation.plan()
        studies = {admin.start_study(federation.home, plan) for _ in range(3)}
        async with federation.silos["site-1"].credentials.channel(federation.address) as channel:
            stub, told = CoordinationStub(channel), set[str]()
            async with asyncio.timeout(30):
                while told != studies:
                    told |= {(await stub.NextTask(pb.NextTaskRequest())).study} - {""}
                    assert told <= studies


@pytest.mark.parametrize("width", [80, 120])
async def test_the_status_page_fits_its_terminal_and_names_who_is_awaited(
    tmp_path: Path, width: int
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1", "site-2", "site-3")
        admin.invite(federation.home, "site-4")
        study = admin.start_study(federation.home, federation.plan())
        federation.silos["site-1"].start()
        await federation.until(lambda: federation.study(study).awaited == ("site-2", "site-3"))
        now = admin.status(federation.home)
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(coordinator_page(now, 0.0))
        page = console.export_text()
        assert max(map(len, page.splitlines())) <= width
        assert "roster 1 waits for the answers of site-2, site-3" in page
        assert "site-4  invited" in page
        values = json.loads(json.dumps(coordinator_values(now)))
        assert values["studies"][0]["awaited"] == ["site-2", "site-3"]
        assert values["studies"][0]["silos"][0]["answer"] == "accepted"


async def test_the_figures_shown_are_those_of_the_round_they_stand_beside(tmp_path: Path) -> None:
    """While a round is under way its evaluation and its correction are there before it is done."""
    console = Console(width=120, record=True, file=io.StringIO())
    async with Federation(tmp_path) as federation:
        await federation.join("site-1", "site-2", "site-3")
        study = admin.start_study(federation.home, federation.plan(rounds=2))
        store = Store(Home(federation.home).database(Home(federation.home).config()))
        with watching(console) as show:
            for key, value in (
                ("round 00001 sum", {"silos": ["site-1", "site-2"], "seconds": 1.0}),
                ("round 00001 model", {"loss": 0.5, "seconds": 1.0}),
                ("round 00001 evaluation", {"fid": 0.25, "seconds": 1.0}),
                ("round 00001 tidy", {"seconds": 0.0}),
                ("round 00002 corrected", {"seconds": 1.0}),
                ("round 00002 evaluation", {"fid": 0.125, "seconds": 1.0}),
                ("round 00002 tidy", {"seconds": 0.0}),
            ):
                store.run(results.put_result, study, key, value)
                show(federation.study(study))
        store.close()
    lines = console.export_text().splitlines()
    shown = [line.split("done, ")[1] for line in lines if "of 2" in line]
    assert shown == [
        "loss 0.5000, FID 0.25; summed: site-1, site-2",
        "FID 0.12, corrections 1; summed: ",
    ]
