"""FedDDPM and FedDDPM+ beside the usual strategies and beside their controls.

    python -m benchmarks.fedddpm digits              run what is missing; then the table and picture
    python -m benchmarks.fedddpm digits --report     the table and the picture of what was run
    python -m benchmarks.fedddpm --seeds 1           of fashion-mnist

Each name is a file of benchmarks/studies/, which `concilium simulate` could run as well. Every run
leaves benchmarks/results/fedddpm/NAME/RUN-SEED.json; a run that is there is not repeated. Models
and deltas are kept in build/fedddpm/ (`--work`), so that a benchmark that was killed goes on where
it was; processes with different `--seeds` may run at the same time. The report is NAME/table.md,
NAME/rounds.md (every figure by round) and NAME/ratios.json beside the runs, and
docs/images/fedddpm-NAME.png; docs/fedddpm.md includes table.md. matplotlib draws the picture
(dependency group `benchmark`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.fedddpm_pictures import draw_finals, draw_rounds, draw_sizes
from benchmarks.fedddpm_summary import ROWS, summary_table
from benchmarks.fedddpm_tables import (
    PAPER,
    UNCORRECTED,
    Json,
    Runs,
    kinds_table,
    ratios,
    ratios_table,
    rounds_table,
    table,
    trigger_table,
)
from benchmarks.measure import machine
from concilium.simulate.spec import Point, load_sweep
from concilium.simulate.sweep import identity_of, run_points

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fedddpm"
DOCS = HERE.parent / "docs"
SEARCHED = {"digits": "digits-baselines", "fashion-mnist": "fashion-baselines"}


def run(name: str, work: Path, seeds: list[int], only: list[str], limit: int | None) -> None:
    """Run what is missing of the study, one JSON each: of these seeds and names, where any are
    given, and at most `limit` runs."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    sweep = load_sweep(HERE / "studies" / f"{name}.toml")

    def told(point: Any, event: Json) -> None:
        if event["event"] == "evaluation":
            print(f"{point.label:28} round {event['round']:3} FID {event['fid']:.4f}", flush=True)

    done = 0
    for point in sweep.points():
        if done == limit:
            break
        if (seeds and point.seed not in seeds) or (only and point.name not in only):
            continue
        path = folder / f"{point.label}.json"
        if path.exists() and _is_of(json.loads(path.read_text("utf-8")), point):
            continue
        for _ in run_points([point], work / name, told):
            lines = (work / name / point.label / "metrics.jsonl").read_text("utf-8").splitlines()
            made = {
                "run": point.name,
                "seed": point.seed,
                "identity": identity_of(point),
                "plan": point.plan.model_dump(mode="json"),
                "commit": _commit(),
                "machine": machine(),
                "events": [json.loads(line) for line in lines],
            }
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
        done += 1


def _is_of(made: Json, point: Point) -> bool:
    """Whether a run is of this point still. A default that was changed since makes it another one;
    an option that did not exist then does not."""
    now = point.plan.model_dump(mode="json")
    return bool(made["identity"] == identity_of(point)) and _agree(made.get("plan", {}), now)


def _agree(then: Any, now: Any) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):
        return all(key in now and _agree(value, now[key]) for key, value in then.items())
    return bool(then == now)


def _commit() -> str:
    """What the program was, "+" where files were changed since; "" outside a clone."""
    command = ("git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def report(name: str) -> None:
    """The tables, the ratios and the picture of the runs that are there."""
    runs = _runs(name)
    if not runs:
        raise SystemExit(f"{name}: no run is there yet; without --report they are made")
    folder = RESULTS / name
    competing = _competing(name)
    kinds, whole = kinds_table(runs), table(runs)
    if kinds:
        whole = f"{kinds}\n<details>\n<summary>all figures</summary>\n\n{whole}\n</details>\n"
    parts = [whole, ratios_table(competing), trigger_table(runs.get(UNCORRECTED, []))]
    shown = "\n".join(part for part in parts if part)
    (folder / "table.md").write_text(shown, "utf-8")
    (folder / "rounds.md").write_text(rounds_table(runs), "utf-8")
    found = {plus: ratios(competing, plus) for plus in PAPER if plus in runs}
    (folder / "ratios.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    draw = draw_rounds if found else draw_sizes if "auxiliary" in name else draw_finals
    draw(runs, DOCS / "images" / f"fedddpm-{name}.png")
    include(name, shown)
    include("summary", summary_table({row.study: _competing(row.study) for row in ROWS}))


def _competing(name: str) -> Runs:
    """The runs of a study, with those that searched the constants of the usual strategies."""
    return {**_runs(name), **(_runs(SEARCHED[name]) if name in SEARCHED else {})}


def _runs(name: str) -> Runs:
    """Runs by name, in the order of the study's file; one of each seed."""
    found: Runs = {}
    if not (study := HERE / "studies" / f"{name}.toml").exists():
        return found
    sweep = load_sweep(study)
    for entry in sweep.simulation.run:
        paths = [RESULTS / name / f"{entry.name}-{seed}.json" for seed in sweep.simulation.seeds]
        there = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
        if there:
            found[entry.name] = there
    return found


def include(name: str, text: str) -> None:
    """Put the table between its marks in docs/fedddpm.md."""
    page = DOCS / "fedddpm.md"
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    content = page.read_text("utf-8") if page.exists() else ""
    if begin not in content:
        return
    head, _, rest = content.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", "utf-8")


def main() -> None:
    names = sorted(path.stem for path in (HERE / "studies").glob("*.toml"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=names, nargs="?", default="fashion-mnist")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="only these")
    parser.add_argument("--runs", nargs="*", default=[], help="only these")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--work", type=Path, default=Path("build/fedddpm"), help="kept results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not arguments.report:
        which = arguments.seeds, arguments.runs, arguments.limit
        run(arguments.study, arguments.work, *which)
    report(arguments.study)


if __name__ == "__main__":
    main()
