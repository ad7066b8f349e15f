"""`benchmarks.train_step`: what goes wrong with one contender costs no other its figures."""

import json
import sys
from itertools import chain

import pytest
import torch

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


def test_a_compiler_that_is_late_costs_the_replayed_step_nothing(monkeypatch):
    """On CUDA: who may wait for a compiler starts when all others have their figures."""
    names = dict.fromkeys(["diffusers", "lucidrains", "ours", *chain(*train_step.ON_CUDA)])
    hows = dict.fromkeys(names, "works") | {
        "diffusers, bf16, compiled": "starts late",
        "diffusers, bf16": "never starts",
    }
    started = []

    def starter(name):
        def start():
            started.append(name)
            limit = 2.0 if name == "diffusers, bf16, compiled" else 60.0
            return Worker(sys.executable, ["tests.kernels.contender", hows[name]], 1, limit)

        return start

    contenders = {name: Contender(name, starter(name)) for name in names}
    monkeypatch.setattr(train_step, "_contenders", lambda *_: contenders)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report, saved = Report("steps"), []

    def save():
        saved.append((list(started), {row["step"]: dict(row) for row in report.rows}))

    train_step.measure(report, "cuda", threads=1, rounds=2, save=save)
    assert started[:2] == ["diffusers", "ours"]
    _, before = next(s for s in reversed(saved) if "diffusers, bf16, compiled" not in s[0])
    for name in ("diffusers", "ours", "ours, CUDA graph"):
        assert before[name]["p50_ms"] is not None, name
    assert before["diffusers, bf16, compiled"]["how"] == "not started"
    _, last = saved[-1]
    late = "no answer within 2 s; it ended without a word"
    assert last["diffusers, bf16, compiled"]["how"] == late
    assert last["ours, CUDA graph"]["p50_ms"] == before["ours, CUDA graph"]["p50_ms"]


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 300), ("cuda", 120)])
def test_no_start_may_take_all_of_a_sessions_time(monkeypatch, device, seconds):
    given = []
    monkeypatch.setattr(train_step, "Worker", lambda *arguments: given.append(arguments[3:]))
    made = train_step._contenders(device, 1, False, ("diffusers, bf16, compiled",))
    for name in ("diffusers", "ours", "diffusers, bf16, compiled"):
        made[name].start()
    assert given == [(seconds,)] * 3


def test_what_was_carried_along_is_found_from_wherever_a_session_starts(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "carried.py").write_text("print('found', flush=True)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "wheels")
    child = worker.Child([sys.executable, "-m", "carried"], worker.environment())
    try:
        assert child.line(60) == "found"
    finally:
        child.end()
