"""The uploads of one session: one per silo at a time, and the newest counts."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

from coordinator.spool import MAX_CHUNK, Incoming, Spool, UploadRefused
from coordinator.wire import check
from protos.v1 import coordination_pb2 as pb

T = TypeVar("T")


class NotYet(Exception):
    """A message that came before what it speaks of; the text says what is missing."""


class Uploads:
    """A stream that broke may not have been noticed here when its silo comes again: then two are
    open, and only the newer one may write."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._newest: dict[int, Incoming] = {}
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def begin(self, silo: int, first: pb.UploadChunk) -> Incoming:
        """Take the first chunk. Raises BadRequest, UploadRefused, WrongOffset, DiskFull."""
        data = _checked(first)
        return await _whole(self._begin(silo, first, data))

    async def _begin(self, silo: int, first: pb.UploadChunk, data: bytes) -> Incoming:
        place = (first.study, first.session, silo)
        begin = partial(self._spool.begin, *place, first.size, first.sha256, first.offset)
        async with self._locks[silo]:
            upload = self._newest[silo] = await asyncio.to_thread(begin)
            await asyncio.to_thread(upload.write, first.offset, data)
        return upload

    async def write(self, silo: int, upload: Incoming, chunk: pb.UploadChunk) -> None:
        """Raises BadRequest, UploadRefused, WrongOffset, DiskFull; NotYet where a newer upload
        has taken over."""
        data = _checked(chunk)
        await _whole(self._write(silo, upload, chunk.offset, data))

    async def _write(self, silo: int, upload: Incoming, offset: int, data: bytes) -> None:
        async with self._locks[silo]:
            if self._newest[silo] is not upload:
                raise NotYet("a newer upload of the same vector has taken over: go on with that")
            await asyncio.to_thread(upload.write, offset, data)

    async def close(self, silo: int, upload: Incoming) -> None:
        """Keep what came; raises UploadRefused where it is all and its digest is another."""
        await _whole(self._close(silo, upload))

    async def _close(self, silo: int, upload: Incoming) -> None:
        async with self._locks[silo]:
            # The part is the newer upload's: it may have been begun anew, and not be whole.
            await asyncio.to_thread(upload.close, take=self._newest[silo] is upload)


def _checked(chunk: pb.UploadChunk) -> bytes:
    """The chunk's bytes, looked at once: each look is a copy."""
    check(chunk)
    data = chunk.data
    if len(data) > MAX_CHUNK:
        raise UploadRefused(
            f"UploadChunk.data has {len(data)} bytes, at most {MAX_CHUNK} are allowed"
        )
    return data


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Carry `work` through also when the line is cut meanwhile: a chunk that came is kept, and a
    thread that is at the file has left it before anybody else is let near."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
