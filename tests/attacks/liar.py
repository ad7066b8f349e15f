"""A coordinator that asks whatever a test wants of a real agent, over gRPC with mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from coordinator.authority import Authority
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import (
    CoordinationServicer,
    add_CoordinationServicer_to_server,
)
from secagg.messages import Signed, Step

_CHUNK = 256 * 1024


@dataclass
class Said:
    """All that left the silo in answer to one task."""

    submitted: list[pb.SubmitRequest] = field(default_factory=list)
    uploaded: bytearray = field(default_factory=bytearray)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    offers: list[pb.AnswerOfferRequest] = field(default_factory=list)
    other: list[Any] = field(default_factory=list)
    """Requests that carry nothing but where they stand: progress, offsets, downloads."""

    @property
    def messages(self) -> list[Signed]:
        return [Signed.decode(request.signed) for request in self.submitted]

    @property
    def steps(self) -> list[Step]:
        return [message.step for message in self.messages]


@dataclass
class _Asked:
    task: pb.Task
    said: Said
    answered: asyncio.Future[Said]


class Liar(CoordinationServicer):
    """It holds the honest coordinator's TLS key, and so it is whom the agent dials.

    An agent asks for its next task when it is through with the last one: that tells when an
    answer is complete, and no test has to wait for a time.
    """

    def __init__(self, home: Path, address: str) -> None:
        self._home, self.address = home, address
        self.artifacts: dict[bytes, bytes] = {}
        self.heard: list[Any] = []
        """Every request of the agent since the start."""
        self._questions: asyncio.Queue[_Asked] = asyncio.Queue()
        self._offers: asyncio.Queue[_Asked] = asyncio.Queue()
        self._open: dict[bool, _Asked] = {}
        """The offer and the other task that the agent is at."""
        self._inside: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        authority = Authority.load(self._home / "authority")
        pair = authority.server_credentials(self.address.rpartition(":")[0])
        credentials = grpc.ssl_server_credentials([pair], authority.pem, True)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_CoordinationServicer_to_server(self, self._server)
        self._server.add_secure_port(self.address, credentials)
        await self._server.start()

    async def stop(self) -> None:
        """After the agent has gone: a handler that outlives its server brings gRPC down."""
        for task in self._inside:
            task.cancel()
        await asyncio.gather(*self._inside, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(None)

    async def alone(self) -> None:
        """Once the calls of an agent that has gone are over: they would take the next question."""
        while self._inside:
            await asyncio.wait(self._inside)
        self._open.clear()

    async def ask(self, task: pb.Task) -> Said:
        """What the agent says to `task`, complete."""
        return await self._ask(task, self._questions)

    async def offer(self, task: pb.Task) -> pb.AnswerOfferRequest | None:
        """The agent's answer to an offer, None where it waits for a person."""
        offers = (await self._ask(task, self._offers)).offers
        return offers[-1] if offers else None

    async def _ask(self, task: pb.Task, queue: asyncio.Queue[_Asked]) -> Said:
        asked = _Asked(task, Said(), asyncio.get_running_loop().create_future())
        await queue.put(asked)
        async with asyncio.timeout(240):  # a worker that starts on a busy machine
            return await asked.answered

    @contextmanager
    def _handling(self, request: Any) -> Iterator[Said]:
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        self.heard.append(request)
        at = self._open.get(isinstance(request, pb.AnswerOfferRequest))
        try:
            yield at.said if at else Said()
        finally:
            self._inside.discard(task)

    async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.Task:
        with self._handling(request):
            offers = not request.study
            if request.wait_seconds == 0 and offers in self._open:  # it looks while it computes
                return self._open[offers].task
            if offers in self._open:
                at = self._open.pop(offers)
                at.answered.set_result(at.said)
            queue = self._offers if offers else self._questions
            try:
                async with asyncio.timeout(request.wait_seconds):
                    self._open[offers] = await queue.get()
            except TimeoutError:
                return pb.Task(study=request.study, idle=pb.Idle())
            return self._open[offers].task

    async def AnswerOffer(
        self, request: pb.AnswerOfferRequest, context: Any
    ) -> pb.AnswerOfferReply:
        with self._handling(request) as said:
            said.offers.append(request)
            return pb.AnswerOfferReply()

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitReply:
        with self._handling(request) as said:
            said.submitted.append(request)
            return pb.SubmitReply()

    async def ReportRefusal(
        self, request: pb.ReportRefusalRequest, context: Any
    ) -> pb.ReportRefusalReply:
        with self._handling(request) as said:
            said.refusals.append((request.session, request.reason))
            return pb.ReportRefusalReply()

    async def ReportProgress(
        self, request: pb.ReportProgressRequest, context: Any
    ) -> pb.ReportProgressReply:
        with self._handling(request) as said:
            said.other.append(request)
            return pb.ReportProgressReply()

    async def UploadOffset(
        self, request: pb.UploadOffsetRequest, context: Any
    ) -> pb.UploadOffsetReply:
        with self._handling(request) as said:
            said.other.append(request)
            return pb.UploadOffsetReply(committed=0)

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadReply:
        with self._handling(None) as said:
            async for chunk in request_iterator:
                self.heard.append(chunk)
                said.uploaded += chunk.data
            return pb.UploadReply(committed=len(said.uploaded))

    async def Download(
        self, request: pb.DownloadRequest, context: Any
    ) -> AsyncIterator[pb.DownloadChunk]:
        with self._handling(request) as said:
            said.other.append(request)
            content = self.artifacts[request.sha256]
            for at in range(request.offset, len(content), _CHUNK):
                data = content[at : at + _CHUNK]
                yield pb.DownloadChunk(offset=at, data=data, size=len(content))
