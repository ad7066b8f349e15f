"""One process serves the studies of a store; another waits, and takes over when it is silent."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import socket
from collections.abc import Callable

import structlog
from sqlalchemy.exc import DBAPIError

from coordinator import lease, migrations
from coordinator.backup import copy_before_upgrade
from coordinator.config import Home
from coordinator.lease import Lease
from coordinator.store import Fenced, Store, sign_of_life

log = structlog.get_logger()

_SIGNS = 6  # signs of life within the time after which a standby takes over
_LOOKS = 10  # and how often a standby looks for them


class Seat:
    """The right to serve the studies of a store: `take` it, `keep` it, `leave` it."""

    def __init__(self, home: Home, store: Store, takeover_after: float) -> None:
        self._home, self._store, self._patience = home, store, takeover_after
        self._me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._lock = os.open(home.lock, os.O_RDWR | os.O_CREAT, 0o600)

    async def take(self, on_fenced: Callable[[], None]) -> None:
        """Returns when this process holds the studies; `on_fenced` is called, from any thread,
        when it finds that it does so no more."""
        if await self._store.do(migrations.standing) == "unversioned":
            # Made by 0.1, which knows no lease: its only guard is the lock on this folder.
            while not self._locked():
                await asyncio.sleep(self._patience / _LOOKS)
            await self._upgrade()
        epoch = await self._claim()
        self._store.hold(epoch, on_fenced)
        if await self._store.do(migrations.standing) == "older":
            await self._upgrade()
        log.info("coordinator.leads", epoch=epoch)

    async def keep(self) -> None:
        """Give signs of life, until cancelled or until another process has taken over."""
        while True:
            await asyncio.sleep(self._patience / _SIGNS)
            try:
                await self._store.do(sign_of_life)
            except Fenced:
                return
            except DBAPIError:
                log.exception("store.unreadable")

    async def leave(self) -> None:
        """Let the next process have it without waiting."""
        if self._store.epoch:
            try:
                await self._store.do(lease.release, self._store.epoch)
            except (Fenced, DBAPIError) as error:
                log.warning("lease.not-released", why=str(error))
        os.close(self._lock)

    async def _claim(self) -> int:
        """The epoch, once the lease is free, its holder is dead, or silent for too long."""
        clock = asyncio.get_running_loop().time
        seen: Lease | None = None
        since, told = clock(), ""
        while True:
            try:
                now = await self._store.do(lease.look)
            except DBAPIError as error:
                # While the store is away its holder cannot give a sign: the time begins anew.
                log.warning("store.unreadable", why=str(error.orig))
                seen = None
                await asyncio.sleep(self._patience / _LOOKS)
                continue
            if now != seen:
                seen, since = now, clock()
            silent = clock() - since >= self._patience
            if not now.holder or silent or self._is_dead(now.holder):
                epoch = await self._take(now)
                if epoch is not None:
                    return epoch
                continue
            if told != now.holder:
                told = now.holder
                log.info("coordinator.standby", holder=now.holder, after=self._patience)
            await asyncio.sleep(self._patience / _LOOKS)

    async def _take(self, seen: Lease) -> int | None:
        if self._locked():
            # Before the lease names us: where lock and lease name the same process, the lock tells
            # whether it lives.
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, self._me.encode(), 0)
        return await self._store.do(lease.take, seen, self._me)

    def _is_dead(self, holder: str) -> bool:
        """Whether the holder served from this folder and has ended: the kernel drops its lock."""
        return self._locked() and os.pread(self._lock, 256, 0).decode() == holder

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def _upgrade(self) -> None:
        before = await self._store.do(migrations.version)
        copy = await asyncio.to_thread(copy_before_upgrade, self._home, before or "0.1")
        log.info("store.upgrade", before=before, to=migrations.NEWEST, copy=str(copy or ""))
        await self._store.do(migrations.upgrade)
