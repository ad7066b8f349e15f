"""What the agent is doing, as a file that `concilium silo status` reads. It holds no count."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from silo.files import write_json

_SECONDS_BETWEEN = 0.5


class Status:
    """Replaces status.json when something changed, at most twice a second but for `flush`."""

    def __init__(self, path: Path, site: str, coordinator: str) -> None:
        self._path = path
        self._next = 0.0
        self._values: dict[str, Any] = {
            "site": site,
            "coordinator": coordinator,
            "running": True,
            "last_contact": None,
            "trouble": None,
            "certificate_expires": None,
            "studies": {},
        }

    def contact(self, trouble: str | None) -> None:
        """The coordinator answered (None), or did not."""
        if trouble is None:
            self._values["last_contact"] = time.time()
        self._values["trouble"] = trouble
        self._write()

    def certificate(self, expires: str) -> None:
        self._values["certificate_expires"] = expires
        self.flush()

    def study(self, name: str, **values: Any) -> None:
        """Merge values into what is shown of a study."""
        self._values["studies"].setdefault(name, {}).update(values)
        self._write()

    def stopped(self) -> None:
        self._values["running"] = False
        self.flush()

    def flush(self) -> None:
        self._next = 0.0
        self._write()

    def _write(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN
            write_json(self._path, self._values | {"written": time.time()})
