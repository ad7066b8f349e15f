"""`python -m tests.secagg.soak SCHEDULES`: many random schedules, in pieces (`make soak`).

A piece is a seed: the same seed is the same schedules, with fresh keys. What was run is added to
`benchmarks/results/soak.json` after each piece, under the digest of the code that ran, so that an
interrupted soak goes on where it was. `make test` runs a few pieces of random seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.secagg.test_schedules import Schedules

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PIECE = 250


@dataclass(frozen=True)
class Piece:
    """What one seed gave."""

    seed: int
    seen: Counter[str]
    seconds: float


def run_piece(number: int) -> Piece:
    """Raises AssertionError, with the shortest schedule that hypothesis found, where one fails."""
    Schedules.seen.clear()
    started = time.process_time()
    try:
        run_state_machine_as_test(
            seed(number)(Schedules),
            settings=settings(
                max_examples=PIECE,
                stateful_step_count=30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        error.add_note(f"again: python -m tests.secagg.soak --seed {number}")
        raise
    return Piece(number, Counter(Schedules.seen), time.process_time() - started)


def code_digest() -> str:
    """SHA-256 over the sources that a schedule runs: results of other code are not added up."""
    driver = [ROOT / "tests" / "secagg" / name for name in ("test_schedules.py", "world.py")]
    used = [*sorted((ROOT / "secagg").rglob("*.py")), *driver]
    parts = (hashlib.sha256(file.read_bytes()).digest() for file in used)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def machine() -> str:
    """The processor, without the name of the host."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model n"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores"


def conditions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("cryptography", "hypothesis", "numpy")}
    return {"code": code_digest(), "python": platform.python_version(), **libraries} | {
        "machine": machine()
    }


def stored(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text("utf-8"))["runs"]) if path.exists() else []


def under(path: Path, these: dict[str, str]) -> dict[str, Any]:
    """What was run under these conditions so far."""
    fresh = {"conditions": these, "pieces": 0, "schedules": 0, "cpu_seconds": 0.0, "seen": {}}
    return next((run for run in stored(path) if run["conditions"] == these), fresh)


def add(path: Path, these: dict[str, str], piece: Piece) -> dict[str, Any]:
    run = under(path, these)
    seen = Counter(run["seen"]) + piece.seen
    run["schedules"] += seen.pop("schedules")
    run["pieces"] = piece.seed  # their seeds are 1 … pieces
    run["cpu_seconds"] = round(run["cpu_seconds"] + piece.seconds, 1)
    run["seen"] = dict(sorted(seen.items()))
    others = [other for other in stored(path) if other["conditions"] != these]
    partial = path.with_suffix(".partial")
    text = json.dumps({"piece": PIECE, "runs": [*others, run]}, indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", "utf-8")
    partial.replace(path)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schedules", nargs="?", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="only this piece, and nothing is written")
    parser.add_argument("--random", action="store_true", help="random seeds; nothing is written")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.seed is not None:
        print(run_piece(asked.seed))
        return 0
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        if asked.random:
            seeds = [secrets.randbits(32) for _ in range(-(-asked.schedules // PIECE))]
            print(sum((piece.seen for piece in pool.map(run_piece, seeds)), Counter()))
            return 0
        these = conditions()
        run = under(asked.results, these)
        while run["schedules"] < asked.schedules:
            first = run["pieces"] + 1
            for piece in pool.map(run_piece, range(first, first + asked.jobs)):
                run = add(asked.results, these, piece)
            each = run["cpu_seconds"] / run["schedules"]
            print(f"{run['schedules']} schedules, {1000 * each:.0f} ms each", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
