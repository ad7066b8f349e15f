"""FedDDPM and FedDDPM+ beside the usual strategies and beside their controls.

    python -m benchmarks.fedddpm digits              run what is missing; then the table and picture
    python -m benchmarks.fedddpm digits --report     the table and the picture of what was run
    python -m benchmarks.fedddpm fashion-mnist --seeds 1

Each name is a file of benchmarks/studies/, which `concilium simulate` could run as well. Every run
leaves benchmarks/results/fedddpm/NAME/RUN-SEED.json; a run that is there is not repeated. Models
and deltas are kept in build/fedddpm/ (`--work`), so that a benchmark that was killed goes on where
it was; processes with different `--seeds` may run at the same time. The report is NAME/table.md and
NAME/ratios.json beside the runs, and docs/images/fedddpm-NAME.png; docs/fedddpm.md includes the
tables. matplotlib draws the picture (dependency group `benchmark`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

from concilium.simulate.spec import load_sweep
from concilium.simulate.sweep import identity_of, run_points
from study.strategies import FedDDPMPlus, RoundRecord

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fedddpm"
DOCS = HERE.parent / "docs"

BASELINES = ("fedavg", "fedprox", "scaffold", "fedadam", "fedyogi")
PLUS, PAPER = "fedddpm-plus", "fedddpm"
UNCORRECTED = "fedavg-end"  # corrected in the last round only, and watched in every round
SLOW = "fedddpm-plus-slow"  # corrected when learning is slow, and at the end; nothing is shared
DRAWN = ("fedavg", "scaffold", "fedadam", PAPER, PLUS, SLOW, "central", "auxiliary")

Json = dict[str, Any]
Runs = dict[str, list[Json]]


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
        if path.exists() and json.loads(path.read_text("utf-8"))["identity"] == identity_of(point):
            continue
        for _ in run_points([point], work / name, told):
            lines = (work / name / point.label / "metrics.jsonl").read_text("utf-8").splitlines()
            made = {
                "run": point.name,
                "seed": point.seed,
                "identity": identity_of(point),
                "torch": torch.__version__,
                "events": [json.loads(line) for line in lines],
            }
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
        done += 1


def report(name: str) -> None:
    """The table, the ratios and the picture of the runs that are there."""
    runs = _runs(name)
    folder = RESULTS / name
    parts = [table(runs), ratios_table(ratios(runs)), trigger_table(runs.get(UNCORRECTED, []))]
    (folder / "table.md").write_text("\n".join(part for part in parts if part), "utf-8")
    (folder / "ratios.json").write_text(json.dumps(ratios(runs), indent=2) + "\n", "utf-8")
    if PLUS in runs:
        draw(runs, DOCS / "images" / f"fedddpm-{name}.png")
    _include(name, (folder / "table.md").read_text("utf-8"))


def _runs(name: str) -> Runs:
    """Runs by name, in the order of the study's file; one of each seed."""
    found: Runs = {}
    sweep = load_sweep(HERE / "studies" / f"{name}.toml")
    for entry in sweep.simulation.run:
        paths = [RESULTS / name / f"{entry.name}-{seed}.json" for seed in sweep.simulation.seeds]
        there = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
        if there:
            found[entry.name] = there
    return found


def evaluations(run: Json) -> list[Json]:
    """The evaluations of a run, by round."""
    return [event for event in run["events"] if event["event"] == "evaluation"]


def finals(runs: list[Json], key: str) -> list[float]:
    """The last value of each seed."""
    return [evaluations(run)[-1][key] for run in runs]


