"""The benchmarks run, on a CPU and without measuring; what they say of it is no result."""

import json
import os
import pathlib
import subprocess
import sys

from benchmarks.page import PAGE, page

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_micro_benchmark_does_its_job():
    said = _run("pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--benchmark-disable")
    assert " passed" in said
    assert "skipped" not in said


def test_a_session_without_a_gpu_measures_nothing_and_says_so(tmp_path):
    _run("benchmarks.gpu_session", "--results", str(tmp_path))
    written = json.loads((tmp_path / "no-gpu.json").read_text())
    assert written["rows"]
    for row in written["rows"]:
        figures = [row[name] for name in ("result", "p50_ms", "gb_s", "of_copy") if name in row]
        assert figures, row
        assert all(figure is None for figure in figures), row
    assert written["targets"]
    assert all(target["value"] is None for target in written["targets"])


def test_the_clock_around_the_norms_sees_both_of_their_passes(tmp_path):
    _run("benchmarks.norm_share", "--steps", "1", "--json", str(tmp_path / "share.json"))
    rows = json.loads((tmp_path / "share.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["step", "forward", "backward"]
    assert 0 < rows[1]["of_step"] + rows[2]["of_step"] < 1
    assert all(row["of_step"] > 0 for row in rows)


def test_the_page_of_results_is_made_from_them():
    assert PAGE.read_text("utf-8") == page(), "renew it with `python -m benchmarks.page`"
