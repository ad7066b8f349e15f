"""Kill the coordinator at every step that it persists.

    python -m tests.coordinator.walk --out FILE [--each] [--only REGEX]

A first study is only recorded: it names the points. Then another FedDDPM+ study of four silos is
run over the real wire, from the invitations to the model, with the coordinator killed by SIGKILL at
the first point, started again, killed at the second, and so on through all of them. It has to end
with the sessions and survivors of the first study in every sum, each sum equal to its survivors'
vectors bit by bit, and made once. With --each every point has a study of its own, with one kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coordinator import admin
from diffusion.features.network import FEATURE_NETWORKS
from tests.coordinator.served import Served

MORE = f"""
[warm_up]
steps = 1

[auxiliary]
images = 40
max_attempts = 3

[strategy]
kind = "fedddpm_plus"
window = 1
tau = 0.9
correction_steps = 2

[evaluation]
feature_network = "digits"
sha256 = "{FEATURE_NETWORKS["digits"].sha256}"
feature_bound = 64.0
samples = 16
every = 2
"""
LIMIT_SECONDS, SECONDS_EACH = 900.0, 60.0
ENDED = ("finished", "stopped", "failed")
LAST = r" record#| sign_of_life#|^uploads discarded"
Json = dict[str, Any]
Sums = dict[str, tuple[int, list[str]]]


@dataclass
class Run:
    """What became of a study."""

    sums: Sums
    deaths: list[int]
    """Exit status of each coordinator that ended before the study did."""
    left: list[str]
    """Points that were not reached."""


async def study(
    folder: Path,
    points: Sequence[str],
    record: Path | None = None,
    database: str | None = None,
    more: str = MORE,
) -> Run:
    """Run one from the invitations to the model, dying at the points one after the other."""
    async with Served(folder, points=points, record=record, database=database) as federation:
        silos = await federation.join_four()
        for silo in silos:
            silo.start()
        name = admin.start_study(federation.home, federation.plan(2, 60.0, more))
        limit = LIMIT_SECONDS + SECONDS_EACH * len(points)
        await federation.until(lambda: federation.study(name).state in ENDED, limit)
        assert federation.study(name).state == "finished", federation.study(name).error
        await federation.until(lambda: all(name in silo.ended for silo in silos))
        assert (federation.study(name).folder / "model" / "unet" / "config.json").exists()
        return Run(federation.sums(name), federation.deaths, federation.points)


def run(points: Sequence[str] = (), record: Path | None = None) -> Run:
    with TemporaryDirectory() as folder:
        return asyncio.run(study(Path(folder), points, record))


def record() -> tuple[Sums, list[str]]:
    """The sums of an undisturbed study, and its points in the order in which they are reached."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "points"
        undisturbed = run(record=file)
        assert undisturbed.deaths == []
        return undisturbed.sums, chosen(file.read_text().splitlines())


def chosen(recorded: list[str]) -> list[str]:
    """Every point once; of files that are known by their content only, every time one is kept. The
    last, the end of the service itself, is no step of a study."""
    points = [p for p in dict.fromkeys(recorded) if not p.endswith(" release#1")]
    points = [p for p in points if p.endswith("#1") or p.startswith("artifact ")]
    # What comes by the clock, or what a restart does in another way (it clears the uploads of all
    # sessions that are over), goes last: into a study of its own.
    return sorted(points, key=lambda p: bool(re.search(LAST, p)))


def judged(points: Sequence[str], outcome: Run, expected: Sums) -> str:
    if outcome.sums != expected:
        return f"other sums: {outcome.sums}"
    if set(outcome.deaths) - {-signal.SIGKILL}:
        return f"a coordinator ended by itself: {outcome.deaths}"
    if len(outcome.deaths) + len(outcome.left) != len(points):
        return f"{len(outcome.deaths)} deaths, {len(outcome.left)} of {len(points)} points left"
    return "ok"


def in_one_study(points: Sequence[str], expected: Sums) -> list[Json]:
    """All points, in as few studies as it takes: what a restart does not come by again has to wait
    for the next one."""
    lines, left = [], [point.partition("#")[0] for point in points]
    for turn in range(1, 6):
        started = time.monotonic()
        outcome = run(left)
        verdict = judged(left, outcome, expected)
        seconds = round(time.monotonic() - started, 1)
        reached = left[: len(left) - len(outcome.left)]
        lines.append({"study": turn, "verdict": verdict, "seconds": seconds, "killed_at": reached})
        print(f"study {turn}: {len(reached)} kills, {verdict}, {seconds} s", flush=True)
        left = outcome.left
        if not left or not reached or verdict != "ok":
            break
    return [*lines, {"not_reached": left}]


def one_study_each(points: Sequence[str], expected: Sums) -> list[Json]:
    lines = []
    for point in points:
        started = time.monotonic()
        try:
            outcome = run([point])
            verdict = judged([point], outcome, expected)
            verdict = "not reached" if outcome.left else verdict
        except AssertionError as error:
            verdict = f"failed: {str(error)[:1000]}"
        seconds = round(time.monotonic() - started, 1)
        lines.append({"point": point, "verdict": verdict, "seconds": seconds})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", action="store_true", help="one study per point")
    parser.add_argument("--only", default="", help="points that match this regular expression")
    given = parser.parse_args()
    expected, points = record()
    points = [p for p in points if re.search(given.only, p)]
    print(f"{len(points)} points", flush=True)
    lines = (one_study_each if given.each else in_one_study)(points, expected)
    content = {"sums": expected, "points": points, "runs": lines}
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    bad = [line for line in lines if line.get("verdict", "ok") != "ok" or line.get("not_reached")]
    return len(bad) > 0


if __name__ == "__main__":
    sys.exit(main())
