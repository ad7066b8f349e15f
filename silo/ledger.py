"""The ledger file of one study: append-only, hash-chained, durable before `append` returns.

    file   = MAGIC || record*
    record = header || entry || chain
    header = u32 length of entry || u32 CRC-32 of those four bytes
    chain  = SHA-256(chain before || entry)          the first: SHA-256(MAGIC || study)

What a crash can leave is a last record that is not whole. It is cut off when the file is opened:
`append` had not returned, so nothing that depends on the record ever left the silo. Anything else
that does not verify is damage, and a damaged ledger is not used: it may have forgotten what was
done. The header has a check of its own so that damage to a length is not taken for a torn tail.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from pathlib import Path

from secagg.codec import u32
from secagg.context import Quantity
from secagg.errors import MalformedMessage
from secagg.ledger import Entry, Opened, decode_entry, encode_entry
from silo import failpoints
from silo.errors import LedgerError
from silo.files import InUse, lock, sync_folder

MAGIC = b"concilium ledger 1\n"
_HEADER = 8
_CHAIN = 32
_MAX_ENTRY = 2 << 20


class LedgerFile:
    """The entries of one study, and the exclusive right to add to them."""

    def __init__(self, path: Path, study: str) -> None:
        """Open or create; raises LedgerError if another process holds it or it is damaged."""
        try:
            self._file = lock(path)
        except InUse as error:
            raise LedgerError(str(error)) from error
        self._path = path
        self._broken = False
        self._turn = threading.Lock()
        self._count = 0
        self._quantity: Quantity | None = None
        self._first = self._chain = hashlib.sha256(MAGIC + study.encode()).digest()
        try:
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def entries(self) -> tuple[Entry, ...]:
        """Everything recorded so far, oldest first, as the file has it: in memory it would be
        another copy of a history of months. Raises LedgerError for a file that was damaged since.
        """
        found: list[Entry] = []
        with self._turn:
            if self._file < 0:
                raise LedgerError(f"{self._path} is closed: open it again")
            content, at, chain = _read_all(self._file), len(MAGIC), self._first
            while len(found) < self._count:
                record = self._record(content, at, chain, len(found))
                if record is None:
                    raise self._damaged(at, len(found))
                at, chain, entry = record
                found.append(entry)
        return tuple(found)

    def append(self, entry: Entry) -> None:
        """Make `entry` durable. After an OSError the ledger must be opened anew.

        Which of the bytes reached the disk is unknown after a failed write or fsync, so nothing
        may be written behind them before the tail was read again.
        """
        # The lock also keeps `close` from giving the descriptor away while it is written to.
        with self._turn:
            if self._broken:
                raise LedgerError(f"{self._path} is closed, or failed before: open it again")
            encoded = encode_entry(entry)
            chain = _next(self._chain, encoded)
            record = _header(encoded) + encoded + chain
            self._broken = True
            self._note_quantity(entry)
            kind = type(entry).__name__.lower()
            failpoints.reach(f"before ledger {kind}", self._quantity)
            _write(self._file, record)
            failpoints.reach(f"written ledger {kind}", self._quantity)
            os.fsync(self._file)
            failpoints.reach(f"after ledger {kind}", self._quantity)
            self._broken = False
            self._chain = chain
            self._count += 1

    def close(self) -> None:
        """Let another process have it."""
        with self._turn:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
                self._broken = True

    def _read(self) -> None:
        content = _read_all(self._file)
        if len(content) < len(MAGIC) and MAGIC.startswith(content):
            self._start()
            return
        if not content.startswith(MAGIC):
            raise LedgerError(f"{self._path} is not a ledger: restore it, or leave the study")
        at = len(MAGIC)
        while (record := self._record(content, at, self._chain, self._count)) is not None:
            at, self._chain, entry = record
            self._note_quantity(entry)
            self._count += 1
        if at != len(content):
            os.ftruncate(self._file, at)
            os.fsync(self._file)
        os.lseek(self._file, at, os.SEEK_SET)

    def _note_quantity(self, entry: Entry) -> None:
        # Entries that follow are of the session that was opened last.
        if isinstance(entry, Opened):
            self._quantity = entry.context.quantity

    def _start(self) -> None:
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        _write(self._file, MAGIC)
        os.fsync(self._file)
        # Without this a crash could lose the whole file, and with it the memory of the silo.
        sync_folder(self._path.parent)

    def _record(
        self, content: bytes, at: int, before: bytes, count: int
    ) -> tuple[int, bytes, Entry] | None:
        """Where the record at `at` ends, its chain and its entry; None where the whole records end.
        `before` is the chain and `count` the number of those before it."""
        header = content[at : at + _HEADER]
        if len(header) < _HEADER:
            return None
        # A file system may have grown the file before it wrote the bytes; no chain is all zeros.
        length = int.from_bytes(header[:4], "big")
        if header[4:] != _header_check(header[:4]) or length > _MAX_ENTRY:
            if any(content[at + _HEADER :]):
                raise self._damaged(at, count)
            return None
        end = at + _HEADER + length + _CHAIN
        chain = content[end - _CHAIN : end]
        if end > len(content) or (end == len(content) and not any(chain)):
            return None
        encoded = content[at + _HEADER : end - _CHAIN]
        if _next(before, encoded) != chain:
            raise self._damaged(at, count)
        try:
            return end, chain, decode_entry(encoded)
        except MalformedMessage as error:
            raise self._damaged(at, count) from error

    def _damaged(self, at: int, count: int) -> LedgerError:
        return LedgerError(
            f"{self._path} is damaged at byte {at}, after {count} whole records. "
            "It is what keeps this site from answering twice, so it is not used any more: find out "
            "what changed it, restore the newest copy, and leave the study if there is none"
        )


def _header(encoded: bytes) -> bytes:
    length = u32(len(encoded))
    return length + _header_check(length)


def _header_check(length: bytes) -> bytes:
    return u32(zlib.crc32(length))


def _next(chain: bytes, encoded: bytes) -> bytes:
    return hashlib.sha256(chain + encoded).digest()


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read_all(file: int) -> bytes:
    """The whole content, wherever the descriptor stands; it stays there."""
    parts, at = [], 0
    while part := os.pread(file, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)
