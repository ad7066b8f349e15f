"""What `benchmarks.kernels` says of its aims where there is no GPU to measure them on."""

import pytest
import torch

from benchmarks.kernels import AIMS, measure
from benchmarks.measure import Report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is measured")
def test_without_a_gpu_every_aim_is_listed_as_not_measured(capsys):
    report = Report("fused operations")
    measure(report, "cuda", rounds=1, compiled=False)
    report.finish()
    shown = capsys.readouterr().out
    assert {target.value for target in report.targets} == {None}
    for op in AIMS:
        assert f"\n  {op}_" in shown
    assert shown.count("): not measured") == len(report.targets) == len(AIMS) + 1
