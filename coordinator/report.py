"""What a study leaves for people: metrics.jsonl, report.json and index.html, after every round.

All of it is computed from the stored results, so that a restart repeats or loses no line. They are
read and written some rounds at a time: a study of ten thousand rounds takes no more memory than one
of a hundred. Nothing here is about one silo's data: what silos contributed is known in sums only.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sqlalchemy import Connection, select

from coordinator import failpoints, records, results
from coordinator.page import render, shown
from coordinator.schema import traffic
from coordinator.store import Store
from coordinator.studies import LiveStudy
from study.memory import give_back

Json = dict[str, Any]
_MEASURED = ("fid", "samples", "network", "network_sha256")
_AT_ONCE = 50
_CORRECTED = (
    "steps",
    "learning_rate",
    "training_loss",
    "loss_after",
    "kept",
    "fid_before",
    "fid_after",
)
_COMPARED = ("kid", "coverage", "copies", "losses", "measured", "clipped")


class Report:
    """The report of one study, in `folder`."""

    def __init__(self, folder: Path, store: Store, live: LiveStudy) -> None:
        self._folder, self._store, self._live = folder, store, live

    async def write(self) -> None:
        """Bring the files up to what the store holds."""
        store, name = self._store, self._live.id
        row = await store.do(records.study, name)
        done = await store.do(results.count, name, "model")
        others = await store.do(results.besides_rounds, name)
        report = {**_head(self._live, row), **_before_rounds(others)}
        seconds, pictured, corrections = _seconds({}, others), shown(done), 0
        lines: list[Json] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        with (
            _replacing(self._folder / "metrics.jsonl") as metrics,
            _replacing(self._folder / "report.json") as file,
        ):
            if report["auxiliary"]:
                _write_event(metrics, {"event": "auxiliary", **report["auxiliary"]})
            file.write(json.dumps(report, indent=2, ensure_ascii=False)[:-2] + ',\n  "rounds": [')
            for first in range(1, done + 1, _AT_ONCE):
                last = min(first + _AT_ONCE - 1, done)
                some = await store.do(results.of_rounds, name, first, last)
                seconds = _seconds(seconds, some)
                rounds = [_round(some, number) for number in range(first, last + 1)]
                await asyncio.to_thread(_write_rounds, metrics, file, rounds)
                corrections += sum("correction" in line for line in rounds)
                lines += [line for line in rounds if line["round"] in pictured]
            traffic = await store.do(_traffic_of, name)
            rest = {"seconds": seconds, "outputs": _OUTPUTS, "bytes": traffic}
            file.write("\n  ]," + json.dumps(rest, indent=2, ensure_ascii=False)[1:] + "\n")
        report |= {"rounds": lines, "rounds_done": done, "corrections": corrections, **rest}
        await asyncio.to_thread(self._write_page, report)

    def _write_page(self, report: Json) -> None:
        with _replacing(self._folder / "index.html") as file:
            file.write(render(report, self._folder))
        give_back()


def _write_rounds(metrics: TextIO, report: TextIO, rounds: list[Json]) -> None:
    """Append some rounds to both files; the first of all is not preceded by a comma."""
    for line in rounds:
        for event in _metrics(line):
            _write_event(metrics, event)
        text = json.dumps(line, indent=2, ensure_ascii=False).replace("\n", "\n    ")
        report.write(("\n    " if line["round"] == 1 else ",\n    ") + text)


def _write_event(metrics: TextIO, event: Json) -> None:
    metrics.write(json.dumps(event, ensure_ascii=False) + "\n")


def _head(live: LiveStudy, row: records.StudyRow) -> Json:
    roster, plan = live.roster, live.plan
    return {
        "study": live.id,
        "title": plan.study.title,
        "state": row.state,
        "error": row.error,
        "created": row.created,
        "ended": row.ended,
        "strategy": plan.strategy.model_dump(),
        "rounds_planned": plan.rounds.count,
        "plan_digest": plan.digest().hex(),
        "roster": {
            "silos": [member.name for member in roster.members],
            "threshold": roster.threshold,
            "colluders": roster.colluders,
            "epoch": roster.epoch,
            "fingerprint": roster.fingerprint,
        },
    }


_OUTPUTS = {
    "model": "model/",
    "samples": "samples.png",
    "grids": "grids/",
    "metrics": "metrics.jsonl",
    "report": "report.json",
    "page": "index.html",
}


def _before_rounds(results: Json) -> Json:
    union, moments = (results.get(k, {}) for k in ("auxiliary", "moments"))
    distance = results.get("auxiliary distance", {})
    counted = [v for k, v in results.items() if k == "census" or k.startswith("census of epoch ")]
    census = counted[-1] if counted else {}
    of_union = ("images", "held_out_images", "labels", "fid", "network", "network_sha256")
    auxiliary = {**union, **distance}
    return {
        "images": census.get("count"),
        "auxiliary": {key: auxiliary[key] for key in of_union if key in auxiliary},
        "features_of": moments.get("silos", []),
    }


def _round(results: Json, number: int) -> Json:
    def part(name: str) -> Json:
        found: Json = results.get(f"round {number:05} {name}", {})
        return found

    summed, step = part("sum"), part("model")
    decision, corrected = part("decision"), part("corrected")
    line: Json = {
        "round": number,
        "survivors": summed["silos"],
        "epoch": summed["epoch"],
        "session": summed["session"]["number"],
        "loss": step["loss"],
        "moved": step["moved"],
        "saturated": step["saturated"],
        "faults": step["faults"],
        "grid": part("grid").get("grid"),
        "seconds": summed["session"]["seconds"],
    }
    if decision:
        line["decision"] = {k: v for k, v in decision.items() if k != "seconds"}
        line["auxiliary_loss"] = decision["loss"]
    if corrected:
        line["correction"] = {key: corrected[key] for key in _CORRECTED if key in corrected}
    if sharing := part("sharing"):
        line["sharing"] = {k: v for k, v in sharing.items() if k != "seconds"}
    evaluation = part("evaluation")
    if evaluation:
        line |= {key: evaluation[key] for key in _MEASURED}
    comparison = part("comparison")
    if comparison:
        line |= {key: comparison[key] for key in _COMPARED if key in comparison}
    return line


def _seconds(before: dict[str, float], results: Json) -> dict[str, float]:
    """Seconds by kind of step, all rounds together: those before and these."""
    total = dict(before)
    for key, value in results.items():
        words = key.split()
        kind = f"rounds: {words[2]}" if words[0] == "round" else key
        if words[0] in ("tags", "images"):
            continue  # within "auxiliary"
        total[kind] = round(total.get(kind, 0.0) + value.get("seconds", 0.0), 3)
    return total


def _metrics(r: Json) -> Iterator[Json]:
    """One line per thing that happened in a round, in order."""
    in_sum = ("round", "survivors", "epoch", "session", "loss", "moved", "saturated", "faults")
    yield {"event": "round", **{key: r[key] for key in in_sum}}
    if "decision" in r:
        yield {"event": "decision", "round": r["round"], **r["decision"]}
    if "correction" in r:
        yield {"event": "correction", "round": r["round"], **r["correction"]}
    if "fid" in r:
        keys = ("round", *_MEASURED, *_COMPARED)
        yield {"event": "evaluation", **{key: r[key] for key in keys if key in r}}
    if "sharing" in r:
        yield {"event": "sharing", "round": r["round"], **r["sharing"]}


def _traffic_of(c: Connection, study: str) -> Json:
    rows = c.execute(select(traffic).where(traffic.c.study == study).order_by(traffic.c.site))
    return {row.site: {"from_silo": row.received, "to_silo": row.sent} for row in rows}


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` when it is written to the end."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    os.replace(partial, path)
    failpoints.reach(f"written {path.name}")
