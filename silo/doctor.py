"""`concilium silo doctor`: what would stop or slow this site, each with the mend, before it does.

Every check looks at the real thing: the name, the port, the proxy and the certificate by going the
way, the clock by asking the coordinator, the device by using it. Nothing is changed, and it can run
beside a running agent.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import grpc

from diffusion.features.file import FeatureFileError, read_network
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from silo.client import Way, detail_of
from silo.config import Policy, SiloConfig, data_path, load_config
from silo.data.dataset import open_dataset
from silo.enrolment import way_of
from silo.errors import SiloError
from silo.estimate import Estimate, estimate
from silo.files import read_json
from silo.home import SiloHome
from silo.identity import load_enrolment, load_or_make_identity
from silo.offers import offered_terms, pinned_terms
from silo.orders import Measured, MeasureTraining
from silo.policy import check_plan
from silo.reach import Unreachable, dial, proxy_of, shake_hands
from silo.worker import Worker
from study.plan import Plan, load_plan
from study.problems import PlanError

Level = Literal["ok", "warning", "problem"]

_SECONDS = 10.0
_SKEW_WARNING, _SKEW_PROBLEM = 30.0, 300.0
_GIB = 1 << 30
_LITTLE_DISK, _LITTLE_MEMORY = 5 * _GIB, 2 * _GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    text: str
    mend: str = ""
    """What to do, where it is not ok."""


def examine(
    home: Path, *, plan_file: Path | None = None, study: str = "", silos: int | None = None
) -> Iterator[Finding]:
    """Every check in the order in which they build on each other.

    With a plan (a file, or a study that was offered here) also what it would cost. `silos` is how
    many take part, for a plan in a file. Raises SiloError for a plan or study that is not there.
    """
    place = SiloHome(home)
    plan, number = _plan(place, plan_file, study, silos)
    try:
        config = load_config(place)
    except SiloError as error:
        yield Finding(
            "site.toml", "problem", str(error), "correct it, or run `concilium silo init`"
        )
        return
    yield Finding("site.toml", "ok", f"site {config.site.name!r}")
    yield from _way(place, config)
    yield from _machine(place)
    yield from (_feature_file(config.policy, file) for file in config.policy.feature_files)
    if plan is not None:
        yield _policy(config.policy, plan)
    yield _data(place, config)
    measured = measure(config, plan)
    yield _device(measured)
    if plan is not None and measured.device is not None:
        cost = estimate(plan, number, measured, config.resources)
        limited = config.resources.hours is not None
        yield from _cost(place, plan, number, measured, cost, limited)


def measure(config: SiloConfig, plan: Plan | None) -> Measured:
    """A few training steps in a worker process of this site, within its limits."""
    # The person who asks is there, whatever the hour.
    worker = Worker(config.resources.model_copy(update={"hours": None}))

    async def ask(progress: Path) -> Measured:
        order = MeasureTraining(worker.machine, plan.toml() if plan else None)
        try:
            return await worker.run(order, progress, lambda _: None)
        finally:
            worker.kill()

    try:
        with TemporaryDirectory() as folder:
            return asyncio.run(ask(Path(folder) / "progress"))
    except SiloError as error:
        return Measured(None, str(error))


def _plan(
    place: SiloHome, file: Path | None, study: str, silos: int | None
) -> tuple[Plan | None, int]:
    if file is not None:
        try:
            return load_plan(file), silos or 5
        except PlanError as error:
            raise SiloError(str(error)) from error
    if not study:
        return None, 0
    known = next((s for s in place.studies() if s.name == study), None)
    terms = (offered_terms(known) or pinned_terms(known)) if known else None
    if terms is None:
        raise SiloError(f"no study {study!r} was offered to this site: see `concilium silo roster`")
    return terms.plan, terms.roster.size


# --- the way to the coordinator


def _way(place: SiloHome, config: SiloConfig) -> Iterator[Finding]:
    try:
        enrolment = load_enrolment(place)
        identity = load_or_make_identity(place)
    except SiloError as error:
        yield Finding("enrolment", "warning", str(error), "`concilium silo join TOKEN`")
        return
    yield _certificate(enrolment.expires, enrolment.renewal_due())
    way = way_of(enrolment, identity, config.coordinator)
    try:
        proxy = proxy_of(way.address, way.proxy)
        plain = dial(way.address, proxy)
        by = f" through the proxy {proxy.address}" if proxy else ""
        yield Finding("port", "ok", f"{way.address} answers{by}")
        shown = shake_hands(plain, way.address, way.authority, way.key, way.certificate)
    except Unreachable as error:
        yield Finding(error.step, "problem", str(error), "see above; the agent keeps trying")
        return
    yield _server_certificate(way.address, shown.expires)
    yield from _service(way)


def _certificate(expires: datetime, due: datetime) -> Finding:
    now, until = (
        datetime.now(UTC),
        f"this site's certificate holds until {expires:%Y-%m-%d %H:%M} UTC",
    )
    if now >= expires:
        return Finding(
            "certificate",
            "problem",
            f"this site's certificate expired on {expires:%Y-%m-%d %H:%M} UTC",
            "ask the study centre for a new invitation and join again, or set this clock right",
        )
    if now > due + timedelta(days=1):
        return Finding(
            "certificate",
            "warning",
            f"{until} and was not renewed in time",
            "the running agent renews it: see that it runs and reaches the coordinator",
        )
    return Finding("certificate", "ok", until)


def _server_certificate(address: str, expires: datetime) -> Finding:
    text = f"{address} shows the certificate of the study centre, until {expires:%Y-%m-%d}"
    if expires - datetime.now(UTC) < timedelta(days=3):
        return Finding("tls", "warning", text, "tell the study centre: its certificate ends soon")
    return Finding("tls", "ok", text)


def _service(way: Way) -> Iterator[Finding]:
    """One call as the agent makes it, and the coordinator's clock in the answer."""
    began = time.time()
    try:
        with way.blocking_channel() as channel:
            ask = CoordinationStub(channel).NextTask
            _, call = ask.with_call(pb.NextTaskRequest(), timeout=_SECONDS)
            told = dict(call.initial_metadata()).get("concilium-time")
    except grpc.RpcError as error:
        text = f"the coordinator answers {error.code().name}: {detail_of(error)}"
        mend = "if this site was revoked or the service is down, the study centre knows"
        yield Finding("service", "problem", text, mend)
        return
    ended = time.time()
    yield Finding("service", "ok", f"the coordinator answered in {ended - began:.2f} s")
    if told is not None:
        with suppress(ValueError):
            yield _clock(float(told), began, ended)


