"""Who is calling, whether they may, and how what went wrong is told: the way into every call."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import Message
from grpc.aio import AbortError, ServicerContext
from sqlalchemy.exc import DBAPIError

from coordinator.authority import Peer, peer_of
from coordinator.contacts import Contacts
from coordinator.records import NoSuchStudy
from coordinator.registry import RegistryError, TooOften
from coordinator.sessions import Resuming
from coordinator.spool import DiskFull, UploadRefused, WrongOffset
from coordinator.store import Fenced
from coordinator.studies import Denied
from coordinator.uploads import NotYet
from coordinator.wire import BadRequest, check
from secagg.errors import MalformedMessage, Refused, UnexpectedEvent

log = structlog.get_logger()

Context = ServicerContext[Message, Message]
_peer_of = lru_cache(maxsize=1024)(peer_of)


class NotFound(Exception):
    """What was asked for is not here."""


_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (MalformedMessage, grpc.StatusCode.INVALID_ARGUMENT),
    (WrongOffset, grpc.StatusCode.OUT_OF_RANGE),
    (UploadRefused, grpc.StatusCode.INVALID_ARGUMENT),
    (Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (UnexpectedEvent, grpc.StatusCode.FAILED_PRECONDITION),
    (NotYet, grpc.StatusCode.FAILED_PRECONDITION),
    (Resuming, grpc.StatusCode.UNAVAILABLE),
    (Fenced, grpc.StatusCode.UNAVAILABLE),
    (Denied, grpc.StatusCode.PERMISSION_DENIED),
    (NoSuchStudy, grpc.StatusCode.PERMISSION_DENIED),
    (RegistryError, grpc.StatusCode.PERMISSION_DENIED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TooOften, grpc.StatusCode.RESOURCE_EXHAUSTED),
)


@dataclass(frozen=True)
class Caller:
    """An authenticated peer, for the time of one call."""

    door: Door
    peer: Peer

    @property
    def site(self) -> str:
        return self.peer.site

    def check(self) -> None:
        """Raises Denied where the caller may not go on; called again while a call stays open."""
        if self.peer.token is None:
            self.door.check(self.peer)


class Door:
    """Lets in whose certificate is in the registry now; `admit` tells it which those are."""

    def __init__(self, contacts: Contacts) -> None:
        self._contacts = contacts
        self._admitted: Mapping[str, str] = {}
        self._inside: dict[asyncio.Task[Any], Peer | None] = {}
        self._put_out: set[asyncio.Task[Any]] = set()
        self._closed = False

    def admit(self, certificates: Mapping[str, str]) -> bool:
        """Serial → site of all that are good. The open calls of all others end: one that waits for
        its caller's next chunk would not look again by itself."""
        changed = self._admitted != certificates
        self._admitted = certificates
        if changed:
            for task, peer in self._inside.items():
                if peer is not None and peer.token is None and not self._admits(peer):
                    self._put_out.add(task)
                    task.cancel()
        return changed

    def _admits(self, peer: Peer) -> bool:
        return self._admitted.get(peer.serial) == peer.site

    def check(self, peer: Peer) -> None:
        if not self._admits(peer):
            raise _shut_out(peer)

    @asynccontextmanager
    async def silo(
        self, context: Context, request: Message | None, *required: str
    ) -> AsyncIterator[Caller]:
        """Around everything that an enrolled silo may call."""
        async with self._answering(context):
            caller = self._caller(context)
            if caller.peer.token is not None:
                raise Denied(
                    "an invitation is for joining only: wait for the study centre's approval"
                )
            caller.check()
            self._check(request, required)
            with self._contacts.call(caller.site):
                yield caller

    @asynccontextmanager
    async def invited(
        self, context: Context, request: Message, *required: str
    ) -> AsyncIterator[Caller]:
        """Around what the bearer of an invitation may call."""
        async with self._answering(context):
            caller = self._caller(context)
            if caller.peer.token is None:
                raise Denied(f"site '{caller.site}' has joined already: call Renew, not Join")
            self._check(request, required)
            yield caller

    def _check(self, request: Message | None, required: tuple[str, ...]) -> None:
        if request is not None:
            check(request, required)

    def _caller(self, context: Context) -> Caller:
        found = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
        peer = None if found is None else _peer_of(bytes(found))
        if peer is None:
            raise Denied("the client certificate names no site: join with an invitation first")
        task = asyncio.current_task()
        if task is not None:
            self._inside[task] = peer
        return Caller(self, peer)

    @asynccontextmanager
    async def _answering(self, context: Context) -> AsyncIterator[None]:
        """Turn what was raised into a status whose text the caller's log can show."""
        task = asyncio.current_task()
        if self._closed or task is None:
            raise asyncio.CancelledError
        self._inside[task] = None
        try:
            yield
        except AbortError:
            raise
        except asyncio.CancelledError:
            peer = self._inside[task]
            if task not in self._put_out or peer is None:
                raise
            task.uncancel()
            await _abort(context, _shut_out(peer))
        except Exception as error:
            await _abort(context, error)
        finally:
            self._put_out.discard(task)
            del self._inside[task]

    async def close(self, grace: float) -> None:
        """Begin no call any more, and return when those that are open have ended; after `grace`
        seconds they are cancelled. Before this the server must not be stopped: gRPC does not wait
        for its handlers, and one that then says how its call ended brings the process down
        (grpc #37239)."""
        self._closed = True
        if self._inside:
            await asyncio.wait(self._inside, timeout=grace)
        left = list(self._inside)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _shut_out(peer: Peer) -> Denied:
    return Denied(
        f"the certificate of site '{peer.site}' was revoked, replaced or has expired: ask the "
        "study centre, and join again with a new invitation"
    )


async def _abort(context: Context, error: Exception) -> NoReturn:
    for kind, code in _CODES:
        if isinstance(error, kind):
            log.info("call.refused", peer=context.peer(), code=code.name, why=str(error))
            await context.abort(code, str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("disk.full", path=error.filename)
        full = "the study centre's disk is full: try again later"
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
    log.error("call.failed", exc_info=error)
    if isinstance(error, DBAPIError):
        busy = "the study centre's store is busy or full: try again later"
        await context.abort(grpc.StatusCode.UNAVAILABLE, busy)
    await context.abort(grpc.StatusCode.INTERNAL, "the coordinator failed; its log says why")
