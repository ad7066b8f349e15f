"""Every point of a sweep, one after the other or spread over a Ray cluster, into a folder.

    OUT/memo/                       results by what they depend on (concilium/simulate/memo.py)
    OUT/<run>-<seed>/metrics.jsonl  what happened, complete from the first line
    OUT/<run>-<seed>/partition.txt  who holds what; partition.png the same as a picture
    OUT/<run>-<seed>/result.json    only when the run is over: its last evaluation

A run whose result.json was made from the same point, and of the same defaults, is not run again.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from concilium.datasets import ImageSet, load_dataset
from concilium.partition import histogram_png, histogram_text
from concilium.simulate.memo import Memo, digest_of
from concilium.simulate.silos import Federation, Here, Pool, check_labels, federate
from concilium.simulate.spec import Point, Sweep
from concilium.simulate.study import Study

T = TypeVar("T")
R = TypeVar("R")
Json = dict[str, Any]
OnEvent = Callable[[Point, Json], None]


def run_sweep(
    sweep: Sweep, out: Path, on_event: OnEvent, ray_address: str | None = None
) -> Iterator[Json]:
    """The results of all points, in order, each as it is there.

    With `ray_address` ("local" starts a cluster on this machine) points and silos are tasks of a
    Ray cluster, whose nodes must share the folder `out`. Then events are in the files only.
    Raises ValueError where Ray is not installed.
    """
    yield from run_points(list(sweep.points()), out, on_event, ray_address)


def run_points(
    points: Sequence[Point], out: Path, on_event: OnEvent, ray_address: str | None = None
) -> Iterator[Json]:
    """The same of some points."""
    data: dict[tuple[str, int, int], ImageSet] = {}
    for point in points:
        if (key := _data_key(point)) not in data:
            data[key] = load_dataset(*key)
        check_labels(point, data[key])  # every run has its labels, or none is begun
    if ray_address is not None:
        yield from _on_ray(points, data, out.resolve(), ray_address)
        return
    for point in points:
        yield run_point(point, data[_data_key(point)], out, Here(), partial(on_event, point))


def _data_key(point: Point) -> tuple[str, int, int]:
    return point.simulation.data, point.plan.data.image_size, point.plan.data.channels


def _on_ray(
    points: Sequence[Point],
    data: Mapping[tuple[str, int, int], ImageSet],
    out: Path,
    address: str,
) -> Iterator[Json]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--ray needs Ray: install concilium[ray]") from error
    ray.init(address=None if address == "local" else address, log_to_driver=False)
    try:
        shared = {key: ray.put(images) for key, images in data.items()}
        # While it waits for its silos it gives its processor back. No more points at once than
        # there are processors: each holds the images of its silos.
        remote = ray.remote(num_cpus=1)(_ray_point)
        most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: deque[Any] = deque()
        for point in points:
            if len(running) == most:
                yield ray.get(running.popleft())
            running.append(remote.remote(point, shared[_data_key(point)], out))
        while running:
            yield ray.get(running.popleft())
    finally:
        ray.shutdown()


def _ray_point(point: Point, data: ImageSet, out: Path) -> Json:
    return run_point(point, data, out, _RayPool(), lambda _: None)


class _RayPool:
    """The silos of a round, each a task of the cluster."""

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """The results, in the order of the tasks."""
        import ray

        remote = ray.remote(num_cpus=1)(function)
        found: list[R] = ray.get([remote.remote(task) for task in tasks])
        return found


def run_point(
    point: Point, data: ImageSet, out: Path, pool: Pool, on_event: Callable[[Json], None]
) -> Json:
    """The result of a point: its identity, and its last evaluation."""
    folder, identity = out / point.label, identity_of(point)
    # With all defaults: what the program takes by default may change.
    plan = point.plan.model_dump(mode="json")
    known = folder / "result.json"
    if known.exists():
        result: Json = json.loads(known.read_text("utf-8"))
        if (result["identity"], result.get("plan")) == (identity, plan):
            return result
    folder.mkdir(parents=True, exist_ok=True)
    known.unlink(missing_ok=True)
    federation = federate(point, data)
    _show_partition(point, federation, folder)
    last: Json = {}
    auxiliary: Json = {}
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for event in Study(point, federation, Memo(out / "memo"), pool).events():
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
            file.flush()
            on_event(event)
            if event["event"] == "evaluation":
                last = event
            if event["event"] == "auxiliary":
                auxiliary = event
    result = {
        "run": point.name,
        "seed": point.seed,
        "identity": identity,
        "plan": plan,
        "auxiliary": auxiliary,
        "last": last,
    }
    unfinished = known.with_name(known.name + ".part")
    unfinished.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(unfinished, known)
    return result


def identity_of(point: Point) -> str:
    """Of everything that was written to say what the point is."""
    return digest_of(
        {
            "training": point.training,
            "plan": point.plan.model_dump(mode="json", exclude_unset=True),
            # Wherever the feature network's file is: the plan has its hash.
            "simulation": point.simulation.model_dump(
                mode="json", exclude_unset=True, exclude={"feature_file"}
            ),
            "seed": point.seed,
        }
    )


def _show_partition(point: Point, federation: Federation, folder: Path) -> None:
    counts, partition = federation.histogram, point.simulation.partition
    silos = range(federation.size) if partition.alters else ()
    scanners = [partition.scanner(silo, federation.size) for silo in silos]
    text = histogram_text(counts, bool(federation.labels), scanners)
    (folder / "partition.txt").write_text(text + "\n", "utf-8")
    histogram_png(counts, folder / "partition.png")
