"""A federation whose coordinator is a process of its own: it can be killed, stopped, replaced."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from coordinator import failpoints, results, schema
from coordinator.config import Home
from coordinator.store import Store, StoreError
from protos.v1 import enrolment_pb2 as join_pb
from secagg.certificate import Certificate
from tests.coordinator.agent import join
from tests.coordinator.federation import Federation
from tests.walking import Deaths

_TRIED_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


class Coordinator:
    """One `concilium coordinator serve`."""

    def __init__(
        self, home: Path, log: Path, environment: dict[str, str] | None = None, *options: str
    ) -> None:
        command = ["-m", "concilium", "coordinator", "serve", "--home", str(home), *options]
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        if not self.ended:
            self.process.send_signal(number)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class Served(Federation):
    """A coordinator that dies at the first of `points`, is started again, dies at the second, and
    so on."""

    def __init__(
        self,
        folder: Path,
        *,
        points: Sequence[str] = (),
        record: Path | None = None,
        absent_after: float = 10.0,
        database: str | None = None,
    ) -> None:
        super().__init__(folder, absent_after, database)
        self.log = folder / "coordinator.log"
        self.deaths = Deaths(list(points))
        self.coordinator: Coordinator | None = None
        self._record = record
        self._reviving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.coordinator = Coordinator(self.home, self.log, self._environment)
        self._reviving = asyncio.create_task(self._revive())

    async def stop(self) -> None:
        if self._reviving is not None:
            self._reviving.cancel()
        if self.coordinator is not None:
            await asyncio.to_thread(self.coordinator.end)

    async def _revive(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if self.coordinator is not None and self.coordinator.ended:
                self.deaths.died(self.coordinator.process.returncode)
                self.coordinator = None
            if self.coordinator is None:
                # A machine with too much to do refuses a new process now and then.
                with suppress(BlockingIOError):
                    self.coordinator = Coordinator(self.home, self.log, self._environment)

    async def until(self, check: Callable[[], Any], seconds: float = 120.0) -> Any:
        def checked() -> Any:
            self._alive()
            # Whoever holds the store may have been killed, or stopped, in a transaction.
            with suppress(StoreError):
                return check()

        return await super().until(checked, seconds)

    def _alive(self) -> bool:
        if self._reviving is not None and self._reviving.done():
            self._reviving.result()  # raises what went wrong
        return True

    @property
    def _environment(self) -> dict[str, str]:
        wanted = {failpoints.VARIABLE: point} if (point := self.deaths.next) else {}
        return wanted | ({failpoints.RECORD: str(self._record)} if self._record else {})

    async def _hand_in(self, token: str, request: join_pb.JoinRequest) -> join_pb.JoinReply:
        while True:
            try:
                return await join(token, request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRIED_AGAIN:
                    raise
                await asyncio.sleep(0.1)

    def sums(self, study: str) -> dict[str, tuple[int, list[str]]]:
        """quantity → (session, survivors) of every sum of the study, each compared bit by bit with
        the vectors that its survivors put in, and there once only."""
        store = Store(Home(self.home).database(Home(self.home).config()))
        try:
            rows = store.run(_sessions, study)
            stored = store.run(results.all_of, study)
        finally:
            store.close()
        names = sorted(self.silos)
        summed = [row for row in rows if row.certificate and is_sum(row.certificate)]
        assert set(Counter(row.quantity for row in summed).values()) == {1}
        ends = [value["session"] for value in stored.values() if "session" in value]
        outcomes = {end["number"]: end for end in ends}
        found = {}
        for row in summed:
            end = outcomes[row.number]
            survivors = [names[i - 1] for i in end["survivors"]]
            vectors = [self.silos[name].vectors[row.quantity, row.number] for name in survivors]
            total = np.sum(vectors, axis=0, dtype=vectors[0].dtype)
            assert end["sum"] == hashlib.sha256(total).hexdigest()
            found[row.quantity] = (row.number, survivors)
        return found


def is_sum(certificate: bytes) -> bool:
    return Certificate.decode(certificate).is_sum


def _sessions(c: Any, study: str) -> list[Any]:
    table = schema.sessions
    query = table.select().where(table.c.study == study).order_by(table.c.number)
    return list(c.execute(query))
