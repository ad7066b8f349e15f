"""Tables of the runs of `benchmarks.fedddpm`: final figures, by round, ratios, the trigger."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

from study.strategies import FedDDPMPlus, RoundRecord

BASELINES = ("fedavg", "fedprox", "scaffold", "fedadam", "fedyogi")
"""The usual strategies; a run that is named fedadam-0-03, say, is one with another constant."""

PLUS, SHORT = "fedddpm-plus", "fedddpm-plus-short"
SLOW = "fedddpm-plus-slow"  # corrected when learning is slow, and at the end; nothing is shared
PAPER = {PLUS: "fedddpm-long", SHORT: "fedddpm", SLOW: "fedddpm"}
"""Each recipe of FedDDPM+, and the run of FedDDPM that has thrice its correction steps. One that is
named fedddpm-long-rate-2e-3 or fedddpm-long-shared, say, has as many with another setting."""
UNCORRECTED = "fedavg-end"  # corrected in the last round only, and watched in every round

Json = dict[str, Any]
Runs = dict[str, list[Json]]
"""By name, one of each seed, in the order of the study's file."""


def evaluations(run: Json) -> list[Json]:
    """The evaluations of a run, by round."""
    return _measured(run, "evaluation")


def auxiliary_sets(runs: list[Json]) -> list[Json]:
    """What was measured of the auxiliary set itself, by seed."""
    return [event for run in runs for event in _measured(run, "auxiliary")]


def unseen_images(runs: list[Json]) -> list[Json]:
    """What was measured of real images that no silo has, by seed; older runs lack it."""
    return [event for run in runs for event in _measured(run, "unseen")]


def _measured(run: Json, kind: str) -> list[Json]:
    return [
        {**event, "worst": min(event["coverage_by_silo"])}
        for event in run["events"]
        if event["event"] == kind
    ]


def finals(runs: list[Json], key: str) -> list[float]:
    """The last value of each seed."""
    return [event[key] for event in _finals(runs)]


def _finals(runs: list[Json]) -> list[Json]:
    return [evaluations(run)[-1] for run in runs]


def table(runs: Runs) -> str:
    """What `METRICS` names of every run, in the end: mean ± standard deviation over the seeds;
    beside it that of up to as many real images that no silo has, and of the auxiliary set itself,
    in a row where all runs have the same, else in a column (its images and its FID). What
    `SOMETIMES` names has a column where a run has it. Below it the feature network, which has to be
    the same of all."""
    ends = [event for some in runs.values() for event in _finals(some)]
    metrics = (*METRICS, *(m for m in SOMETIMES if any(m[0] in event for event in ends)))
    titles = " | ".join(title for _, title, _, _ in metrics)
    head = f"| run | seeds | local steps | correction steps | {titles} |"
    sets = {name: auxiliary_sets(some) for name, some in runs.items()}
    # One that was made again on another processor differs by rounding alone.
    firsts = [some[0] for some in sets.values() if some]
    fids = [first["fid"] for first in firsts]
    differ = len({first["images"] for first in firsts}) > 1
    differ = differ or max(fids, default=0.0) > 1.2 * min(fids, default=0.0)
    lines = [head + (" its auxiliary set: images, FID |" if differ else "")]
    lines.append("|---|" + "--:|" * (lines[0].count("|") - 2))
    if not differ and (most := max(sets.values(), key=len)):
        lines.append(
            f"| *the auxiliary set* | {len(most)} | | | {' | '.join(_cells(most, metrics))} |"
        )
    if fresh := max((unseen_images(some) for some in runs.values()), key=len):
        measured = " | ".join(_cells(fresh, metrics))
        lines.append(f"| *images that no silo has* | {len(fresh)} | | | {measured} |")
        lines[-1] += " |" if differ else ""
    for name, some in runs.items():
        local = finals(some, "local_steps")[0]
        corrected = mean(finals(some, "correction_steps"))
        row = [str(len(some)), str(local), f"{corrected:.0f}", *_cells(_finals(some), metrics)]
        if differ:
            row.append(_described(sets[name]))
        lines.append(f"| {name} | {' | '.join(row)} |")
    networks = {(event["network"], event["network_sha256"]) for event in ends}
    if len(networks) > 1:
        raise ValueError(f"figures of different feature networks make no table: {networks}")
    lines += ["", *(f"Features: `{name}`, SHA-256 {sha256[:16]}…" for name, sha256 in networks)]
    return "\n".join(lines) + "\n"


def _described(sets: list[Json]) -> str:
    if not sets:
        return ""
    images = mean(event["images"] for event in sets)
    return f"{images:.0f}: {_spread([event['fid'] for event in sets], 3)}"


def _cells(measured: list[Json], metrics: tuple[Metric, ...]) -> list[str]:
    return [
        _spread([e[key] * scale for e in measured], n) if all(key in e for e in measured) else "–"
        for key, _, scale, n in metrics
    ]


