"""A simulation computes what the service computes: the same numbers each time, killed or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concilium.datasets import digits
from concilium.simulate.memo import Memo
from concilium.simulate.silos import Federation, Here, federate
from concilium.simulate.spec import load_sweep
from concilium.simulate.study import Study
from study.problems import PlanError
from study.reservation import share
from tests.concilium.simulations import (
    ALL,
    DEFAULT,
    PLUS,
    RUN,
    events,
    simulate,
    study,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("table")
    return simulate(study(folder, ALL), folder / "out")


def test_every_strategy_and_both_ends_of_the_scale_end_in_an_evaluation(
    table: dict[str, list[dict[str, Any]]],
) -> None:
    assert set(table) == {f"{name}-3" for name in ALL}
    finals = {name: lines[-1] for name, lines in table.items()}
    assert all(line["event"] == "evaluation" for line in finals.values())
    assert all(np.isfinite([line["fid"], line["kid"]]).all() for line in finals.values())
    assert len({line["fid"] for line in finals.values()}) == len(ALL), "they differ"


def test_every_decision_is_told_with_its_numbers(table: dict[str, list[dict[str, Any]]]) -> None:
    decisions = [line for line in table["plus-3"] if line["event"] == "decision"]
    assert [d["round"] for d in decisions] == [1, 2]
    assert "needs 2 completed rounds" in decisions[0]["reason"]
    assert decisions[1]["correct"]
    assert {"window", "tau"} <= set(decisions[1]["numbers"])
    corrections = [line for line in table["fedddpm-3"] if line["event"] == "correction"]
    assert [c["steps"] for c in corrections] == [2, 2]
    assert table["fedddpm-3"][-1]["correction_steps"] == 4


def test_a_correction_that_does_harm_is_taken_back(tmp_path: Path) -> None:
    harmful = PLUS.replace("}", ", correction_learning_rate = 1.0}")
    runs = {"plus": harmful, "fedavg": ""}
    lines = simulate(study(tmp_path, runs), tmp_path / "out")
    last = [line for line in lines["plus-3"] if line["event"] == "correction"][-1]
    assert last["fid_after"] > last["fid_before"]
    assert last["kept"] is False
    ends = {name: events[-1]["model"] for name, events in lines.items()}
    assert ends["plus-3"] == ends["fedavg-3"], "and nothing else differs"


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    table: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    again = simulate(study(tmp_path, {"plus": PLUS, "default": DEFAULT}), tmp_path / "out")
    assert again == {name: table[name] for name in ("plus-3", "default-3")}
    other = study(tmp_path, {"plus": PLUS}, **{"seeds = [3]": "seeds = [4]"})
    assert simulate(other, tmp_path / "other")["plus-4"] != table["plus-3"]


@pytest.mark.parametrize("secure", ["false", "true"])
def test_silos_go_on_with_their_own_images_where_the_model_is_near_the_set(
    secure: str, tmp_path: Path
) -> None:
    """As near as can be, here: from the first evaluation on, of which there are three."""
    rounds = "plan.rounds = {count = 3}\n"
    runs = {
        name: rounds
        + DEFAULT.replace("}", f", share_until = {until}}}")
        + f"\nsecure_sum = {secure}"
        for name, until in (("near", 100.0), ("never", 0.0))
    }
    lines = simulate(study(tmp_path, runs), tmp_path / "out")
    told = {
        name: [line for line in found if line["event"] == "sharing"]
        for name, found in lines.items()
    }
    assert told["never-3"] == []
    assert [line["round"] for line in told["near-3"]] == [1, 2], "no round follows the third"
    assert told["near-3"][0]["share"] is False
    assert {"fid", "auxiliary_fid", "share_until"} <= set(told["near-3"][0]["numbers"])
    moved = {
        name: [line["moved"] for line in found if line["event"] == "round"]
        for name, found in lines.items()
    }
    assert moved["near-3"][0] == moved["never-3"][0]
    assert moved["near-3"][1] != moved["never-3"][1]


def test_a_silo_that_has_no_image_to_give_gives_none(tmp_path: Path) -> None:
    few = {"images = 60": "images = 10", "images = 300": "images = 1000"}
    skewed = {'{labels = "dirichlet", alpha = 0.5}': "{quantity = 0.3}", "[3]": "[6]"}
    path = study(tmp_path, {"plus": f"secure_sum = true\n{PLUS}"}, **few, **skewed)
    silos = federate(next(load_sweep(path).points()), digits())
    assert 0 in [share(10, n, silos.total) for n in silos.counts]
    assert events(path, tmp_path / "memo")[0]["images"] > 0


def test_a_simulation_killed_in_any_round_ends_in_the_numbers_of_one_that_was_not(
    table: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, out = study(tmp_path, {"plus": PLUS}), tmp_path / "out"
    command = [sys.executable, "-m", "concilium", "simulate", str(path), "--out", str(out)]
    # Another number of threads adds in another order.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=threads)
    metrics = out / "plus-3" / "metrics.jsonl"
    end = time.monotonic() + 240
    while not (metrics.exists() and '"event": "round"' in metrics.read_text("utf-8")):
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert simulate(path, out)["plus-3"] == table["plus-3"]


@pytest.mark.parametrize("name", ["plus", "scaffold"])
def test_the_secure_sum_gives_the_same_model_within_its_rounding(name: str, tmp_path: Path) -> None:
    plain = events(study(tmp_path, {name: ALL[name]}), tmp_path / "memo")
    secure = events(study(tmp_path, {name: f"{ALL[name]}\nsecure_sum = true"}), tmp_path / "memo")
    for a, b in zip(plain, secure, strict=True):
        assert a["event"] == b["event"]
        if a["event"] == "round":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["moved"] == pytest.approx(a["moved"], rel=1e-2)
        if a["event"] == "auxiliary":
            assert a == b, "the union is exact"
    assert plain[-1]["model"] != secure[-1]["model"], "it did go through the encoding"
    assert secure[-1]["fid"] == pytest.approx(plain[-1]["fid"], rel=0.05)


def test_control_variates_and_a_correction_go_together(tmp_path: Path) -> None:
    with_control = PLUS.replace("window = 1, tau = 0.1", "tau = -1.0, control_variates = true")
    runs = {"both": with_control, "scaffold": ALL["scaffold"]}
    lines = simulate(study(tmp_path, runs), tmp_path / "out")
    rounds = {
        name: [line["moved"] for line in found if line["event"] == "round"]
        for name, found in lines.items()
    }
    assert rounds["both-3"] == rounds["scaffold-3"], "until the last round's end"
    assert [line["round"] for line in lines["both-3"] if line["event"] == "correction"] == [2]


def test_the_union_costs_what_the_page_says(tmp_path: Path) -> None:
    path = study(tmp_path, {"plus": f"{PLUS}\nsecure_sum = true"})
    union = events(path, tmp_path / "memo")[0]
    wanted, slots, pixels = 60, 8, 64
    assert union["tag_bytes"] == 4 * wanted * slots
    occupied = wanted * slots * (1 - np.exp(-1 / slots))
    assert union["image_bytes"] == pytest.approx((1 + pixels) * occupied, rel=0.15)
    assert union["image_bytes"] % (1 + pixels) == 0


def test_a_model_without_federation_may_take_the_rates_of_the_rounds(tmp_path: Path) -> None:
    falls = "plan.rounds = {count = 3, final_learning_rate = 0.01}"
    runs = {
        "constant": 'training = "central"\nplan.rounds = {count = 3}',
        "by-rounds": 'training = "central"\nfalling_rate = true\nplan.rounds = {count = 3}',
        "stays": f'training = "central"\n{falls}',
        "falls": f'training = "central"\nfalling_rate = true\n{falls}',
    }
    lines = simulate(study(tmp_path, runs), tmp_path / "out")
    ends = {name: found[-1]["fid"] for name, found in lines.items()}
    assert ends["by-rounds-3"] == ends["constant-3"], "round by round it is the same training"
    assert ends["stays-3"] == ends["constant-3"]
    assert ends["falls-3"] != ends["constant-3"]


def test_without_the_audit_every_draw_is_united(tmp_path: Path) -> None:
    """Of models that hardly trained, beside images of noise, which most draws are as near to as
    these to one another."""
    draw, dropped = np.random.default_rng(0), {}
    for audited in ("true", "false"):
        more = f"audit = {audited}\n{PLUS}\nplan.auxiliary = {{audit_quantile = 0.5}}"
        path = study(tmp_path, {"plus": more})
        point = next(load_sweep(path).points())
        silos = federate(point, digits())
        noise = [draw.integers(0, 256, own.shape, dtype=np.uint8) for own in silos.images]
        given = Federation(tuple(noise), silos.labels, silos.secrets)
        union = next(Study(point, given, Memo(tmp_path / audited), Here()).events())
        dropped[audited] = union["dropped"]
    assert dropped["true"] > 0
    assert dropped["false"] == 0


def test_a_silo_that_rests_changes_nothing_and_the_others_count_for_it(tmp_path: Path) -> None:
    more = "plan.rounds = {participation = 0.5}"
    path = study(tmp_path, {"some": more})
    point = next(load_sweep(path).points())
    working = [point.plan.working(n, 4) for n in (1, 2)]
    assert [len(w) for w in working] == [2, 2]
    silos = federate(point, digits())
    resting = min(set(range(1, 5)) - working[0])
    images = list(silos.images)
    images[resting - 1] = 255 - images[resting - 1]
    other = Federation(tuple(images), silos.labels, silos.secrets)
    first, second = (
        next(e for e in events(path, tmp_path / name, given) if e["event"] == "round")
        for name, given in (("a", silos), ("b", other))
    )
    assert first["moved"] == second["moved"], "round 1 does not see the images of a silo that rests"


def test_what_is_wrong_with_a_simulation_is_said_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no \\[simulation\\]"):
        load_sweep(study(tmp_path, {}, **{"[simulation]": "[simulator]"}))
    with pytest.raises(PlanError, match='labels = "classes": add classes'):
        load_sweep(study(tmp_path, {}, **{'"dirichlet", alpha = 0.5': '"classes"'}))
    path = study(tmp_path, {"a": ""})
    path.write_text(path.read_text("utf-8") + RUN.format(name="a", more=""), "utf-8")
    with pytest.raises(PlanError, match="two runs have the same name"):
        load_sweep(path)
    broken = study(tmp_path, {"a": 'plan.strategy = {kind = "fedsgd"}'})
    with pytest.raises(PlanError, match='run "a".*fedsgd'):
        load_sweep(broken)


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("silos = 4", "silos = 0", "simulation.silos = 0: use at least 1"),
        ("silos = 4", "silos = 2.5", "simulation.silos = 2.5: use a whole number"),
        ("silos = 4", "", "simulation.silos is missing: write `silos = …` in [simulation]"),
        ("silos = 4", "silo = 4", "simulation.silo = 4 is unknown: did you mean silos?"),
        ("alpha = 0.5", "alpha = -1", "simulation.partition.alpha = -1: use more than 0"),
        ("alpha = 0.5", "alhpa = 1", "partition.alhpa = 1 is unknown: did you mean alpha?"),
        (
            'name = "a"',
            "",
            "simulation.run[0].name is missing: write `name = …` in [[simulation.run",
        ),
        ('name = "a"', 'name = "a"\ntraning = "local"', "did you mean training?"),
        ('name = "a"', 'name = "a"\ntraining = "alone"', "'federated', 'central', 'local'"),
        ('name = "a"', 'name = "a"\nplan = 3', "simulation.run[0].plan = 3: make it a section"),
    ],
)
def test_a_wrong_key_of_a_simulation_is_said_with_its_value_and_what_to_write(
    tmp_path: Path, written: str, instead: str, said: str
) -> None:
    path = study(tmp_path, {"a": ""})
    assert written in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace(written, instead), "utf-8")
    with pytest.raises(PlanError) as caught:
        load_sweep(path)
    assert said in str(caught.value)


def test_training_on_an_auxiliary_set_that_is_not_planned_is_refused_before_any_run(
    tmp_path: Path,
) -> None:
    path = study(tmp_path, {"a": "", "aux": 'training = "auxiliary"'})
    text = path.read_text("utf-8")
    path.write_text(text.replace("[auxiliary]\nimages = 60\n", ""), "utf-8")
    with pytest.raises(PlanError, match='run "aux".*training.*add \\[auxiliary\\] with `images'):
        load_sweep(path)
