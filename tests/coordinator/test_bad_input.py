"""Messages and uploads that are not what they should be: a clear error, and nothing is lost."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator import admin, audit
from coordinator.config import Home
from coordinator.store import Store
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from secagg.roster import Roster
from study.plan import load_plan
from tests.coordinator.agent import TestSilo
from tests.coordinator.federation import Federation

INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
DENIED = grpc.StatusCode.PERMISSION_DENIED
SITES = ["site-1", "site-2", "site-3", "site-4"]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), str(error.value.details())


class Held:
    """A federation in the middle of its census: site-1 is about to upload, the rest have."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.silo = federation, federation.silos["site-1"]
        self._arrived, self._go = asyncio.Event(), asyncio.Event()

    async def begin(self) -> None:
        async def hold(_silo: TestSilo, where: str) -> None:
            if where == "before upload":
                self._arrived.set()
                await self._go.wait()

        self.silo.hook = hold
        for silo in self.federation.silos.values():
            silo.start()
        plan = self.federation.plan()
        self.study = admin.start_study(self.federation.home, plan, SITES)
        async with asyncio.timeout(120):
            await self._arrived.wait()

    @property
    def vector(self) -> bytes:
        vector = self.silo.studies[self.study].vector
        assert vector is not None
        return vector.tobytes()

    async def end(self) -> None:
        """The study goes on as if nothing had happened."""
        self._go.set()
        await self.federation.until(lambda: self.federation.result(self.study, "census"))
        assert len(self.federation.exact(self.study, "census", "census 1")) == 4


async def chunks(parts: Iterable[pb.UploadChunk]) -> AsyncIterator[pb.UploadChunk]:
    for part in parts:
        yield part


