"""What every step of a study needs: its results in the store, its artifacts, its worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from coordinator import jobs, records, results
from coordinator.config import Home
from coordinator.jobs import Machine
from coordinator.report import Report
from coordinator.sessions import Tools
from coordinator.studies import LiveStudy
from coordinator.summing import Summing
from coordinator.worker import Worker

log = structlog.get_logger()

Json = dict[str, Any]


class Steps:
    """The parts of a study that runs."""

    def __init__(
        self,
        home: Home,
        tools: Tools,
        worker: Worker,
        machine: Machine,
        live: LiveStudy,
        absent_after: float,
    ) -> None:
        self._home, self._tools, self._worker, self._machine = home, tools, worker, machine
        self._live, self._plan, self._text = live, live.plan, live.row.plan
        self._summing = Summing(tools, live, absent_after)
        self._report = Report(home.study(live.id), tools.store, live)
        self._members: list[int] = []

    def _of_epoch(self, key: str) -> str:
        """The key of a step that is done once per roster epoch."""
        epoch = self._live.roster.epoch
        return key if epoch == 1 else f"{key} of epoch {epoch}"

    async def once(self, key: str, step: Callable[[], Awaitable[Json]]) -> Json:
        """The stored result of a step, or that of running it now, stored."""
        found: Json | None = await self._result(key)
        if found is not None:
            return found
        await self._summing.may_go_on()
        started = time.time()
        result = await step()
        result["seconds"] = round(time.time() - started, 3)
        await self._tools.store.do(results.put_result, self._live.id, key, result)
        return result

    async def _result(self, key: str) -> Any:  # Json, or None before the step is done
        return await self._tools.store.do(results.result, self._live.id, key)

    async def _stage(self, stage: str) -> None:
        await self._tools.store.do(records.set_stage, self._live.id, stage)
        log.info("study.stage", study=self._live.id, stage=stage)

    async def _keep_model(self, file: Path) -> bytes:
        sha256 = await asyncio.to_thread(self._tools.artifacts.adopt, file)
        await self._publish(sha256)
        return sha256

    async def _publish(self, sha256: bytes) -> None:
        """Let the silos have a model."""
        await self._record(sha256, "model", published=True)
        await self._tools.store.do(records.set_model, self._live.id, sha256)

    async def _record(self, sha256: bytes, role: str, *, published: bool = False) -> None:
        size = self._tools.artifacts.path(sha256).stat().st_size
        await self._tools.store.do(
            results.record_artifact, self._live.id, sha256, role, size, published=published
        )

    def _scratch(self, name: str) -> Path:
        # The worker of a process that was taken over from may still be at the same job.
        return self._home.scratch / f"{self._tools.store.epoch}-{self._live.id}-{name}"

    def _names(self, indices: tuple[int, ...]) -> list[str]:
        return [self._live.roster.member(i).name for i in indices]

    async def _draw(self, model: Json, images: int, png: Path) -> None:
        path = self._tools.artifacts.path(bytes.fromhex(model["model"]))
        await self._worker.run(jobs.draw_grid, self._machine, self._text, path, images, png)
