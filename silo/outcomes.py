"""How the sessions of a study under one roster ended: the certificates this site has verified, one
file each. A certificate is judged by the roster of its session, so each epoch has its own.

A file is written after everything that follows from the outcome was done, so the highest number
here is what the coordinator is told as settled; after a crash the outcome comes again.
"""

from __future__ import annotations

from pathlib import Path

from secagg.certificate import Certificate
from secagg.context import NO_HASH
from secagg.ledger import History
from silo.files import write_file

_SUFFIX = ".certificate"


class Outcomes:
    """The certificates in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        numbers = (p.stem for p in folder.glob(f"*{_SUFFIX}"))
        self.settled = max((int(n) for n in numbers if n.isdecimal()), default=0)
        """The last session whose outcome is known."""

    @property
    def previous(self) -> bytes:
        """The digest of the last certificate: what the next session's context holds."""
        return self._read(self.settled).digest if self.settled else NO_HASH

    def add(self, session: int, certificate: Certificate) -> None:
        write_file(self._path(session), certificate.encode())
        self.settled = max(self.settled, session)

    def tags(self, history: History) -> dict[int, Certificate]:
        """Attempt → certificate of every sum of tags under this roster that this site is in."""
        found = {}
        for record in history.sessions.values():
            context, settled = record.context, record.settled
            ours = context.quantity.purpose == "tags" and settled and settled.included
            if ours and self._path(context.session).exists():
                found[context.quantity.round] = self._read(context.session)
        return found

    def _read(self, session: int) -> Certificate:
        return Certificate.decode(self._path(session).read_bytes())

    def _path(self, session: int) -> Path:
        return self._folder / f"{session}{_SUFFIX}"