async def test_uploads_with_a_wrong_digest_length_or_place_are_refused_and_resume_where_they_ended(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        content, digest = held.vector, hashlib.sha256(held.vector).digest()
        head = {"study": held.study, "session": 1, "size": len(content), "sha256": digest}
        rest = {"study": held.study, "session": 1}

        async with held.silo.credentials.channel(federation.address) as channel:
            stub = CoordinationStub(channel)

            async def send(*parts: pb.UploadChunk) -> tuple[grpc.StatusCode, str]:
                return await refused(stub.Upload(chunks(parts)))

            wrong = {**head, "sha256": bytes(32)}
            code, text = await send(pb.UploadChunk(offset=0, data=content, **wrong))
            assert (code, "send it again from byte 0" in text) == (INVALID, True)
            wrong = {**head, "size": len(content) + 4}
            code, text = await send(pb.UploadChunk(offset=0, data=content, **wrong))
            assert (code, "the vector has" in text) == (INVALID, True)
            code, text = await send(pb.UploadChunk(offset=2, data=content[2:], **head))
            assert (code, "0 are committed" in text) == (grpc.StatusCode.OUT_OF_RANGE, True)
            code, text = await send(pb.UploadChunk(offset=0, data=content + b"more", **head))
            assert (code, "that were announced" in text) == (INVALID, True)
            code, text = await send(pb.UploadChunk(offset=0, data=bytes((1 << 20) + 1), **head))
            assert (code, "at most 1048576" in text) == (INVALID, True)
            code, text = await send(pb.UploadChunk(offset=0, data=content, **rest))
            assert (code, "size is missing" in text) == (INVALID, True)
            code, text = await send(
                pb.UploadChunk(offset=0, data=content[:3], **head),
                pb.UploadChunk(offset=5, data=content[5:], **rest),
            )
            assert code == grpc.StatusCode.OUT_OF_RANGE
            offset = pb.UploadOffsetRequest(study=held.study, session=1)
            assert (await stub.UploadOffset(offset)).committed == 3
        # The silo's own upload now goes on at byte 3; a restart in between changes nothing.
        await federation.restart()
        await held.end()


async def test_a_vector_that_a_silo_signed_for_cannot_be_replaced_by_another_upload(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        await federation.until(lambda: federation.study(held.study).present == 3)
        vector = federation.silos["site-2"].studies[held.study].vector
        assert vector is not None
        content, other = vector.tobytes(), bytes(vector.nbytes)
        head = {"study": held.study, "session": 1, "size": len(content), "offset": 0}
        async with federation.silos["site-2"].credentials.channel(federation.address) as channel:
            stub = CoordinationStub(channel)
            for begun in (other, other[:1]):
                first = pb.UploadChunk(data=begun, sha256=hashlib.sha256(other).digest(), **head)
                code, text = await refused(stub.Upload(chunks([first])))
                assert code == INVALID
                assert f"is here, with SHA-256 {hashlib.sha256(content).hexdigest()}" in text
            first = pb.UploadChunk(data=content, sha256=hashlib.sha256(content).digest(), **head)
            assert (await stub.Upload(chunks([first]))).committed == len(content)
        await held.end()


@pytest.mark.parametrize("whose", ["one", "all"])
async def test_a_masked_input_that_is_lost_ends_the_session_with_its_certificate(
    tmp_path: Path, whose: str
) -> None:
    async with Federation(tmp_path) as federation:
        silos, go = await federation.join_four(), asyncio.Event()

        async def hold(_silo: TestSilo, where: str) -> None:
            if where == "before UNMASK":
                await go.wait()

        for silo in silos:
            silo.hook = hold
            silo.start()
        study = admin.start_study(federation.home, federation.plan())
        await federation.until(lambda: federation.study(study).phase == "unmasking")
        uploads = Home(federation.home).spool / study / "1"
        for file in uploads.glob("2-*" if whose == "one" else "*"):
            file.unlink()
        go.set()
        await federation.until(lambda: federation.study(study).state == "failed", 20)
        error = federation.study(study).error or ""
        lost, mend = {
            "one": ("site-2", "at that site, and start a new study without it"),
            "all": ("every silo", "to this machine's disk, and start a new study"),
        }[whose]
        assert f"masked input of {lost} was taken whole and is not there any more" in error
        assert mend in error
        await federation.until(lambda: all(study in silo.ended for silo in silos))
        assert {silo.studies[study].settled for silo in silos} == {1}


async def test_a_message_that_speaks_of_an_upload_that_is_not_here_is_refused(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        taking = held.silo.studies[held.study]
        request = pb.SubmitRequest(
            study=held.study,
            session=1,
            signed=taking.state.sent.message.encode(),  # type: ignore[attr-defined]
        )
        async with held.silo.credentials.channel(federation.address) as channel:
            code, text = await refused(CoordinationStub(channel).Submit(request))
        assert (code, "upload the rest first" in text) == (FAILED, True)
        async with federation.silos["site-2"].credentials.channel(federation.address) as channel:
            code, text = await refused(CoordinationStub(channel).Submit(request))
        assert (code, "of another silo" in text) == (DENIED, True)
        await held.end()


def wrong_calls(stub: CoordinationStub, study: str) -> list[tuple[Any, grpc.StatusCode, str]]:
    """(call, status, words of the sentence that the caller reads)."""
    message = pb.SubmitRequest(study=study, session=1, signed=b"x")
    field_99 = b"\x98\x06\x01"
    unknown = pb.SubmitRequest.FromString(message.SerializeToString() + field_99)
    unsigned = pb.SubmitRequest(study=study, session=1)
    never = pb.ReportRefusalRequest(study=study, session=9, reason="x")
    chatty = pb.ReportProgressRequest(study=study, activity="x" * 81)
    control = pb.ReportProgressRequest(study=study, activity="\x1b[2J")
    nowhen = pb.ReportProgressRequest(study=study, activity="x", session=2**64 - 1)
    beyond = pb.ReportProgressRequest(study=study, activity="x", step=2, steps=1)
    endless = pb.ReportProgressRequest(study=study, activity="x", steps=2**32 - 1)
    foreign = pb.NextTaskRequest(study="other-1234", epoch=1)
    answer = pb.AnswerOfferRequest(
        study=study, plan_digest=bytes(32), roster_digest=bytes(32), accepted=True
    )
    nowhere = pb.DownloadRequest(study=study, sha256=bytes(32))
    huge = pb.SubmitRequest(study=study, session=1, signed=bytes(5 << 20))
    return [
        (stub.Submit(unsigned), INVALID, "signed is missing"),
        (stub.Submit(unknown), INVALID, "has field 99"),
        (stub.Submit(message), INVALID, "signed message"),
        (stub.Submit(huge), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        (stub.ReportRefusal(never), INVALID, "no session 9"),
        (stub.ReportProgress(chatty), INVALID, "at most 80"),
        (stub.ReportProgress(control), INVALID, "characters of control"),
        (stub.ReportProgress(nowhen), INVALID, f"no session {2**64 - 1}"),
        (stub.ReportProgress(beyond), INVALID, "step 2 of 1: step is at most steps"),
        (stub.ReportProgress(endless), INVALID, "steps at most 1000000000"),
        (stub.NextTask(pb.NextTaskRequest(wait_seconds=61)), INVALID, "at most 60"),
        (stub.NextTask(foreign), DENIED, "not in the roster"),
        (stub.AnswerOffer(answer), FAILED, "another plan or roster"),
        (stub.Download(nowhere).read(), grpc.StatusCode.NOT_FOUND, "no artifact"),
    ]


async def test_missing_unknown_and_oversized_fields_and_foreign_studies_are_refused(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        await federation.join("site-5")
        held = Held(federation)
        await held.begin()
        async with held.silo.credentials.channel(federation.address) as channel:
            for call, code, words in wrong_calls(CoordinationStub(channel), held.study):
                found, text = await refused(call)
                assert (found, words in text) == (code, True), text
        async with federation.silos["site-5"].credentials.channel(federation.address) as channel:
            request = pb.NextTaskRequest(study=held.study, epoch=1)
            code, text = await refused(CoordinationStub(channel).NextTask(request))
            assert (code, "not in the roster" in text) == (DENIED, True)
        await held.end()


async def test_a_silo_that_refuses_is_not_waited_for_and_its_reason_is_shown(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        refusing = {"site-1", "site-2"}

        async def refuse(silo: TestSilo, where: str) -> None:
            if where == "open" and silo.name in refusing:
                study = next(iter(silo.studies))
                async with silo.credentials.channel(federation.address) as channel:
                    reason = "the disk is full: make room"
                    request = pb.ReportRefusalRequest(study=study, session=1, reason=reason)
                    await CoordinationStub(channel).ReportRefusal(request)
                await asyncio.sleep(30)

        for silo in silos:
            silo.hook = refuse
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=60))
        status = await federation.until(lambda: (s := federation.study(study)).error and s)
        assert "site-1: the disk is full: make room" in status.error
        assert "the threshold is 3" in status.error


async def test_a_site_thinks_again_about_an_offer_but_not_without_end(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        study = admin.start_study(federation.home, federation.plan())
        async with federation.silos["site-1"].credentials.channel(federation.address) as channel:
            stub = CoordinationStub(channel)
            offer = (await stub.NextTask(pb.NextTaskRequest(wait_seconds=20))).offer
            answer = pb.AnswerOfferRequest(
                study=study,
                plan_digest=load_plan(offer.plan).digest(),
                roster_digest=Roster.decode(offer.roster).digest,
                rule="a person said so",
            )
            for number in range(20):
                answer.accepted = number % 2 == 0
                await stub.AnswerOffer(answer)
                await stub.AnswerOffer(answer)  # the same again is no change
            answer.accepted = True
            code, text = await refused(stub.AnswerOffer(answer))
            assert (code, "20 times: the last one stands. Call" in text) == (DENIED, True)
        status = await federation.until(lambda: federation.study(study))
        assert {s.name: s.answer for s in status.silos}["site-1"] == "declined"


async def test_a_silo_that_has_seen_what_never_was_fills_no_log(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        async with held.silo.credentials.channel(federation.address) as channel:
            for session in range(7, 12):
                request = pb.NextTaskRequest(study=held.study, epoch=1, settled_session=session)
                code, text = await refused(CoordinationStub(channel).NextTask(request))
                assert (code, f"has seen session {session} end" in text) == (FAILED, True)
        place = Home(federation.home)
        store = Store(place.database(place.config()))
        written = store.run(lambda c: [entry.kind for entry in audit.entries(c)])
        store.close()
        assert written.count("study.error") == 1
        assert "has seen session 7 end" in (federation.study(held.study).error or "")
        await held.end()


async def test_a_study_is_paused_and_stopped_by_the_operator(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join_four()
        held = Held(federation)
        await held.begin()
        admin.stop_study(federation.home, held.study)
        await federation.until(lambda: federation.study(held.study).state == "stopped")
        await federation.until(
            lambda: all(held.study in federation.silos[name].ended for name in ("site-2", "site-3"))
        )
        ended = federation.silos["site-2"].ended[held.study]
        assert ended.reason == pb.StudyEnded.STOPPED
        with pytest.raises(admin.AdminError, match="cannot be changed"):
            admin.pause_study(federation.home, held.study)
