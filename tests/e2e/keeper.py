"""A copy of every vector that a silo encodes: the silo itself deletes it after the outcome."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


class Keeper(threading.Thread):
    """Links `<silos>/<name>/studies/*/vectors/<quantity>/vector` to `<kept>/<name>.<quantity>`."""

    def __init__(self, silos: Path, kept: Path) -> None:
        super().__init__(daemon=True)
        self._silos, self._kept, self._done = silos, kept, threading.Event()
        kept.mkdir()

    def run(self) -> None:
        while not self._done.is_set():
            for vector in self._silos.glob("*/studies/*/vectors/*/vector"):
                name = f"{vector.relative_to(self._silos).parts[0]}.{vector.parent.name}"
                try:
                    os.link(vector, self._kept / name)
                except (FileExistsError, FileNotFoundError):
                    continue
            time.sleep(0.02)

    def stop(self) -> None:
        self._done.set()
        self.join()
