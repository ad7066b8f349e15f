"""The way to the coordinator: one channel, calls that are repeated until they are answered.

Every call of the protocol may be repeated and changes nothing the second time, so whatever looks
like a fault of the way (or of a coordinator that restarts) is tried again for ever, with
exponential back-off and jitter. What trying again cannot mend is raised as RefusedByCoordinator.
Streams resume where the other side has got to: an upload at the committed offset, a download at
the length of the partial file.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from protos.v1 import coordination_pb2 as pb
from protos.v1 import enrolment_pb2 as enrolment_pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from protos.v1.enrolment_pb2_grpc import EnrolmentStub
from silo.errors import ProposalRefused, RefusedByCoordinator
from silo.files import move

T = TypeVar("T")

# The largest that the coordinator takes: the cost of a message is more than that of its bytes.
CHUNK_BYTES = 1 << 20
KEEPALIVE_SECONDS = 60
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 10.0
_CALL_SECONDS, _STREAM_SECONDS = 30.0, 3600.0
_FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
# Step 2 of the largest roster, 255 silos, is 255 headers that speak of 255 receivers each, and 254
# parcels: 11.9 MiB. gRPC takes 4 by itself, enough for 145 silos. A silo sends less than 1.
LONGEST_MESSAGE = 16 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", LONGEST_MESSAGE),
    # Firewalls forget quiet connections: pings keep the way open, without calls too.
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # A line that is reset loses what is under way; gRPC would let several chunks be.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 18),
]


@dataclass(frozen=True)
class Way:
    """Whom to dial, and what to show and to trust there. All PEM."""

    address: str
    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    proxy: str = field(default="", repr=False)
    """URL of an HTTP proxy, with its password; "" = as https_proxy and no_proxy say."""
    keepalive: int = KEEPALIVE_SECONDS
    """Seconds of silence after which a ping is sent."""

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self.address, self._credentials, options=self._options)

    def blocking_channel(self) -> grpc.Channel:
        """For a program without an event loop."""
        return grpc.secure_channel(self.address, self._credentials, options=self._options)

    @property
    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    @property
    def _options(self) -> list[tuple[str, Any]]:
        ping = ("grpc.keepalive_time_ms", 1000 * self.keepalive)
        return [*_OPTIONS, ping, *([("grpc.http_proxy", self.proxy)] if self.proxy else [])]


class Client:
    """Calls to one coordinator.

    `on_contact(None)` is called after every answer, `on_contact(text)` after every failure that
    will be tried again.
    """

    def __init__(self, way: Way, on_contact: Callable[[str | None], None]) -> None:
        self._on_contact = on_contact
        self._old: set[asyncio.Task[None]] = set()
        self._verified: set[Path] = set()
        self._dial(way)

    def _dial(self, way: Way) -> None:
        self._channel = way.channel()
        self._coordination = CoordinationStub(self._channel)
        self._enrolment = EnrolmentStub(self._channel)

    def redial(self, way: Way) -> None:
        """New calls go over a new channel; those under way end on the old one."""
        drained = asyncio.ensure_future(self._channel.close(grace=_STREAM_SECONDS))
        self._old.add(drained)
        drained.add_done_callback(self._old.discard)
        self._dial(way)

    async def close(self) -> None:
        for drained in self._old:
            drained.cancel()
        await self._channel.close(grace=None)

    async def next_task(self, study: str, settled: int, wait: int, epoch: int = 0) -> pb.Task:
        """`epoch` is that of the roster pinned for `study`."""
        request = pb.NextTaskRequest(
            study=study, settled_session=settled, wait_seconds=wait, epoch=epoch
        )
        seconds = _CALL_SECONDS + wait
        return await self._call(lambda: self._coordination.NextTask(request, timeout=seconds))

    async def answer_offer(self, request: pb.AnswerOfferRequest) -> None:
        await self._call(lambda: self._coordination.AnswerOffer(request, timeout=_CALL_SECONDS))

    async def leave_study(self, study: str, reason: str) -> None:
        request = pb.LeaveStudyRequest(study=study, reason=reason)
        await self._call(lambda: self._coordination.LeaveStudy(request, timeout=_CALL_SECONDS))

    async def countersign(self, request: pb.CountersignRequest) -> None:
        await self._call(lambda: self._coordination.Countersign(request, timeout=_CALL_SECONDS))

    async def submit(self, request: pb.SubmitRequest) -> None:
        await self._call(lambda: self._coordination.Submit(request, timeout=_CALL_SECONDS))

    async def report_refusal(self, study: str, session: int, reason: str) -> None:
        request = pb.ReportRefusalRequest(study=study, session=session, reason=reason)
        await self._call(lambda: self._coordination.ReportRefusal(request, timeout=_CALL_SECONDS))

    async def report_progress(self, request: pb.ReportProgressRequest) -> None:
        """Tried once: the next report makes a lost one good."""
        try:
            await self._coordination.ReportProgress(request, timeout=_CALL_SECONDS)
            self._on_contact(None)
        except grpc.aio.AioRpcError as error:
            self._on_contact(_describe(error))

    async def join(self, request: enrolment_pb.JoinRequest) -> enrolment_pb.JoinReply:
        """Tried once: the person who joins is waiting and reads what went wrong."""
        reply: enrolment_pb.JoinReply = await self._enrolment.Join(request, timeout=_CALL_SECONDS)
        return reply

    async def renew(self, certificate_request: bytes) -> bytes:
        """The new certificate (PEM)."""
        request = enrolment_pb.RenewRequest(certificate_request=certificate_request)
        reply = await self._call(lambda: self._enrolment.Renew(request, timeout=_CALL_SECONDS))
        return reply.certificate

    async def upload(self, study: str, session: int, vector: Path, sha256: bytes) -> None:
        """Send the masked vector; returns once the coordinator has committed all of it."""
        where = pb.UploadOffsetRequest(study=study, session=session)

        async def attempt() -> None:
            offset = await self._coordination.UploadOffset(where, timeout=_CALL_SECONDS)
            chunks = _chunks(study, session, vector, sha256, offset.committed)
            await self._coordination.Upload(chunks, timeout=_STREAM_SECONDS)

        await self._call(attempt)

    async def download(self, study: str, sha256: bytes, target: Path, *, at_most: int) -> None:
        """Fetch an artifact to `target`, unless it is there.

        Raises ProposalRefused for one that is larger than `at_most` bytes or whose content does
        not have the hash, RefusedByCoordinator where there is none.

        Nothing is synced: what a power cut spoils has another hash, and is fetched again. So a file
        of an earlier process is read and hashed before it is used.
        """
        partial = target.with_name(target.name + ".partial")
        if target.exists():
            known = target in self._verified
            if known or await asyncio.to_thread(Hashed(target).catch_up) == sha256:
                return self._verified.add(target)
            target.unlink()
        hashed = Hashed(partial)
        resumed = partial.exists() and partial.stat().st_size > 0
        # A crash between the last byte and the rename leaves a partial file that is whole.
        if not partial.exists() or await asyncio.to_thread(hashed.catch_up) != sha256:
            await self._call(lambda: self._download_once(study, sha256, hashed, at_most))
        found = await asyncio.to_thread(hashed.catch_up)
        if found != sha256:
            partial.unlink()
            if resumed:  # what was there before may be what a power cut left: all of it anew
                return await self.download(study, sha256, target, at_most=at_most)
            raise ProposalRefused(
                f"artifact {sha256.hex()} arrived with SHA-256 {found.hex()}: "
                "the study centre's copy is damaged"
            )
        await asyncio.to_thread(move, partial, target)
        # Each round has an input of its own, and the agent removes that of the round before.
        self._verified = {path for path in self._verified if path.exists()} | {target}

    async def _download_once(self, study: str, sha256: bytes, hashed: Hashed, at_most: int) -> None:
        with open(hashed.path, "ab") as file:
            request = pb.DownloadRequest(study=study, sha256=sha256, offset=hashed.size)
            async for chunk in self._coordination.Download(request, timeout=_STREAM_SECONDS):
                data = chunk.data
                if chunk.offset != hashed.size or hashed.size + len(data) > at_most:
                    file.truncate(0)
                    raise ProposalRefused(
                        f"artifact {sha256.hex()} is longer than the {at_most} bytes that the "
                        "plan allows, or came in the wrong order"
                    )
                file.write(data)
                hashed.add(data)

    async def _call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        delay = _FIRST_DELAY
        while True:
            try:
                answer = await attempt()
            except grpc.aio.AioRpcError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # gRPC can put an error of its own in the place of our cancellation; retried,
                    # it would keep an agent alive that was asked to end.
                    raise asyncio.CancelledError from error
                if error.code() in _FINAL:
                    self._on_contact(None)
                    raise RefusedByCoordinator(_describe(error)) from error
                self._on_contact(_describe(error))
                await asyncio.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311 - only jitter
                delay = min(delay * 2, _LONGEST_DELAY)
            else:
                self._on_contact(None)
                return answer


async def _chunks(
    study: str, session: int, vector: Path, sha256: bytes, offset: int
) -> AsyncIterator[pb.UploadChunk]:
    size = vector.stat().st_size
    first = True
    with open(vector, "rb") as file:
        file.seek(offset)
        while True:
            data = file.read(CHUNK_BYTES)
            if not data and not first:
                return
            chunk = pb.UploadChunk(study=study, session=session, offset=offset, data=data)
            if first:
                chunk.size, chunk.sha256 = size, sha256
            yield chunk
            first, offset = False, offset + len(data)


class Hashed:
    """The SHA-256 of a file that grows at its end, so that nothing is read again to be hashed."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._sha256 = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """Of what was just written."""
        self._sha256.update(data)
        self.size += len(data)

    def catch_up(self) -> bytes:
        """The digest of the whole file, after reading what was not added; blocks."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self.size)
                while data := file.read(CHUNK_BYTES):
                    self.add(data)
        return self._sha256.digest()


def detail_of(error: grpc.RpcError) -> str:
    """What the coordinator says of it, without what a terminal would obey: it ends in logs, in
    status.json and on the screen where people compare fingerprints."""
    return "".join(c if c.isprintable() else " " for c in error.details() or "")


def _describe(error: grpc.aio.AioRpcError) -> str:
    code = error.code().name.lower().replace("_", " ")
    detail = detail_of(error)
    return f"{code}: {detail}" if detail else code
