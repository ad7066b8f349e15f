# ruff: noqa: N802 - methods are named as in the .proto
"""How an institution gets its certificate, and keeps it: `Enrolment` of protos/v1."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection

from coordinator import registry
from coordinator.authority import Authority, parse_request
from coordinator.door import Context, Door
from coordinator.store import Store
from coordinator.wire import BadRequest
from protos.v1 import enrolment_pb2 as pb
from protos.v1.enrolment_pb2_grpc import EnrolmentServicer

_PROOF = b"concilium/join/1"


class EnrolmentService(EnrolmentServicer):
    """Join under an invitation; renew under one's own certificate."""

    def __init__(
        self, store: Store, authority: Authority, door: Door, certificate_days: float
    ) -> None:
        self._store, self._authority, self._door = store, authority, door
        self._days = certificate_days

    async def _admit(self) -> None:
        # The certificate may be used as soon as it is handed out.
        self._door.admit(await self._store.do(registry.admitted))

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        required = ("certificate_request", "identity_key", "identity_proof", "agent_version")
        async with self._door.invited(context, request, *required) as caller:
            self._check(request)
            assert caller.peer.token is not None  # noqa: S101 - `invited` lets nobody else in
            reply = await self._store.do(self._join, caller.site, caller.peer.token, request)
            await self._admit()
            return reply

    def _check(self, request: pb.JoinRequest) -> None:
        _parse(request.certificate_request)
        signed = _PROOF + hashlib.sha256(request.certificate_request).digest()
        try:
            key = Ed25519PublicKey.from_public_bytes(request.identity_key)
            key.verify(request.identity_proof, signed)
        except (InvalidSignature, ValueError) as error:
            raise BadRequest("JoinRequest.identity_proof does not prove identity_key") from error

    def _join(self, c: Connection, site: str, token: str, request: pb.JoinRequest) -> pb.JoinReply:
        csr, identity = request.certificate_request, request.identity_key
        found = registry.join(c, site, token, csr, identity, request.agent_version)
        reply = pb.JoinReply(state=pb.JoinReply.PENDING, fingerprint=found.fingerprint)
        if found.status == "approved":
            reply.state = pb.JoinReply.APPROVED
            reply.certificate = self._certificate(c, site, csr)
        return reply

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
        async with self._door.silo(context, request, "certificate_request") as caller:
            csr = request.certificate_request
            _parse(csr)
            shown = caller.peer.serial
            certificate = await self._store.do(self._certificate, caller.site, csr, shown)
            await self._admit()
            return pb.RenewReply(certificate=certificate)

    def _certificate(self, c: Connection, site: str, csr: bytes, shown: str = "") -> bytes:
        """The certificate that answers this request: the one already made, where there is one.
        `shown`: the serial of the one by which it was asked for."""
        found = registry.certificate_for(c, site, csr)
        if found is not None:
            return found
        issued = self._authority.silo_certificate(site, parse_request(csr), self._days)
        registry.record_certificate(c, site, csr, issued, shown)
        return issued.pem


def _parse(csr: bytes) -> None:
    try:
        parse_request(csr)
    except ValueError as error:
        raise BadRequest(str(error)) from error
