"""The secure sum beside its peers and its limits: time, bytes and memory of client and server.

    python -m benchmarks.secure_sum [--quick] [--minutes 10] [--work FILE] [--json FILE]

The same vector goes through our code, Flower's SecAgg (all pairs, its own functions), a CKKS
encryption with TenSEAL, and what bounds ours: the keystream alone, the additions alone, a memcpy.
Times are processor seconds of one core, taken in turns: what else the machine does then neither
counts nor favours one side. The cells of the table by size and silos are kept in --work: a run that
was cut off goes on behind the last of them, and after --minutes no other is begun. The peers are
installed into .venv-peers on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from benchmarks.measure import Cells, Report, Times, side_by_side
from benchmarks.ours import RING, Client, Server, delta_of, on_processor
from secagg.masking import apply_masks

T = TypeVar("T")
PEERS = pathlib.Path(".venv-peers")
MILLION = 1_000_000


class Peers:
    """The process in the peers' environment; answers None where it cannot be had."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._process = _start_peers()
        self.versions = self._ask(job="versions") or {}

    def _ask(self, **request: Any) -> dict[str, Any] | None:
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            return None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def run(self, job: str, vector: np.ndarray[Any, Any], peers: int) -> dict[str, Any] | None:
        path = self._folder / f"{vector.size}.npy"
        if not path.exists():
            np.save(path, vector)
        return self._ask(job=job, vector=str(path), peers=peers)

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def _start_peers() -> subprocess.Popen[str] | None:
    python = PEERS / "bin" / "python"
    try:
        if not python.exists():
            print("installing the peers into", PEERS)
            subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "flwr", "tenseal"]
            subprocess.run(install, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no peers: {error}")
        return None
    script = pathlib.Path(__file__).with_name("peers.py")
    return subprocess.Popen(
        [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def peak_bytes(job: Callable[[], object]) -> int | None:
    """How far resident memory rises above what it was, at its highest (Linux)."""
    if sys.platform != "linux":
        return None
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def in_fresh_process(*arguments: object) -> int | None:
    """The peak that this program finds when it runs only one job."""
    command = [sys.executable, "-m", "benchmarks.secure_sum", "--peak", *map(str, arguments)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return cast("int | None", json.loads(said))


def peak(what: str, n: int, silos: int) -> int | None:
    if what == "client":
        client = Client(n, silos)
        del client.copy, client.delta, client.words
        return peak_bytes(client.everything)
    with tempfile.TemporaryDirectory() as folder:
        return peak_bytes(Server(pathlib.Path(folder), n, silos).fold)


def two_processes(client: Client) -> float:
    """Seconds (wall) until two processes have masked half of the vector each.

    Both are there already, and the memory is shared: what is left out is what starting a process
    costs, which is printed beside it.
    """
    half = client.words.size // 2
    start = time.perf_counter()
    child = os.fork()
    part = client.words[:half] if child == 0 else client.words[half:]
    apply_masks(part, client.keys)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return time.perf_counter() - start


def process_start() -> float:
    """Seconds (wall) to start a process that can make masks."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import secagg.masking"], check=True)
    return time.perf_counter() - start


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure_client(report: Report, peers: Peers, rounds: int) -> None:
    """10 M parameters × 10 peers: everything in turns, and the targets."""
    n, others = 10 * MILLION, 10
    client = Client(n, others)
    jobs: dict[str, Callable[[], object]] = {
        "encode": client.encode,
        "mask and add": client.mask,
        "serialise": client.serialise,
        "mask, add, serialise": client.mask_and_serialise,
        "limit: keystream": client.keystream,
        "limit: additions": client.add,
        "limit: memcpy of the float32 vector": client.memcpy,
    }
    times = side_by_side(jobs, rounds=rounds, time_job=client.on_processor)
    for name, found in times.items():
        report.row(part="client", params=n, silos=others + 1, what=name, **found.milliseconds())
    flower: list[float] = []
    ours: list[float] = []
    for _ in range(max(2, rounds // 4)):
        answer = peers.run("flower_client", client.delta, others)
        ours.append(client.on_processor(client.everything))
        flower += [answer["seconds"]] if answer else []
    for name, found_s in {"ours, all of it": ours, "Flower, all of it": flower}.items():
        columns = Times(tuple(found_s)).milliseconds() if found_s else {"p50_ms": None}
        report.row(part="client", params=n, silos=others + 1, what=name, **columns)
    p50 = {name: found.p50 for name, found in times.items()}
    masking = p50["mask, add, serialise"] / p50["limit: keystream"]
    report.target("mask_vs_keystream", masking, "x", at_most=1.5)
    encoding = p50["encode"] / p50["limit: memcpy of the float32 vector"]
    report.target("encode_vs_memcpy", encoding, "x", at_most=5)
    ratio = float(np.median(flower) / np.median(ours)) if flower else None
    report.target("client_vs_flower", ratio, "x", at_least=25)
    report.target("upload_bytes_per_param", client.serialise() / n, "B", at_most=2.01)
    memory = in_fresh_process("client", n, others)
    per_param = None if memory is None else memory / n
    report.target("client_bytes_per_param", per_param, "B", at_most=4)
    one, two = [], []
    for _ in range(rounds):
        one.append(seconds(client.mask))
        two.append(two_processes(client))
    started = Times(tuple(process_start() for _ in range(3)))
    for name, taken in {"1 process, wall": one, "2 processes, wall": two}.items():
        columns = Times(tuple(taken)).milliseconds()
        report.row(part="cores", params=n, silos=others + 1, what=f"mask: {name}", **columns)
    report.row(part="cores", what="starting a process for it, wall", **started.milliseconds())


def measure_server(report: Report, peers: Peers, rounds: int) -> None:
    n, silos = 10 * MILLION, 10
    vector = np.random.default_rng(n).normal(0, 0.01, n).astype(np.float32)
    flower, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(pathlib.Path(folder), n, silos)
        for _ in range(max(2, rounds // 4)):
            ours.append(on_processor(server.fold))
            answer = peers.run("flower_server", vector, silos)
            flower += [answer["seconds"]] if answer else []
    for name, taken in {"ours": ours, "Flower": flower}.items():
        columns = Times(tuple(taken)).milliseconds() if taken else {"p50_ms": None}
        what = f"{name}: 10 inputs, one dropout"
        report.row(part="server", params=n, silos=silos + 1, what=what, **columns)
    ratio = float(np.median(flower) / np.median(ours)) if flower else None
    report.target("server_vs_flower", ratio, "x", at_least=8)
    few, many = (in_fresh_process("server", n, silos) for silos in (3, 100))
    report.row(part="server", params=n, silos=3, what="memory of a fold", bytes=few)
    report.row(part="server", params=n, silos=100, what="memory of a fold", bytes=many)
    growth = None if few is None or many is None else many / few
    report.target("server_memory_growth", growth, "x", at_most=1.05)


def measure_table(
    report: Report, peers: Peers, cells: Cells, sizes: list[int], minutes: float
) -> None:
    """Client seconds by size and silos. Every cell is kept as soon as it is there; when `minutes`
    are over no other is begun, and what is missing says so."""
    end = time.monotonic() + 60 * minutes
    grid = [(n, silos) for n in sizes for silos in (3, 10, 32, 100)]

    def cell(key: str, job: Callable[[], T]) -> T | None:
        return cells.get(key, job) if key in cells or time.monotonic() < end else None

    def of_peers(job: str, n: int, silos: int) -> dict[str, Any] | None:
        return peers.run(job, delta_of(n), silos - 1)

    ours, flower, ckks = {}, {}, {}
    for n, silos in grid:
        ours[n, silos] = cell(f"{n} x {silos}: ours", partial(table_cell, n, silos))
    for n in sizes:
        # CKKS knows no masks: what it costs does not depend on the other silos.
        ckks[n] = cell(f"{n}: CKKS", partial(of_peers, "ckks_client", n, 3))
    for n, silos in sorted(grid, key=lambda place: place[0] * place[1]):
        job = partial(of_peers, "flower_client", n, silos)
        flower[n, silos] = cell(f"{n} x {silos}: Flower", job)
    for n, silos in grid:
        row: dict[str, Any] = {"params": n, "silos": silos}
        row |= ours[n, silos] or {"ours_s": None}
        for name, found in (("flower", flower[n, silos]), ("ckks", ckks[n])):
            row[f"{name}_s"] = found["seconds"] if found else None
            row[f"{name}_bytes_per_param"] = found["bytes"] / n if found else None
        report.row(part="table", **row)


def table_cell(n: int, silos: int) -> dict[str, float]:
    client = Client(n, silos - 1)
    jobs = {
        "memcpy": client.memcpy,
        "add": client.add,
        "keystream": client.keystream,
        "ours": client.everything,
    }
    times = side_by_side(jobs, rounds=3, time_job=client.on_processor)
    found = {f"{name}_s": taken.p50 for name, taken in times.items()}
    return found | {"bytes_per_param": client.serialise() / n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--work", type=pathlib.Path, help="file that keeps the table's cells")
    parser.add_argument("--minutes", type=float, default=10.0, help="for cells of the table")
    parser.add_argument("--only-table", action="store_true", help="no targets")
    parser.add_argument("--peak", nargs=3, metavar=("PART", "PARAMETERS", "SILOS"))
    arguments = parser.parse_args()
    if arguments.peak:
        what, n, silos = arguments.peak
        print(json.dumps(peak(what, int(n), int(silos))))
        return
    rounds = 5 if arguments.quick else 11
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(pathlib.Path(folder))
        known = ", ".join(f"{name} {version}" for name, version in peers.versions.items())
        report = Report(f"Secure sum, {RING}-bit ring, processor time of one core; peers: {known}")
        if not arguments.only_table:
            measure_client(report, peers, rounds)
            measure_server(report, peers, rounds)
        sizes = [MILLION, 10 * MILLION, 36 * MILLION][: 1 if arguments.quick else 3]
        cells = Cells(arguments.work, **peers.versions)
        measure_table(report, peers, cells, sizes, arguments.minutes)
        peers.close()
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
