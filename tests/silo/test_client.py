"""The way to the coordinator breaks: what was sent or fetched is not sent or fetched again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.authority import Authority
from coordinator.wire import task_of
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import (
    CoordinationServicer,
    add_CoordinationServicer_to_server,
)
from secagg.coordinator.gathering import MAILBOX_BYTES, SEED_BYTES
from secagg.events import Headers
from secagg.messages import HASH_BYTES, Dealt, Header, Parcel, Signed, Step
from secagg.roster import MAX_SILOS
from silo.client import CHUNK_BYTES, LONGEST_MESSAGE, Client, Way
from silo.errors import ProposalRefused, RefusedByCoordinator
from silo.identity import _pem

CONTENT = bytes(range(256)) * 4096 + b"end"  # one chunk of an upload, and three bytes
DIGEST = hashlib.sha256(CONTENT).digest()


class Flaky(CoordinationServicer):
    """Commits what it gets and hangs up after every `patience` chunks."""

    def __init__(self) -> None:
        self.patience, self.held = 1000, bytearray()
        self.sent: list[int] = []
        self.served: list[int] = []
        self.content = CONTENT
        self.code: grpc.StatusCode | None = None
        self.failures, self.said = 0, "as the test wants it"
        self.task: pb.Task | None = None

    async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.Task:
        if self.code is not None and self.failures > 0:
            self.failures -= 1
            await context.abort(self.code, self.said)
        return self.task or pb.Task(study=request.study, idle=pb.Idle())

    async def UploadOffset(self, request: Any, context: Any) -> pb.UploadOffsetReply:
        return pb.UploadOffsetReply(committed=len(self.held))

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadReply:
        taken = 0
        async for chunk in request_iterator:
            assert chunk.offset == len(self.held)
            assert len(chunk.data) <= 1 << 20
            if taken == 0:
                assert (chunk.size, chunk.sha256) == (len(CONTENT), DIGEST)
            if taken == self.patience:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line is cut")
            self.held += chunk.data
            self.sent.append(len(chunk.data))
            taken += 1
        return pb.UploadReply(committed=len(self.held))

    async def Download(
        self, request: pb.DownloadRequest, context: Any
    ) -> AsyncIterator[pb.DownloadChunk]:
        at, taken = request.offset, 0
        while at < len(self.content):
            if taken == self.patience:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line is cut")
            data = self.content[at : at + 100_000]
            yield pb.DownloadChunk(offset=at, data=data, size=len(self.content))
            self.served.append(at)
            at, taken = at + len(data), taken + 1


@pytest.fixture
async def flaky(tmp_path: Path) -> AsyncIterator[tuple[Flaky, Client, list[str | None]]]:
    authority = Authority.create(tmp_path / "authority")
    server, service = grpc.aio.server(), Flaky()
    add_CoordinationServicer_to_server(service, server)
    pair = authority.server_credentials("127.0.0.1")
    credentials = grpc.ssl_server_credentials([pair], authority.pem, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    certificate = authority.silo_certificate("north", request.sign(key, hashes.SHA256()), 30)
    seen: list[str | None] = []
    way = Way(f"127.0.0.1:{port}", authority.pem, certificate.pem, _pem(key))
    client = Client(way, seen.append)
    yield service, client, seen
    await client.close()
    await server.stop(0)


async def test_an_upload_that_is_cut_again_and_again_sends_every_byte_once(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    service, client, seen = flaky
    service.patience = 1
    (tmp_path / "vector").write_bytes(CONTENT)
    await client.upload("trial", 1, tmp_path / "vector", DIGEST)
    assert bytes(service.held) == CONTENT
    assert sum(service.sent) == len(CONTENT)
    assert max(service.sent) == CHUNK_BYTES
    assert "unavailable: the line is cut" in seen
    assert seen[-1] is None


async def test_a_download_goes_on_where_it_was_cut(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    service, client, _ = flaky
    service.patience = 4
    target = tmp_path / DIGEST.hex()
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert len(service.served) == len(set(service.served)) == 11
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert len(service.served) == 11, "what is here is not fetched again"


async def test_nothing_that_the_coordinator_says_moves_a_terminal(
    flaky: tuple[Flaky, Client, list[str | None]],
) -> None:
    service, client, seen = flaky
    service.said, service.failures = "it\x1b[2J is\u202e f\x9bull\u2028\nÄ", 1
    service.code = grpc.StatusCode.UNAVAILABLE
    await client.next_task("trial", 0, 0, 1)
    assert seen[0] == "unavailable: it [2J is  f ull  Ä"
    service.failures, service.code = 1, grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(RefusedByCoordinator) as refused:
        await client.next_task("trial", 0, 0, 1)
    assert str(refused.value) == "permission denied: it [2J is  f ull  Ä"


def headers_of(silos: int) -> Headers:
    """Step 2 with every field at its full size: no session of so many silos has more bytes."""
    dealt = [Dealt(i, *5 * [bytes(HASH_BYTES)]) for i in range(1, silos + 1)]
    body = Header(bytes(HASH_BYTES), bytes(HASH_BYTES), bytes(HASH_BYTES), tuple(dealt)).encode()
    signed = [Signed(Step.SHARE, i, body, bytes(64)) for i in range(1, silos + 1)]
    parcel = Parcel(bytes(MAILBOX_BYTES), bytes(SEED_BYTES))
    return Headers(tuple(signed), dict.fromkeys(range(2, silos + 1), parcel))


async def test_the_headers_and_parcels_of_the_largest_roster_reach_a_silo(
    flaky: tuple[Flaky, Client, list[str | None]],
) -> None:
    service, client, _ = flaky
    sent = service.task = task_of("trial", 1, headers_of(MAX_SILOS), b"", [], "")
    assert (4 << 20) < sent.ByteSize() < 0.8 * LONGEST_MESSAGE
    async with asyncio.timeout(30):
        task = await client.next_task("trial", 0, 0, 1)
    assert task == sent
    assert [Signed.decode(raw).sender for raw in task.headers.signed] == [*range(1, 256)]


async def test_a_file_that_was_removed_is_hashed_again_when_its_name_is_back(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    _, client, _ = flaky
    target = tmp_path / DIGEST.hex()
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    target.unlink()
    await client.download("trial", DIGEST, tmp_path / "the next round's", at_most=len(CONTENT))
    target.write_bytes(CONTENT[:-1] + b"x")
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert target.read_bytes() == CONTENT


async def test_a_partial_file_of_an_earlier_process_is_used(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    service, client, _ = flaky
    target = tmp_path / DIGEST.hex()
    partial = tmp_path / f"{DIGEST.hex()}.partial"
    partial.write_bytes(CONTENT[:1_000_000])
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert service.served == [1_000_000]
    target.unlink()
    partial.write_bytes(CONTENT)
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert service.served == [1_000_000], "it was whole, only not renamed"


async def test_a_file_of_an_earlier_process_is_used_only_if_it_is_what_it_says(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    service, client, _ = flaky
    target = tmp_path / DIGEST.hex()
    target.write_bytes(CONTENT)
    await client.download("trial", DIGEST, target, at_most=len(CONTENT))
    assert service.served == []
    for name, spoilt in (("a", b""), ("b", CONTENT[:-1] + b"x"), ("c", CONTENT + b"x")):
        target = tmp_path / name
        target.write_bytes(spoilt)
        await client.download("trial", DIGEST, target, at_most=len(CONTENT))
        assert target.read_bytes() == CONTENT


async def test_an_artifact_that_is_too_long_or_of_another_hash_is_refused(
    flaky: tuple[Flaky, Client, list[str | None]], tmp_path: Path
) -> None:
    service, client, _ = flaky
    with pytest.raises(ProposalRefused, match="longer than the 500000 bytes"):
        await client.download("trial", DIGEST, tmp_path / "a", at_most=500_000)
    assert (tmp_path / "a.partial").stat().st_size == 0
    service.content = CONTENT[:-1] + b"x"
    with pytest.raises(ProposalRefused, match="copy is damaged"):
        await client.download("trial", DIGEST, tmp_path / "b", at_most=len(CONTENT))
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "b.partial").exists()


async def test_faults_of_the_way_are_tried_again_and_refusals_are_not(
    flaky: tuple[Flaky, Client, list[str | None]],
) -> None:
    service, client, seen = flaky
    service.code, service.failures = grpc.StatusCode.UNAVAILABLE, 2
    async with asyncio.timeout(60):
        task = await client.next_task("trial", 0, 0)
    assert task.WhichOneof("task") == "idle"
    assert [s is None for s in seen] == [False, False, True]
    service.code, service.failures = grpc.StatusCode.PERMISSION_DENIED, 2
    with pytest.raises(RefusedByCoordinator, match="permission denied: as the test wants it"):
        await client.next_task("trial", 0, 0)
    assert service.failures == 1