_RECIPES = (
    ("plus", "*plus*"),
    ("and-last", "*and-last*"),
    ("throughout", "*throughout*"),
    ("short", "*short*"),
    ("slow", "*slow*"),
    ("fedddpm", "FedDDPM"),
    ("fedavg", "FedAvg"),
    ("fedprox", "FedProx"),
    ("scaffold", "SCAFFOLD"),
    ("fedadam", "FedAdam"),
    ("fedyogi", "FedYogi"),
    ("end", "*end*"),
    ("end-whole", "*end-whole*"),
    ("double", "*double*"),
    ("auxiliary", "*auxiliary*"),
    ("auxiliary-3x", "*auxiliary-3x*"),
    ("central", "*central*"),
    ("local", "*local*"),
)
"""How a run of a study by kind of heterogeneity ends, the default first, and its column's title."""
_OTHERWISE = ("local", "and-last", "fedddpm")


def kinds_table(runs: Runs) -> str:
    """The final FIDs of a study whose runs are named KIND-RECIPE, a row for each kind of
    heterogeneity: of the auxiliary set, and of each recipe, in the mean over the seeds. Bold is the
    lowest of those that make one model of all silos, with no more correction steps than the
    default: *local* makes a model for each silo, *and-last* and FedDDPM correct for longer."""
    by_kind: dict[str, Runs] = defaultdict(dict)
    for name, some in runs.items():
        # "auxiliary-3x" ends with no other recipe, so that at most one of them fits.
        for recipe, _ in _RECIPES:
            if name.endswith(f"-{recipe}"):
                by_kind[name.removesuffix(f"-{recipe}")][recipe] = some
    by_kind = {kind: some for kind, some in by_kind.items() if {"plus", "fedavg"} <= some.keys()}
    if not by_kind:
        return ""
    shown = [(r, title) for r, title in _RECIPES if any(r in some for some in by_kind.values())]
    titles = " | ".join(title for _, title in shown)
    lines = [f"| final FID | the set | {titles} |", "|---|--:|" + "--:|" * len(shown)]
    for kind, some in by_kind.items():
        fids = {recipe: mean(finals(of_seeds, "fid")) for recipe, of_seeds in some.items()}
        least = min(fid for recipe, fid in fids.items() if recipe not in _OTHERWISE)
        sets = [event["fid"] for event in max(map(auxiliary_sets, some.values()), key=len)]
        cells = [f"{mean(sets):.3f}" if sets else "–"]
        for recipe, _ in shown:
            cell = f"{fids[recipe]:.3f}" if recipe in fids else "–"
            best = recipe not in _OTHERWISE and fids.get(recipe) == least
            cells.append(f"**{cell}**" if best else cell)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rounds_table(runs: Runs) -> str:
    """What `METRICS` names, by round: a table each, mean ± standard deviation over the seeds.

    Runs differ in their number of rounds; what stands in one column has done the same share of it.
    """
    counts = {name: [e["round"] for e in evaluations(some[0])] for name, some in runs.items()}
    parts = []
    for count in sorted({len(rounds) for rounds in counts.values()}, reverse=True):
        for key, title, scale, digits in METRICS:
            shares = " | ".join(f"{k}/{count}" for k in range(1, count + 1))
            lines = [
                f"{title}, by the share of the rounds that are done",
                "",
                f"| run | rounds | {shares} |",
                "|---|--:|" + "--:|" * count,
            ]
            for name in (name for name, rounds in counts.items() if len(rounds) == count):
                columns = zip(*(evaluations(run) for run in runs[name]), strict=True)
                cells = [_spread([e[key] * scale for e in column], digits) for column in columns]
                lines.append(f"| {name} | {counts[name][-1]} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


Metric = tuple[str, str, float, int]

METRICS: tuple[Metric, ...] = (
    ("fid", "FID", 1.0, 3),
    ("kid", "KID · 10³", 1e3, 2),
    ("coverage", "coverage", 1.0, 3),
    ("worst", "worst silo's coverage", 1.0, 3),
)
"""Key, title, factor and digits of what an evaluation is shown by. The last is the coverage of the
images of that silo whose images are covered least."""

SOMETIMES: tuple[Metric, ...] = (
    ("copies", "near-copies", 1.0, 3),
    ("accuracy", "accuracy", 1.0, 3),
    ("accuracy_of_real", "accuracy of real images", 1.0, 3),
)
"""Share of samples nearer to a real image than 0.05 of these are to another, which older runs lack;
and, of conditional models, how many of the images that no silo has are told apart by a classifier
trained on samples, and by one trained on the silos' images."""


def _spread(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


_CONTROLS = (
    "fedavg-end",
    "fedavg-end-long",
    "fedavg-end-long-rate-2e-2",
    "auxiliary",
    "auxiliary-3x",
    "auxiliary-3x-falling",
    "fedavg-double",
    "central",
    "central-falling",
    "central-3x",
)


@dataclass(frozen=True)
class _Pair:
    """Two runs, of the seeds that both have."""

    one: list[Json]
    two: list[Json]

    def of(self, key: str) -> float:
        """The ratio of the means over the seeds."""
        return mean(finals(self.one, key)) / mean(finals(self.two, key))

    @property
    def ahead(self) -> str:
        """In how many seeds the first ends lower."""
        fids = zip(finals(self.one, "fid"), finals(self.two, "fid"), strict=True)
        lower = [one < two for one, two in fids]
        return f"{sum(lower)}/{len(lower)}"


def _paired(runs: Runs, name: str, other: str) -> _Pair | None:
    one, two = runs.get(name, []), runs.get(other, [])
    shared = {run["seed"] for run in one} & {run["seed"] for run in two}
    if not shared:
        return None
    one, two = ([run for run in some if run["seed"] in shared] for some in (one, two))
    return _Pair(one, two)


def ratios(runs: Runs, plus: str = PLUS) -> Json:
    """The aims for the run `plus`, each as a ratio of means over the seeds that both of its runs
    have; absent where a run is missing. Seeds share the split, the first model and the noise, so
    beside each stands in how many of them `plus` ends lower. The best baseline, and the best
    FedDDPM with thrice the steps, is the best of those that have as many seeds as any, with
    whatever constant."""
    if plus not in runs:
        return {}
    found = _against_strategies(runs, plus)
    for name, run, other in (
        ("secure_vs_float", f"{plus}-secure", plus),
        ("secure_vs_float_fedavg", "fedavg-secure", "fedavg"),
    ):
        if pair := _paired(runs, run, other):
            found[name] = pair.of("fid")
    for control in _CONTROLS:
        if pair := _paired(runs, plus, control):
            found |= {f"fid_vs_{control}": pair.of("fid"), f"seeds_ahead_of_{control}": pair.ahead}
    return found


def _against_strategies(runs: Runs, plus: str) -> Json:
    found: Json = {}
    usual = best(runs, lambda name: family(name) in BASELINES)
    if pair := _paired(runs, plus, usual):
        found["best_baseline"] = usual
        found["fid_vs_best_baseline"] = pair.of("fid")
        found["seeds_ahead_of_best_baseline"] = pair.ahead
        found["difference_over_spread"] = _separation(
            finals(pair.two, "fid"), finals(pair.one, "fid")
        )
    thrice = best(runs, lambda name: _FEDDDPM.sub("", name) == PAPER[plus])
    if pair := _paired(runs, plus, thrice):
        found["best_fedddpm"] = thrice
        found["plus_fid_vs_fedddpm"] = pair.of("fid")
        found["seeds_ahead_of_fedddpm"] = pair.ahead
        found["plus_steps_vs_fedddpm"] = pair.of("correction_steps")
    for other in sorted({*PAPER.values()} - {PAPER[plus]}):
        if pair := _paired(runs, plus, other):
            found[f"fid_vs_{other}"] = pair.of("fid")
            found[f"steps_vs_{other}"] = pair.of("correction_steps")
    if pair := _paired(runs, plus, "fedavg"):
        fids = finals(pair.two, "fid")
        found["rounds_to_fedavg_fid"] = _rounds_to(pair.one, mean(fids))
        found["rounds_to_fedavg_fid_by_seed"] = [
            _rounds_to([run], fid) for run, fid in zip(pair.one, fids, strict=True)
        ]
    return found


_CONSTANT = re.compile(r"-\d+(-\d+)?$")
_FEDDDPM = re.compile(r"-(rate-[\de-]+|shared)$")


def family(name: str) -> str:
    """A strategy's name without its constant: that of fedadam-0-03 is fedadam."""
    return _CONSTANT.sub("", name)


def best(runs: Runs, competes: Callable[[str], bool]) -> str:
    """The lowest mean of those that have as many seeds as any of them; "" where there is none."""
    there = {name: some for name, some in runs.items() if competes(name)}
    most = max((len(some) for some in there.values()), default=0)
    means = {n: mean(finals(some, "fid")) for n, some in there.items() if len(some) == most}
    return min(means, key=lambda name: means[name], default="")


def _separation(others: list[float], plus: list[float]) -> float | None:
    """How many pooled standard deviations the means are apart."""
    if min(len(others), len(plus)) < 2:
        return None
    spread = ((stdev(others) ** 2 + stdev(plus) ** 2) / 2) ** 0.5
    return (mean(others) - mean(plus)) / spread if spread else None


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


def ratios_table(runs: Runs) -> str:
    """The ratios of the recipes of FedDDPM+ that were run, the default first, with their aims."""
    found = {name: ratios(runs, name) for name in PAPER if name in runs}
    if not found:
        return ""
    names = dict.fromkeys(name for some in found.values() for name in some)
    lines = ["", f"| ratio | {' | '.join(found)} | aim |", "|---|" + "--:|" * (len(found) + 1)]
    for name in names:
        cells = [_ratio(name, some.get(name)) for some in found.values()]
        aim = f"≤ {_AIMS[name]:.2f}" if name in _AIMS else ""
        lines.append(f"| `{name}` | {' | '.join(cells)} | {aim} |")
    return "\n".join(lines) + "\n"


def _ratio(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_ratio(name, one) for one in value)
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    missed = name in _AIMS and round(value, 3) > round(_AIMS[name], 3)
    return f"**{value:.3f}** (missed)" if missed else f"{value:.3f}"


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
