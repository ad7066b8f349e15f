"""`benchmarks.train_step`: what goes wrong with one contender costs no other its figures."""

import json
import sys

import pytest

from benchmarks import train_step, worker
from benchmarks.measure import Report
from benchmarks.train_step import Contender, _fill, _take_turns
from benchmarks.worker import Worker


def _measured(tmp_path, **hows):
    def starter(how):
        return lambda: Worker(sys.executable, ["tests.kernels.contender", how], 1)

    contenders = {name: Contender(name, starter(how)) for name, how in hows.items()}
    report, path, rounds = Report("steps"), tmp_path / "steps.json", []

    def keep():
        _fill(report, contenders, "cpu", "cpu")
        report.write(path)
        rounds.append(json.loads(path.read_text()))

    _take_turns(list(contenders.values()), 4, keep)
    return {row["step"]: row for row in rounds[-1]["rows"]}, rounds


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("dies", "RuntimeError: out of memory"),
        ("hangs", "no answer within 5 s; it ended without a word"),
        ("never starts", "ModuleNotFoundError: No module named 'diffusers'"),
    ],
)
def test_a_contender_that_fails_says_why_and_the_others_are_measured(
    tmp_path, monkeypatch, how, why
):
    monkeypatch.setattr(worker, "STEP_SECONDS", 5)
    rows, _ = _measured(tmp_path, diffusers="works", lucidrains=how, ours="chatters")
    assert rows["lucidrains"]["how"] == why
    assert rows["lucidrains"]["p50_ms"] is None
    for name in ("diffusers", "ours"):
        assert rows[name]["p50_ms"] >= 0
        assert rows[name]["peak_mib"] >= 0
        assert rows[name]["parameters"] == 7
        assert list(rows[name]) == list(train_step._COLUMNS)


def test_results_are_written_after_every_round(tmp_path):
    _, rounds = _measured(tmp_path, diffusers="works", lucidrains="works", ours="works")
    assert len(rounds) == train_step._WARMUP + 4 + 1
    assert [target["value"] for target in rounds[0]["targets"]] == [None, None]
    for written in rounds[train_step._WARMUP :]:
        assert all(row["p50_ms"] is not None for row in written["rows"])
