"""Kill a silo's agent at every step that it persists.

    python -m tests.silo.walk --out FILE [--only REGEX] [--resume]

One real agent, from `silo init` to the final model, and three silos of the tests take part in a
FedDDPM+ study over the real wire. A first study is only recorded: it names the points, among them
every file that the agent writes and every entry of its ledger. Then the same study is run again
and again, each time with the agent killed by SIGKILL at some of the points, one after the other,
and started again, until all of them were walked. It has to end with exact sums, each with the
agent's one vector in it or without the agent; what the agent signed for a step of a session has to
be one message, however often it was killed in between.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from sqlalchemy.exc import OperationalError

from coordinator import admin as centre
from coordinator import registry, results
from coordinator.authority import Authority, parse_request
from coordinator.config import Home
from coordinator.store import Store
from diffusion.features.pinned import FEATURE_NETWORKS
from secagg.messages import Signed
from silo import admin, failpoints
from silo.files import write_file
from silo.home import SiloHome
from silo.identity import build_request, load_or_make_identity
from tests.coordinator.agent import TestSilo
from tests.coordinator.federation import Federation
from tests.walking import Deaths, Piece, Walk

NAME, OTHERS = "site-4", ["site-1", "site-2", "site-3"]
MORE = """
[warm_up]
steps = 2

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
sha256 = "{sha256}"
samples = 16
every = 2
"""
Json = dict[str, Any]


@dataclass
class Run:
    """What became of a study."""

    deaths: Deaths
    with_agent: dict[str, bool] = field(default_factory=dict)
    """quantity → whether the agent was in the sum."""
    problems: list[str] = field(default_factory=list)


class Agent:
    """`concilium silo join`, then `run`, begun again whenever it dies; the next point each time."""

    def __init__(self, home: Path, points: Sequence[str], record: Path | None) -> None:
        self.home, self.deaths, self._record = home, Deaths(list(points)), record
        self.process: subprocess.Popen[bytes] | None = None

    async def join(self, token: str) -> None:
        while await self._run("join", token) != 0:
            pass

    async def serve(self) -> None:
        while True:
            await self._run("run")

    async def _run(self, *command: str) -> int:
        environment = {failpoints.VARIABLE: point} if (point := self.deaths.next) else {}
        environment |= {failpoints.RECORD: str(self._record)} if self._record else {}
        with open(self.home / "walk.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "concilium", "silo", *command, "--home", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        while self.process.poll() is None:
            await asyncio.sleep(0.05)
        if self.process.returncode != 0:
            self.deaths.died(self.process.returncode)
        return self.process.returncode

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)


class Watch:
    """What can be seen of the agent from outside: its vectors, and what others got from it."""

    def __init__(self, home: Path, artifacts: Path) -> None:
        self._home, self._artifacts = home, artifacts
        self.artifacts: dict[str, bytes] = {}
        self.vectors: dict[str, set[bytes]] = defaultdict(set)
        self.signed: dict[tuple[int, str], set[bytes]] = defaultdict(set)

    async def files_seen(self) -> None:
        """The agent deletes a vector once its outcome is known, the coordinator the sum of a round
        that is over: look often."""
        while True:
            for file in self._home.glob("studies/*/vectors/*/vector"):
                with suppress(FileNotFoundError):
                    self.vectors[file.parent.name].add(file.read_bytes())
            for file in self._artifacts.glob("*/*"):
                if file.name not in self.artifacts and len(file.name) == 64:
                    with suppress(FileNotFoundError):
                        self.artifacts[file.name] = file.read_bytes()
            await asyncio.sleep(0.02)

    async def messages_seen(self, store: Store) -> None:
        """Every message of the agent that the coordinator has taken."""
        while True:
            with suppress(OperationalError):  # the store is locked for long: look again
                for session, message in store.run(_messages):
                    if message.sender == 4:
                        self.signed[session, message.step.name].add(message.encode())
            await asyncio.sleep(0.05)


def _messages(c: Any) -> list[tuple[int, Signed]]:
    from coordinator.journal import decode_event
    from coordinator.schema import session_events
    from secagg.events import Received

    found = []
    for row in c.execute(session_events.select()):
        event = decode_event(row.event)
        if isinstance(event, Received):
            found.append((row.number, event.message))
    return found


async def study(folder: Path, points: Sequence[str], record: Path | None) -> Run:
    home = folder / "agent"
    rng = np.random.default_rng(4)
    data = folder / "images.npz"
    np.savez(data, images=rng.integers(0, 256, (30, 8, 8), dtype=np.uint8))
    admin.init(home, name=NAME, data=data, format="npz", threads=1, automatic=True)
    agent = Agent(home, points, record)
    outcome = Run(agent.deaths)
    try:
        await _study(folder, agent, outcome)
    except AssertionError as error:
        outcome.problems.append(str(error)[:1000] or type(error).__name__)
    finally:
        agent.end()
    return outcome


async def _study(folder: Path, agent: Agent, outcome: Run) -> None:
    home = agent.home
    async with Federation(folder, absent_after=1800.0) as federation:
        await federation.join(*OTHERS)
        watch = Watch(home, Home(federation.home).artifacts)
        store = Store(Home(federation.home).database(Home(federation.home).config()))
        tasks = [asyncio.create_task(agent.join(centre.invite(federation.home, NAME)))]
        await federation.until(lambda: centre.pending(federation.home), 60)
        centre.approve(federation.home, NAME)
        await tasks.pop()
        age_certificate(federation, home)
        tasks.append(asyncio.create_task(agent.serve()))
        tasks.append(asyncio.create_task(watch.files_seen()))
        tasks.append(asyncio.create_task(watch.messages_seen(store)))
        for silo in federation.silos.values():
            silo.start()
        plan = federation.plan(2, 1800.0, MORE.format(sha256=FEATURE_NETWORKS["digits"].sha256))
        plan.write_text(plan.read_text().replace("image_size = 4", "image_size = 8"))
        name = centre.start_study(federation.home, plan)
        limit = 900 + 60 * len(agent.deaths.points)
        over = ("finished", "failed", "stopped")

        def is_over() -> bool:
            for task in tasks:
                if task.done():
                    task.result()  # raises what went wrong
            return federation.study(name).state in over

        await federation.until(is_over, limit)
        await federation.until(lambda: (home / "studies" / name / "ended.json").exists(), 120)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        agent.end()
        stored = store.run(results.all_of, name)
        store.close()
        if federation.study(name).state != "finished":
            outcome.problems.append(f"the study failed: {federation.study(name).error}")
        check_sums(federation.silos, stored, watch, outcome)
        for (session, step), messages in watch.signed.items():
            if len(messages) > 1:
                outcome.problems.append(f"session {session}: {len(messages)} messages of {step}")


def age_certificate(federation: Federation, home: Path) -> None:
    """Give the agent a certificate that is 25 days old, so that it renews it at once."""
    place = Home(federation.home)
    request = build_request(load_or_make_identity(SiloHome(home)), NAME)
    then = datetime.now(UTC) - timedelta(days=25)
    old = Authority.load(place.authority).silo_certificate(NAME, parse_request(request), 30.0, then)
    store = Store(place.database(place.config()))
    store.run(registry.record_certificate, NAME, request, old)
    store.close()
    write_file(SiloHome(home).certificates / "site.pem", old.pem)


def check_sums(silos: dict[str, TestSilo], stored: Json, watch: Watch, outcome: Run) -> None:
    """Each sum less the others' vectors is one that the agent had made, or nothing."""
    for value in stored.values():
        end = value.get("session", {})
        if end.get("kind") != "summed":
            continue
        number = end["number"]
        (quantity,) = (q for q, session in silos["site-1"].vectors if session == number)
        kind = silos["site-1"].vectors[quantity, number].dtype
        total = np.frombuffer(watch.artifacts[end["sum"]], kind).copy()
        for name in (OTHERS[i - 1] for i in end["survivors"] if i < 4):
            total -= silos[name].vectors[quantity, number]
        outcome.with_agent[quantity] = 4 in end["survivors"]
        if 4 not in end["survivors"] and total.any():
            outcome.problems.append(f"{quantity}: the sum holds more than its survivors'")
        made = watch.vectors[quantity.replace(" ", "-")]
        if 4 in end["survivors"] and total.tobytes() not in made:
            outcome.problems.append(f"{quantity}: not a vector of the agent's ({len(made)} seen)")


def run(points: Sequence[str] = (), record: Path | None = None) -> Run:
    with TemporaryDirectory() as folder:
        return asyncio.run(study(Path(folder), points, record))


def undisturbed() -> list[str]:
    """The points of a study in the order in which they are reached, each once."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "points"
        outcome = run(record=file)
        assert outcome.problems == []
        assert outcome.deaths.statuses == []
        return list(dict.fromkeys(file.read_text().splitlines()))


def piece(points: list[str]) -> Piece:
    outcome = run(points)
    own = outcome.deaths.problem
    problems = [*outcome.problems, *([own] if own else [])]
    return Piece(outcome.deaths, problems, {"with_agent": outcome.with_agent})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="points that match this regular expression")
    parser.add_argument("--resume", action="store_true", help="go on where FILE says")
    given = parser.parse_args()
    walk = Walk.resume(given.out) if given.resume else None
    if walk is None:
        points = [p for p in undisturbed() if re.search(given.only, p)]
        walk = Walk.begin(given.out, points)
    # Whoever dies before CONFIRM has lost its keys, and its other points of that session with them.
    walk.go(piece, apart=10)
    return not walk.good


if __name__ == "__main__":
    sys.exit(main())
