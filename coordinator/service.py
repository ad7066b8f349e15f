# ruff: noqa: N802 - methods are named as in the .proto
"""What silos can call while they take part in studies: `Coordination` of protos/v1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from coordinator import audit, results
from coordinator.contacts import Progress
from coordinator.door import Caller, Context, Door, NotFound
from coordinator.sessions import Tools
from coordinator.spool import UploadRefused
from coordinator.studies import Denied, LiveStudy, Studies
from coordinator.wire import BadRequest, check, check_steps, parcels_of
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationServicer
from secagg.errors import Reason, Refused
from secagg.messages import Signed
from study.audit_log import Head

_MAX_WAIT = 60
# A long poll looks again this often even if no bell rings, so that a revocation is never missed.
_LOOK_AGAIN = 5.0


class CoordinationService(CoordinationServicer):
    """Every call may be repeated; the second time changes nothing."""

    def __init__(self, tools: Tools, door: Door, studies: Studies, largest_vector: int) -> None:
        self._tools, self._door, self._studies = tools, door, studies
        self._largest_vector = largest_vector
        self.closing = False

    async def NextTask(self, request: pb.NextTaskRequest, context: Context) -> pb.Task:
        async with self._door.silo(context, request) as caller:
            # For `concilium silo doctor`, which compares clocks.
            await context.send_initial_metadata((("concilium-time", f"{time.time():.3f}"),))
            if request.wait_seconds > _MAX_WAIT:
                raise BadRequest(f"NextTaskRequest.wait_seconds is at most {_MAX_WAIT}")
            if request.study and not request.epoch:
                raise BadRequest("NextTaskRequest.epoch is missing: which roster is pinned?")
            task = await self._next_task(caller, request)
            self._tools.contacts.count(
                task.study, caller.site, received=request.ByteSize(), sent=task.ByteSize()
            )
            return task

    async def _next_task(self, caller: Caller, request: pb.NextTaskRequest) -> pb.Task:
        clock = asyncio.get_running_loop().time
        until = clock() + request.wait_seconds
        live = self._studies.get(request.study, caller.site) if request.study else None
        bell = live.bell if live else self._studies.offers
        while True:
            rung = bell.rung
            caller.check()
            task = await self._look(caller.site, live, request)
            left = until - clock()
            if task is not None or left <= 0 or self.closing:
                return task or pb.Task(study=request.study, idle=pb.Idle())
            await bell.wait(min(left, _LOOK_AGAIN), since=rung)

    async def _look(
        self, site: str, live: LiveStudy | None, request: pb.NextTaskRequest
    ) -> pb.Task | None:
        if live is not None:
            epoch, settled = request.epoch, request.settled_session
            return await live.task_for(self._tools.store, site, epoch, settled)
        return self._studies.offer_for(site)

    async def AnswerOffer(
        self, request: pb.AnswerOfferRequest, context: Context
    ) -> pb.AnswerOfferReply:
        required = ("study", "plan_digest", "roster_digest")
        async with self._door.silo(context, request, *required) as caller:
            if not request.accepted and not request.rule:
                raise BadRequest("AnswerOfferRequest.rule is missing: which rule forbids it?")
            live = self._studies.get(request.study, caller.site)
            await live.answer(self._tools.store, caller.site, request)
            return pb.AnswerOfferReply()

    async def LeaveStudy(
        self, request: pb.LeaveStudyRequest, context: Context
    ) -> pb.LeaveStudyReply:
        async with self._door.silo(context, request, "study", "reason") as caller:
            live = self._studies.get(request.study, caller.site)
            await live.leave(self._tools.store, caller.site, request.reason)
            return pb.LeaveStudyReply()

    async def Countersign(
        self, request: pb.CountersignRequest, context: Context
    ) -> pb.CountersignReply:
        async with self._door.silo(context, request, "study", "signature") as caller:
            live = self._studies.get(request.study, caller.site)
            place, digest = request.log.place, request.log.digest.hex()
            head = Head(caller.site, place, digest, request.signature.hex())
            await self._tools.store.do(audit.countersign, head)
            self._tools.contacts.count(live.id, caller.site, received=request.ByteSize())
            return pb.CountersignReply()

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitReply:
        async with self._door.silo(context, request, "study", "session", "signed") as caller:
            live = self._studies.get(request.study, caller.site)
            message, parcels = Signed.decode(request.signed), parcels_of(request.parcels)
            if message.sender != live.index_of(caller.site):
                raise Denied(f"site '{caller.site}' hands in a message of another silo")
            self._tools.contacts.count(live.id, caller.site, received=request.ByteSize())
            session = live.session_of(request.session)
            # A session that is over has an outcome, which the silo is told next: a message that
            # comes again, or too late, changes nothing any more.
            if session is not None:
                await session.receive(message, parcels)
            return pb.SubmitReply()

    async def ReportRefusal(
        self, request: pb.ReportRefusalRequest, context: Context
    ) -> pb.ReportRefusalReply:
        async with self._door.silo(context, request, "study", "session", "reason") as caller:
            live = self._studies.get(request.study, caller.site)
            session = live.session_of(request.session)
            if session is not None:
                await session.refuse(live.index_of(caller.site), caller.site, request.reason)
            return pb.ReportRefusalReply()

    async def ReportProgress(
        self, request: pb.ReportProgressRequest, context: Context
    ) -> pb.ReportProgressReply:
        async with self._door.silo(context, request, "study", "activity") as caller:
            live = self._studies.get(request.study, caller.site)
            check_steps(request)
            live.check_number(request.session)
            now = Progress(request.session, request.activity, request.step, request.steps)
            self._tools.contacts.progress(live.id, caller.site, now)
            return pb.ReportProgressReply()

    async def UploadOffset(
        self, request: pb.UploadOffsetRequest, context: Context
    ) -> pb.UploadOffsetReply:
        async with self._door.silo(context, request, "study", "session") as caller:
            live = self._studies.get(request.study, caller.site)
            live.session_of(request.session)
            committed = await asyncio.to_thread(
                self._tools.spool.committed,
                live.id,
                request.session,
                live.index_of(caller.site),
            )
            return pb.UploadOffsetReply(committed=committed)

    async def Upload(
        self, request_iterator: AsyncIterator[pb.UploadChunk], context: Context
    ) -> pb.UploadReply:
        async with self._door.silo(context, None) as caller:
            chunks = aiter(request_iterator)
            chunk = await anext(chunks, None)
            if chunk is None:
                raise BadRequest("Upload without a chunk")
            check(chunk, ("study", "session", "size", "sha256"))
            live = self._studies.get(chunk.study, caller.site)
            silo, session = live.index_of(caller.site), live.session_of(chunk.session)
            if session is None:
                raise Refused(Reason.WRONG_STEP, f"session {chunk.session} is over")
            session.check_upload(silo, chunk.size)
            self._check_size(chunk.size)
            upload = await session.uploads.begin(silo, chunk)
            try:
                while True:
                    received = chunk.ByteSize()
                    self._tools.contacts.count(live.id, caller.site, received=received)
                    chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    caller.check()
                    await session.uploads.write(silo, upload, chunk)
            finally:
                await session.uploads.close(silo, upload)
            return pb.UploadReply(committed=upload.committed)

    def _check_size(self, size: int) -> None:
        if size > self._largest_vector:
            raise UploadRefused(
                f"the vector has {size} bytes, this coordinator takes {self._largest_vector}: "
                "the study centre can raise largest_vector in coordinator.toml"
            )

    async def Download(  # type: ignore[override]  # the stubs know only of generators
        self, request: pb.DownloadRequest, context: Context
    ) -> None:
        async with self._door.silo(context, request, "study", "sha256") as caller:
            live = self._studies.get(request.study, caller.site)
            store, sha256 = self._tools.store, request.sha256
            size = await store.do(results.published_size, live.id, sha256)
            # The file goes before its row, when no step reads it any more.
            there = self._tools.artifacts.path(sha256).exists()
            if size is None or request.offset > size or not there:
                raise NotFound(
                    f"study '{live.id}' has no artifact {sha256.hex()} with byte {request.offset}"
                )
            pieces = self._tools.artifacts.chunks(sha256, request.offset)
            first: Any = {"size": size}
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                caller.check()
                offset, data = piece
                # Written, not yielded: the door's cancellation has to arrive here also while gRPC
                # waits for the reader, or the call would end without a status, which gRPC does not
                # tell the silo.
                await context.write(pb.DownloadChunk(offset=offset, data=data, **first))
                self._tools.contacts.count(live.id, caller.site, sent=len(data))
                first = {}
            if first:
                await context.write(pb.DownloadChunk(offset=request.offset, size=size))
