"""docs/benchmarks.md, made from what the benchmarks wrote.

    python -m benchmarks.page [--check]

Each benchmarks/results/NAME.json becomes a section: what it measured, on which machine, which
targets it met, and its rows. benchmarks/notes.toml says, by the name of a target, what bounds a
figure that stays short, and under [runs], by NAME, how a run was made. Where no file is of a GPU,
what `benchmarks.gpu_session` would measure is listed as not measured. `--check` writes nothing and
fails where the page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import gpu_session
from benchmarks.measure import NOT_MEASURED

RESULTS = Path(__file__).with_name("results")
NOTES = Path(__file__).with_name("notes.toml")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `python -m benchmarks.page` from `benchmarks/results/`; do not edit. Each figure was
measured by the command of its section on the machine named there. Ratios carry over to other
machines better than times do.
"""

Row = dict[str, Any]


def page() -> str:
    notes = tomllib.loads(NOTES.read_text("utf-8"))
    found = sorted(RESULTS.glob("*.json"))
    results = {path: json.loads(path.read_text("utf-8")) for path in found}
    # What the soak and the fuzzer count is no report of `benchmarks.measure`.
    reports = {path: result for path, result in results.items() if "targets" in result}
    if not any(result["title"] == gpu_session.TITLE for result in reports.values()):
        reports |= {RESULTS / "no-gpu.json": _without_a_gpu()}
    return "\n".join([HEAD, *(_section(path, result, notes) for path, result in reports.items())])


def _without_a_gpu() -> Row:
    session = gpu_session.Session(None, 0.0, "python -m benchmarks.gpu_session")
    gpu_session.unmeasured(session)
    return session.report.as_dict() | {"machine": {"gpu": None}}


def _section(path: Path, result: dict[str, Any], notes: dict[str, Any]) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None)
    machine = machine or NOT_MEASURED
    title = f"## {result['title']}"
    commands = result.get("commands", [f"python -m benchmarks.{path.stem}"])
    made_by = ", ".join(f"`{command}`" for command in commands)
    lines = [title, "", made_by, "", f"Machine: {machine}.", ""]
    if path.stem in notes["runs"]:
        lines += [notes["runs"][path.stem].strip(), ""]
    if result["targets"]:
        lines += _table([_target(t) for t in result["targets"]])
    for target in result["targets"]:
        if target["met"] is not True and target["name"] in notes:
            lines += [f"`{target['name']}`: {notes[target['name']].strip()}", ""]
    for _, rows in groupby(result["rows"], key=lambda row: row.get("part", tuple(row))):
        lines += _table([{k: v for k, v in row.items() if k != "part"} for row in rows])
    return "\n".join(lines)


def _target(target: Row) -> Row:
    verdict = {True: "met", False: "**missed**", None: NOT_MEASURED}[target["met"]]
    sense = {"<=": "≤", ">=": "≥"}[target["sense"]]
    measured = target["value"]
    return {
        "target": f"`{target['name']}`",
        "measured": None if measured is None else f"{_shown(measured)} {target['unit']}".strip(),
        "aim": f"{sense} {target['target']}",
        "": verdict,
    }


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in columns]
    head = ["| " + " | ".join(columns) + " |"]
    rule = ["|" + "|".join("--:" if right else "---" for right in numeric) + "|"]
    body = ["| " + " | ".join(_shown(row.get(name, "")) for name in columns) + " |" for row in rows]
    return [*head, *rule, *body, ""]


def _shown(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, "utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != made:
        sys.exit("docs/benchmarks.md is not what the results say: run python -m benchmarks.page")


if __name__ == "__main__":
    main()
