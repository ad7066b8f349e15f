"""A walk through many points of death, in pieces; where it stands is in a file after each of them.

A piece is one study, killed at some of the points one after the other. A walk that was interrupted
goes on where its file says. A point that a study does not come by again after its restarts begins
the next piece; one that no study of its own comes by either is set aside, and said to be.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PIECE = 20


@dataclass
class Deaths:
    """What became of a process that is to die at each of `points` and is started again."""

    points: list[str]
    statuses: list[int] = field(default_factory=list)
    """Exit status of each that ended before the study did."""
    seconds: list[float] = field(default_factory=list)
    """From one death to the next."""
    _since: float = field(default_factory=time.monotonic)

    @property
    def next(self) -> str | None:
        return self.points[len(self.statuses)] if self.left else None

    @property
    def killed(self) -> list[str]:
        return self.points[: len(self.statuses)]

    @property
    def left(self) -> list[str]:
        return self.points[len(self.statuses) :]

    def died(self, status: int) -> None:
        now = time.monotonic()
        self.statuses.append(status)
        self.seconds.append(round(now - self._since, 1))
        self._since = now

    @property
    def problem(self) -> str | None:
        """What did not end by our SIGKILL."""
        if set(self.statuses) - {-signal.SIGKILL}:
            return f"it ended by itself: {self.statuses}"
        return None


@dataclass
class Piece:
    """How a study ended that was killed here and there."""

    deaths: Deaths
    problems: list[str]
    more: Json = field(default_factory=dict)


class Walk:
    """The points that are left, the pieces that were walked; `out` holds both."""

    def __init__(self, out: Path, content: Json) -> None:
        self._out, self.content = out, content

    @classmethod
    def begin(cls, out: Path, points: list[str], **known: Any) -> Walk:
        """`known` is what the pieces are compared with."""
        left = list(range(len(points)))
        walk = cls(out, {**known, "points": points, "left": left, "not_reached": [], "runs": []})
        walk._write()
        return walk

    @classmethod
    def resume(cls, out: Path) -> Walk | None:
        """The walk that was interrupted, None where there is none."""
        content = json.loads(out.read_text()) if out.exists() else {}
        return cls(out, content) if content.get("left") else None

    @property
    def good(self) -> bool:
        problems = [p for run in self.content["runs"] for p in run["problems"]]
        return not problems and not self.content["left"] and not self.content["not_reached"]

    def go(self, run: Callable[[list[str]], Piece], apart: int = 1) -> None:
        """Until no point is left; a piece that ends wrong is written down, and the next begun. The
        points of a piece are `apart` steps from each other, where a death may skip some steps."""
        while self.content["left"]:
            chosen = self._choose(apart)
            points = [self.content["points"][i] for i in chosen]
            started = time.monotonic()
            piece = run(points)
            killed = piece.deaths.killed
            line = {
                "killed_at": killed,
                "seconds_between": piece.deaths.seconds,
                "problems": piece.problems,
                "seconds": round(time.monotonic() - started, 1),
                **piece.more,
            }
            self.content["runs"].append(line)
            if not killed:
                self.content["not_reached"].append(points[0])
            done = set(chosen[: max(1, len(killed))])
            self.content["left"] = [i for i in self.content["left"] if i not in done]
            self._write()
            said = piece.problems or "ok"
            rest = len(self.content["left"])
            print(f"{len(killed)} kills: {said}, {line['seconds']} s; {rest} left", flush=True)

    def _choose(self, apart: int) -> list[int]:
        chosen: list[int] = []
        for i in self.content["left"]:
            if not chosen or i - chosen[-1] >= apart:
                chosen.append(i)
        return chosen[:PIECE]

    def _write(self) -> None:
        partial = self._out.with_name(self._out.name + ".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self._out)
