"""Files that survive a crash: whole or not there, durable before the next step, one holder."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from silo import failpoints
from silo.errors import SiloError


def write_file(path: Path, content: bytes | memoryview, mode: int = 0o600) -> None:
    """Replace `path` by `content`; after a crash it holds either the old content or the new."""
    with replacing(path, mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, mode: int = 0o600, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends; where it raises,
    `path` is what it was. One that is not `durable` may be lost when the machine fails."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        failpoints.reach(f"before {_point(path)}")
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
    failpoints.reach(f"after {_point(path)}")


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value stored at `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def overwrite(path: Path, content: bytes) -> None:
    """Put `content` where the old content of the same length was, durably. Unlike `write_file` it
    leaves no copy of the old one on a disk that writes in place; after a crash either or a mixture
    is there."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A new or renamed file is durable once its folder is: a directory is synced like a file.
sync_folder = sync_file


def move(source: Path, target: Path) -> None:
    """Rename within one file system, durably."""
    failpoints.reach(f"before move to {_point(target)}")
    os.replace(source, target)
    sync_folder(target.parent)
    failpoints.reach(f"after move to {_point(target)}")


def _point(path: Path) -> str:
    """The file's name; with its folder's where that tells which sum it is for; no digest."""
    if path.parent.parent.name == "vectors":
        return f"{path.parent.name}/{path.name}"
    return path.parent.name if len(path.name) == 64 else path.name


def make_folder(path: Path) -> Path:
    """A folder that nobody else can enter, and its parents where they are missing."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


class InUse(SiloError):
    """Another process holds the lock."""


def lock(path: Path) -> int:
    """Hold `path` (created where missing) for this process until its descriptor is closed.

    The kernel drops the lock when the process dies, whatever kills it. Raises `InUse`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUse(
            f"{path} is held by another agent on this machine: stop that one first, "
            "or give this one a home of its own"
        ) from error
    return descriptor
