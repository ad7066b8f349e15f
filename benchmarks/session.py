"""One whole session through the real service: mTLS gRPC, one process a silo, SQLite, files, fsync.

    python -m benchmarks.session [--silos 10] [--channels 128 256 352 352] [--json FILE]

A coordinator and its silos run as they do in production, with one exception: a silo's delta is
known beforehand instead of trained. The silos enrol, accept the plan, are counted, fetch the first
model, encode, mask, upload and unmask; the coordinator folds and publishes the sum. What is timed
is the first round, from its proposal to its sum in the store, and set beside the sum of three
lower bounds on this machine's cores: the keystream of all masks, a TLS copy of all vectors and
models, and the additions. What a session must do besides (SHA-256, encoding, files) is measured in
the same way and printed apart; it is in no bound.

Many virtual machines get their memory from the host when it is first touched, and give it back when
it has been free for seconds; here the first touch costs 2.3 s a gigabyte, ten times a copy. So
memory is touched before and let go when the clock starts. `--cold` leaves that out.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import mmap
import os
import pathlib
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import silo.agent
from benchmarks.measure import Report, side_by_side
from benchmarks.ours import Client, on_processor
from concilium.demo.federation import Federation, Process, ProcessDied
from coordinator import admin
from coordinator.authority import Authority
from coordinator.config import Home
from silo.files import write_file
from silo.model_size import parameter_count
from silo.quantities import Quantities
from study.plan import load_plan
from study.quantity import RoundWork, delta_encoding

PLAN = """
[study]
name = "session"
title = "One session"
seed = 7
[deadlines]
advertise = 600
share = 600
input = 600
confirm = 600
unmask = 600
[data]
image_size = 8
[model]
block_out_channels = {channels}
attention = {attention}
mid_attention = false
[schedule]
num_train_timesteps = 10
[sampler]
steps = 1
[rounds]
count = 1
local_steps = 1
first_clip = 0.05
"""
COUNT = 100
LIMIT_SECONDS = 600.0
_TLS_RECORD = 16 * 1024
_TICKS = os.sysconf("SC_CLK_TCK")
# Bytes a parameter and silo, generously: its files, their copies on the way, the upload.
_TOUCHED = 20


class KnownDeltas(Quantities):
    """A site without images and without training: its delta is there before it is asked for."""

    delta: NDArray[np.float32]
    seconds = 0.0
    """What each round is to take here, as if it had been trained for so long."""

    async def count(self) -> int:
        return COUNT

    async def _round(
        self, round: int, work: RoundWork, silos: int, model: Path, folder: Path
    ) -> None:
        await asyncio.sleep(self.seconds)
        await asyncio.to_thread(self._encode, work, silos, folder)

    def _encode(self, work: RoundWork, silos: int, folder: Path) -> None:
        encoding = delta_encoding(work, silos, self._plan.secure_sum.ring)
        residual = np.zeros(sum(work.sizes), dtype=np.float32)
        # The encoder uses up the delta that it is given, as that of a trained round.
        delta = self.delta if self._plan.rounds.count == 1 else self.delta.copy()
        encoded = encoding.encode(
            delta, residual, count=COUNT, loss=0.5, key=os.urandom(32), consume=True
        )
        write_file(folder / "vector", encoded.vector.data.cast("B"))


@dataclass
class Sites(Federation):
    """The demonstration's federation, with agents that know their deltas."""

    known: dict[str, tuple[Path, float]] = field(default_factory=dict)
    """Name of a site → the file of its delta and the seconds of a round, where they are not
    out/delta.npy and none."""

    def start(self, name: str, environment: dict[str, str] | None = None) -> Process:
        if name == "coordinator":
            return super().start(name, environment)
        log = self.out / "logs" / f"{name}.log"
        delta, seconds = self.known.get(name, (self.out / "delta.npy", 0.0))
        with log.open("ab") as file:
            command = [sys.executable, "-m", "benchmarks.session", "--round-seconds", str(seconds)]
            popen = subprocess.Popen(
                [*command, "--agent", self.silo_home(name), delta],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.processes[name] = Process(name, log, popen)
        return self.processes[name]

    def processor(self) -> dict[str, float]:
        """Processor seconds so far: of the coordinator's service, and of all agents."""
        used = {"coordinator": 0.0, "silos": 0.0}
        for name, process in self.processes.items():
            fields = Path(f"/proc/{process.popen.pid}/stat").read_text().rpartition(")")[2].split()
            part = name if name == "coordinator" else "silos"
            used[part] += (int(fields[11]) + int(fields[12])) / _TICKS
        return used

    def result(self, study: str, key: str) -> dict[str, Any] | None:
        """What the coordinator stored under `key`, if it has."""
        self.check()
        store = sqlite3.connect(self.coordinator_home / "store.sqlite")
        failed = "select error from studies where id = ? and state = 'failed'"
        if (error := store.execute(failed, (study,)).fetchone()) is not None:
            raise ProcessDied(f"study {study} failed: {error[0]}")
        query = "select value from results where study = ? and key = ?"
        row = store.execute(query, (study, key)).fetchone()
        store.close()
        return None if row is None else json.loads(row[0])

    def wait_for(self, study: str, key: str) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            found = self.result(study, key)
            if found is not None:
                return found
            time.sleep(0.05)
        raise TimeoutError(f"no {key!r} after {LIMIT_SECONDS:.0f} s")


class Touched:
    """Memory that the machine really has, until it is let go."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        ones = b"1" * (1 << 20)
        for at in range(0, size - len(ones), len(ones)):
            self._memory[at : at + len(ones)] = ones

    def let_go(self) -> None:
        self._memory.close()


def run_session(folder: Path, silos: int, channels: list[int], cold: bool) -> dict[str, Any]:
    """What the coordinator noted of the round's sum, and the processor seconds it took."""
    plan = folder / "plan.toml"
    attention = json.dumps([False] * len(channels))
    plan.write_text(PLAN.format(channels=channels, attention=attention))
    n = parameter_count(load_plan(plan.read_text()).model)
    delta = np.random.default_rng(7).standard_normal(n, dtype=np.float32)
    np.save(folder / "delta.npy", np.float32(0.01) * delta)
    names = [f"site-{i:02}" for i in range(silos)]
    with Sites(folder, names, absent_after=120.0) as sites:
        for name in names:
            sites.found_silo(name, np.zeros((1, 1, 8, 8), dtype=np.uint8))
        sites.found_coordinator()
        sites.enrol()
        for name in names:
            sites.start(name)
        memory = None if cold else Touched(silos * _TOUCHED * n)
        study = admin.start_study(sites.coordinator_home, plan)
        sites.wait_for(study, "first model")
        before = sites.processor()
        if memory is not None:
            memory.let_go()
        found = sites.wait_for(study, "round 00001 sum")
        after = sites.processor()
        found["processor"] = {part: after[part] - before[part] for part in before}
        found["params"] = n
        return found


def tls_copy(folder: Path, size: int) -> None:
    """`size` bytes through TLS 1.3 in memory, encrypted and decrypted, as gRPC's records are."""
    authority = Authority.load(Home(folder / "coordinator").authority)
    key, chain = authority.server_credentials("127.0.0.1")
    (folder / "tls.pem").write_bytes(key + chain)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(folder / "tls.pem")
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = ours.wrap_bio(up, down, server_side=True), theirs.wrap_bio(down, up)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    block, into = bytes(_TLS_RECORD), bytearray(_TLS_RECORD)
    for _ in range(size // _TLS_RECORD):
        client.write(block)
        server.read(_TLS_RECORD, into)


def bounds(folder: Path, n: int, silos: int) -> dict[str, float]:
    """Processor seconds that no implementation of this session on one core could go below.

    Keystream: N masks at each of N silos, N self masks at the coordinator. Additions: as many, and
    N inputs. TLS: N vectors up, N models down.
    """
    client, megabytes = Client(n, silos - 1), 64
    jobs = {
        "keystream": client.keystream,
        "add": client.add,
        "tls": lambda: tls_copy(folder, megabytes << 20),
    }
    times = side_by_side(jobs, rounds=3, time_job=on_processor)
    wire = silos * (client.words.nbytes + 4 * n)
    return {
        "keystream": (silos + 1) * times["keystream"].p50,
        "TLS copy": wire / (megabytes << 20) * times["tls"].p50,
        "add": (silos + 2) * times["add"].p50,
    }


def besides(folder: Path, n: int, silos: int) -> dict[str, float]:
    """Processor seconds of what a session also has to do, whoever implements it: the silo hashes
    the model and its vector, the coordinator every vector; the delta is encoded; a model, a vector
    and a masked vector are written at the silo, and the upload at the coordinator."""
    client, block = Client(n, silos - 1), os.urandom(1 << 20)
    blocks = -(-client.words.nbytes // len(block))

    def sha256() -> None:
        digest = hashlib.sha256()
        for _ in range(blocks):
            digest.update(block)

    def write() -> None:
        with open(folder / "written", "wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block)

    jobs = {"SHA-256": sha256, "encoding": client.encode, "files": write}
    times = side_by_side(jobs, rounds=3, time_job=client.on_processor)
    model = 4 * n / client.words.nbytes
    return {
        "SHA-256": silos * (model + 2) * times["SHA-256"].p50,
        "encoding": silos * times["encoding"].p50,
        "files": silos * (model + 3) * times["files"].p50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--silos", type=int, default=10)
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 352, 352])
    parser.add_argument("--cold", action="store_true", help="do not touch memory beforehand")
    parser.add_argument("--agent", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--round-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.agent:
        home, delta = arguments.agent
        KnownDeltas.delta, KnownDeltas.seconds = np.load(delta), arguments.round_seconds
        vars(silo.agent)["Quantities"] = KnownDeltas
        silo.agent.main(home)
        return
    silos, cores = arguments.silos, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        found = run_session(Path(folder), silos, arguments.channels, arguments.cold)
        lowest = bounds(Path(folder), found["params"], silos)
        more = besides(Path(folder), found["params"], silos)
    n, words = found["params"], 2
    report = Report(f"A session of {silos} silos and {n} parameters through the real service")
    report.row(what="whole session, wall", seconds=found["seconds"])
    for phase, taken in found["session"]["seconds"].items():
        report.row(what=f"step: {phase}, wall", seconds=taken)
    report.row(what="fold and store the sum, wall", seconds=_rest(found))
    for part, taken in found["processor"].items():
        report.row(what=f"processor time: {part}", seconds=taken)
    for name, taken in lowest.items():
        report.row(what=f"lower bound, one core: {name}", seconds=taken)
    bound = sum(lowest.values()) / cores
    report.row(what=f"sum of the lower bounds on {cores} cores", seconds=bound)
    for name, taken in more.items():
        report.row(what=f"in no bound, one core: {name}", seconds=taken)
    total = sum(found["processor"].values())
    rest = total - sum(lowest.values()) - sum(more.values())
    report.row(what="the rest: gRPC, TCP, Python, page faults", seconds=rest)
    used = total / cores
    report.row(what=f"all processor time on {cores} cores", seconds=used, vs_bounds=used / bound)
    report.row(what="uploads", bytes=silos * words * n)
    report.row(what="downloads of the input model", bytes=silos * 4 * n)
    report.target("session_vs_bounds", found["seconds"] / bound, "x", at_most=2.5)
    report.finish(arguments.json)


def _rest(found: dict[str, Any]) -> float:
    return float(found["seconds"] - sum(found["session"]["seconds"].values()))


if __name__ == "__main__":
    main()
