"""A coordinator and silos in one process, which meet only over gRPC with mutual TLS on loopback."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from concilium.demo.federation import free_port
from coordinator import admin, results
from coordinator.artifacts import Artifacts
from coordinator.config import Home, config_text
from coordinator.server import CoordinatorServer
from coordinator.store import Store
from protos.v1 import enrolment_pb2 as join_pb
from study.invitation import Invitation
from tests.coordinator.agent import Credentials, TestSilo, join, join_request, new_key

PLAN = """
[study]
name = "tiny"
title = "A tiny study"
seed = 7

[deadlines]
advertise = {deadline}
share = {deadline}
input = {deadline}
confirm = {deadline}
unmask = {deadline}

[data]
image_size = 4

[model]
block_out_channels = [8]
attention = [false]
mid_attention = false

[schedule]
num_train_timesteps = 10

[sampler]
steps = 2

[rounds]
count = {rounds}
local_steps = 1
first_clip = 0.05
{more}
"""


def shortened(plan: Path, step: str, seconds: int) -> Path:
    """The plan, with another deadline for one step: the one that has to run out."""
    text = plan.read_text()
    assert f"{step} = 20.0" in text
    plan.write_text(text.replace(f"{step} = 20.0", f"{step} = {seconds}"))
    return plan


class Federation:
    """A coordinator's folder, its server object, and silos that have joined."""

    def __init__(
        self, folder: Path, absent_after: float = 3.0, database: str | None = None
    ) -> None:
        self.home, self.address = folder / "coordinator", f"127.0.0.1:{free_port()}"
        admin.init(self.home, self.address, listen=self.address)
        config = Home(self.home).config()
        ours = {"absent_after": absent_after, "worker_threads": 1, "database": database}
        (self.home / "coordinator.toml").write_text(config_text(config.model_copy(update=ours)))
        self.server: CoordinatorServer | None = None
        self.silos: dict[str, TestSilo] = {}
        self._folder = folder

    async def __aenter__(self) -> Federation:
        await self.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        for member in self.silos.values():
            await member.kill()
        await self.stop()

    async def start(self) -> None:
        self.server = CoordinatorServer(self.home)
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(grace=0.2)
            self.server = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def join(self, *names: str) -> None:
        for name in names:
            token = admin.invite(self.home, name)
            key, pem = new_key()
            identity = Ed25519PrivateKey.generate()
            request = join_request(key, identity)
            reply = await self._hand_in(token, request)
            assert reply.state == join_pb.JoinReply.PENDING
            admin.approve(self.home, name)
            reply = await self._hand_in(token, request)
            authority = Invitation.decode(token).authority_pem
            credentials = Credentials(pem, reply.certificate, authority)
            self.silos[name] = TestSilo(name, self.address, credentials, identity)

    async def _hand_in(self, token: str, request: join_pb.JoinRequest) -> join_pb.JoinReply:
        for _ in range(20):
            try:
                return await join(token, request)
            except grpc.aio.AioRpcError as error:
                # A machine with much to do needs longer for a handshake than gRPC waits for one.
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.3)
        return await join(token, request)

    async def join_four(self) -> list[TestSilo]:
        await self.join("site-1", "site-2", "site-3", "site-4")
        return list(self.silos.values())

    def plan(self, rounds: int = 1, deadline: float = 20.0, more: str = "") -> Path:
        path = self._folder / "plan.toml"
        path.write_text(PLAN.format(rounds=rounds, deadline=deadline, more=more))
        return path

    def study(self, study: str) -> admin.StudyStatus:
        return next(s for s in admin.status(self.home).studies if s.id == study)

    def result(self, study: str, key: str) -> Any:
        store = Store(Home(self.home).database(Home(self.home).config()))
        try:
            return store.run(results.result, study, key)
        finally:
            store.close()

    async def until(self, check: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What `check` returns once that is true."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not (found := check()):
            if loop.time() > end:
                status = admin.status(self.home).studies
                errors = {name: member.errors for name, member in self.silos.items()}
                raise AssertionError(f"not within {seconds} s: {status} {errors}")
            await asyncio.sleep(0.1)
        return found

    def exact(self, study: str, key: str, quantity: str) -> list[str]:
        """The survivors of a stored sum, after comparing it, by its digest, with theirs."""
        found = self.result(study, key)
        session, survivors = found["session"], list(found["silos"])
        vectors = [self.silos[name].vectors[quantity, session["number"]] for name in survivors]
        total = np.zeros_like(vectors[0])
        for vector in vectors:
            total += vector
        assert session["sum"] == hashlib.sha256(total).hexdigest()
        return survivors

    def artifact(self, sha256: str) -> Path:
        return Artifacts(Home(self.home).artifacts).path(bytes.fromhex(sha256))
