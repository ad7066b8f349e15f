"""Pictures of the runs of `benchmarks.fedddpm`, by matplotlib (dependency group `benchmark`)."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.fedddpm_tables import (
    METRICS,
    PLUS,
    Runs,
    auxiliary_sets,
    evaluations,
    finals,
)

_CONTROLS = re.compile(r"(fedavg-(end|double)|central|local|auxiliary)(-|$)")
"""Models that are made without FedDDPM+, to judge it by: no strategies of their own."""
_DASHED = "--", "-.", ":"


def draw_rounds(runs: Runs, path: Path) -> None:
    """What `METRICS` names, by the share of a run's rounds that are done: the mean over the seeds,
    and their range as a band; of every strategy in `path`, and of the default among its controls
    in the file beside it whose name ends in "-controls". The default is black; dotted and grey: the
    auxiliary set itself."""
    strategies, controls = apart(runs)
    _draw_rounds(strategies, runs, path)
    _draw_rounds(controls, runs, path.with_name(f"{path.stem}-controls{path.suffix}"))


def apart(runs: Runs) -> tuple[Runs, Runs]:
    """The strategies, without those by the secure sum, which lie on the ones in float; and the
    controls, FedAvg and the default among them."""
    controls = {name: some for name, some in runs.items() if _CONTROLS.match(name)}
    strategies = {name: some for name, some in runs.items() if name not in controls}
    beside = {name: strategies[name] for name in ("fedavg", PLUS) if name in strategies}
    floats = {n: some for n, some in strategies.items() if not n.endswith("-secure")}
    return floats, {**beside, **controls}


def _draw_rounds(shown: Runs, runs: Runs, path: Path) -> None:
    from matplotlib import colormaps

    colors = colormaps["tab10"].colors
    figure, axes = _figure(len(METRICS), (11.0, 9.0), rows=2)
    for plot, (key, title, scale, _) in zip(axes, METRICS, strict=True):
        for number, name in enumerate(shown):
            curves = [evaluations(run) for run in shown[name]]
            columns = list(zip(*curves, strict=True))
            done = [column[0]["round"] / curves[0][-1]["round"] for column in columns]
            values = [[event[key] * scale for event in column] for column in columns]
            turn, color = divmod(number, len(colors))
            look = {"color": colors[color], "ls": ("-", *_DASHED)[turn % 4]}
            if name == PLUS:
                look = {"color": "black", "lw": 2.5, "zorder": 3}
            plot.plot(done, [mean(v) for v in values], marker="o", ms=3, label=name, **look)
            low, high = [min(v) for v in values], [max(v) for v in values]
            plot.fill_between(done, low, high, alpha=0.1, color=look["color"])
        if sets := max((auxiliary_sets(some) for some in runs.values()), key=len):
            level = mean(event[key] * scale for event in sets)
            plot.axhline(level, color="grey", ls=":", label="the auxiliary set")
        plot.set(xlabel="share of the rounds", ylabel=title, xlim=(0, 1.02))
        if key in ("fid", "kid"):
            _logarithmic(plot)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8)
    _save(figure, path, below=0.1)


def draw_finals(runs: Runs, path: Path) -> None:
    """The final FID of every run: a large dot for the mean over the seeds, a small one for each.
    Where names end in a recipe (KIND-RECIPE), each kind that has a KIND-fedavg has its plot."""
    kinds = [name.removesuffix("-fedavg") for name in runs if name.endswith("-fedavg")] or [""]
    groups = {kind: [name for name in runs if _kind(name, kinds) == kind] for kind in kinds}
    recipes = list(dict.fromkeys(_recipe(name, kinds) for name in runs))
    rows = -(-len(groups) // 2)
    size = (11.0, 0.5 + rows * (0.8 + 0.2 * max(len(names) for names in groups.values())))
    if len(groups) == 1:
        figure, plots = _figure(1, (7.0, 0.9 + 0.24 * len(runs)))
    else:
        figure, plots = _figure(2 * rows, size, rows=rows)
    highest = max(max(finals(some, "fid")) for some in runs.values())
    for plot, (kind, names) in zip(plots, groups.items(), strict=False):
        for row, name in enumerate(names):
            fids, color = finals(runs[name], "fid"), "C0"
            if kind:
                color = f"C{recipes.index(_recipe(name, kinds)) % 10}"
            plot.plot(fids, [row] * len(fids), ".", color=color, ms=4)
            plot.plot(mean(fids), row, "o", color=color, ms=7)
        plot.set(title=kind, xlim=(0, 1.05 * highest), ylim=(len(names) - 0.5, -0.5))
        plot.set(xlabel="FID")
        plot.set_yticks(range(len(names)), [_recipe(n, kinds) for n in names], fontsize=8)
    for plot in plots[len(groups) :]:
        plot.set_visible(False)
    _save(figure, path)


def _kind(name: str, kinds: list[str]) -> str:
    """The longest of the kinds that a name begins with."""
    return max((k for k in kinds if not k or name.startswith(f"{k}-")), key=len, default=kinds[0])


def _recipe(name: str, kinds: list[str]) -> str:
    kind = _kind(name, kinds)
    return name.removeprefix(f"{kind}-") if kind else name


def draw_sizes(runs: Runs, path: Path) -> None:
    """The final FID by the size of the auxiliary set, of runs RECIPE-IMAGES: the mean over the
    seeds, and their range as a band. A run that is named otherwise is a level line."""
    figure, (plot,) = _figure(1, (7.0, 4.2))
    sized = {name: some for name, some in runs.items() if _last(name).isdigit()}
    recipes = list(dict.fromkeys(name.rpartition("-")[0] for name in sized))
    for color, recipe in enumerate(recipes):
        of_it = {n: some for n, some in sized.items() if n.rpartition("-")[0] == recipe}
        found = sorted((int(_last(name)), finals(some, "fid")) for name, some in of_it.items())
        images, fids = [size for size, _ in found], [values for _, values in found]
        plot.plot(images, [mean(v) for v in fids], f"C{color}o-", ms=4, label=recipe)
        low, high = [min(v) for v in fids], [max(v) for v in fids]
        plot.fill_between(images, low, high, alpha=0.15, color=f"C{color}")
    for name in (name for name in runs if name not in sized):
        recipe = name.rpartition("-")[0]
        color = recipes.index(recipe) if recipe in recipes else len(recipes)
        plot.axhline(mean(finals(runs[name], "fid")), color=f"C{color}", ls=":", label=name)
    sizes = sorted({int(_last(name)) for name in sized})
    plot.set(xlabel="images wanted", ylabel="FID", xscale="log", ylim=(0, None))
    plot.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    plot.set_xticks([], minor=True)
    plot.legend(fontsize=8)
    _save(figure, path)


def _last(name: str) -> str:
    return name.rpartition("-")[2]


def _figure(plots: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure, and its plots in reading order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, plots // rows, figsize=size, dpi=110, squeeze=False)
    for plot in axes.flat:
        plot.grid(alpha=0.3, which="both")
    return figure, list(axes.flat)


def _logarithmic(plot: Any) -> None:
    """Of factors, not differences: slow starters would squeeze the others into a line."""
    from matplotlib import ticker

    plot.set_yscale("log", nonpositive="clip")
    plot.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    plot.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    plot.yaxis.set_minor_formatter(ticker.NullFormatter())


def _save(figure: Any, path: Path, below: float = 0.0) -> None:
    """With a share of its height left free below."""
    from matplotlib import pyplot

    figure.tight_layout(rect=(0.0, below, 1.0, 1.0))
    figure.savefig(path)
    pyplot.close(figure)
