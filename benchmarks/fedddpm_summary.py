"""The table at the head of docs/fedddpm.md: where FedDDPM+ is ahead, and of what.

A row for each split; beside the default the best usual strategy, FedDDPM with thrice the correction
steps, and the controls that make one model of all silos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from benchmarks.fedddpm_tables import (
    BASELINES,
    PLUS,
    Json,
    Runs,
    auxiliary_sets,
    best,
    family,
    finals,
)


@dataclass(frozen=True)
class Row:
    """Runs of a study; those of a study by kind are named KIND-RECIPE."""

    title: str
    study: str
    kind: str = ""


ROWS = (
    Row("Fashion-MNIST, two classes each, fresh seeds", "fashion-fresh"),
    Row("…, the seeds that chose the recipe", "fashion-mnist"),
    Row("…, one class each, ten silos", "fashion-heterogeneity", "one-class"),
    Row("…, two classes each, ten silos", "fashion-heterogeneity", "ten-silos"),
    Row("…, scanners that differ", "fashion-heterogeneity", "scanners"),
    Row("…, unequal numbers", "fashion-heterogeneity", "quantity"),
    Row("…, a Dirichlet of 0.1", "fashion-heterogeneity", "dirichlet-0-1"),
    Row("…, a Dirichlet of 1", "fashion-heterogeneity", "dirichlet-1"),
    Row("…, IID", "fashion-heterogeneity", "iid"),
    Row("digits, two classes each", "digits"),
    Row("…, one class each, ten silos", "digits-heterogeneity", "one-class"),
    Row("…, two classes each, ten silos", "digits-heterogeneity", "ten-silos"),
    Row("…, scanners that differ", "digits-heterogeneity", "scanners"),
    Row("…, unequal numbers", "digits-heterogeneity", "quantity"),
    Row("…, a Dirichlet of 0.1", "digits-heterogeneity", "dirichlet-0-1"),
    Row("…, a Dirichlet of 1", "digits-heterogeneity", "dirichlet-1"),
    Row("…, IID", "digits-heterogeneity", "iid"),
)
_BY_KIND = {
    "plus": PLUS,
    "fedddpm": "fedddpm-long",
    "double": "fedavg-double",
    "end": "fedavg-end-long",
    "end-whole": "fedavg-end-long-rate-2e-2",
}
"""What a recipe of a study by kind is called in the others; the rest is named alike."""
_OTHERS = ("fedavg-end-long", "auxiliary-3x", "central")
_POOLED = "central-3x"
"""As many steps as the default takes one after the other, of all images: what nobody may have. No
control, and not in the way of a bold figure."""


def summary_table(studies: Mapping[str, Runs]) -> str:
    """The final FIDs, in the mean over the seeds; the default's is bold where no other model of its
    row is shown with a lower one, but for that of all images in one place."""
    titles = (
        "final FID",
        "seeds",
        "FedDDPM+",
        "FedAvg",
        "best usual strategy",
        "FedDDPM, thrice the steps",
        "FedAvg, twice the rounds",
        "best other control",
        "all images, as many steps",
        "the set",
    )
    lines = [f"| {' | '.join(titles)} |", "|---|--:|--:|--:|:--|--:|--:|:--|--:|--:|"]
    for row in ROWS:
        runs = _named_alike(studies.get(row.study, {}), row.kind)
        if PLUS in runs:
            lines.append(f"| {row.title} | {' | '.join(_cells(runs))} |")
    return "\n".join(lines) + "\n"


def _cells(runs: Runs) -> list[str]:
    usual = best(runs, lambda name: family(name) in BASELINES)
    thrice = best(runs, lambda name: name.startswith("fedddpm-long"))
    control = best(runs, lambda name: name.startswith(_OTHERS) and name != _POOLED)
    others = [runs[name] for name in (usual, thrice, "fedavg-double", control) if name in runs]
    mine, sets = _cell(runs, PLUS), auxiliary_sets(runs[PLUS])
    if all(float(mine) <= round(_fid(some), 3) for some in others):
        mine = f"**{mine}**"
    return [
        str(len(runs[PLUS])),
        mine,
        _cell(runs, "fedavg"),
        f"{_cell(runs, usual)} {_title(usual)}".strip(),
        _cell(runs, thrice),
        _cell(runs, "fedavg-double"),
        f"{_cell(runs, control)} {_title(control)}".strip(),
        _cell(runs, _POOLED),
        f"{mean(event['fid'] for event in sets):.3f}" if sets else "–",
    ]


def _named_alike(runs: Runs, kind: str) -> Runs:
    """Of one kind, under the names that other studies use."""
    if not kind:
        return runs
    own = {n.removeprefix(f"{kind}-"): some for n, some in runs.items() if n.startswith(f"{kind}-")}
    return {_BY_KIND.get(recipe, recipe): some for recipe, some in own.items()}


def _fid(runs: list[Json]) -> float:
    return mean(finals(runs, "fid"))


def _cell(runs: Runs, name: str) -> str:
    return f"{_fid(runs[name]):.3f}" if name in runs else "–"


def _title(name: str) -> str:
    """A control by its name in the tables, in italics, and a strategy by its own."""
    strategies = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD"}
    strategies |= {"fedadam": "FedAdam", "fedyogi": "FedYogi"}
    if family(name) in strategies:
        return strategies[family(name)]
    return f"*{'end' if name.startswith('fedavg-end') else name}*" if name else ""
