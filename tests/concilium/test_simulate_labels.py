"""Simulations of labelled images, and of ones without labels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from concilium.commands.simulate import command
from concilium.datasets import DataMissing, ImageSet, digits
from concilium.simulate.memo import Memo
from concilium.simulate.silos import Here, federate
from concilium.simulate.spec import load_sweep
from concilium.simulate.study import Study
from study.problems import PlanError
from tests.concilium.simulations import CONDITIONAL, PLUS, simulate, study


def test_a_conditional_study_says_which_silo_has_too_few_images_of_every_class(
    tmp_path: Path,
) -> None:
    few = {"images = 300": "images = 80", '{labels = "dirichlet", alpha = 0.5}': "{}"}
    path = study(tmp_path, {"plus": f"{PLUS}\nplan.model = {{classes = 10}}"}, **few)
    done = CliRunner().invoke(command, [str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: ")
    assert "class" in done.output


def findings(folder: Path) -> Path:
    """ChestMNIST's layout: fourteen findings of each image, which are no classes."""
    whole = digits()
    assert whole.test is not None
    arrays = {"train_images": whole.images[:300, 0], "test_images": whole.test.images[:, 0]}
    labels = {"train_labels": np.zeros((300, 14)), "test_labels": np.zeros((297, 14))}
    np.savez(folder / "chestmnist.npz", **arrays, **labels)
    return folder / "chestmnist.npz"


def test_images_without_labels_are_simulated_where_nothing_needs_labels(tmp_path: Path) -> None:
    changes = {
        'data = "digits"\nimages = 300': f'data = "{findings(tmp_path)}"',
        '{labels = "dirichlet", alpha = 0.5}': "{}",
    }
    runs = {"plus": PLUS, "skewed": "partition = {quantity = 1.0, noise = 4.0}"}
    lines = simulate(study(tmp_path, runs, **changes), tmp_path / "out")
    assert lines["plus-3"][-1]["fid"] > 0
    (unseen,) = (line for line in lines["plus-3"] if line["event"] == "unseen")
    assert unseen["images"] == 20, "of the publisher's test images"
    assert lines["skewed-3"][-1]["fid"] > 0
    table = (tmp_path / "out" / "plus-3" / "partition.txt").read_text("utf-8")
    counts = [line.split() for line in table.splitlines()]
    assert counts == [["silo", "all"], *([str(silo), "75"] for silo in (1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            'partition = {labels = "dirichlet", alpha = 1.0}',
            'partition labels = "dirichlet".*"iid"',
        ),
        ('partition = {labels = "classes", classes = 2}', 'partition labels = "classes".*"iid"'),
        ("plan.model = {classes = 10}", "model.classes needs labels.*leave it out"),
    ],
)
def test_a_setting_that_needs_labels_says_so_before_any_run_begins(
    run: str, said: str, tmp_path: Path
) -> None:
    changes = {
        'data = "digits"\nimages = 300': f'data = "{findings(tmp_path)}"',
        '{labels = "dirichlet", alpha = 0.5}': "{}",
    }
    path = study(tmp_path, {"first": "", "second": run}, **changes)
    done = CliRunner().invoke(command, [str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    last = done.output.splitlines()[-1]
    assert re.match(f'Error: run "second": {said}', last)
    assert "300 of 300 images of data" in last
    assert "one label for each image" in last
    assert not list(tmp_path.glob("out/*/metrics.jsonl"))


def test_a_classifier_is_tested_on_labelled_images_only(tmp_path: Path) -> None:
    conditional = "plan.model = {classes = 10}"
    iid = {'{labels = "dirichlet", alpha = 0.5}': "{}"}
    point = next(load_sweep(study(tmp_path, {"fedavg": conditional}, **iid)).points())
    whole = digits()
    assert whole.test is not None
    bare = replace(whole, test=ImageSet(whole.test.images, None, unlabelled=297))
    with pytest.raises(DataMissing, match="297 of 297 test images"):
        federate(point, bare)
    unconditional = next(load_sweep(study(tmp_path, {"fedavg": ""})).points())
    assert federate(unconditional, bare).labels


def test_a_conditional_study_corrects_with_labels_and_tells_a_classifier_s_accuracy(
    tmp_path: Path,
) -> None:
    central = 'training = "central"\nplan.rounds = {local_steps = 100}'
    runs = {"plus": PLUS, "central": central, "auxiliary": 'training = "auxiliary"'}
    lines = simulate(study(tmp_path, runs, **CONDITIONAL), tmp_path / "out")
    union = lines["plus-3"][0]
    occupied, rest = divmod(union["image_bytes"], 1 + 2 + 64)
    assert (rest, union["images"] <= occupied) == (0, True), "marker, label and image, for each"
    assert [e["event"] for e in lines["plus-3"]].count("correction") >= 1
    assert 0 <= union["dropped"] <= union["drawn"] - union["images"]
    ends = {name: events[-1]["accuracy"] for name, events in lines.items()}
    assert all(0.0 <= end <= 1.0 for end in ends.values())
    assert ends["central-3"] > max(0.15, ends["plus-3"]), "which has learned something"
    (bar,) = {events[-1]["accuracy_of_real"] for events in lines.values()}
    assert bar > max(0.8, *ends.values()), "trained on the 300 images themselves"


def test_labels_of_the_union_are_those_of_the_silos(tmp_path: Path) -> None:
    """They come through the secure sums as through plain ones, each with its image, and of most of
    the silos' classes."""
    unions = []
    for secure in ("false", "true"):
        run = {"plus": f"{PLUS}\nsecure_sum = {secure}"}
        partition = 'partition = {labels = "classes", classes = 3}'
        changes = CONDITIONAL | {'partition = {labels = "dirichlet", alpha = 0.5}': partition}
        point = next(load_sweep(study(tmp_path, run, **changes)).points())
        silos, memo = federate(point, digits()), Memo(tmp_path / f"memo-{secure}")
        line = next(Study(point, silos, memo, Here()).events())
        (found,) = (
            np.load(file) for file in (tmp_path / f"memo-{secure}").glob("*.npz")
            if "labels" in np.load(file).files
        )  # fmt: skip
        assert line["images"] == len(found["images"]) == len(found["labels"]) > 30
        assert 5 < len(set(found["labels"].tolist()) & set(range(10))) == len(set(found["labels"]))
        unions.append(found)
    for name in ("images", "labels"):
        assert np.array_equal(unions[0][name], unions[1][name])


def test_one_model_per_silo_is_refused_where_it_would_not_know_the_other_classes(
    tmp_path: Path,
) -> None:
    path = study(tmp_path, {"local": 'training = "local"'}, **CONDITIONAL)
    with pytest.raises(PlanError, match="knows the classes of that silo alone"):
        load_sweep(path)
