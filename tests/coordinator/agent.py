"""An institution's agent for the tests: `secagg.silo` with a socket and a ledger in memory.

It has no policy and no training, and its vectors are known to the tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protos.v1 import coordination_pb2 as pb
from protos.v1 import enrolment_pb2 as join_pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from protos.v1.enrolment_pb2_grpc import EnrolmentStub
from secagg import silo
from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.errors import Refused, UnexpectedEvent
from secagg.events import (
    Adverts,
    Confirmations,
    GiveUp,
    Headers,
    InputMasked,
    MaskInput,
    Open,
    Record,
    Send,
    Settle,
    SiloEvent,
    Survivors,
)
from secagg.ledger import Entry, History
from secagg.masking import DTYPES, Vector, apply_masks
from secagg.messages import Parcel, Signed, Step
from secagg.primitives import Secret
from secagg.roster import Roster
from study.invitation import Invitation
from study.plan import Plan, load_plan
from study.quantity import (
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    count_encoding,
    decode_work,
    delta_encoding,
    evaluation_encoding,
    moments_encoding,
)
from study.reservation import Reservation, images_vector, reserve, share, with_labels

PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
COUNTS = {"site-1": 100, "site-2": 40, "site-3": 250, "site-4": 10, "site-5": 60, "site-6": 30}


class Vanish(Exception):
    """What a test raises inside a silo to make its process end."""


@dataclass
class Credentials:
    """What a silo's TLS channel is made of."""

    key: bytes
    certificate: bytes
    authority: bytes

    def channel(self, address: str) -> grpc.aio.Channel:
        made = grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]
        # The last is also the time that a handshake may take, on a machine that is busy.
        options += [("grpc.max_reconnect_backoff_ms", 200), ("grpc.min_reconnect_backoff_ms", 5000)]
        return grpc.aio.secure_channel(address, made, options=options)


def new_key() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key, pem


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def join_request(
    key: ec.EllipticCurvePrivateKey, identity: Ed25519PrivateKey
) -> join_pb.JoinRequest:
    request = certificate_request(key)
    return join_pb.JoinRequest(
        certificate_request=request,
        identity_key=identity.public_key().public_bytes_raw(),
        identity_proof=identity.sign(b"concilium/join/1" + hashlib.sha256(request).digest()),
        agent_version="test",
    )


async def join(token: str, request: join_pb.JoinRequest) -> join_pb.JoinReply:
    made = Invitation.decode(token)
    credentials = Credentials(made.private_key_pem, made.certificate_pem, made.authority_pem)
    async with credentials.channel(made.address) as channel:
        return await EnrolmentStub(channel).Join(request, timeout=30)


Hook = Callable[["TestSilo", str], Awaitable[None]]


async def nothing(_silo: TestSilo, _where: str) -> None:
    return None


@dataclass
class Taking:
    """One study at one silo: the protocol's state and the ledger that survives a crash."""

    plan: Plan
    party: silo.SiloParty
    state: silo.SiloState
    disk: list[Entry] = field(default_factory=list)
    settled: int = 0
    vector: Vector | None = None
    context: SessionContext | None = None
    reservation: Reservation | None = None
    images: np.ndarray[Any, Any] | None = None

    def restart(self) -> None:
        self.state = silo.resume(self.party, History.of(self.disk))


