"""Parts with a life of their own: worker, spool, artifacts; and a service without torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.artifacts import Artifacts
from coordinator.contacts import Contacts
from coordinator.spool import DiskFull, Spool
from coordinator.uploads import Uploads
from coordinator.worker import Worker, WorkerDied
from protos.v1 import coordination_pb2 as pb


def die_unless_told_not_to(told: Path) -> str:
    if not told.exists():
        told.touch()
        os._exit(9)
    return "done"


def die() -> None:
    os._exit(9)


async def test_a_worker_that_dies_is_replaced_and_the_job_done_again(tmp_path: Path) -> None:
    worker = Worker()
    try:
        assert await worker.run(die_unless_told_not_to, tmp_path / "told") == "done"
        with pytest.raises(WorkerDied, match="lack of memory"):
            await worker.run(die)
        with pytest.raises(ZeroDivisionError):
            await worker.run(divmod, 1, 0)
    finally:
        worker.close()


def test_the_service_runs_without_torch() -> None:
    code = "import sys, coordinator.server, coordinator.admin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_is_told_and_the_upload_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, content = Spool(tmp_path), bytes(range(250)) * 4
    digest = hashlib.sha256(content).digest()
    first = spool.begin("s", 1, 2, len(content), digest, 0)
    first.write(0, content[:600])
    first.close()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskFull, match="goes on where it stopped"):
            spool.begin("s", 1, 2, len(content), digest, 600)
    rest = spool.begin("s", 1, 2, len(content), digest, spool.committed("s", 1, 2))
    rest.write(600, content[600:])
    rest.close()
    assert spool.holds("s", 1, 2, digest, len(content))


async def test_an_upload_that_a_newer_one_took_over_from_takes_nothing(tmp_path: Path) -> None:
    """Else a part that was begun anew would get the name of a vector that is whole."""
    spool, content = Spool(tmp_path), bytes(range(250))
    digest, other = hashlib.sha256(content).digest(), bytes(32)
    uploads, head = Uploads(spool), {"study": "s", "session": 1, "size": len(content)}
    older = await uploads.begin(2, pb.UploadChunk(data=content, sha256=digest, **head))
    await uploads.begin(2, pb.UploadChunk(data=b"x", sha256=other, **head))
    newer = await uploads.begin(2, pb.UploadChunk(data=content[:9], sha256=digest, **head))
    await uploads.close(2, older)
    assert [file.suffix for file in (tmp_path / "s" / "1").iterdir()] == [".part"]
    await uploads.write(2, newer, pb.UploadChunk(data=content[9:], offset=9))
    await uploads.close(2, newer)
    assert spool.holds("s", 1, 2, digest, len(content))


def test_vectors_fold_into_their_sum_whatever_their_length(tmp_path: Path) -> None:
    spool, rng = Spool(tmp_path), np.random.default_rng(1)
    vectors = rng.integers(0, 2**16, (3, 1_300_001), dtype=np.uint16)  # three chunks, one odd
    inputs = {}
    for silo, vector in enumerate(vectors, start=1):
        content = vector.tobytes()
        inputs[silo] = hashlib.sha256(content).digest()
        upload = spool.begin("s", 1, silo, len(content), inputs[silo], 0)
        upload.write(0, content)
        upload.close()
    total = spool.fold("s", 1, inputs, 16, vectors.shape[1], [])
    np.testing.assert_array_equal(total, vectors.sum(axis=0, dtype=np.uint16))
    spool.discard("s", 1)
    assert spool.committed("s", 1, 1) == 0


def test_artifacts_are_named_by_their_content_and_leave_nothing_half_written(
    tmp_path: Path,
) -> None:
    artifacts = Artifacts(tmp_path / "a")
    digest = artifacts.put(b"content")
    assert digest == hashlib.sha256(b"content").digest() == artifacts.put(b"content")
    half = artifacts.path(digest).with_name("half.part")
    half.write_bytes(b"con")
    artifacts.clear()
    assert not half.exists()
    assert list(artifacts.chunks(digest, 3)) == [(3, b"tent")]


def test_nobody_is_absent_from_a_service_that_does_not_listen_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A standby may wait for weeks before it opens its door, and then asks for every silo."""
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time)
    monkeypatch.setattr("coordinator.contacts.time", clock)
    contacts = Contacts()
    now += 3600
    assert not contacts.absent("site-1", 10.0)
    contacts.listening()
    now += 9
    assert not contacts.absent("site-1", 10.0)
    with contacts.call("site-2"):
        now += 1
    assert contacts.absent("site-1", 10.0)
    assert not contacts.absent("site-2", 10.0)
