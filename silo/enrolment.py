"""Becoming known to a coordinator, and staying it: join with an invitation, renew in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from protos.v1 import enrolment_pb2 as pb
from silo.client import Client, Way, detail_of
from silo.config import Coordinator
from silo.errors import EnrolmentError
from silo.files import write_file, write_json
from silo.home import SiloHome
from silo.identity import (
    Enrolment,
    Identity,
    build_request,
    certificate_request,
    join_fingerprint,
    load_enrolment,
)
from silo.reach import Unreachable, dial, proxy_of, shake_hands
from study.invitation import Invitation, InvitationError

DIRECT = Coordinator()

_ASK_SECONDS = 1.0
_PERSISTENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def agent_version() -> str:
    try:
        return version("concilium")
    except PackageNotFoundError:
        return "unknown"


async def join(
    home: SiloHome,
    identity: Identity,
    token: str,
    *,
    site: str,
    announce: Callable[[str], None],
    proxy: str = "",
) -> Enrolment:
    """Hand in this site's keys under an invitation, and wait until a person has approved them.

    `announce` is called with the fingerprint to compare by phone, once it is handed in. Interrupted
    and run again it goes on. Raises EnrolmentError, which says what to do.
    """
    invitation = _read_token(token, site)
    request = certificate_request(home, identity, site)
    message = pb.JoinRequest(
        certificate_request=request,
        identity_key=identity.public,
        identity_proof=identity.prove(request),
        agent_version=agent_version(),
    )
    way = Way(
        invitation.address,
        invitation.authority_pem,
        invitation.certificate_pem,
        invitation.private_key_pem,
        proxy,
    )
    client = Client(way, lambda _: None)
    try:
        certificate = await _ask_until_approved(client, way, message, identity, site, announce)
    finally:
        await client.close()
    _check_certificate(certificate, identity, invitation.authority_pem, site)
    write_file(home.certificates / "authority.pem", invitation.authority_pem)
    write_file(home.certificates / "site.pem", certificate)
    write_json(home.enrolment, {"site": site, "address": invitation.address})
    return load_enrolment(home)


def _read_token(token: str, site: str) -> Invitation:
    try:
        invitation = Invitation.decode(token)
    except InvitationError as error:
        raise EnrolmentError(str(error)) from error
    if datetime.now(UTC) >= invitation.expires:
        raise EnrolmentError(
            f"the invitation expired on {invitation.expires:%Y-%m-%d %H:%M} UTC: ask the study "
            "centre for a new one (or set this machine's clock, if that is wrong)"
        )
    if invitation.site != site:
        raise EnrolmentError(
            f"the invitation is for {invitation.site!r}, this site is {site!r}: correct [site] "
            "name in site.toml, or ask for the right invitation"
        )
    return invitation


async def _ask_until_approved(
    client: Client,
    way: Way,
    message: pb.JoinRequest,
    identity: Identity,
    site: str,
    announce: Callable[[str], None],
) -> bytes:
    announced = False
    while True:
        try:
            reply = await client.join(message)
        except grpc.aio.AioRpcError as error:
            if not announced or error.code() not in _PERSISTENT:
                raise await _explained(error, way) from error
            await asyncio.sleep(_ASK_SECONDS)  # it was there before: it restarts, say
            continue
        ours = join_fingerprint(site, message.certificate_request, identity.public)
        if reply.fingerprint != ours:
            raise EnrolmentError(
                f"the study centre holds other keys than this site's: it shows "
                f"{reply.fingerprint!r}, here it is {ours!r}. Somebody is in between: stop, and "
                "call the study centre"
            )
        if not announced:
            announce(ours)
            announced = True
        if reply.state == pb.JoinReply.APPROVED:
            return reply.certificate
        await asyncio.sleep(_ASK_SECONDS)


async def _explained(error: grpc.aio.AioRpcError, way: Way) -> EnrolmentError:
    if error.code() in _PERSISTENT:
        return EnrolmentError(await asyncio.to_thread(why_unreachable, way))
    return EnrolmentError(f"the study centre does not take this invitation: {detail_of(error)}")


def why_unreachable(way: Way) -> str:
    """gRPC says only "unavailable"; going the way step by step tells what is the matter."""
    try:
        plain = dial(way.address, proxy_of(way.address, way.proxy))
        shake_hands(plain, way.address, way.authority, way.key, way.certificate)
    except Unreachable as error:
        return str(error)
    return f"{way.address} answers but the study centre's service does not: try again later"


def _check_certificate(pem: bytes, identity: Identity, authority: bytes, site: str) -> None:
    """The certificate is over our key, for our name, from the authority of the invitation."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise EnrolmentError(
            f"the study centre sent a certificate that is none: {error}"
        ) from error
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    ours = serialization.load_pem_private_key(identity.tls_pem, None).public_key()
    if certificate.public_key() != ours or uris != [f"concilium://silo/{site}"]:
        raise EnrolmentError("the study centre sent the certificate of another site: tell them")


def way_of(enrolment: Enrolment, identity: Identity, line: Coordinator = DIRECT) -> Way:
    """How an enrolled site dials in: through a proxy, and kept open, as site.toml says."""
    return Way(
        enrolment.address,
        enrolment.authority_pem,
        enrolment.certificate_pem,
        identity.tls_pem,
        line.proxy.get_secret_value(),
        line.keepalive,
    )


async def renew(
    home: SiloHome, identity: Identity, client: Client, line: Coordinator = DIRECT
) -> Enrolment:
    """A fresh certificate over the same key; the client's new calls use it, those under way end
    with the old one. Raises EnrolmentError for a certificate that cannot be used."""
    enrolment = load_enrolment(home)
    pem = await client.renew(build_request(identity, enrolment.site))
    _check_certificate(pem, identity, enrolment.authority_pem, enrolment.site)
    write_file(home.certificates / "site.pem", pem)
    fresh = load_enrolment(home)
    client.redial(way_of(fresh, identity, line))
    return fresh
