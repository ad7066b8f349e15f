"""A sweep spread over a Ray cluster gives the numbers of one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concilium.simulate.spec import load_sweep
from concilium.simulate.sweep import run_sweep
from tests.concilium.simulations import ALL, PLUS, simulate, study

pytest.importorskip("ray", reason="concilium[ray] is not installed")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_cluster_gives_the_same_numbers(tmp_path: Path) -> None:
    path = study(tmp_path, {"plus": PLUS, "scaffold": ALL["scaffold"]})
    here = simulate(path, tmp_path / "here")
    spread = tmp_path / "spread"
    names = [
        result["run"] for result in run_sweep(load_sweep(path), spread, lambda *_: None, "local")
    ]
    assert names == ["plus", "scaffold"]
    for run, lines in here.items():
        text = (spread / run / "metrics.jsonl").read_text("utf-8")
        assert [json.loads(line) for line in text.splitlines()] == lines
