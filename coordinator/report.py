"""What a study leaves for people: metrics.jsonl, report.json and index.html, after every round.

All of it is computed from the stored results, so that a restart repeats or loses no line. Nothing
here is about one silo's data: what silos contributed is known in sums only.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from coordinator import failpoints, records
from coordinator.page import render
from coordinator.schema import traffic
from coordinator.store import Store
from coordinator.studies import LiveStudy

Json = dict[str, Any]
_MEASURED = ("fid", "samples", "network", "network_sha256")
_COMPARED = ("kid", "coverage", "copies", "losses", "measured", "clipped")


class Report:
    """The report of one study, in `folder`."""

    def __init__(self, folder: Path, store: Store, live: LiveStudy) -> None:
        self._folder, self._store, self._live = folder, store, live

    async def write(self) -> None:
        """Bring the files up to what the store holds."""
        row = await self._store.do(records.study, self._live.id)
        results = await self._store.do(records.results_of, self._live.id)
        bytes_by_silo = await self._store.do(_traffic_of, self._live.id)
        report = {**_head(self._live, row), **_body(results), "bytes": bytes_by_silo}
        await asyncio.to_thread(self._write, report)

    def _write(self, report: Json) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(line, ensure_ascii=False) for line in _metrics(report))
        _replace(self._folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
        text = json.dumps(report, indent=2, ensure_ascii=False)
        _replace(self._folder / "report.json", text + "\n")
        _replace(self._folder / "index.html", render(report, self._folder))


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


def _body(results: Json) -> Json:
    union, moments = (results.get(k, {}) for k in ("auxiliary", "moments"))
    counted = [v for k, v in results.items() if k == "census" or k.startswith("census of epoch ")]
    census = counted[-1] if counted else {}
    numbers = range(1, len(results) + 1)
    rounds = [_round(results, n) for n in numbers if f"round {n:05} model" in results]
    of_union = ("images", "held_out_images", "labels")
    return {
        "images": census.get("count"),
        "auxiliary": {key: union[key] for key in of_union if key in union},
        "features_of": moments.get("silos", []),
        "rounds": rounds,
        "seconds": _seconds(results),
        "outputs": {
            "model": "model/",
            "samples": "samples.png",
            "grids": [r["grid"] for r in rounds if r["grid"]],
            "metrics": "metrics.jsonl",
            "report": "report.json",
            "page": "index.html",
        },
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
        keys = ("training_loss", "loss_after")
        line["correction"] = {key: corrected[key] for key in keys}
    evaluation = part("evaluation")
    if evaluation:
        line |= {key: evaluation[key] for key in _MEASURED}
    comparison = part("comparison")
    if comparison:
        line |= {key: comparison[key] for key in _COMPARED if key in comparison}
    return line


def _seconds(results: Json) -> Json:
    """Seconds by kind of step, all rounds together."""
    total: dict[str, float] = {}
    for key, value in results.items():
        words = key.split()
        kind = f"rounds: {words[2]}" if words[0] == "round" else key
        if words[0] in ("tags", "images"):
            continue  # within "auxiliary"
        total[kind] = round(total.get(kind, 0.0) + value.get("seconds", 0.0), 3)
    return total


def _metrics(report: Json) -> list[Json]:
    """One line per thing that happened, in order."""
    lines: list[Json] = []
    in_sum = ("round", "survivors", "epoch", "session", "loss", "moved", "saturated", "faults")
    for r in report["rounds"]:
        lines.append({"event": "round", **{key: r[key] for key in in_sum}})
        if "decision" in r:
            lines.append({"event": "decision", "round": r["round"], **r["decision"]})
        if "correction" in r:
            lines.append({"event": "correction", "round": r["round"], **r["correction"]})
        if "fid" in r:
            keys = ("round", *_MEASURED, *_COMPARED)
            lines.append({"event": "evaluation", **{key: r[key] for key in keys if key in r}})
    return lines


def _traffic_of(c: Connection, study: str) -> Json:
    rows = c.execute(select(traffic).where(traffic.c.study == study).order_by(traffic.c.site))
    return {row.site: {"from_silo": row.received, "to_silo": row.sent} for row in rows}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
    failpoints.reach(f"written {path.name}")
