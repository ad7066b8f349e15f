"""What the figures of `benchmarks.fedddpm` can tell at all: `python -m benchmarks.limits`.

Two limits. Real images that no silo has, measured as samples are, are what a perfect model would
reach with so many of them. And a judged correction measures its model by other samples than the
round's evaluation does, so that runs that are there tell how far two draws of one model differ. The
result is benchmarks/results/fedddpm/limits.json; docs/fedddpm.md includes its tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.fedddpm import HERE, RESULTS, include
from concilium.datasets import load_dataset
from concilium.simulate.measure import Ruler
from concilium.simulate.memo import Memo
from concilium.simulate.silos import execution_of, federate
from concilium.simulate.spec import load_sweep

Json = dict[str, Any]

STUDY, RUN = "fashion-mnist", "fedavg"
COUNTS = {224: "", 1000: "as many as samples", 1776: "as many as the auxiliary set"}


def of_real_images(work: Path) -> list[Json]:
    """FID, coverage and near-copies of real images that no silo has, by their number and seed."""
    measured = []
    for point in load_sweep(HERE / "studies" / f"{STUDY}.toml").points():
        if point.name != RUN:
            continue
        size = point.plan.data.image_size
        federation = federate(point, load_dataset(point.simulation.data, size))
        execution = execution_of(point.simulation.precision)
        ruler = Ruler(point.plan, federation, Memo(work), execution, point.simulation)
        unseen = federation.unseen
        assert unseen is not None
        for images in COUNTS:
            found = ruler.of_images(unseen.images[:images]).line()
            kept = {key: round(found[key], 4) for key in ("fid", "coverage", "copies")}
            measured.append({"images": images, "seed": point.seed, **kept})
    return measured


def of_draws(dataset: str) -> Json:
    """How far the FIDs of two draws of one model are apart, over all runs of the data set that have
    both: the root of the mean square, the highest, and the mean of shown minus judged."""
    differences = []
    for path in sorted(RESULTS.glob(f"{dataset}*/*-[0-9]*.json")):
        events = json.loads(path.read_text("utf-8"))["events"]
        shown = {e["round"]: e["fid"] for e in events if e["event"] == "evaluation"}
        for event in events:
            if event["event"] == "correction" and "fid_after" in event and event["round"] in shown:
                judged = event["fid_after"] if event["kept"] else event["fid_before"]
                differences.append(shown[event["round"]] - judged)
    return {
        "pairs": len(differences),
        "rms": round(mean(d * d for d in differences) ** 0.5, 4),
        "highest": round(max(map(abs, differences)), 4),
        "mean": round(mean(differences), 4),
    }


def tables(found: Json) -> str:
    """The two tables of the page."""
    lines = ["| real images | FID | coverage | near-copies |", "|--:|--:|--:|--:|"]
    for images, meaning in COUNTS.items():
        rows = [row for row in found["real_images"] if row["images"] == images]
        cells = []
        for key, digits in (("fid", 3), ("coverage", 2), ("copies", 3)):
            low, high = (edge(row[key] for row in rows) for edge in (min, max))
            cells.append(f"{low:.{digits}f} to {high:.{digits}f}")
        name = f"{images:,} ({meaning})" if meaning else f"{images:,}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| two draws of one model | pairs | FIDs apart, r.m.s. | at most |"]
    lines.append("|---|--:|--:|--:|")
    for dataset, of in found["draws"].items():
        lines.append(f"| {dataset} | {of['pairs']} | {of['rms']:.3f} | {of['highest']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with TemporaryDirectory() as folder:
        real = of_real_images(Path(folder))
    draws = {
        name: of_draws(pattern) for name, pattern in (("digits", "digits"), (STUDY, "fashion"))
    }
    found = {"real_images": real, "draws": draws}
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / "limits.json").write_text(text, "utf-8")
    include("limits", tables(found))
    print(tables(found))


if __name__ == "__main__":
    main()