def _clock(told: float, began: float, ended: float) -> Finding:
    """The coordinator's time lies between asking and answer, if both clocks are right."""
    ahead = began - told if told < began else min(0.0, ended - told)
    how = "ahead of" if ahead > 0 else "behind"
    text = f"this clock is {abs(ahead):.0f} s {how} the coordinator's"
    mend = "let this machine set its clock by NTP: certificates and invitations go by it"
    if abs(ahead) >= _SKEW_PROBLEM:
        return Finding("clock", "problem", text, mend)
    if abs(ahead) >= _SKEW_WARNING:
        return Finding("clock", "warning", text, mend)
    return Finding("clock", "ok", "this clock and the coordinator's agree")


# --- this machine


def _machine(place: SiloHome) -> Iterator[Finding]:
    free = shutil.disk_usage(place.path).free
    text = f"{_size(free)} free where {place.path} lies"
    if free < _LITTLE_DISK:
        yield Finding("disk", "warning", text, "the cache of the images and checkpoints go there")
    else:
        yield Finding("disk", "ok", text)
    available = _available_memory()
    if available is not None:
        text = f"{_size(available)} of memory available"
        little = available < _LITTLE_MEMORY
        mend = "training needs about 2 GiB and more" if little else ""
        yield Finding("memory", "warning" if little else "ok", text, mend)
    mode = place.path.stat().st_mode & 0o077
    if mode:
        yield Finding(
            "keys", "problem", f"others may enter {place.path}", f"chmod 700 {place.path}"
        )


