"""What the agent is doing, as a file that `concilium silo status` reads. It holds no count."""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from silo.enrolment import agent_version

_SECONDS_BETWEEN = 0.5

log = structlog.get_logger(__name__)


class Status:
    """Replaces status.json when something changed, at most twice a second; on the event loop."""

    def __init__(self, path: Path, site: str, coordinator: str) -> None:
        self._path = path
        self._written = 0.0
        self._later: asyncio.TimerHandle | None = None
        self._values: dict[str, Any] = {
            "site": site,
            "coordinator": coordinator,
            "version": agent_version(),
            "running": True,
            "process": os.getpid(),
            "last_contact": None,
            "trouble": None,
            "certificate_expires": None,
            "studies": {},
        }

    def contact(self, trouble: str | None) -> None:
        """The coordinator answered (None), or did not."""
        before = self._values["trouble"]
        if trouble is None:
            self._values["last_contact"] = time.time()
        if trouble is None and before is not None:
            log.info("coordinator answers again")
        if trouble is not None and before is None:
            log.warning("coordinator does not answer as it should", reason=trouble)
        self._values["trouble"] = trouble
        self._changed()

    @property
    def values(self) -> dict[str, Any]:
        """What the file holds, as of now; to be read only."""
        studies = {name: dict(shown) for name, shown in list(self._values["studies"].items())}
        return {**self._values, "studies": studies}

    def certificate(self, expires: datetime) -> None:
        self._values["certificate_expires"] = expires.timestamp()
        self._changed()

    def study(self, name: str, **values: Any) -> None:
        """Merge values into what is shown of a study."""
        self._values["studies"].setdefault(name, {}).update(values)
        self._changed()

    def stopped(self) -> None:
        self._values["running"] = False
        self._write()

    def _changed(self) -> None:
        wait = self._written + _SECONDS_BETWEEN - time.monotonic()
        if wait <= 0:
            self._write()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(wait, self._write)

    def _write(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._written = time.monotonic()
        # Not synced: after a power failure nobody asks what the agent was doing before it.
        partial = self._path.with_name(f".{self._path.name}.new")
        text = json.dumps(self._values | {"written": time.time()}, indent=1, ensure_ascii=False)
        partial.write_text(text, "utf-8")
        os.replace(partial, self._path)
