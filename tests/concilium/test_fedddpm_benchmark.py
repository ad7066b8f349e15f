"""`benchmarks.fedddpm`: what it runs, what it takes for done, and what its tables say of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fedddpm
from benchmarks import fedddpm_tables as tables
from benchmarks.fedddpm_pictures import apart
from benchmarks.fedddpm_summary import summary_table
from concilium.simulate.spec import load_sweep
from tests.concilium.simulations import PLUS, RUN, STUDY


def made(seed: int, *fids: float, steps: int = 0, set_fid: float | None = None) -> dict[str, Any]:
    """A run that was evaluated in every tenth round."""
    events: list[dict[str, Any]] = []
    covered = {"kid": 0.002, "coverage": 0.2, "coverage_by_silo": [0.3, 0.1]}
    covered |= {"network": "digits", "network_sha256": "ab" * 32}
    if set_fid is not None:
        events.append({"event": "auxiliary", "images": 90, "fid": set_fid, **covered})
    for k, fid in enumerate(fids, 1):
        done = {"round": 10 * k, "local_steps": 20 * k, "correction_steps": steps}
        events.append({"event": "evaluation", "fid": fid, **done, **covered})
    return {"seed": seed, "events": events}


RUNS = {
    "fedavg": [made(1, 0.8, 0.5), made(2, 0.8, 0.3)],
    "scaffold": [made(1, 0.9, 0.4), made(2, 0.9, 0.3)],
    "fedadam": [made(1, 0.9, 0.6), made(2, 0.9, 0.6)],
    "fedddpm": [made(1, 0.4, 0.4, steps=60), made(2, 0.4, 0.4, steps=60)],
    "fedddpm-long": [made(1, 0.4, 0.3, steps=60), made(2, 0.4, 0.3, steps=60)],
    tables.PLUS: [made(1, 0.3, 0.2, steps=20, set_fid=0.04), made(2, 0.5, 0.2, steps=20)],
    tables.SLOW: [made(1, 0.6, 0.3, steps=30), made(2, 0.6, 0.3, steps=30)],
}


def test_the_ratios_are_those_of_the_means_and_the_rounds_of_each_seed() -> None:
    found = tables.ratios(RUNS)
    assert found["best_baseline"] == "scaffold"
    assert found["fid_vs_best_baseline"] == pytest.approx(0.2 / 0.35)
    assert found["seeds_ahead_of_best_baseline"] == "2/2"
    equal_once = RUNS | {"central": [made(1, 0.9, 0.2), made(2, 0.9, 0.3)]}
    assert tables.ratios(equal_once)["seeds_ahead_of_central"] == "1/2"
    assert found["plus_fid_vs_fedddpm"] == pytest.approx(2 / 3)
    assert found["plus_steps_vs_fedddpm"] == pytest.approx(1 / 3)
    # FedAvg ends at 0.4 in the mean, at 0.5 and 0.3 by seed.
    assert found["rounds_to_fedavg_fid"] == 0.5
    assert found["rounds_to_fedavg_fid_by_seed"] == [0.5, 1.0]
    assert tables.ratios(RUNS, tables.SLOW)["fid_vs_best_baseline"] == pytest.approx(0.3 / 0.35)
    rows = {row.split("|")[1].strip(): row for row in tables.ratios_table(RUNS).splitlines() if row}
    assert "| 0.571 | 0.857 | ≤ 0.90 |" in rows["`fid_vs_best_baseline`"]
    assert "| 0.333 | **0.500** (missed) | ≤ 0.33 |" in rows["`plus_steps_vs_fedddpm`"]
    assert "| 0.667 | 0.750 | ≤ 1.05 |" in rows["`plus_fid_vs_fedddpm`"], "each beside its own"
    assert "| 0.500 | – |" in rows["`fid_vs_fedddpm`"]
    assert "| 0.333 | – |" in rows["`steps_vs_fedddpm`"]


def test_another_constant_of_a_usual_strategy_competes_where_it_has_all_the_seeds() -> None:
    one, two = made(1, 0.9, 0.2), made(2, 0.9, 0.28)
    assert tables.ratios(RUNS | {"fedadam-0-03": [one]})["best_baseline"] == "scaffold"
    assert tables.ratios(RUNS | {"fedadam-0-03": [one, two]})["best_baseline"] == "fedadam-0-03"
    for name in ("scaffold-1-25", "fedprox-1"):
        assert tables.ratios(RUNS | {name: [one, two]})["best_baseline"] == name
    assert tables.ratios(RUNS | {"fedavg-end": [one, two]})["best_baseline"] == "scaffold"


def test_the_best_fedddpm_of_as_many_steps_is_what_the_default_is_held_to() -> None:
    better = [made(1, 0.4, 0.25, steps=60), made(2, 0.4, 0.24, steps=60)]
    for name in ("fedddpm-long-rate-2e-3", "fedddpm-long-shared"):
        found = tables.ratios(RUNS | {name: better})
        assert (found["best_fedddpm"], found["plus_fid_vs_fedddpm"]) == (name, 0.2 / 0.245)
        assert tables.ratios(RUNS | {name: better[:1]})["best_fedddpm"] == "fedddpm-long"
        assert tables.ratios(RUNS | {name: better}, tables.SLOW)["best_fedddpm"] == "fedddpm"


def test_the_tables_show_every_run_the_auxiliary_set_and_the_worst_silo() -> None:
    head, _, union, *rows, empty, features = tables.table(RUNS).splitlines()
    assert (empty, features) == ("", "Features: `digits`, SHA-256 abababababababab…")
    assert head.endswith("| coverage | worst silo's coverage |")
    assert union == "| *the auxiliary set* | 1 | | | 0.040 | 2.00 | 0.200 | 0.100 |"
    assert len(rows) == len(RUNS)
    assert rows[0].startswith("| fedavg | 2 | 40 | 0 | 0.400 ± 0.141 | 2.00 ± 0.00 | 0.200 ± 0.000")
    by_round = tables.rounds_table(RUNS).splitlines()
    assert len(by_round) == len(tables.METRICS) * (4 + len(RUNS)) + len(tables.METRICS) - 1
    assert "| fedavg | 20 | 0.800 ± 0.000 | 0.400 ± 0.141 |" in by_round


def test_sets_that_differ_by_more_than_rounding_stand_beside_their_runs() -> None:
    for other, beside in ((0.045, False), (0.06, True)):
        runs = {"one": [made(1, 0.3, set_fid=0.04)], "two": [made(1, 0.2, set_fid=other)]}
        head, *_ = tables.table(runs).splitlines()
        assert ("its auxiliary set" in head) is beside


def test_by_kind_the_best_that_makes_one_model_of_all_silos_is_bold() -> None:
    runs = {
        "one-class-fedavg": [made(1, 0.5), made(2, 0.3)],
        "one-class-plus": [made(1, 0.2, set_fid=0.04), made(2, 0.1, set_fid=0.06)],
        "one-class-auxiliary-3x": [made(1, 0.3, set_fid=0.04)],
        "iid-fedavg": [made(1, 0.1)],
        "iid-plus": [made(1, 0.2)],
        "iid-local": [made(1, 0.05)],
        "iid-fedddpm": [made(1, 0.09)],  # has thrice the correction steps
        "fedavg-end": [made(1, 0.01)],
    }
    head, _, *rows = tables.kinds_table(runs).splitlines()
    assert head == "| final FID | the set | *plus* | FedDDPM | FedAvg | *auxiliary-3x* | *local* |"
    assert rows == [
        "| one-class | 0.050 | **0.150** | – | 0.400 | 0.300 | – |",
        "| iid | – | 0.200 | 0.090 | **0.100** | – | 0.050 |",
    ]
    assert tables.kinds_table(RUNS) == ""


def test_the_summary_has_a_row_for_each_split_and_is_bold_where_nothing_is_lower() -> None:
    by_kind = {
        "one-class-plus": [made(1, 0.2, set_fid=0.04)],
        "one-class-fedavg": [made(1, 0.5)],
        "one-class-fedddpm": [made(1, 0.19)],
        "one-class-end": [made(1, 0.4)],
        "one-class-end-whole": [made(1, 0.3)],
    }
    searched = {"fedprox-0-01": [made(1, 0.9, 0.32), made(2, 0.9, 0.34)]}
    pooled = {"central-3x": [made(1, 0.05), made(2, 0.07)]}  # which nobody may have
    studies = {"digits": RUNS | searched | pooled, "fashion-heterogeneity": by_kind}
    _, _, one_class, digits = summary_table(studies).splitlines()
    assert one_class == (
        "| …, one class each, ten silos | 1 | 0.200 | 0.500 | 0.500 FedAvg | 0.190 | – "
        "| 0.300 *end* | – | 0.040 |"
    )
    assert digits == (
        "| digits, two classes each | 2 | **0.200** | 0.400 | 0.330 FedProx | 0.300 | – | – "
        "| 0.060 | 0.040 |"
    )


def test_real_images_that_no_silo_has_show_what_a_perfect_model_would_reach() -> None:
    run = made(1, 0.5)
    run["events"].insert(0, {**run["events"][-1], "event": "unseen", "fid": 0.003})
    for runs in ({"fedavg": [run]}, {"fedavg": [run], "plus": [made(1, 0.4, set_fid=0.04)]}):
        row = next(r for r in tables.table(runs).splitlines() if r.startswith("| *images that"))
        assert row == "| *images that no silo has* | 1 | | | 0.003 | 2.00 | 0.200 | 0.100 |"


def test_near_copies_stand_in_the_table_where_they_were_counted() -> None:
    one, two = made(1, 0.5), made(2, 0.5)
    for run, share in ((one, 0.02), (two, 0.04)):
        run["events"][-1]["copies"] = share
    other = made(1, 0.4)
    head, _, *rows = tables.table({"fedavg": [one, two], "scaffold": [other]}).splitlines()
    assert head.endswith("| near-copies |")
    assert [row.split("|")[-2].strip() for row in rows[:2]] == ["0.030 ± 0.014", "–"]
    other["events"][-1]["network_sha256"] = "cd" * 32
    with pytest.raises(ValueError, match="different feature networks"):
        tables.table({"fedavg": [one, two], "scaffold": [other]})


def test_the_first_correction_is_read_off_a_run_without_any() -> None:
    losses = [1.0, 0.5, 0.38, 0.37, 0.365]
    events = []
    for number, loss in enumerate(losses, 1):
        events.append({"event": "round", "round": number, "loss": 1.0 / number})
        events.append({"event": "decision", "round": number, "loss": loss})
    rows = tables.trigger_table([{"events": events}]).splitlines()
    cells = {row.split("|")[1].strip() + row.split("|")[2].strip(): row for row in rows[3:]}
    # W = 1: improvements of 50, 24, 2.6 and 1.4 % in rounds 2 to 5, against τ = 2, 5, 10 and 20 %.
    assert [cell.strip() for cell in cells["auxiliary1"].split("|")[3:-1]] == ["5", "4", "4", "4"]
    assert [cell.strip() for cell in cells["silos1"].split("|")[3:-1]] == ["–", "–", "–", "5"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of two runs, with a page that has a place for its table."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "docs" / "images").mkdir(parents=True)
    runs = {tables.PLUS: PLUS, "fedavg": "", "auxiliary": 'training = "auxiliary"'}
    text = STUDY + "".join(RUN.format(name=name, more=more) for name, more in runs.items())
    (tmp_path / "studies" / "small.toml").write_text(text, "utf-8")
    page = "before\n<!-- begin small -->\n\nold\n\n<!-- end small -->\nafter\n"
    (tmp_path / "docs" / "fedddpm.md").write_text(page, "utf-8")
    monkeypatch.setattr(fedddpm, "HERE", tmp_path)
    monkeypatch.setattr(fedddpm, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(fedddpm, "DOCS", tmp_path / "docs")
    return tmp_path


def test_a_benchmark_runs_what_is_missing_and_reports_all_of_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(limit: int | None = None) -> int:
        fedddpm.run("small", place / "work", [], [], limit)
        return capsys.readouterr().out.count(" round   2 FID")

    files = place / "results" / "small"
    assert [run(limit=1), run(), run()] == [1, 2, 0]
    assert {path.name for path in files.iterdir()} == {
        f"{name}-3.json" for name in (tables.PLUS, "fedavg", "auxiliary")
    }
    one = json.loads((files / f"{tables.PLUS}-3.json").read_text("utf-8"))
    assert one["plan"]["strategy"]["correction_judged"] == "last", "a default, as it was then"
    assert one["machine"]["torch"]

    # An option that is new since then changes nothing; a default that is another one now does.
    del one["plan"]["strategy"]["correction_judged"]
    (files / f"{tables.PLUS}-3.json").write_text(json.dumps(one), "utf-8")
    assert run() == 0
    one["plan"]["strategy"]["correction_judged"] = "never"
    (files / f"{tables.PLUS}-3.json").write_text(json.dumps(one), "utf-8")
    known = place / "work" / "small" / f"{tables.PLUS}-3" / "result.json"
    was = json.loads(known.read_text("utf-8"))
    was["plan"]["strategy"]["correction_judged"] = "never"
    known.write_text(json.dumps(was), "utf-8")
    assert run() == 1, "and the folder's old run does not pass for the new one"

    fedddpm.report("small")
    page = (place / "docs" / "fedddpm.md").read_text("utf-8")
    assert page.startswith("before\n<!-- begin small -->\n\n| run |")
    assert page.endswith("|\n\n<!-- end small -->\nafter\n")
    assert f"\n| {tables.PLUS} | 1 | 4 | " in page
    assert "old" not in page
    drawn = (place / "docs" / "images" / "fedddpm-small.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 20_000
    controls = (place / "docs" / "images" / "fedddpm-small-controls.png").read_bytes()
    assert len(controls) > 20_000
    written = json.loads((files / "ratios.json").read_text("utf-8"))
    assert written[tables.PLUS]["best_baseline"] == "fedavg"


def test_every_run_is_in_a_picture_but_those_by_the_secure_sum() -> None:
    for study in ("digits", "fashion-mnist", "fashion-fresh", "digits-long"):
        names = {
            run.name for run in load_sweep(fedddpm.HERE / f"studies/{study}.toml").simulation.run
        }
        strategies, controls = apart({name: [made(1, 0.3)] for name in names})
        assert {*strategies, *controls} == {n for n in names if not n.endswith("-secure")}
        assert set(strategies) & set(controls) == {"fedavg", tables.PLUS}
        assert {"scaffold", "fedprox", "fedadam", "fedyogi"} & names <= set(strategies)
        assert {"central", "auxiliary-3x", "local"} & names <= set(controls)


@pytest.mark.parametrize("name", ["draw_finals", "draw_sizes"])
def test_a_sweep_has_a_picture(name: str, tmp_path: Path) -> None:
    sizes = {f"plus-{n}": [made(1, 0.3), made(2, 0.4)] for n in (250, 1000)} | {
        "plus-unaudited": [made(1, 0.2)]
    }
    getattr(fedddpm, name)(sizes, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "study", sorted((fedddpm.HERE / "studies").glob("fashion-*.toml")), ids=lambda p: p.stem
)
def test_images_of_fashion_that_no_silo_has_did_not_train_the_feature_network(study: Path) -> None:
    """Its t10k images did, which a simulation takes where the silos have all of the others."""
    for point in load_sweep(study).points():
        seen, of = point.simulation.images, point.plan.evaluation
        assert of is not None
        assert seen is not None
        assert seen + of.samples <= 60_000


@pytest.mark.parametrize(
    "study", sorted((fedddpm.HERE / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_command_of_a_table_makes_no_other_table(study: Path) -> None:
    """What a study's file says was run, with one seed at least, and would not be made again today;
    but for the one that wants a GPU, and for those runs of digits-long that are older than the rule
    by which a run is known, as the page says."""
    if study.stem == "fashion-full":
        return
    made = set()
    for point in load_sweep(study).points():
        path = fedddpm.RESULTS / study.stem / f"{point.label}.json"
        if path.exists():
            made.add(point.name)
            known = fedddpm._is_of(json.loads(path.read_text("utf-8")), point)
            assert known or study.stem == "digits-long", path
    assert {run.name for run in load_sweep(study).simulation.run} == made


def test_no_run_that_is_kept_would_share_otherwise_today() -> None:
    """Runs from before silos could stop sharing are kept: none of them comes near its set."""
    judged = 0
    for study in sorted((fedddpm.HERE / "studies").glob("*.toml")):
        for point in load_sweep(study).points():
            path = fedddpm.RESULTS / study.stem / f"{point.label}.json"
            plan, federated = point.plan, point.training == "federated"
            if not (plan.strategy.stops_sharing and federated and path.exists()):
                continue
            events = json.loads(path.read_text("utf-8"))["events"]
            (of_set,) = (event["fid"] for event in events if event["event"] == "auxiliary")
            fids = [event["fid"] for event in events if event["event"] == "evaluation"]
            told = [event["share"] for event in events if event["event"] == "sharing"]
            asked = range(1, plan.evaluations)
            said = [plan.strategy.shares(fids[:k], plan.evaluations, of_set).share for k in asked]
            assert said == (told or [True] * len(said)), path
            judged += 1
    assert judged > 15
