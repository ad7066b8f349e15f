"""Content-addressed files: models, sums and what else is known by its SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from coordinator import failpoints

_READ = 1 << 20  # the largest chunk of a download


class Artifacts:
    """The folder of artifacts. A file is there whole and durable, or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what a crash has left half written; nothing refers to it."""
        for partial in self._folder.glob("*/*.part"):
            partial.unlink(missing_ok=True)

    def path(self, sha256: bytes) -> Path:
        name = sha256.hex()
        return self._folder / name[:2] / name

    def put(self, content: bytes | memoryview) -> bytes:
        """Store `content` durably; its SHA-256."""
        digest = hashlib.sha256(content).digest()
        target = self.path(digest)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(f"{uuid4().hex}.part")
            with open(partial, "wb") as file:
                file.write(content)
            self._settle(partial, target)
        return digest

    def adopt(self, file: Path) -> bytes:
        """Move a finished file in (on the same file system); its SHA-256."""
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").digest()
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        self._settle(file, target)
        return digest

    def _settle(self, partial: Path, target: Path) -> None:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        failpoints.reach("artifact written")
        os.replace(partial, target)
        # The name is durable only with its folder.
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        failpoints.reach("artifact kept")

    def read(self, sha256: bytes) -> bytes:
        return self.path(sha256).read_bytes()

    def chunks(self, sha256: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from `offset` to the end, in pieces of 1 MiB."""
        with open(self.path(sha256), "rb") as file:
            file.seek(offset)
            while data := file.read(_READ):
                yield offset, data
                offset += len(data)

    def remove(self, sha256: bytes) -> None:
        self.path(sha256).unlink(missing_ok=True)
        failpoints.reach("artifact removed")