class TestSilo:
    """An agent. `hook` is called at named places and may wait, or raise Vanish."""

    __test__ = False

    def __init__(
        self, name: str, address: str, credentials: Credentials, identity: Ed25519PrivateKey
    ) -> None:
        self.name, self.address, self.credentials = name, address, credentials
        self.identity, self.ledger_key = identity, Secret(os.urandom(32))
        self.hook: Hook = nothing
        self.studies: dict[str, Taking] = {}
        self.looks_for_offers = False
        """Also while a study runs, as the real agent does."""
        self.vectors: dict[tuple[str, int], Vector] = {}
        """(quantity, session) → what this silo put in."""
        self.ended: dict[str, pb.StudyEnded] = {}
        self.samples = b""
        """Those that the last evaluation was of."""
        self.features: np.ndarray[Any, Any] | None = None
        """Of this silo's images, (n, d) about the network's center; drawn where there are none."""
        self.greed = 0
        """How many synthetic images more than its share it brings."""
        self.voids = False
        """Whether it will not let the sum of a round be read."""
        self.shared: dict[str, bool] = {}
        """Which rounds came with auxiliary images to train on, by quantity."""
        self.errors: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._live(), name=self.name)

    async def kill(self) -> None:
        while self._task is not None and not self._task.done():
            # Again and again: a call that ends just then answers a cancellation with a status.
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.2)
        self._task = None
        for taking in self.studies.values():
            taking.restart()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _live(self) -> None:
        channel = self.credentials.channel(self.address)
        stub = CoordinationStub(channel)
        try:
            while True:
                try:
                    await self._turn(stub)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in PASSING:
                        self.errors.append(f"{error.code().name}: {error.details()}")
                    await asyncio.sleep(0.05)
        except Vanish:
            for taking in self.studies.values():
                taking.restart()
        finally:
            await channel.close()

    async def _turn(self, stub: CoordinationStub) -> None:
        running = [name for name in self.studies if name not in self.ended]
        for name in [*running, ""] if self.looks_for_offers else running or [""]:
            settled = self.studies[name].settled if name else 0
            epoch = self.studies[name].party.roster.epoch if name else 0
            wait = 1 if name or not running else 0
            request = pb.NextTaskRequest(
                study=name, settled_session=settled, wait_seconds=wait, epoch=epoch
            )
            task = await stub.NextTask(request, timeout=wait + 5)
            await self._answer(stub, task)

    async def _answer(self, stub: CoordinationStub, task: pb.Task) -> None:
        kind = task.WhichOneof("task")
        await self.hook(self, kind)
        match kind:
            case "idle":
                return
            case "offer":
                await self._accept(stub, task)
            case "ended":
                self.ended[task.study] = task.ended
            case "outcome":
                certificate = Certificate.decode(task.outcome.certificate)
                taking = self.studies[task.study]
                self._deliver(taking, Settle(certificate))
                taking.settled = task.session
            case _:
                await self._take_part(stub, task)

    async def _accept(self, stub: CoordinationStub, task: pb.Task) -> None:
        plan, roster = load_plan(task.offer.plan), Roster.decode(task.offer.roster)
        index = roster.index_of(self.name)
        party = silo.SiloParty(roster, index, self.identity, self.ledger_key, os.urandom)
        before = self.studies.get(task.study)
        disk = before.disk if before is not None else []
        if History.of(disk).in_doubt:
            return  # first the outcome, which comes while the roster before is pinned
        self.studies[task.study] = Taking(plan, party, silo.resume(party, History.of(disk)), disk)
        self.ended.pop(task.study, None)
        answer = pb.AnswerOfferRequest(
            study=task.study,
            plan_digest=plan.digest(),
            roster_digest=roster.digest,
            accepted=True,
        )
        while True:
            try:
                await stub.AnswerOffer(answer)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                await asyncio.sleep(0.05)

    async def _take_part(self, stub: CoordinationStub, task: pb.Task) -> None:
        taking = self.studies[task.study]
        event = await self._event(stub, task, taking)
        try:
            sent = self._deliver(taking, event)
        except (Refused, UnexpectedEvent) as error:
            self.errors.append(str(error))
            refusal = pb.ReportRefusalRequest(
                study=task.study, session=task.session, reason=str(error)
            )
            await stub.ReportRefusal(refusal)
            return
        for send in sent:
            await self._send(stub, task, taking, send)

    async def _event(self, stub: CoordinationStub, task: pb.Task, taking: Taking) -> SiloEvent:
        match task.WhichOneof("task"):
            case "open":
                context = SessionContext.decode(task.open.context)
                if taking.context != context:
                    # A coordinator that restarts cuts the download off: then all of it again.
                    vector = await self._contribution(stub, task, taking)
                    taking.context, taking.vector = context, vector
                    self.vectors[str(context.quantity), context.session] = vector.copy()
                return Open(context)
            case "adverts":
                return Adverts(tuple(map(Signed.decode, task.adverts.signed)))
            case "headers":
                parcels = {p.silo: Parcel(p.mailbox, p.seed) for p in task.headers.parcels}
                return Headers(tuple(map(Signed.decode, task.headers.signed)), parcels)
            case "survivors":
                return Survivors(tuple(task.survivors.silos))
            case "confirmations":
                return Confirmations(tuple(map(Signed.decode, task.confirmations.signed)))
            case "give_up":
                return GiveUp(task.give_up.context_digest)
        raise AssertionError(task)

    def _deliver(self, taking: Taking, event: SiloEvent) -> list[Send]:
        taking.state, effects = taking.state.handle(event)
        sent: list[Send] = []
        for effect in effects:
            match effect:
                case Record(entry):
                    taking.disk.append(entry)
                case Send():
                    sent.append(effect)
                case MaskInput(keys):
                    assert taking.vector is not None
                    apply_masks(taking.vector, keys)
                    digest = hashlib.sha256(taking.vector).digest()
                    sent += self._deliver(taking, InputMasked(digest, taking.vector.nbytes))
        return sent

    async def _send(
        self, stub: CoordinationStub, task: pb.Task, taking: Taking, send: Send
    ) -> None:
        step = send.message.step
        if step is Step.MASKED_INPUT:
            await self.hook(self, "before upload")
            assert taking.vector is not None
            await upload(stub, task.study, task.session, taking.vector.tobytes())
        await self.hook(self, f"before {step.name}")
        parcels = [
            pb.Parcel(silo=i, mailbox=p.mailbox, seed=p.seed) for i, p in send.parcels.items()
        ]
        request = pb.SubmitRequest(
            study=task.study, session=task.session, signed=send.message.encode(), parcels=parcels
        )
        await stub.Submit(request, timeout=5)
        await self.hook(self, f"after {step.name}")

    async def _contribution(self, stub: CoordinationStub, task: pb.Task, taking: Taking) -> Vector:
        work, roster = decode_work(task.open.work), taking.party.roster
        count = COUNTS[self.name]
        rng = np.random.default_rng([taking.party.index, task.session])
        match work:
            case CensusWork():
                return count_encoding(roster.size).encode({"count": count})
            case RoundWork() if self.voids:
                ring = taking.plan.secure_sum.ring
                return delta_encoding(work, roster.size, ring).void(os.urandom)
            case RoundWork():
                encoding = delta_encoding(work, roster.size, taking.plan.secure_sum.ring)
                n = sum(work.sizes)
                self.shared[f"round {SessionContext.decode(task.open.context).quantity.round}"] = (
                    work.auxiliary is not None
                )
                model = await download(stub, task.study, task.open.artifacts[0])
                assert len(model) == 4 * n
                delta = rng.normal(0, 0.01, n).astype(np.float32)
                return encoding.encode(
                    delta, np.zeros_like(delta), count=count, loss=0.5, key=os.urandom(32)
                ).vector
            case TagsWork():
                images = share(work.images, count, work.total_count) + self.greed
                taking.images = rng.integers(0, 256, (images, *taking.plan.data.shape), np.uint8)
                if taking.plan.model.classes is not None:
                    # One label too many: a silo can send anything.
                    labels = np.arange(images) % (taking.plan.model.classes + 1)
                    taking.images = with_labels(taking.images, labels)
                taking.reservation = reserve(images, work.slots, os.urandom)
                return taking.reservation.vector()
            case ImagesWork():
                content = await download(stub, task.study, task.open.artifacts[0])
                assert taking.images is not None
                assert taking.reservation is not None
                total = np.frombuffer(content, dtype=DTYPES[32])
                return images_vector(taking.images, taking.reservation, total)
            case EvaluationWork():
                sizes = [len(await download(stub, task.study, a)) for a in task.open.artifacts]
                pixels = np.prod(taking.plan.data.shape)
                assert sizes[1] == work.images * pixels
                self.samples = await download(stub, task.study, task.open.artifacts[1])
                measures = rng.uniform(0, 1, 3 + work.bins)
                measures[0] = np.nan if self.name == "site-4" else -0.25
                return evaluation_encoding(work, roster.size).encode(measures)
            case MomentsWork():
                d = work.dimension
                features = rng.normal(1, 1, (count, d)) if self.features is None else self.features
                outer = (features.T @ features)[np.triu_indices(d)]
                values = np.concatenate([[len(features)], features.sum(axis=0), outer])
                return moments_encoding(work, roster.size).encode(values / work.total_count)


async def upload(
    stub: CoordinationStub, study: str, session: int, content: bytes, chunk: int = 1 << 16
) -> int:
    """Upload from the committed offset on; how much is committed then."""
    asked = pb.UploadOffsetRequest(study=study, session=session)
    start = (await stub.UploadOffset(asked)).committed

    async def chunks() -> AsyncIterator[pb.UploadChunk]:
        first: dict[str, Any] = {"size": len(content), "sha256": hashlib.sha256(content).digest()}
        for at in range(start, len(content), chunk) or [start]:
            data = content[at : at + chunk]
            yield pb.UploadChunk(study=study, session=session, offset=at, data=data, **first)
            first = {}

    return int((await stub.Upload(chunks(), timeout=60)).committed)


async def download(stub: CoordinationStub, study: str, sha256: bytes) -> bytes:
    parts = [c async for c in stub.Download(pb.DownloadRequest(study=study, sha256=sha256))]
    content = b"".join(part.data for part in parts)
    assert hashlib.sha256(content).digest() == sha256
    assert parts[0].size == len(content)
    return content
