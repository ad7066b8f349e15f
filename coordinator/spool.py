"""Uploads on disk: masked vectors on their way in, and their sum.

`<study>/<session>/<silo>-<sha256>.<epoch>.part` grows as chunks come; once it is whole and its
digest is right it is renamed to `<silo>-<sha256>`. The file system is all the state there is, so a
restart forgets nothing. A process writes to files of its own epoch of the lease only, and goes on
with a copy of an earlier one's: one that was stopped and goes on late writes where nobody reads.
Masked vectors are uniformly random: they tell nothing, and are removed when the session ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from coordinator import failpoints
from secagg.masking import DTYPES, MaskKey, Vector, apply_masks

MAX_CHUNK = 1 << 20
_SYNC_EVERY = 16 << 20
_FOLD_CHUNK = 1 << 18  # bytes of one vector in memory at a time
_RESERVE = 64 << 20  # left on the disk for the store


class UploadRefused(Exception):
    """A chunk or an upload that cannot be taken; the text says what is wrong with it."""


class WrongOffset(UploadRefused):
    """A chunk that does not start where the committed bytes end."""


class InputLost(Exception):
    """A vector that was whole when its silo signed for it is not there as it was. `alone`: those
    of other silos are, so that the disk as a whole is not what lost it."""

    def __init__(self, silo: int, why: str, alone: bool) -> None:
        self.silo, self.alone = silo, alone
        super().__init__(why)


class DiskFull(Exception):
    """No space for an upload. The silo tries again; the operator makes room."""


class Spool:
    """The folder of uploads. Methods block; call them off the event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.epoch = 0
        """The fencing number of the process that writes here."""
        folder.mkdir(parents=True, exist_ok=True)

    def committed(self, study: str, session: int, silo: int) -> int:
        """How many bytes of this silo's upload are here."""
        return max((_length(f) for f in self._files(study, session, silo)), default=0)

    def begin(
        self, study: str, session: int, silo: int, size: int, sha256: bytes, offset: int
    ) -> Incoming:
        """Go on with an upload at the committed offset.

        A part of another vector is dropped: what counts is the digest that the silo signs, and
        the silo's own ledger allows it one. Raises UploadRefused for another offset or where
        another vector is whole, DiskFull.
        """
        name = f"{silo}-{sha256.hex()}"
        for other in self._files(study, session, silo):
            if other.name.partition(".")[0] == name:
                continue
            if not other.suffix:
                # It may be what the silo has signed for, in a sum that all others then confirm.
                raise UploadRefused(
                    f"this silo's vector is here, with SHA-256 {other.name.partition('-')[2]}: no "
                    "other one is taken in this session. Send the one that the silo's ledger names"
                )
            other.unlink(missing_ok=True)
        folder = self._session(study, session)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / name
        part = folder / f"{name}.{self.epoch}.part"
        done = whole.stat().st_size if whole.exists() else None
        if done is None:
            self._take_over(folder, name, part)
        committed = done or (part.stat().st_size if part.exists() else 0)
        if done is None and offset != committed:
            raise WrongOffset(
                f"the chunk starts at byte {offset}, {committed} are committed: go on there"
            )
        free = shutil.disk_usage(folder).free
        if done is None and free < size - committed + _RESERVE:
            raise DiskFull(_full(folder, size - committed, free))
        return Incoming(whole, part, size, sha256, committed, done is not None)

    def _take_over(self, folder: Path, name: str, part: Path) -> None:
        """Go on with what came under earlier epochs; raises UploadRefused under one of them."""
        for other in folder.glob(f"{name}.*.part"):
            epoch = int(other.name.split(".")[1])
            if epoch > self.epoch:
                raise UploadRefused("another coordinator has taken over: ask again")
            if epoch < self.epoch:
                if not part.exists() or _length(part) < _length(other):
                    copy = part.with_suffix(".copy")
                    shutil.copyfile(other, copy)
                    os.replace(copy, part)
                other.unlink(missing_ok=True)

    def holds(self, study: str, session: int, silo: int, sha256: bytes, size: int) -> bool:
        """Whether this very vector is here, whole and verified."""
        whole = self._session(study, session) / f"{silo}-{sha256.hex()}"
        return whole.exists() and whole.stat().st_size == size

    def fold(
        self,
        study: str,
        session: int,
        inputs: Mapping[int, bytes],
        ring: int,
        length: int,
        keys: Sequence[MaskKey],
    ) -> Vector:
        """Σ of the vectors of `inputs` (silo → digest) and of the keystreams of `keys`, mod 2^b.
        Raises InputLost where one is missing or has another length; each had its digest when it
        got its name, and nobody writes to it since.

        Memory: the sum and one chunk, whatever the number of silos. A chunk of the sum stays in a
        core's cache while the vectors are added to it.
        """
        total = np.zeros(length, dtype=DTYPES[ring])
        chunk = np.empty(_FOLD_CHUNK // total.itemsize, dtype=total.dtype)
        with ExitStack() as opened:
            folder = self._session(study, session)
            names = {silo: f"{silo}-{sha256.hex()}" for silo, sha256 in inputs.items()}
            _check_whole(folder, names, total.nbytes)
            files = [opened.enter_context(open(folder / n, "rb", 0)) for n in names.values()]
            for start in range(0, length, chunk.size):
                part = total[start : start + chunk.size]
                addend = chunk[: part.size]
                for file in files:
                    if file.readinto(addend.data.cast("B")) != part.nbytes:
                        raise OSError(errno.EIO, "a committed upload is shorter than it was")
                    part += addend
        apply_masks(total, keys)
        return total

    def discard(self, study: str, session: int) -> None:
        shutil.rmtree(self._session(study, session), ignore_errors=True)
        failpoints.reach(f"uploads discarded, session {session}")

    def clear(self, under_way: Collection[tuple[str, int]]) -> None:
        """Remove the uploads of every session but those (study, number): a crash came between the
        end of a session and `discard`."""
        for folder in self._folder.glob("*/*"):
            if (folder.parent.name, int(folder.name)) not in under_way:
                shutil.rmtree(folder, ignore_errors=True)

    def _session(self, study: str, session: int) -> Path:
        return self._folder / study / str(session)

    def _files(self, study: str, session: int, silo: int) -> list[Path]:
        found = self._session(study, session).glob(f"{silo}-*")
        return [file for file in found if file.suffix != ".copy"]


class Incoming:
    """One upload under way, from the committed offset on. Methods block."""

    def __init__(
        self, whole: Path, part: Path, size: int, sha256: bytes, committed: int, done: bool
    ) -> None:
        self._whole, self._part, self.size, self._sha256 = whole, part, size, sha256
        self.committed, self.done = committed, done
        self._synced = committed
        # What comes in one go is hashed as it comes; else the file is read when it is whole, so
        # that a line that breaks often does not cost as many readings.
        self._hash = None if committed else hashlib.sha256()
        self._file = None if done else open(part, "ab")  # noqa: SIM115 - closed by `close`

    def write(self, offset: int, data: bytes) -> None:
        """Raises UploadRefused for a chunk out of place, DiskFull."""
        if self._file is None:
            return  # the whole vector is here: a repeated upload changes nothing
        if offset != self.committed:
            raise WrongOffset(
                f"the chunk starts at byte {offset}, {self.committed} are committed: go on there"
            )
        if self.committed + len(data) > self.size:
            raise UploadRefused(f"more than the {self.size} bytes that were announced")
        try:
            self._file.write(data)
            self.committed += len(data)
            if self._hash is not None:
                self._hash.update(data)
            if self.committed - self._synced >= _SYNC_EVERY:
                self._sync()
        except OSError as error:
            self._file.close()
            self._file = None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self._part.parent).free
                raise DiskFull(
                    _full(self._part.parent, self.size - self.committed, free)
                ) from error
            raise

    def close(self, take: bool = True) -> None:
        """Make what came durable; when it is all, check the digest and, with `take`, take it.

        Raises UploadRefused where the digest is another; the part is dropped then.
        """
        if self._file is None:
            return
        self._sync()
        self._file.close()
        self._file = None
        if self.committed < self.size or not take:
            return
        found = self._digest()
        failpoints.reach(f"upload whole, session {self._whole.parent.name}")
        if found != self._sha256:
            self._part.unlink()
            self.committed = 0
            raise UploadRefused(
                f"the vector has SHA-256 {found.hex()}, announced was {self._sha256.hex()}: "
                "send it again from byte 0"
            )
        os.replace(self._part, self._whole)
        descriptor = os.open(self._whole.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        failpoints.reach(f"upload taken, session {self._whole.parent.name}")
        self.done = True

    def _digest(self) -> bytes:
        if self._hash is not None:
            return self._hash.digest()
        with open(self._part, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = self.committed


def _check_whole(folder: Path, names: Mapping[int, str], size: int) -> None:
    lengths = {silo: _length(folder / name) for silo, name in names.items()}
    alone = size in lengths.values()
    for silo, length in lengths.items():
        if length != size:
            raise InputLost(silo, f"{length} of {size} bytes are in {folder}", alone)


def _length(file: Path) -> int:
    """0 where it is not there, or not any more."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _full(folder: Path, wanted: int, free: int) -> str:
    return (
        f"the study centre's disk is full: {wanted >> 20} MiB are wanted for the upload and "
        f"{free >> 20} MiB free at {folder.parent.parent}; the upload goes on where it stopped "
        "when there is room"
    )
