"""Who holds what in the studies by kind of heterogeneity: `python -m benchmarks.splits`.

Draws docs/images/fedddpm-splits.png: for each kind of digits-heterogeneity and
fashion-heterogeneity the images per silo and class with the first seed, and the total of each silo.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fedddpm import DOCS, HERE
from concilium.datasets import load_dataset
from concilium.simulate.silos import federate
from concilium.simulate.spec import load_sweep

STUDIES = ("digits-heterogeneity", "fashion-heterogeneity")


def splits(study: str) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(kind, images [silos, classes]) with the study's first seed."""
    sweep = load_sweep(HERE / "studies" / f"{study}.toml")
    data = None
    for point in sweep.points():
        if point.seed == sweep.simulation.seeds[0] and point.name.endswith("-fedavg"):
            size = point.plan.data.image_size
            data = data or load_dataset(point.simulation.data, size)
            yield point.name.removesuffix("-fedavg"), federate(point, data).histogram


def draw(found: dict[str, list[tuple[str, NDArray[np.int64]]]], path: Path) -> None:
    """A row of plots for each study; the darker, the more images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(map(len, found.values()))
    figure, axes = pyplot.subplots(len(found), columns, figsize=(13.0, 5.4), dpi=110, squeeze=False)
    for plot in axes.flat:
        plot.set_visible(False)
    for row, (study, kinds) in zip(axes, found.items(), strict=True):
        for plot, (kind, counts) in zip(row, kinds, strict=False):
            plot.set_visible(True)
            plot.imshow(counts, cmap="Blues", vmin=0, aspect="auto")
            plot.set_title(f"{study.partition('-')[0]}: {kind}", fontsize=8)
            plot.set_xticks(range(counts.shape[1]), range(counts.shape[1]), fontsize=6)
            totals = [f"{silo}: {n:,}" for silo, n in enumerate(counts.sum(axis=1), start=1)]
            plot.set_yticks(range(len(counts)), totals, fontsize=6)
    figure.supxlabel("class", fontsize=8)
    figure.supylabel("silo: its images", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    draw({study: list(splits(study)) for study in STUDIES}, DOCS / "images" / "fedddpm-splits.png")


if __name__ == "__main__":
    main()
