"""The heads of the study centre's audit log that this site has signed, and keeps.

    HOME/heads.jsonl    one line each, as `concilium silo heads` prints them

With them a log that was shortened or written anew can be told from the one that was there.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silo.errors import SiloError
from silo.files import write_file
from study.audit_log import AuditError, Head, read_heads


class LogRewritten(SiloError):
    """The study centre shows another audit log than the one this site signed."""


def signed_heads(path: Path) -> list[Head]:
    """All that this site signed, oldest first. Raises AuditError for a damaged file."""
    text = path.read_text("utf-8") if path.exists() else ""
    # A power cut leaves a line that is not whole; what it said was never sent.
    return read_heads(text[: text.rfind("\n") + 1])


class Heads:
    """Signs heads for one site; `path` is the file they are kept in."""

    def __init__(self, path: Path, key: Ed25519PrivateKey, site: str) -> None:
        """Raises SiloError for a file that was changed."""
        self._path, self._key, self._site = path, key, site
        self._turn = threading.Lock()
        try:
            known = signed_heads(path)
        except AuditError as error:
            raise SiloError(
                f"{path} is damaged ({error}): move it away and keep it, a new one is begun"
            ) from error
        # In memory only the last: there is one for every session that ever ended.
        self._last = known[-1] if known else None
        write_file(path, "".join(json.dumps(vars(head)) + "\n" for head in known).encode())

    def sign(self, place: int, digest: str) -> Head:
        """Raises LogRewritten where an entry is not what it was when this site signed it."""
        with self._turn:
            return self._sign(place, digest)

    def _sign(self, place: int, digest: str) -> Head:
        known = self._signed(place)
        if known is not None and known.digest != digest:
            raise LogRewritten(
                f"entry {place} of the study centre's audit log is another one than this site "
                "signed: ask the study centre (`concilium silo heads` is the proof)"
            )
        if known is None:
            known = self._last = Head.sign(self._key, self._site, place, digest)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(known)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return known

    def _signed(self, place: int) -> Head | None:
        """What was signed at this place before. Places rise from session to session; one that does
        not is of an outcome that came again, or of a log that was written anew."""
        if self._last is None or place > self._last.place:
            return None
        if place == self._last.place:
            return self._last
        return next((head for head in signed_heads(self._path) if head.place == place), None)
