"""Calls that are open while certificates change: revocation ends them, renewal does not."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from coordinator import admin, results
from coordinator.artifacts import Artifacts
from coordinator.config import Home
from coordinator.store import Store
from protos.v1 import coordination_pb2 as pb
from protos.v1 import enrolment_pb2 as join_pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from protos.v1.enrolment_pb2_grpc import EnrolmentStub
from tests.coordinator.agent import Credentials, certificate_request, new_key
from tests.coordinator.federation import Federation
from tests.coordinator.test_bad_input import Held, refused


class Stalled:
    """An upload of the held silo that sends one byte, and the rest when `go` is set."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def chunks(self) -> AsyncIterator[pb.UploadChunk]:
        content, where = self._held.vector, {"study": self._held.study, "session": 1}
        head = {"size": len(content), "sha256": hashlib.sha256(content).digest()}
        yield pb.UploadChunk(offset=0, data=content[:1], **where, **head)
        self.begun.set()
        await self.go.wait()
        yield pb.UploadChunk(offset=1, data=content[1:], **where)


async def test_a_revoked_silo_is_put_out_of_an_upload_that_waits_for_its_next_chunk(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        stalled = Stalled(held)
        async with held.silo.credentials.channel(federation.address) as channel:
            upload = asyncio.ensure_future(CoordinationStub(channel).Upload(stalled.chunks()))
            await stalled.begun.wait()
            await asyncio.sleep(0.3)
            began = time.monotonic()
            admin.revoke(federation.home, held.silo.name)
            code, text = await refused(upload)
            assert (code, "was revoked" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
            assert time.monotonic() - began < 20
        # The others' sum goes on without it, and nothing of the half upload is in it.
        await federation.until(lambda: federation.result(held.study, "census"))
        assert federation.exact(held.study, "census", "census 1") == ["site-2", "site-3", "site-4"]


async def test_an_upload_goes_on_while_the_certificate_that_it_began_under_is_renewed(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        stalled = Stalled(held)
        key, pem = new_key()
        async with held.silo.credentials.channel(federation.address) as channel:
            upload = asyncio.ensure_future(CoordinationStub(channel).Upload(stalled.chunks()))
            await stalled.begun.wait()
            request = join_pb.RenewRequest(certificate_request=certificate_request(key))
            renewed = await EnrolmentStub(channel).Renew(request)
            fresh = Credentials(pem, renewed.certificate, held.silo.credentials.authority)
            async with fresh.channel(federation.address) as other:
                task = await CoordinationStub(other).NextTask(pb.NextTaskRequest())
                assert task.WhichOneof("task") == "idle"
            await asyncio.sleep(1.2)  # the service has looked at the certificates since
            stalled.go.set()
            assert (await upload).committed == len(held.vector)
        await held.end()


MODEL_BYTES = 32 << 20  # far more than the line, gRPC and the kernel hold for a reader that rests


def publish(federation: Federation, study: str, content: bytes) -> bytes:
    """An artifact that the silos of the study may fetch, as the runner records one; its SHA-256."""
    place = Home(federation.home)
    digest = Artifacts(place.artifacts).put(content)
    store = Store(place.database(place.config()))
    store.run(results.record_artifact, study, digest, "model", len(content), published=True)
    store.close()
    return digest


@pytest.mark.parametrize("rests", [0.0, 2.0], ids=["reads on", "rests first"])
async def test_a_revoked_silo_is_put_out_of_a_download_that_waits_for_its_reader(
    tmp_path: Path, rests: float
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        digest = publish(federation, held.study, os.urandom(MODEL_BYTES))
        async with held.silo.credentials.channel(federation.address) as channel:
            wanted = pb.DownloadRequest(study=held.study, sha256=digest)
            stream = CoordinationStub(channel).Download(wanted)
            got = len((await stream.read()).data)
            await asyncio.sleep(0.5)  # what fits is under way: the service waits for the reader
            began = time.monotonic()
            admin.revoke(federation.home, held.silo.name)
            await asyncio.sleep(rests)

            async def read_on() -> None:
                nonlocal got
                while (chunk := await stream.read()) is not grpc.aio.EOF:
                    got += len(chunk.data)
                    await asyncio.sleep(0.25)

            code, text = await refused(read_on())
            assert (code, "was revoked" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
            assert time.monotonic() - began < 20
            assert got < MODEL_BYTES / 2
