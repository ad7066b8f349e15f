"""`benchmarks.gpu_session` keeps what it has, whatever fails, hangs or is left out."""

import json

import pytest
import torch

from benchmarks import gpu_session, page
from benchmarks.gpu_session import Session, _run, prove, results_of, run, tabulate
from benchmarks.measure import Report, Target


def _target(value):
    return Target("mask_add_ms", value, "ms", 5.0, "<=")


def _session(path, seconds=100.0, command="first"):
    return Session(path, seconds, command)


def test_a_second_session_replaces_what_it_measures_and_keeps_the_rest(tmp_path):
    path = tmp_path / "gpu.json"
    first = _session(path)
    first.put("train_step", [{"step": "ours", "p50_ms": 9.0}])
    first.put("kernels: masks", [{"op": "mask_add", "by": "ours", "p50_ms": 4.0}], [_target(4.0)])
    first.put("proofs", [{"proof": "a", "result": "FAILED: so"}, {"proof": "b", "result": "seen"}])
    second = _session(path, command="second")
    second.put("kernels: masks", [{"op": "mask_add", "by": "ours", "p50_ms": 3.0}], [_target(3.0)])
    second.put("proofs", [{"proof": "a", "result": "shown"}])
    written = json.loads(path.read_text())
    assert written["rows"] == [
        {"proof": "b", "result": "seen", "part": "proofs"},
        {"proof": "a", "result": "shown", "part": "proofs"},
        {"step": "ours", "p50_ms": 9.0, "part": "train_step"},
        {"op": "mask_add", "by": "ours", "p50_ms": 3.0, "part": "kernels: masks"},
    ]
    assert [target["value"] for target in written["targets"]] == [3.0]
    assert written["commands"] == ["first", "second"]
    assert (first.failed, second.failed) == (1, 0)


@pytest.fixture
def with_a_gpu(monkeypatch):
    """As far as the session can tell; the processes that it starts find none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_no_part_starts_when_the_seconds_are_spent(tmp_path, with_a_gpu):
    path = tmp_path / "gpu.json"
    known = [{"proof": "a second gpu", "result": "the same bits"}]
    _session(path).put("proofs", known)
    _session(path).put("train_step", [{"step": "ours", "p50_ms": 9.0}])
    run(_session(path, seconds=1.0), (), "cuda", quick=True)
    rows = json.loads(path.read_text())["rows"]
    steps = [row for row in rows if row["part"] == "train_step"]
    assert steps == [{"step": "ours", "p50_ms": 9.0, "part": "train_step"}]
    results = {row["proof"]: row["result"] for row in rows if "proof" in row}
    assert results.pop("a second gpu") == "the same bits"
    assert len(results) == len(gpu_session.PROOFS) - 1
    assert set(results.values()) == {"not measured: the session's seconds were spent"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they hold")
def test_a_proof_that_fails_keeps_no_other_from_being_tried(with_a_gpu):
    session = _session(None)
    prove(session, gpu_session.QUICK[:2])
    assert [row["result"].partition(":")[0] for row in session.report.rows] == ["FAILED"] * 2
    assert all(len(row["result"]) > len("FAILED: ") for row in session.report.rows)
    assert session.failed == 2


def test_what_is_missing_is_said_first_and_only_what_needs_it_is_left_out(
    with_a_gpu, monkeypatch, capsys
):
    asked = []
    needed = (*gpu_session._NEEDED, "no_diffusers.models", "benchmarks.page")
    monkeypatch.setattr(gpu_session, "_NEEDED", needed)
    monkeypatch.setattr(gpu_session, "prove", lambda _, proofs: asked.extend(proofs))
    monkeypatch.setattr(gpu_session, "tabulate", lambda _, part, *__: asked.append(part))
    session = _session(None)
    run(session, (), "cuda", quick=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["not measured: the training step and what is proven of networks, for want of "
                     "no_diffusers"]  # fmt: skip
    (row,) = session.report.rows
    assert (row["part"], row["result"]) == ("train_step", "not measured: no no_diffusers")
    assert "train_step" not in asked
    assert set(gpu_session.PROOFS) | {f"kernels: {g}" for g in gpu_session.GROUPS} == set(asked)


def test_a_proof_that_lacks_a_package_has_not_failed(monkeypatch, capsys):
    def proof():
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(gpu_session, "PROOFS", (proof,))
    gpu_session.say(["proof"])
    assert capsys.readouterr().out == "proof not measured: No module named 'diffusers'\n"


def test_what_hangs_is_ended_and_what_fails_says_why(tmp_path):
    assert _run(["http.server", "0", "--bind", "127.0.0.1"], 1.0) == "not finished after 1 s"
    session = _session(tmp_path / "gpu.json")
    tabulate(session, "train_step", 60.0, "train_step", ["--rounds=many"])
    (row,) = session.report.rows
    assert row["result"].startswith("FAILED: ")
    assert "--rounds" in row["result"]
    tabulate(session, "train_step", 60.0, "train_step", ["--device=cuda"])
    assert not any("table" in row for row in session.report.rows)


def test_results_of_other_versions_stay_as_they_are(tmp_path):
    path = results_of(tmp_path)
    Report("GPU session").write(path)
    assert results_of(tmp_path) == path
    of_another = json.loads(path.read_text())
    of_another["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(of_another))
    assert results_of(tmp_path).name.startswith(f"{path.stem}-torch-{torch.__version__[:3]}")


def test_the_page_names_the_commands_that_made_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    commands = [f"python -m benchmarks.gpu_session --only {part}" for part in ("a", "b")]
    Report("GPU session", commands=commands).write(tmp_path / "nvidia-h200.json")
    Report("masks").write(tmp_path / "masks.json")
    assert f"`{commands[0]}`, `{commands[1]}`" in page.page()
    assert "`python -m benchmarks.masks`" in page.page()


def test_the_page_says_of_a_gpu_that_nothing_was_measured_until_something_was(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    without = page.page()
    for name in ("step_vs_diffusers_cuda", "group_norm_silu_vs_eager", "mask_add_ms"):
        (line,) = (line for line in without.splitlines() if f"| `{name}` |" in line)
        assert line.count("not measured") == 2
    title = "three steps are those of the cpu"
    assert f"| {title} | not measured |" in without
    assert "| ours, CUDA graph | not measured" in without
    Report(gpu_session.TITLE).write(tmp_path / "nvidia-h200.json")
    assert title not in page.page()
