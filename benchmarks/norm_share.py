"""How much of our training step on a CPU GroupNorm + SiLU takes, forward and backward.

    python -m benchmarks.norm_share [--steps 30] [--json FILE]

The step of `benchmarks.train_step` (1.1 M parameters, 32×32×1, batch 64, one thread) in bfloat16,
channels_last and with fused norms, also where another form would be chosen, with a clock around
every call of the two ops: CPU time of this process. The limit is a third of the step for the
backward pass.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import FORMS, our_step
from benchmarks.measure import Report

OPS = {"forward": "_group_norm_silu", "backward": "_group_norm_silu_backward"}


def measure(report: Report, steps: int) -> None:
    """Rows of the step and of its two parts, medians over the steps, and the backward's share."""
    step, _ = our_step("cpu", FORMS["bf16, channels_last, fused"])
    spent = dict.fromkeys(OPS, 0.0)
    module = importlib.import_module("kernels.group_norm_silu")

    def clocked(part: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            result = op(*arguments)
            spent[part] += time.process_time() - start
            return result

        return call

    for part, name in OPS.items():  # as the op's own functions look them up, at every call
        setattr(module, name, clocked(part, getattr(module, name)))
    taken: dict[str, list[float]] = {part: [] for part in ("step", *OPS)}
    warmup = min(3, steps)
    for done in range(warmup + steps):
        spent.update(dict.fromkeys(OPS, 0.0))
        start = time.process_time()
        step()
        spent["step"] = time.process_time() - start
        if done >= warmup:
            for part, seconds in taken.items():
                seconds.append(spent[part])
    whole = float(np.median(taken["step"]))
    for part, seconds in taken.items():
        median = float(np.median(seconds))
        report.row(what=part, cpu_p50_ms=round(1e3 * median, 1), of_step=round(median / whole, 3))
    backward = float(np.median(taken["backward"])) / whole
    report.target("norm_backward_of_step", round(backward, 3), "", at_most=0.333)


def main() -> None:
    parser = argparse.ArgumentParser(description="the norm's share of a training step on a CPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("GroupNorm + SiLU in a training step on cpu, 1 thread")
    measure(report, given.steps)
    report.finish(given.json)


if __name__ == "__main__":
    main()