def table(runs: Runs) -> str:
    """Final FID, KID and coverage of every run: mean ± standard deviation over the seeds."""
    lines = [
        "| run | seeds | local steps | correction steps | FID | KID · 10³ | coverage |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    auxiliary = [
        event
        for run in runs.get(PLUS, [])
        for event in run["events"]
        if event["event"] == "auxiliary"
    ]
    if auxiliary:
        cells = [_spread([e[key] * scale for e in auxiliary], n) for key, scale, n in _COLUMNS]
        lines.append(f"| *the auxiliary set* | {len(auxiliary)} | | | {' | '.join(cells)} |")
    for name, some in runs.items():
        cells = [_spread([v * scale for v in finals(some, k)], n) for k, scale, n in _COLUMNS]
        local = finals(some, "local_steps")[0]
        corrected = mean(finals(some, "correction_steps"))
        cells = [str(len(some)), str(local), f"{corrected:.0f}", *cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


_COLUMNS = (("fid", 1.0, 3), ("kid", 1e3, 2), ("coverage", 1.0, 3))


def _spread(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def ratios(runs: Runs) -> Json:
    """The aims, each as a ratio of means over the seeds that both of its runs have; absent where a
    run is missing. The best baseline is the best of those that have as many seeds as any."""
    found: Json = {}
    if PLUS not in runs:
        return found

    def paired(name: str, other: str) -> tuple[list[Json], list[Json]] | None:
        one, two = runs.get(name, []), runs.get(other, [])
        shared = {run["seed"] for run in one} & {run["seed"] for run in two}
        if not shared:
            return None
        return [r for r in one if r["seed"] in shared], [r for r in two if r["seed"] in shared]

    def of_fids(name: str, other: str) -> float | None:
        pair = paired(name, other)
        return mean(finals(pair[0], "fid")) / mean(finals(pair[1], "fid")) if pair else None

    most = max((len(runs[name]) for name in BASELINES if name in runs), default=0)
    there = [name for name in BASELINES if name in runs and len(runs[name]) == most]
    best = min(there, key=lambda name: mean(finals(runs[name], "fid")), default="")
    if pair := paired(PLUS, best):
        found["best_baseline"] = best
        found["fid_vs_best_baseline"] = of_fids(PLUS, best)
        found["difference_over_spread"] = _separation(
            finals(pair[1], "fid"), finals(pair[0], "fid")
        )
    if pair := paired(PLUS, PAPER):
        steps = [mean(finals(some, "correction_steps")) for some in pair]
        found["plus_fid_vs_fedddpm"] = of_fids(PLUS, PAPER)
        found["plus_steps_vs_fedddpm"] = steps[0] / steps[1]
    if pair := paired(PLUS, "fedavg"):
        found["rounds_to_fedavg_fid"] = _rounds_to(pair[0], mean(finals(pair[1], "fid")))
    for name in ("fedavg", SLOW):
        found[f"secure_vs_float_{name}"] = of_fids(f"{name}-secure", name)
    for control in ("fedavg-end", "auxiliary", "auxiliary-3x", "fedavg-double", "central"):
        found[f"fid_vs_{control}"] = of_fids(PLUS, control)
    shown_when_unknown = ("difference_over_spread", "rounds_to_fedavg_fid")
    return {k: v for k, v in found.items() if v is not None or k in shown_when_unknown}


def _separation(others: list[float], plus: list[float]) -> float | None:
    """How many pooled standard deviations the means are apart."""
    if min(len(others), len(plus)) < 2:
        return None
    spread = ((stdev(others) ** 2 + stdev(plus) ** 2) / 2) ** 0.5
    return (mean(others) - mean(plus)) / spread


def _rounds_to(runs: list[Json], target: float) -> float | None:
    """First evaluated round whose mean FID is at most the target, as a share of all rounds."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for event in evaluations(run):
            by_round[event["round"]].append(event["fid"])
    reached = [number for number, fids in sorted(by_round.items()) if mean(fids) <= target]
    return reached[0] / max(by_round) if reached else None


_AIMS = {
    "fid_vs_best_baseline": 0.9,
    "plus_fid_vs_fedddpm": 1.05,
    "plus_steps_vs_fedddpm": 1 / 3,
    "rounds_to_fedavg_fid": 0.5,
}


def ratios_table(found: Json) -> str:
    """The ratios with their aims."""
    if not found:
        return ""
    lines = ["", "| ratio | measured | aim |", "|---|--:|--:|"]
    for name, value in found.items():
        aim = f"≤ {_AIMS[name]:.2f}" if name in _AIMS else ""
        shown = "–" if value is None else f"{value:.3f}" if isinstance(value, float) else value
        if name in _AIMS and isinstance(value, float) and round(value, 3) > round(_AIMS[name], 3):
            shown = f"**{shown}** (missed)"
        lines.append(f"| `{name}` | {shown} | {aim} |")
    return "\n".join(lines) + "\n"


def trigger_table(runs: list[Json]) -> str:
    """In which round the first correction comes, by signal, W and τ, one number per seed.

    Until then every such run is the run without corrections: so it is read off that one's losses.
    """
    if not runs:
        return ""
    lines = ["", "| signal | W | " + " | ".join(f"τ = {tau}" for tau in _TAUS) + " |"]
    lines.append("|---|--:|" + "--:|" * len(_TAUS))
    for signal in ("auxiliary", "silos"):
        for window in (1, 2, 3, 5):
            cells = [
                ", ".join(_first_correction(run, signal, window, tau) for run in runs)
                for tau in _TAUS
            ]
            lines.append(f"| {signal} | {window} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_TAUS = (0.02, 0.05, 0.1, 0.2)


def _first_correction(
    run: Json, signal: Literal["auxiliary", "silos"], window: int, tau: float
) -> str:
    rule = FedDDPMPlus(window=window, tau=tau, signal=signal, first_correction_steps=0)
    silo = {e["round"]: e["loss"] for e in run["events"] if e["event"] == "round"}
    history: list[RoundRecord] = []
    for event in run["events"]:
        if event["event"] == "decision":
            number = event["round"]
            history.append(RoundRecord(number, event["loss"], silo_loss=silo[number]))
            if rule.decide(history).correct:
                return str(number)
    return "–"


def draw(runs: Runs, path: Path) -> None:
    """FID by round: the mean over the seeds, and the range of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), dpi=110)
    for name in (n for n in DRAWN if n in runs):
        curves = [[(e["round"], e["fid"]) for e in evaluations(run)] for run in runs[name]]
        rounds = [number for number, _ in curves[0]]
        values = [[fid for _, fid in curve] for curve in curves]
        columns = list(zip(*values, strict=True))
        (line,) = axes.plot(rounds, [mean(c) for c in columns], marker="o", ms=3, label=name)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(rounds, low, high, alpha=0.15, color=line.get_color())
    # Of factors, not differences: the slow starters would squeeze the others into a line.
    axes.set(xlabel="round", ylabel="FID", yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _include(name: str, text: str) -> None:
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
    parser.add_argument("study", choices=names)
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
