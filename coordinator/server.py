"""The service: one port, one event loop, one runner per study that is not over."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc.aio import Server
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from coordinator import admin, records, registry
from coordinator import contacts as signs_of_life
from coordinator.artifacts import Artifacts
from coordinator.authority import Authority
from coordinator.config import CoordinatorConfig, Home
from coordinator.contacts import Contacts
from coordinator.door import Door
from coordinator.enrolment import EnrolmentService
from coordinator.jobs import Machine
from coordinator.metrics import Metrics
from coordinator.runner import Runner
from coordinator.service import CoordinationService
from coordinator.sessions import Tools
from coordinator.spool import Spool
from coordinator.standby import Seat
from coordinator.store import Fenced, Store
from coordinator.studies import LiveStudy, Studies
from coordinator.worker import Worker
from protos.v1.coordination_pb2_grpc import add_CoordinationServicer_to_server
from protos.v1.enrolment_pb2_grpc import add_EnrolmentServicer_to_server
from study.memory import keep_buffers, keep_what_is_there

log = structlog.get_logger()

# How soon the service sees what the command line wrote: approvals, revocations, studies.
_LOOK_EVERY = 0.5
_GRACE, _PROBE_SECONDS = 3.0, 5.0
# What a probe may ask for by name, as grpc.health.v1 has it.
_SERVICES = (health.OVERALL_HEALTH, "concilium.v1.Coordination", "concilium.v1.Enrolment")

_OPTIONS: list[tuple[str, Any]] = [
    # Two services on one port would each get half of the silos' connections.
    ("grpc.so_reuseport", 0),
    # Silos ping through NAT, every 10 s where a site.toml says so; a server that finds this too
    # often hangs up.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that vanished without a word is noticed, and its long poll closed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What a reset line loses is what was under way: gRPC would measure the line and let several
    # chunks be. For the chunk that is being received it makes room anyway, so this costs no speed.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 18),
]


class ServerError(Exception):
    """The service cannot start; the text says why, and what to do."""


class ServerCertificates:
    """What gRPC asks at every handshake, in a thread of its own: the server's certificate, or None
    where it is the one that gRPC has.

    Given a certificate, gRPC replaces what handshakes under way still read, and a hundred silos
    that dial in at once can bring the process down (grpc #36693).
    """

    def __init__(self, authority: Authority, host: str) -> None:
        self._authority, self._host = authority, host
        self._given: tuple[bytes, bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            pair = self._authority.server_credentials(self._host)
            if pair == self._given:
                return None
            self._given = pair
        return grpc.ssl_server_certificate_configuration([pair], self._authority.pem)


class CoordinatorServer:
    """The coordinator of `home`: `start`, then `stop`; or `serve` for both, with signals."""

    def __init__(self, home: Path, listen: str | None = None) -> None:
        """`listen` is bound in place of what coordinator.toml says."""
        self._home = Home(home)
        self._config = self._home.config()
        self._bind = listen or self._config.bind
        self._authority = Authority.load(self._home.authority)
        self._store = Store(self._home.database(self._config), upgrade=True)
        self._seat = Seat(self._home, self._store, self._config.takeover_after)
        self._contacts = Contacts()
        self._tools = Tools(
            self._store,
            Spool(self._home.spool),
            Artifacts(self._home.artifacts),
            self._contacts,
        )
        self._door, self._studies = Door(self._contacts), Studies()
        largest = self._config.largest_vector
        self._service = CoordinationService(self._tools, self._door, self._studies, largest)
        self._health = health.aio.HealthServicer()
        self._metrics = Metrics(lambda: admin.status(home))
        self._server: Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._recording = True
        self.fenced = asyncio.Event()
        """Set when another process has taken over the studies: then this one has to end."""

    async def start(self) -> None:
        """Wait until no other process holds the studies of the store, then bind and serve. Raises
        ServerError where the port cannot be had."""
        loop = asyncio.get_running_loop()

        def fenced() -> None:
            loop.call_soon_threadsafe(self.fenced.set)

        await self._seat.take(fenced)
        self._tasks.append(asyncio.create_task(self._seat.keep(), name="keep the lease"))
        await self._clear()
        await self._look()
        server = self._server = grpc.aio.server(options=_OPTIONS)
        add_CoordinationServicer_to_server(self._service, server)
        enrolment = EnrolmentService(
            self._store, self._authority, self._door, self._config.certificate_days
        )
        add_EnrolmentServicer_to_server(enrolment, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            server.add_secure_port(self._bind, self._credentials())
        except RuntimeError as error:
            raise ServerError(
                f"cannot listen on {self._bind}: another program has the port, or the address is "
                f"not this machine's ({error}). End the other program, or set `listen` in "
                f"{self._home.config_file}"
            ) from error
        await server.start()
        self._contacts.listening()
        await self._serve_metrics()
        for service in _SERVICES:
            await self._health.set(service, HealthCheckResponse.SERVING)
        self._tasks.append(asyncio.create_task(self._keep_looking(), name="watch the store"))
        keep_what_is_there()
        log.info("coordinator.started", listen=self._bind, address=self._config.address)

    async def _serve_metrics(self) -> None:
        address = self._config.metrics
        if address is None:
            return
        try:
            self._metrics.serve(address)
        except OSError as error:
            raise ServerError(
                f"cannot listen on {address} ({error.strerror}): another program has the port, or "
                f"the address is not this machine's. Set `metrics` in {self._home.config_file}"
            ) from error
        log.info("metrics.started", listen=address)

    async def _clear(self) -> None:
        """Remove what a crash has left: for who holds the lease only, not for a standby."""
        shutil.rmtree(self._home.scratch, ignore_errors=True)
        self._home.scratch.mkdir()
        self._tools.artifacts.clear()
        spool = self._tools.spool
        spool.epoch = self._store.epoch
        spool.clear(await self._store.do(records.sessions_under_way))

    async def stop(self, grace: float = _GRACE) -> None:
        """Let open calls end, stop the runners, close the store. Everything goes on from where
        it was when the service starts again, or at a standby."""
        self._service.closing = True
        await self._health.enter_graceful_shutdown()
        self._studies.wake()
        await self._door.close(grace)
        if self._server is not None:
            await self._server.stop(0.5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for live in self._studies.all():
            if live.session is not None:
                await live.session.detach()  # a commit that is under way ends first
        await asyncio.to_thread(self._metrics.close)
        with suppress(Fenced):
            await self._record_contacts()
        await self._seat.leave()
        self._store.close()
        log.info("coordinator.stopped")

    def _credentials(self) -> grpc.ServerCredentials:
        """mTLS: every client shows a certificate of our authority, an invitation's or a silo's.

        The server's own certificate is made anew before it expires, without a restart.
        """
        # The stubs lack the None that gRPC takes for "unchanged".
        fetch: Any = ServerCertificates(self._authority, self._config.host)
        return grpc.dynamic_ssl_server_credentials(
            fetch(), fetch, require_client_authentication=True
        )

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                await self._look()
            except Exception:
                log.exception("store.unreadable")

    async def _look(self) -> None:
        """See what the command line changed, and write down who is in contact."""
        # First of all: nothing that a silo does may keep its own revocation from being seen.
        if self._door.admit(await self._store.do(registry.admitted)):
            self._studies.wake()
        await self._record_contacts()
        for row in await self._store.do(records.all_studies):
            if row.id not in self._studies:
                self._take_up(await self._store.do(LiveStudy.load, row))
                continue
            self._studies.of(row.id).operator_wants(row)

    async def _record_contacts(self) -> None:
        """Write down who is in contact; where that fails it is lost, and all else goes on."""
        news = self._contacts.take()
        if not news:
            return
        try:
            await self._store.do(signs_of_life.record, news)
        except Fenced:
            raise
        except Exception:
            if self._recording:  # twice a second would fill the log
                log.exception("contacts.lost")
            self._recording = False
        else:
            self._recording = True

    def _take_up(self, live: LiveStudy) -> None:
        self._studies.add(live)
        if live.row.over:
            return
        config = self._config
        machine = Machine(config.device, config.worker_threads)
        # A child process for each study: a long correction of one keeps no other one waiting.
        worker = Worker()
        runner = Runner(self._home, self._tools, worker, machine, live, config.absent_after)
        running = asyncio.create_task(runner.run(), name=f"run {live.id}")
        running.add_done_callback(lambda _: worker.close())
        self._tasks.append(running)


async def serve(home: Path, listen: str | None = None) -> None:
    """Run the coordinator until SIGTERM or SIGINT; as a standby while another one runs.

    Raises ConfigError, AuthorityError, StoreError or ServerError; the text of each says what to do.
    """
    configure_logging(Home(home).config())
    keep_buffers()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = CoordinatorServer(home, listen)
    starting = asyncio.create_task(server.start())
    ends = [asyncio.create_task(event.wait()) for event in (ended, server.fenced)]
    try:
        await asyncio.wait([starting, *ends], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what went wrong
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if server.fenced.is_set():
            raise Fenced(
                "another coordinator has taken over, since this one did not answer for too long; "
                "start this one again to have it wait as the standby"
            )
    finally:
        for task in (starting, *ends):
            task.cancel()
        await asyncio.gather(starting, *ends, return_exceptions=True)
        await server.stop(grace=0.0 if server.fenced.is_set() else _GRACE)


async def health_of(home: Path) -> str:
    """What the service of `home` answers to a probe. Raises ServerError unless it serves."""
    config, authority = Home(home).config(), Authority.load(Home(home).authority)
    key, certificate = authority.probe_credentials()
    credentials = grpc.ssl_channel_credentials(authority.pem, key, certificate)
    port = config.bind.rpartition(":")[2]
    options = [("grpc.ssl_target_name_override", config.host)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(HealthCheckRequest(), timeout=_PROBE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise ServerError(
                f"no answer at port {port} of this machine ({error.code().name}): is the service "
                "running? its log says why not"
            ) from error
    found: str = HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != HealthCheckResponse.SERVING:
        raise ServerError(f"the service answers {found}: it is being stopped, or waits as standby")
    return found


def configure_logging(config: CoordinatorConfig) -> None:
    """One line per event, for people or as JSON."""
    renderer: Any = structlog.processors.JSONRenderer()
    on_terminal = sys.stdout.isatty()
    if config.log == "console" or (config.log == "auto" and on_terminal):
        renderer = structlog.dev.ConsoleRenderer(colors=on_terminal)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
