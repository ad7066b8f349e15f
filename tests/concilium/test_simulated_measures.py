"""What a simulation measures beside its models, and with how many samples of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concilium.datasets import digits
from concilium.partition import Partition
from concilium.simulate.measure import Ruler, Vector
from concilium.simulate.memo import Memo
from concilium.simulate.silos import Here, execution_of, federate
from concilium.simulate.spec import load_sweep
from concilium.simulate.study import Study
from concilium.simulate.sweep import run_sweep
from diffusion.evaluation import compare
from diffusion.features.network import load_feature_network
from diffusion.model import build_model, load_vector
from study.reservation import share
from tests.concilium.simulations import CONDITIONAL, events, study


def test_images_that_no_silo_has_are_measured_as_samples_are(tmp_path: Path) -> None:
    lines = events(study(tmp_path, {"fedavg": ""}), tmp_path / "memo")
    (unseen,) = (line for line in lines if line["event"] == "unseen")
    last = lines[-1]
    assert unseen["images"] == last["samples"]
    assert unseen["fid"] < last["fid"]
    assert unseen["coverage"] > last["coverage"]
    point = next(load_sweep(study(tmp_path, {"fedavg": ""})).points())
    whole = digits()
    silos = federate(point, whole)
    assert silos.unseen is not None
    together = np.concatenate([*silos.images, silos.unseen.images])
    sorted_images = [sorted(image.tobytes() for image in part) for part in (together, whole.images)]
    assert sorted_images[0] == sorted_images[1], "each image once"
    everything = replace(point, simulation=point.simulation.model_copy(update={"images": None}))
    rest = federate(everything, whole).unseen
    assert rest is not None
    assert len(rest.images) == 297, "what the publisher set apart"
    assert whole.test is not None
    apart, mixed = (
        [(image.tobytes(), label) for image, label in zip(part.images, part.labels, strict=True)]
        for part in (whole.test, rest)
        if part.labels is not None
    )
    assert mixed != apart, "in random order"
    assert sorted(mixed) == sorted(apart), "each with its label"
    for other in (Partition(noise=4.0), Partition(quantity=0.5)):
        skewed = point.simulation.model_copy(update={"partition": other})
        assert federate(replace(point, simulation=skewed), whole).unseen is None


def test_of_one_model_per_silo_samples_are_as_many_as_its_share_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    described = Ruler._described

    def noted(self: Ruler, model: Vector, n: int, first: int) -> Any:
        asked.append(n)
        return described(self, model, n, first)

    monkeypatch.setattr(Ruler, "_described", noted)
    path = study(tmp_path, {"local": 'training = "local"'})
    silos = federate(next(load_sweep(path).points()), digits())
    last = events(path, tmp_path / "memo", silos)[-1]
    assert len(set(silos.counts)) > 1
    assert "losses" not in last, "of which model?"
    assert asked[-4:] == [share(last["samples"], n, silos.total) for n in silos.counts]


@pytest.mark.parametrize("changes", [{}, CONDITIONAL], ids=["images", "labelled"])
def test_the_loss_by_timestep_is_the_mean_of_what_silos_would_measure(
    changes: dict[str, str], tmp_path: Path
) -> None:
    point = next(load_sweep(study(tmp_path, {"fedavg": ""}, **changes)).points())
    plan, silos = point.plan, federate(point, digits())
    simulated = Study(point, silos, Memo(tmp_path / "memo"), Here())
    last = list(simulated.events())[-1]
    assert plan.evaluation is not None
    network = load_feature_network(plan.evaluation.feature_network, plan.evaluation.sha256, ())
    model = build_model(plan.model)
    load_vector(model, simulated.model)
    compared = [
        compare(
            model,
            images,
            images,
            network,
            schedule=plan.schedule,
            objective=plan.objective,
            seed=plan.study.seed,
            execution=execution_of(point.simulation.precision),
            labels=labels,
        ).losses
        for images, labels in zip(silos.images, silos.labels_for(plan), strict=True)
    ]
    assert len({len(images) for images in silos.images}) > 1, "or means of images would do"
    assert last["losses"] == pytest.approx(np.mean(compared, axis=0), rel=1e-6)
    assert len(last["losses"]) == 10
    assert len(set(last["losses"])) == 10


@pytest.mark.parametrize(
    ("silos", "images", "said"),
    [
        (21, 504, r"no silo offered a synthetic image.*auxiliary\.images \(10\)"),
        (20, 501, r"holds 1 images, too few to hold 1 out: raise auxiliary\.images"),
    ],
)
def test_a_set_too_small_for_so_many_silos_is_said(
    silos: int, images: int, said: str, tmp_path: Path
) -> None:
    """Of ten images each silo is due less than half a one, or one silo just more than that."""
    changes = {
        "images = 60": "images = 10",
        "images = 300": f"images = {images}",
        "silos = 4": f"silos = {silos}",
        'labels = "dirichlet", alpha = 0.5': 'labels = "iid"',
    }
    path = study(tmp_path, {"plus": 'plan.strategy = {kind = "fedddpm_plus"}'}, **changes)
    with pytest.raises(ValueError, match=said):
        events(path, tmp_path / "memo")


def test_a_sweep_shows_who_has_what_and_with_which_scanner(tmp_path: Path) -> None:
    scanners = 'partition = {labels = "classes", classes = 3, rotation = 10.0, contrast = 0.3}'
    path = study(tmp_path, {"central": f'training = "central"\n{scanners}'})
    for _ in run_sweep(load_sweep(path), tmp_path / "out", lambda *_: None):
        pass
    folder = tmp_path / "out" / "central-3"
    head, *rows = (folder / "partition.txt").read_text("utf-8").splitlines()
    silos = federate(next(load_sweep(path).points()), digits())
    assert head.split() == ["silo", *map(str, range(10)), "all"]
    for row, images, labels in zip(rows, silos.images, silos.labels, strict=True):
        cells = row.split()
        assert int(cells[11]) == len(images)
        assert [n != "·" for n in cells[1:11]] == [bool((labels == c).any()) for c in range(10)]
    assert rows[0].endswith("-10.0°, contrast ×0.70, noise 0.0")
    assert rows[3].endswith("+10.0°, contrast ×1.30, noise 0.0")
    with Image.open(folder / "partition.png") as picture:
        assert picture.size == (10 * 36 + 1, 4 * 36 + 1)
