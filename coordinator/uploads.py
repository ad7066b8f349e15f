"""The uploads of one session: one per silo at a time, and the newest counts."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial

from coordinator.spool import MAX_CHUNK, Incoming, Spool, UploadRefused
from coordinator.wire import check
from protos.v1 import coordination_pb2 as pb


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
        """Raises UploadRefused, WrongOffset, DiskFull."""
        place = (first.study, first.session, silo)
        begin = partial(self._spool.begin, *place, first.size, first.sha256, first.offset)
        async with self._locks[silo]:
            upload = self._newest[silo] = await asyncio.to_thread(begin)
        return upload

    async def write(self, silo: int, upload: Incoming, chunk: pb.UploadChunk) -> None:
        """Raises BadRequest, UploadRefused, WrongOffset, DiskFull; NotYet where a newer upload
        has taken over."""
        check(chunk)
        if len(chunk.data) > MAX_CHUNK:
            raise UploadRefused(
                f"UploadChunk.data has {len(chunk.data)} bytes, at most {MAX_CHUNK} are allowed"
            )
        async with self._locks[silo]:
            if self._newest[silo] is not upload:
                raise NotYet("a newer upload of the same vector has taken over: go on with that")
            await asyncio.to_thread(upload.write, chunk.offset, chunk.data)

    async def close(self, silo: int, upload: Incoming) -> None:
        """Keep what came; raises UploadRefused where it is all and its digest is another."""
        async with self._locks[silo]:
            await asyncio.to_thread(upload.close)
