"""Uploads and downloads over a line that is cut: they go on at the last committed chunk."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from coordinator import admin, results
from coordinator.artifacts import Artifacts
from coordinator.config import Home
from coordinator.spool import Spool
from coordinator.store import Store
from silo.client import CHUNK_BYTES, Client, Way
from tests.coordinator.agent import TestSilo, nothing
from tests.coordinator.federation import Federation
from tests.proxy import Proxy

# The tags of so many images make a vector of a dozen chunks; the coordinator needs no torch for it.
PLAN = """
[warm_up]
steps = 1

[auxiliary]
images = 400000

[strategy]
kind = "fedddpm"
correction_steps = 1
"""
HANDSHAKE = 16 * 1024
"""What TLS, HTTP/2 and the request's own fields take of a connection, at most."""


@asynccontextmanager
async def about_to_upload(folder: Path) -> AsyncIterator[tuple[Federation, TestSilo, str]]:
    """A federation whose first silo is about to upload its tags; it does when the body ends."""
    async with Federation(folder, absent_after=30.0) as federation:
        silos = await federation.join_four()
        here, go = asyncio.Event(), asyncio.Event()

        async def wait(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if (where, quantity) == ("before upload", "tags 1"):
                silo.hook = nothing
                here.set()
                await go.wait()

        silos[0].hook = wait
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=120.0, more=PLAN))
        await asyncio.wait_for(here.wait(), 60)
        yield federation, silos[0], study
        go.set()
        await federation.until(lambda: federation.result(study, "tags 1"), 60)


def way(federation: Federation, silo: TestSilo, proxy: Proxy) -> Way:
    made = silo.credentials
    return Way(proxy.address, made.authority, made.certificate, made.key)


async def until_cut(proxy: Proxy, call: Coroutine[Any, Any, None]) -> bool:
    """Whether the call ended before the line was cut. A call that was cut is given up, as if its
    process had died: the next one begins with what the disks hold."""
    before, task = proxy.cuts, asyncio.ensure_future(call)
    while proxy.cuts == before and not task.done():
        await asyncio.sleep(0.01)
    ended = task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return ended


# Half chunks after the last committed byte. "each" cuts a line at the end of each chunk, "inside"
# in the middle of each but the first, "far" after several.
WHERE = {"each": (2,), "inside": (3,), "far": (1, 7, 4)}
anywhere = pytest.mark.parametrize("where", WHERE)
# A line that dies silently lets what is under way arrive; one that is reset loses it.
silently_or_reset = pytest.mark.parametrize("stall", [0.2, 0.0], ids=["silently", "reset"])


def budgets(where: str) -> Iterator[int]:
    return cycle(halves * CHUNK_BYTES // 2 for halves in WHERE[where])


@anywhere
@silently_or_reset
async def test_an_upload_cut_at_chunks_and_inside_them_sends_at_most_one_chunk_again(
    tmp_path: Path, where: str, stall: float
) -> None:
    async with about_to_upload(tmp_path) as (federation, silo, study):
        vector = silo.studies[study].vector
        assert vector is not None
        content, file = vector.tobytes(), tmp_path / "vector"
        assert len(content) > 10 * CHUNK_BYTES
        file.write_bytes(content)
        spool, digest = Spool(Home(federation.home).spool), hashlib.sha256(content).digest()
        proxy = Proxy(federation.address)
        await proxy.start()
        proxy.stall = stall
        committed, cuts, sent = 0, 0, 0
        for budget in budgets(where):
            client = Client(way(federation, silo, proxy), lambda _: None)
            proxy.cut_after(HANDSHAKE + budget)
            ended = await until_cut(proxy, client.upload(study, 2, file, digest))
            await client.close()
            await asyncio.sleep(0.1)  # the coordinator notices, and keeps what came
            if ended:
                break
            now, cuts = spool.committed(study, 2, 1), cuts + 1
            again = (proxy.total - sent) - (now - committed)
            assert again <= CHUNK_BYTES + 2 * HANDSHAKE, (cuts, again)
            committed, sent = now, proxy.total
        await proxy.stop()
        assert cuts >= (5 if where == "far" else 10)
        assert spool.holds(study, 2, 1, digest, len(content))


@anywhere
@silently_or_reset
async def test_a_download_cut_anywhere_fetches_at_most_one_chunk_again(
    tmp_path: Path, where: str, stall: float
) -> None:
    async with about_to_upload(tmp_path) as (federation, silo, study):
        place = Home(federation.home)
        content = os.urandom(10 * CHUNK_BYTES + 12345)
        digest = Artifacts(place.artifacts).put(content)
        store = Store(place.database(place.config()))
        size = len(content)
        store.run(results.record_artifact, study, digest, "model", size, published=True)
        store.close()
        proxy, target = Proxy(federation.address), tmp_path / "model"
        partial = target.with_name("model.partial")
        await proxy.start()
        proxy.stall = stall
        here, cuts, got = 0, 0, 0
        for budget in budgets(where):
            client = Client(way(federation, silo, proxy), lambda _: None)
            proxy.cut_after(HANDSHAKE + budget, back=True)
            download = client.download(study, digest, target, at_most=size)
            ended = await until_cut(proxy, download)
            await client.close()
            if ended:
                break
            now, cuts = partial.stat().st_size if partial.exists() else 0, cuts + 1
            again = (proxy.returned - got) - (now - here)
            assert again <= CHUNK_BYTES + 2 * HANDSHAKE, (cuts, again)
            here, got = now, proxy.returned
        await proxy.stop()
        assert cuts >= (5 if where == "far" else 9)
        assert target.read_bytes() == content
