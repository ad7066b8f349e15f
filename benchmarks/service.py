"""The service over many rounds: whether it stays as fast, as small and as complete as it began.

    python -m benchmarks.service [light] [heavy] [soak] [two-studies] [--rounds R] [--json FILE]

Agents run as they do in production, each in a process of its own, with one exception: their deltas
are known beforehand instead of trained.

* light: 100 agents and a small model for 200 rounds. What the protocol itself costs.
* heavy: 10 agents and 36 M parameters for 5 rounds.
* soak: eight hours at one round a minute, without the waiting: 480 rounds of 10 agents, of which
  one is killed and started again every 20 rounds, and the coordinator every 80.
* two-studies: the light study of 4 agents for 100 rounds alone; then beside a second study, whose
  silos take five seconds for a round; then beside a third, whose worker at the coordinator draws
  samples of a larger model all the time. Ratios of the first study's seconds per round. The worker
  takes a core: on a machine with two, the last ratio also says what that core was worth.

The slope of resident memory is a least-squares line over the rounds after the first quarter,
between restarts. "Lost" counts rounds whose sum lacks the part of a silo that is among its
survivors, or holds one twice: every silo reports a loss of 0.5, and the coordinator's mean says how
many came through.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.measure import Report
from benchmarks.session import PLAN, Sites
from coordinator import admin
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from silo.home import SiloHome
from silo.identity import load_enrolment, load_or_make_identity
from silo.model_size import parameter_count
from study.plan import load_plan

_PAGE = resource.getpagesize()
_SAMPLE_SECONDS = 2.0
_PROBE_SECONDS = 0.1
_ROUND_SECONDS = 600.0
_WARM_UP = 0.25
_FEWEST_ROUNDS = 100  # for a slope: what fewer of them show is the noise of the allocator


@dataclass(frozen=True)
class Scenario:
    """What is run, and how often something is killed (0 = never)."""

    silos: int
    rounds: int
    channels: Sequence[int]
    kill_silo_every: int = 0
    kill_coordinator_every: int = 0
    deadline: int = 600
    """Seconds for each step. Who dies in a step has lost its keys, and is waited for until then."""


SCENARIOS = {
    "light": Scenario(silos=100, rounds=200, channels=[8]),
    "heavy": Scenario(silos=10, rounds=5, channels=[128, 256, 352, 352]),
    "soak": Scenario(10, 480, [8], kill_silo_every=20, kill_coordinator_every=80, deadline=10),
    "two-studies": Scenario(silos=4, rounds=100, channels=[8]),
}
_SLOW_SECONDS = 5.0
_LARGER = [64, 128]
_ENDLESS = 99_999  # rounds of a study that is not waited for


@dataclass
class Watch:
    """Samples of every process: the rounds done, resident bytes, open descriptors."""

    sites: Sites
    rounds: int = 0
    samples: dict[tuple[str, int], list[tuple[int, int, int]]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while True:
            over = self._stop.wait(_SAMPLE_SECONDS)
            for name, process in list(self.sites.processes.items()):
                pid = process.popen.pid
                try:
                    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
                    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                except (FileNotFoundError, ProcessLookupError):
                    continue
                self.samples.setdefault((name, pid), []).append(
                    (self.rounds, resident, descriptors)
                )
            if over:
                return

    def stop(self) -> None:
        self._stop.set()


class Probe:
    """A unary call over mutual TLS every tenth of a second, as a silo's agent makes it."""

    def __init__(self, home: Path) -> None:
        place = SiloHome(home)
        way = load_enrolment(place)
        key = load_or_make_identity(place).tls_pem
        self._address = way.address
        self._credentials = grpc.ssl_channel_credentials(
            way.authority_pem, key, way.certificate_pem
        )
        self.seconds: list[float] = []
        self.failed = 0
        self._stop = threading.Event()

    def run(self) -> None:
        request = pb.NextTaskRequest(study="", settled_session=0, wait_seconds=0)
        with grpc.secure_channel(self._address, self._credentials) as channel:
            stub = CoordinationStub(channel)
            while not self._stop.wait(_PROBE_SECONDS):
                start = time.perf_counter()
                try:
                    stub.NextTask(request, timeout=30)
                except grpc.RpcError:
                    self.failed += 1  # while the coordinator is down
                else:
                    self.seconds.append(time.perf_counter() - start)

    def stop(self) -> None:
        self._stop.set()


