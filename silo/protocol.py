"""One study's side of the secure sum at this silo: the pure state, its ledger, the masked vector.

`secagg.silo` says what to do; here it is done, in order, on disk: a ledger entry is durable before
what depends on it is handed back to be sent. All of it blocks, so the agent calls it in a thread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import structlog

from secagg.context import SessionContext
from secagg.errors import Reason, Refused
from secagg.events import (
    Headers,
    InputMasked,
    MaskInput,
    Open,
    Record,
    Send,
    Settle,
    SiloEffect,
    SiloEvent,
)
from secagg.ledger import History, SessionRecord
from secagg.masking import CHUNK_BYTES, DTYPES, MaskKey, Masks
from secagg.primitives import SECRET_BYTES, derive
from secagg.silo import SiloParty, SiloState, complain, resume
from silo import failpoints
from silo.errors import LedgerError, WorkFailed
from silo.files import overwrite, replacing, write_file
from silo.ledger import LedgerFile

log = structlog.get_logger(__name__)

# What only the dealer of a parcel can have done.
_DEALERS = (Reason.BAD_CIPHERTEXT, Reason.BAD_COMMITMENT)


class Protocol:
    """Feed events, get messages to send. After a restart it goes on from what the ledger says."""

    def __init__(
        self, party: SiloParty, ledger: LedgerFile, masked: Path, shares_key: Path
    ) -> None:
        """`masked` is the folder for masked vectors, `shares_key` the file that is overwritten when
        the shares in the ledger are of no use any more."""
        self._ledger, self._masked, self._shares_key = ledger, masked, shares_key
        self._ledger_key = party.ledger_key
        self._vector: FileIO | None = None
        if not shares_key.exists():
            write_file(shares_key, os.urandom(SECRET_BYTES))
        self._party = self._with_key(party)
        self._state: SiloState = resume(self._party, History.of(ledger.entries()))
        if self.session is None:
            self._burn()

    def close(self) -> None:
        """Overwrite the secrets in memory, and let another process have the ledger."""
        self._hold(None)
        self._state.wipe()
        self._party.ledger_key.wipe()
        self._ledger.close()

    def _with_key(self, party: SiloParty) -> SiloParty:
        """Shares are locked with what only the agent's key and this study's file together give."""
        salt = self._shares_key.read_bytes()
        return replace(party, ledger_key=derive(self._ledger_key, salt, b"shares of a session"))

    def _burn(self) -> None:
        """No session is under way, so nobody is owed a share: from now on none can be opened. A
        thief of this machine, however much he recorded, comes too late."""
        overwrite(self._shares_key, os.urandom(SECRET_BYTES))
        self._party.ledger_key.wipe()
        self._party = self._with_key(self._party)
        self._state = replace(self._state, party=self._party)

    @property
    def history(self) -> History:
        return self._state.history

    @property
    def session(self) -> SessionContext | None:
        """The session under way."""
        return self._state.session

    def record(self, context: bytes) -> SessionRecord | None:
        """What the ledger says of the session with this context digest."""
        return self.history.sessions.get(context)

    def opened(self, session: int) -> bool:
        """Whether this site took part in a session of this number."""
        return any(r.context.session == session for r in self.history.sessions.values())

    def masked_vector(self, context: SessionContext) -> Path:
        """The file that is uploaded in this session."""
        return self._masked / f"{context.session}.vector"

    def open(self, context: SessionContext, vector: Path) -> list[Send]:
        """Step 0 with the encoded vector, which is there before anything is promised.

        Raises `Refused` where an honest silo does not take part, WorkFailed for a vector of
        another length than the context says.
        """
        file = FileIO(vector)
        try:
            size = os.fstat(file.fileno()).st_size
            if size != context.vector_bytes:
                raise WorkFailed(
                    f"the vector of {context.quantity} has {size} bytes, "
                    f"the session's has {context.vector_bytes}"
                )
            sends = self.handle(Open(context))
        except BaseException:
            file.close()
            raise
        self._hold(file)
        return sends

    def _hold(self, vector: FileIO | None) -> None:
        """Keep the vector that the session under way was opened with, open, until it is masked.

        By its name it could be another one by then: what a coordinator proposes between is computed
        under the same name, from a model of its choice, even if it is never opened.
        """
        if self._vector is not None:
            self._vector.close()
        self._vector = vector

    def handle(self, event: SiloEvent) -> list[Send]:
        """Carry an event through; what is returned may be sent, and may be sent again.

        Raises `Refused` and `UnexpectedEvent` as `secagg.silo` does, with nothing changed, and
        OSError where a disk failed; then the state is what the ledger says.
        """
        if isinstance(event, Headers):
            return self._handle_headers(event)
        state, effects = self._state.handle(event)
        return self._carry_out(state, effects)

    def _handle_headers(self, event: Headers) -> list[Send]:
        """Where one dealer's parcel contradicts its header, the answer is a complaint. What no
        honest coordinator relays (a forged signature, say) accuses the coordinator alone."""
        try:
            state, effects = self._state.handle(event)
        except Refused as error:
            if error.accused is None or error.reason not in _DEALERS or self.session is None:
                raise
            log.error("complained", session=self.session.session, reason=str(error))
            return [complain(self._party, self.session.digest, error.accused)]
        return self._carry_out(state, effects)

    def _carry_out(self, state: SiloState, effects: Sequence[SiloEffect]) -> list[Send]:
        before, self._state = self._state, state
        sends: list[Send] = []
        for effect in effects:
            match effect:
                case Record(entry):
                    try:
                        self._ledger.append(entry)
                    except (OSError, LedgerError):
                        self._forget(before)
                        raise
                case Send():
                    sends.append(effect)
                case MaskInput(keys):
                    # A failure leaves the state at `Masking`: the same request masks again.
                    sends += self.handle(self._mask(keys))
                    self._hold(None)
        if self.session is None and any(isinstance(effect, Record) for effect in effects):
            self._hold(None)
            self._burn()
        return sends

    def _forget(self, before: SiloState) -> None:
        """After a failed write neither state can be trusted: the new one was not recorded, and the
        old one may hold secrets that the transition has wiped to zeros. A vector masked with keys
        of zeros would be a vector in the clear. So both go, and the ledger alone decides."""
        before.wipe()
        self._state.wipe()
        self._state = resume(self._party, History.of(self._ledger.entries()))
        self._hold(None)

    def _mask(self, keys: Sequence[MaskKey]) -> InputMasked:
        context = self.session
        if context is None or self._vector is None:
            raise WorkFailed("there is no vector to mask: the session was opened without one")
        failpoints.reach("before-mask", context.quantity)
        masks, digest, size = Masks(keys), hashlib.sha256(), 0
        chunk = np.empty(CHUNK_BYTES, dtype=np.uint8)
        words, content = chunk.view(DTYPES[context.ring]), memoryview(chunk.data)
        self._vector.seek(0)
        # Not durable: after a crash its keys are lost, and nobody asks for it any more.
        with replacing(self.masked_vector(context), durable=False) as masked:
            # A chunk is masked, hashed and written while it is in a core's cache.
            while got := self._vector.readinto(content):
                masks.add_to(words[: got // words.itemsize])
                digest.update(content[:got])
                masked.write(content[:got])
                size += got
        if size != context.vector_bytes:
            raise WorkFailed(f"the vector of {context.quantity} was {size} bytes when masked")
        return InputMasked(digest.digest(), size)

    def settle(self, event: Settle) -> SessionRecord | None:
        """Record how a session ended; its record, or None for one that we took no part in.

        Raises `Refused` for a certificate that does not prove it.
        """
        self.handle(event)
        record = self.record(event.certificate.context)
        if record is not None:
            self.masked_vector(record.context).unlink(missing_ok=True)
        return record
