"""Where secrets must not be: log, status, ledger, the coordinator's store, core files."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from coordinator import admin
from protos.v1 import coordination_pb2 as pb
from secagg import coordinator, primitives
from secagg.errors import Reason
from secagg.events import Confirmations, Survivors
from secagg.primitives import Secret
from silo.home import SiloHome
from silo.identity import load_or_make_identity
from silo.process import begin
from study.quantity import CensusWork
from tests.attacks.liar import Said
from tests.attacks.stage import Stage
from tests.coordinator.federation import Federation
from tests.silo.centre import AgentProcess


class Witness:
    """Every Secret that is made while it watches: the object, and what it held."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.watching = True
        self._patch = patch
        self.seen: list[tuple[Secret, bytes]] = []
        make = Secret.__init__

        def made(secret: Secret, value: bytes) -> None:
            make(secret, value)
            if self.watching:
                self.seen.append((secret, bytes(value)))

        patch.setattr(primitives.Secret, "__init__", made)

    def watch_only_the_agent(self, stage: Stage) -> None:
        """The other silos live in this process too, but only while nothing is asked of it."""
        self.watching, ask = False, stage.liar.ask

        async def watched(task: pb.Task) -> Said:
            self.watching = True
            try:
                return await ask(task)
            finally:
                self.watching = False

        self._patch.setattr(stage.liar, "ask", watched)

    @property
    def kept(self) -> int:
        """How many secrets are still what they were."""
        return sum(secret.reveal() == value and any(value) for secret, value in self.seen)

    @property
    def values(self) -> set[bytes]:
        return {value for _, value in self.seen if len(value) >= 32 and any(value)}


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


def spellings(secret: bytes) -> Iterator[bytes]:
    """How a secret could stand in a file: raw, in hexadecimal, base64, decimal, as a list."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for offset in range(3):  # also in the middle of something longer
        encoded = base64.b64encode(bytes(offset) + secret)
        yield encoded[4 if offset else 0 : -4]
        yield base64.urlsafe_b64encode(bytes(offset) + secret)[4 if offset else 0 : -4]
    yield str(int.from_bytes(secret, "big")).encode()
    yield str(int.from_bytes(secret, "little")).encode()
    yield ", ".join(map(str, secret)).encode()
    yield repr(secret)[2:-1].encode()


def found_in(folder: Path, secrets: set[bytes], *leave_out: str) -> list[str]:
    """The files below `folder` that hold any of the secrets in any spelling."""
    needles = [spelling for secret in secrets for spelling in spellings(secret)]
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in leave_out:
            content = path.read_bytes()
            found += [f"{path.name}: {n[:40]!r}" for n in needles if n in content]
    return found


async def a_session(stage: Stage) -> None:
    """A whole session, in which one silo drops out."""
    stage.open(CensusWork())
    await stage.until(coordinator.Collecting)
    await stage.until(coordinator.Confirming, 5)
    # On the way, what an attacker would try: requests that end in an error and in the log.
    await stage.refuses(Survivors((1, 2, 3)), Reason.BELOW_THRESHOLD)
    await stage.until(coordinator.Unmasking)
    few = Confirmations(stage.request(Confirmations).messages[:2])
    await stage.refuses(few, f"{Reason.BELOW_THRESHOLD.value}: 2 confirmations")
    await stage.until(coordinator.Summed)
    await stage.settle()


async def test_no_file_of_the_agent_holds_a_secret_in_the_clear(
    fresh: Stage, witness: Witness
) -> None:
    """But its keys. Log and status have none, and the ledger has the shares encrypted."""
    witness.watch_only_the_agent(fresh)
    identity = load_or_make_identity(SiloHome(fresh.victim.home))
    await a_session(fresh)
    assert len(witness.values) > 20
    secrets = witness.values | {identity.signing.private_bytes_raw(), identity.ledger.reveal()}
    assert found_in(fresh.victim.home, secrets, "ledger.key", "identity.pem") == []
    assert any("fewer silos" in line.get("reason", "") for line in fresh.victim.log())
    # The search does find what is there.
    assert found_in(fresh.victim.home, {identity.ledger.reveal()})[0].startswith("ledger.key")


async def test_every_secret_of_a_session_is_overwritten_when_it_ends(
    fresh: Stage, witness: Witness
) -> None:
    witness.watch_only_the_agent(fresh)
    await a_session(fresh)
    assert witness.seen
    assert witness.kept == 1  # with which the shares of the next session will be locked


async def test_an_agent_that_ends_in_the_middle_overwrites_what_it_held(
    fresh: Stage, witness: Witness
) -> None:
    witness.watch_only_the_agent(fresh)
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    assert witness.kept > 0
    await fresh.victim.stop()
    assert witness.kept == 0


async def test_the_coordinator_stores_no_secret(tmp_path: Path, witness: Witness) -> None:
    """Its store has the messages, and so the shares that silos gave it; no seed, no root, no key,
    not even those that it restored to compute the sum."""
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        for member in silos:
            member.start()
        study = admin.start_study(federation.home, federation.plan())
        await federation.until(lambda: federation.result(study, "census"))
    keys = {member.identity.private_bytes_raw() for member in silos}
    secrets = keys | {value for value in witness.values if len(value) == 32}
    assert len(secrets) > 30
    assert found_in(federation.home, secrets) == []


async def test_the_agent_leaves_no_core_file(fresh: Stage) -> None:
    """The real process, in the middle of a session, killed as a crash would kill it."""
    await fresh.victim.stop()
    await fresh.liar.alone()
    agent = AgentProcess(fresh.victim.home)
    try:
        fresh.open(CensusWork())
        await fresh.until(coordinator.Collecting)
        pid = agent.process.pid
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (1, 1)
        agent.process.send_signal(signal.SIGABRT)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert os.WTERMSIG(status) == signal.SIGABRT
        assert not os.WCOREDUMP(status)
    finally:
        agent.process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_memory_of_the_agent_is_closed_to_other_processes_of_its_user() -> None:
    script = (
        "import ctypes; from silo.memory import keep_private; libc = ctypes.CDLL(None);"
        "print(libc.prctl(3, 0, 0, 0, 0)); keep_private(); print(libc.prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "0"]


def privacy() -> tuple[tuple[int, int], int]:
    """The limit of core files and PR_GET_DUMPABLE, of this process."""
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) if sys.platform == "linux" else 0
    return resource.getrlimit(resource.RLIMIT_CORE), dumpable


def test_a_child_that_holds_images_is_as_private_as_the_agent() -> None:
    """One byte, not none: where dumps are piped to a program the kernel asks for no other limit."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, begin, (0,)) as pool:
        assert pool.submit(privacy).result() == ((1, 1), 0)


def test_a_limit_of_core_files_that_cannot_be_raised_stays_at_none() -> None:
    script = (
        "import resource as r; from silo.memory import keep_private;"
        "r.setrlimit(r.RLIMIT_CORE, (0, 0)); keep_private(); print(*r.getrlimit(r.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "0"]
