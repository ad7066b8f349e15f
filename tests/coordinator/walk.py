"""Kill the coordinator at every step that it persists.

    python -m tests.coordinator.walk --out FILE [--only REGEX] [--resume]

A first study is only recorded: it names the points. Then the same FedDDPM+ study of four silos is
run over the real wire again and again, from the invitations to the model, each time with the
coordinator killed by SIGKILL at the next twenty points, one after the other, and started again. It
has to end with the sessions and survivors of the first study in every sum, each sum equal to its
survivors' vectors bit by bit, and made once.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from coordinator import admin
from diffusion.features.pinned import FEATURE_NETWORKS
from tests.coordinator.served import Served
from tests.walking import Deaths, Piece, Walk

MORE = f"""
[warm_up]
steps = 1

[auxiliary]
images = 40
max_attempts = 3

[strategy]
kind = "fedddpm_plus"
auxiliary_share = 0.0
first_correction_steps = 0
correct_last = true
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
Sums = dict[str, tuple[int, list[str]]]


@dataclass
class Run:
    """What became of a study."""

    deaths: Deaths
    sums: Sums = field(default_factory=dict)
    error: str | None = None


async def study(
    folder: Path,
    points: Sequence[str],
    record: Path | None = None,
    database: str | None = None,
    more: str = MORE,
) -> Run:
    """Run one from the invitations to the model, dying at the points one after the other."""
    federation = Served(folder, points=points, record=record, database=database)
    outcome = Run(federation.deaths)
    try:
        async with federation:
            silos = await federation.join_four()
            for silo in silos:
                silo.start()
            name = admin.start_study(federation.home, federation.plan(2, 60.0, more))
            limit = LIMIT_SECONDS + SECONDS_EACH * len(points)
            await federation.until(lambda: federation.study(name).state in ENDED, limit)
            assert federation.study(name).state == "finished", federation.study(name).error
            await federation.until(lambda: all(name in silo.ended for silo in silos))
            assert (federation.study(name).folder / "model" / "unet" / "config.json").exists()
            outcome.sums = federation.sums(name)
    except AssertionError as error:
        outcome.error = str(error)[:1000] or type(error).__name__
    return outcome


def run(points: Sequence[str] = (), record: Path | None = None) -> Run:
    with TemporaryDirectory() as folder:
        return asyncio.run(study(Path(folder), points, record))


def record() -> tuple[Sums, list[str]]:
    """The sums of an undisturbed study, and its points in the order in which they are reached."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "points"
        undisturbed = run(record=file)
        assert undisturbed.error is None, undisturbed.error
        assert undisturbed.deaths.statuses == []
        return undisturbed.sums, chosen(file.read_text().splitlines())


def chosen(recorded: list[str]) -> list[str]:
    """Every point once; of files that are known by their content only, every time one is kept. The
    last, the end of the service itself, is no step of a study."""
    points = [p for p in dict.fromkeys(recorded) if not p.endswith(" release#1")]
    points = [p for p in points if p.endswith("#1") or p.startswith("artifact ")]
    # What comes by the clock, or what a restart does in another way (it clears the uploads of all
    # sessions that are over), goes last: into a study of its own. A restarted process begins to
    # count anew, so the numbers mean nothing to it.
    in_order = sorted(points, key=lambda p: bool(re.search(LAST, p)))
    return [point.partition("#")[0] for point in in_order]


def judged(outcome: Run, expected: Sums) -> list[str]:
    problems = [outcome.error, outcome.deaths.problem]
    if outcome.error is None and outcome.sums != expected:
        problems.append(f"other sums: {outcome.sums}")
    return [problem for problem in problems if problem]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="points that match this regular expression")
    parser.add_argument("--resume", action="store_true", help="go on where FILE says")
    given = parser.parse_args()
    walk = Walk.resume(given.out) if given.resume else None
    if walk is None:
        sums, points = record()
        walk = Walk.begin(given.out, [p for p in points if re.search(given.only, p)], sums=sums)
    # As JSON has them: lists, no tuples.
    expected = {
        quantity: (number, names) for quantity, (number, names) in walk.content["sums"].items()
    }

    def piece(points: list[str]) -> Piece:
        outcome = run(points)
        return Piece(outcome.deaths, judged(outcome, expected))

    walk.go(piece)
    return not walk.good


if __name__ == "__main__":
    sys.exit(main())