def _feature_file(policy: Policy, file: Path) -> Finding:
    """Whether a study that names this network could be evaluated here."""
    get = "ask the study centre for the file, or correct [policy] in site.toml"
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        read_network(file.stem, sha256, (file,))  # as a plan that pins this very file would have it
    except OSError as error:
        return Finding("features", "problem", f"{file}: {error.strerror}", get)
    except FeatureFileError as error:
        return Finding("features", "problem", str(error), get)
    text = f"{file.name} is a feature network, SHA-256 {sha256}"
    if file.stem in policy.feature_networks:
        return Finding("features", "ok", text)
    allow = f'if studies may evaluate with it, add "{file.stem}" to feature_networks'
    return Finding("features", "warning", text, allow)


def _policy(policy: Policy, plan: Plan) -> Finding:
    broken = [f"{declined.rule}: {declined.why}" for declined in check_plan(policy, plan)]
    if not broken:
        return Finding("policy", "ok", f"this site's policy has nothing against {plan.study.title}")
    mend = "the agent declines it: ask the study centre for less, or change [policy] in site.toml"
    return Finding("policy", "problem", "; ".join(broken), mend)


def _data(place: SiloHome, config: SiloConfig) -> Finding:
    path = data_path(place, config)
    try:
        dataset = open_dataset(path, config.data.format, 32, 1, config.data.reading)
    except SiloError as error:
        return Finding("data", "problem", str(error), "correct [data] in site.toml")
    read = [report for file in place.cache.glob("*/report.json") if (report := read_json(file))]
    counts = sorted(
        {int(report["count"]) for report in read if report["source"] == str(dataset.path)}
    )
    if not counts:
        return Finding(
            "data",
            "warning",
            f"{path} ({dataset.format}) was not read yet",
            "`concilium silo check` reads it once and shows what is there",
        )
    return Finding("data", "ok", f"{path} ({dataset.format}): {counts[-1]} images cached")


def _device(measured: Measured) -> Finding:
    if measured.device is None:
        return Finding("device", "problem", measured.trouble, "correct [resources] in site.toml")
    return Finding("device", "ok", measured.device)


# --- a plan


def _cost(
    place: SiloHome, plan: Plan, silos: int, measured: Measured, cost: Estimate, limited: bool
) -> Iterator[Finding]:
    days = f", {cost.days:.1f} days within the working hours" if limited else ""
    yield Finding(
        "time",
        "ok",
        f"{plan.study.title}: about {_hours(cost.hours)} of computing{days} "
        f"({measured.seconds_per_step:.3g} s a training step), and as long as slower sites take",
    )
    yield from _deadline(plan, measured)
    traffic = cost.traffic
    yield Finding(
        "traffic",
        "ok",
        f"about {_size(traffic.up)} sent and {_size(traffic.down)} received among {silos} silos",
    )
    free = shutil.disk_usage(place.path).free
    enough = free > 1.5 * cost.disk
    yield Finding(
        "room",
        "ok" if enough else "problem",
        f"about {_size(cost.disk)} on the disk beside the images, "
        f"{_size(measured.peak_mib << 20)} of memory",
        "" if enough else f"make room where {place.path} lies",
    )


def _deadline(plan: Plan, measured: Measured) -> Iterator[Finding]:
    seconds = plan.rounds.local_steps * measured.seconds_per_step
    if plan.warm_up is not None and plan.auxiliary is not None:
        seconds = max(seconds, plan.warm_up.steps * measured.seconds_per_step)
    allowed = plan.deadlines.advertise
    if seconds > 0.8 * allowed:
        yield Finding(
            "deadline",
            "warning" if seconds < allowed else "problem",
            f"the longest work before a sum takes {_hours(seconds / 3600)} here, the plan allows "
            f"{_hours(allowed / 3600)}",
            "ask the study centre for a longer [deadlines] advertise, or use a faster device",
        )


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _available_memory() -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().split("\n")
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    return None