def run(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Figures of one scenario; everything is made below `folder`."""
    plan, delta = folder / "plan.toml", folder / "delta.npy"
    # More rounds than are waited for: publishing a model at 100 sites is not what is measured.
    n = _write_plan(plan, delta, scenario.channels, 2 * scenario.rounds, scenario.deadline)
    names = [f"site-{i:03}" for i in range(scenario.silos)]
    with Sites(folder, names, absent_after=120.0) as sites:
        _found(sites)
        study = admin.start_study(sites.coordinator_home, plan)
        sites.wait_for(study, "first model")
        watch, probe = Watch(sites), Probe(sites.silo_home(names[0]))
        threads = [threading.Thread(target=part.run, daemon=True) for part in (watch, probe)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        processor = sites.processor()
        lost = _rounds(scenario, sites, study, watch)
        seconds = time.monotonic() - start
        used = {k: v - processor[k] for k, v in sites.processor().items()}
        for part in (watch, probe):
            part.stop()
        for thread in threads:
            thread.join()
    figures: dict[str, Any] = {
        "silos": scenario.silos,
        "params": n,
        "rounds": scenario.rounds,
        "seconds": round(seconds, 1),
        "rounds_per_minute": 60 * scenario.rounds / seconds,
        "lost": lost,
    }
    if not scenario.kill_silo_every:
        figures["coordinator_cpu_s_per_round"] = used["coordinator"] / scenario.rounds
        figures["silo_cpu_s_per_round"] = used["silos"] / scenario.rounds / scenario.silos
    latency = {f"call_p{q}_ms": 1e3 * float(np.quantile(probe.seconds, q / 100)) for q in (50, 99)}
    return figures | latency | _memory(watch)


def _write_plan(
    plan: Path, delta: Path, channels: Sequence[int], rounds: int, deadline: int, steps: int = 1
) -> int:
    """A plan whose samples take `steps` steps, and a delta for its model; its parameters."""
    text = PLAN.format(channels=list(channels), attention=json.dumps([False] * len(channels)))
    text = text.replace("= 600\n", f"= {deadline}\n")
    text = text.replace("_timesteps = 10\n", f"_timesteps = {max(10, steps)}\n")
    text = text.replace("[sampler]\nsteps = 1\n", f"[sampler]\nsteps = {steps}\n")
    plan.write_text(text.replace("count = 1\n", f"count = {rounds}\n"))
    n = parameter_count(load_plan(plan.read_text()).model)
    known = np.random.default_rng(7).standard_normal(n, dtype=np.float32)
    np.save(delta, np.float32(0.001) * known)
    return n


def _found(sites: Sites) -> None:
    """Coordinator and agents, enrolled and running."""
    for name in sites.names:
        sites.found_silo(name, np.zeros((1, 1, 8, 8), dtype=np.uint8))
        policy = SiloHome(sites.silo_home(name)).config
        policy.write_text(policy.read_text().replace("_rounds = 1000", f"_rounds = {_ENDLESS}"))
    sites.found_coordinator()
    sites.enrol()
    for name in sites.names:
        sites.start(name)


def run_two(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Seconds per round of one study: alone, beside slow silos, beside a busy worker."""
    groups = {
        group: [f"{group}-{i:03}" for i in range(scenario.silos)]
        for group in ("first", "slow", "busy")
    }
    plans = {group: folder / f"{group}.toml" for group in groups}
    deltas = {group: folder / f"{group}.npy" for group in groups}
    n = _write_plan(plans["first"], deltas["first"], scenario.channels, _ENDLESS, 600)
    _write_plan(plans["slow"], deltas["slow"], scenario.channels, _ENDLESS, 600)
    _write_plan(plans["busy"], deltas["busy"], _LARGER, _ENDLESS, 600, steps=1000)
    sites = Sites(folder, [name for names in groups.values() for name in names], absent_after=120.0)
    seconds = {"first": 0.0, "slow": _SLOW_SECONDS, "busy": 0.0}
    for group, names in groups.items():
        sites.known |= dict.fromkeys(names, (deltas[group], seconds[group]))
    figures: dict[str, Any] = {"silos": scenario.silos, "params": n, "rounds": scenario.rounds}
    with sites:
        _found(sites)
        home = sites.coordinator_home
        first = admin.start_study(home, plans["first"], groups["first"])
        _round(sites, first, 1)
        alone, done = _timed(sites, first, 1, scenario.rounds)
        figures["seconds_per_round_alone"] = alone
        for group, under_way in (("slow", "round 00001 model"), ("busy", "round 00001 sum")):
            other = admin.start_study(home, plans[group], groups[group])
            sites.wait_for(other, under_way)
            beside, done = _timed(sites, first, done, scenario.rounds)
            state = next(s for s in admin.status(home).studies if s.id == other)
            figures[f"seconds_per_round_beside_{group}"] = beside
            figures[f"ratio_beside_{group}"] = beside / alone
            figures[f"the_other_study_{group}"] = f"{state.state}: {state.stage}"
            admin.pause_study(home, other)  # a study that ends would have its model published
    return figures


def _timed(sites: Sites, study: str, done: int, rounds: int) -> tuple[float, int]:
    """Seconds per round of the next `rounds`, and which is the last. The first of them is waited
    for before the clock starts: a part of it was over."""
    _round(sites, study, first := _last(sites, study, done) + 1)
    start = time.monotonic()
    for number in range(first + 1, first + rounds + 1):
        _round(sites, study, number)
    return (time.monotonic() - start) / rounds, first + rounds


def _last(sites: Sites, study: str, done: int) -> int:
    """The last round that is over; `done` is one that is."""
    while sites.result(study, f"round {done + 1:05} model") is not None:
        done += 1
    return done


def _rounds(scenario: Scenario, sites: Sites, study: str, watch: Watch) -> int:
    """Wait for round after round, kill what is to be killed; how many rounds lost something."""
    rng, lost = random.Random(7), 0
    for number in range(1, scenario.rounds + 1):
        found = _round(sites, study, number)
        survivors = len(found["sum"]["silos"])
        # Σ w_i 0.5 over the survivors, w_i = 1/N; a silo that was counted twice or not at all is
        # off by 0.5/N.
        expected = 0.5 * survivors / scenario.silos
        lost += abs(found["model"]["loss"] - expected) > 0.1 / scenario.silos
        watch.rounds = number
        if scenario.kill_silo_every and number % scenario.kill_silo_every == 0:
            name = rng.choice(list(sites.names))
            sites.kill(name)
            sites.start(name)
        if scenario.kill_coordinator_every and number % scenario.kill_coordinator_every == 0:
            sites.kill("coordinator")
            sites.start("coordinator")
    return lost


def _round(sites: Sites, study: str, number: int) -> dict[str, Any]:
    deadline = time.monotonic() + _ROUND_SECONDS
    key = f"round {number:05}"
    while time.monotonic() < deadline:
        model = sites.result(study, f"{key} model")
        if model is not None:
            total = sites.result(study, f"{key} sum")
            assert total is not None
            return {"sum": total, "model": model}
        time.sleep(0.1)
    raise TimeoutError(f"round {number} did not end within {_ROUND_SECONDS:.0f} s")


def _memory(watch: Watch) -> dict[str, Any]:
    """Resident memory and descriptors: of the coordinator, and of the silos on average."""
    out: dict[str, Any] = {}
    for part in ("coordinator", "silo"):
        series = [
            np.array(samples)
            for (name, _), samples in watch.samples.items()
            if (name == "coordinator") == (part == "coordinator")
        ]
        slopes = [slope for s in series if (slope := _slope(s)) is not None]
        last = [s[-1] for s in series]
        out |= {
            f"{part}_rss_mib": float(np.mean([s[1] for s in last])) / 2**20,
            f"{part}_rss_slope": float(np.mean(slopes)) if slopes else None,
            f"{part}_rss_mib_by_round": _course(series[0]),
            f"{part}_descriptors": f"{max(s[0][2] for s in series)} → {max(s[2] for s in last)}",
        }
    return out


def _course(samples: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """What the slope was drawn through: resident MiB at ten rounds, each the mean of some samples
    around it."""
    parts = np.array_split(samples, min(10, len(samples)))
    return ", ".join(f"{p[:, 0].mean():.0f}: {p[:, 1].mean() / 2**20:.1f}" for p in parts)


def _slope(samples: np.ndarray[Any, np.dtype[np.int64]]) -> float | None:
    """MiB per 1,000 rounds between two restarts, None where there are too few rounds."""
    rounds = samples[:, 0].astype(float)
    first = rounds[0] + _WARM_UP * (rounds[-1] - rounds[0])
    kept = samples[rounds >= first]
    if len(np.unique(kept[:, 0])) < _FEWEST_ROUNDS:
        return None
    slope = np.polyfit(kept[:, 0].astype(float), kept[:, 1] / 2**20, 1)[0]
    return float(1000 * slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="light|heavy|soak|two-studies")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--silos", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.scenarios or list(SCENARIOS)
    report = Report("The service over many rounds: agents as processes, mutual TLS, SQLite")
    for name in chosen:
        if name not in SCENARIOS:
            parser.error(f"there is no scenario {name!r}: {', '.join(SCENARIOS)}")
        known = SCENARIOS[name]
        scenario = Scenario(
            arguments.silos or known.silos,
            arguments.rounds or known.rounds,
            known.channels,
            known.kill_silo_every,
            known.kill_coordinator_every,
            known.deadline,
        )
        with tempfile.TemporaryDirectory() as folder:
            figures = (run_two if name == "two-studies" else run)(scenario, Path(folder))
        for key, value in figures.items():
            report.row(scenario=name, what=key, value=value)
        if name == "light":
            slope = figures["coordinator_rss_slope"]
            report.target("rss_slope_mib_per_1000_rounds", slope, "MiB", at_most=1.0)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
