"""What `benchmarks.kernels` says of its aims, with a GPU and where there is none."""

import pytest
import torch

from benchmarks import kernels as benchmark
from benchmarks.contenders import SPECS
from benchmarks.kernel_cases import GROUPS, NOISE, Case, cifar_sizes
from benchmarks.kernels import AIMS, Measured, _first_cause, _target, measure
from benchmarks.measure import Report
from diffusion.model import build_model, parameter_layout


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


def _aim(op, measured, copied=0.0):
    report = Report("fused operations")
    _target(report, op, measured, copied)
    return [(target.value, target.unit) for target in report.targets]


def test_what_was_not_captured_has_no_aim_rather_than_one_by_another_clock():
    not_captured = Measured(2.0, uncaptured="operation not permitted")
    assert _aim("mask_add", {"ours": not_captured}) == [(None, "ms")]
    assert _aim("adamw_ema", {"ours": not_captured}, 1.0) == [(None, "of copy bandwidth")]
    both = {"ours": Measured(2.0, 1.0), "eager": not_captured, "compile": Measured(9.0, 3.0)}
    assert _aim("group_norm_silu", both) == [(None, "x"), (3.0, "x")]
    assert not_captured.clock == "wall clock; not captured: operation not permitted"


def test_what_makes_noise_is_held_to_the_longer_of_copy_and_noise():
    ours, noise = Measured(9.0, 2.0), Measured(9.0, 1.8)
    assert _aim("q_sample", {"ours": ours, NOISE: noise}, 1.0) == [
        (0.9, "of the noise's arithmetic")
    ]
    assert _aim("q_sample", {"ours": ours, NOISE: noise}, 1.9) == [(0.95, "of copy bandwidth")]


def test_bytes_that_never_move_have_no_share_of_the_copy_bandwidth():
    masks = Case("mask_add", None, list, keystream=4 * 10**9)
    assert masks.rates("ours", 2.0, 1e9) == {"gb_s": 2.0, "of_copy": "arithmetic"}
    small = Case("q_sample, batch 128", None, list)
    assert set(small.rates("ours", 2.0, 1e9).values()) == {"in cache"}


def test_the_reason_is_what_failed_first():
    def fail():
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as raised:
        fail()
    assert _first_cause(raised.value) == "operation not permitted"


def test_a_case_that_fails_costs_no_other_its_row(monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    cases = {"one": lambda device: [Case("bad", None, fail), Case("good", 8, lambda: None)]}
    monkeypatch.setattr("benchmarks.kernels.GROUPS", cases)
    monkeypatch.setattr("benchmarks.kernels.copy_bandwidth", lambda _: (1e9, "wall clock"))
    report = Report("fused operations")
    measure(report, "cpu", rounds=1, compiled=False)
    _, bad, good = report.rows
    assert (bad["p50_ms"], bad["rates_of"]) == (None, "not measured: out of memory")
    assert good["rates_of"] == "wall clock"
    assert good["p50_ms"] is not None


def test_what_cannot_be_compiled_says_why(monkeypatch):
    def no_compiler(job, dynamic):
        def fail():
            raise RuntimeError("no C compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    cases = {"one": lambda device: [Case("good", 8, lambda: None, lambda: None)]}
    monkeypatch.setattr("benchmarks.kernels.GROUPS", cases)
    monkeypatch.setattr("benchmarks.kernels.copy_bandwidth", lambda _: (1e9, "wall clock"))
    report = Report("fused operations")
    measure(report, "cpu", rounds=1, compiled=True)
    said = {row["by"]: row.get("rates_of") for row in report.rows}
    assert said["compile"] == "not measured: no C compiler"
    assert said["ours"] == said["eager"] == "wall clock"


def test_the_copy_is_timed_by_the_clock_of_what_is_judged_by_it(monkeypatch):
    replays = []

    def replayed(job, wall):
        replays.append(job())
        return Measured(wall, replay=0.5)

    monkeypatch.setattr(benchmark, "_replayed", replayed)
    monkeypatch.setattr(benchmark, "_wait", lambda device: lambda: None)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, device: real(min(n, 1000)))
    bandwidth, clock = benchmark.copy_bandwidth("cuda")
    assert (bandwidth, clock) == (8 * 1000 / 0.5, "replay")
    assert len(replays) == 1


def test_masks_are_measured_in_the_tensors_of_the_network():
    with torch.device("meta"):
        model = build_model(SPECS["cuda"])
    layout = parameter_layout(model)
    starts = [offset for _, _, offset in layout]
    ends = [*starts[1:], sum(p.numel() for p in model.parameters())]
    assert cifar_sizes() == [end - start for start, end in zip(starts, ends, strict=True)]


def _tensors(made):
    return [v.detach().float() for v in (made if isinstance(made, tuple) else (made,))]


@pytest.mark.parametrize("group", GROUPS)
def test_every_case_runs_and_does_what_its_rivals_do(group):
    """Where both make the same noise or none."""
    compared = set()
    for case in GROUPS[group]("cpu"):
        ours = case.ours()
        for rival in filter(None, (case.eager, *case.others.values())):
            theirs = rival()
            if case.name.startswith(("add_noise", "sampler_step, DDIM", "group_norm_silu")):
                torch.testing.assert_close(_tensors(theirs), _tensors(ours), rtol=1e-3, atol=1e-3)
                compared.add(case.name)
    assert len(compared) == {"norms": 1, "elementwise": 2}.get(group, 0)
