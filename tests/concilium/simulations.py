"""Tiny simulations: a study on digits, of so many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from concilium.datasets import digits
from concilium.simulate.memo import Memo
from concilium.simulate.silos import Federation, Here, federate
from concilium.simulate.spec import Point, load_sweep
from concilium.simulate.study import Study
from concilium.simulate.sweep import run_sweep

STUDY = """
[study]
name = "tiny"
title = "A tiny study"
seed = 1

[data]
image_size = 8

[model]
block_out_channels = [8, 8]
attention = [false, false]
mid_attention = false
norm_num_groups = 4

[schedule]
num_train_timesteps = 100

[optimizer]
batch_size = 8

[sampler]
steps = 5

[warm_up]
steps = 6
patience = 1
check_every = 2

[auxiliary]
images = 60

[rounds]
count = 2
local_steps = 2

[evaluation]
feature_network = "digits"
sha256 = "9fb79a8912226791a58ea0d29720e44da22c67879da2f1e7ddf219bdcb70dfed"
samples = 20

[simulation]
data = "digits"
images = 300
silos = 4
seeds = [3]
precision = "float32"
partition = {labels = "dirichlet", alpha = 0.5}
"""
RUN = """
[[simulation.run]]
name = "{name}"
{more}
"""
PLUS = (
    'plan.strategy = {kind = "fedddpm_plus", window = 1, tau = 0.1, correction_steps = 3, '
    "auxiliary_share = 0.0, first_correction_steps = 0, correct_last = true}"
)
DEFAULT = 'plan.strategy = {kind = "fedddpm_plus", first_correction_steps = 2}'  # which shares
ALL = {
    "fedavg": "",
    "fedprox": 'plan.strategy = {kind = "fedprox", mu = 0.1}',
    "scaffold": 'plan.strategy = {kind = "scaffold"}',
    "fedadam": 'plan.strategy = {kind = "fedadam"}',
    "fedyogi": 'plan.strategy = {kind = "fedyogi"}',
    "fedddpm": 'plan.strategy = {kind = "fedddpm", correction_steps = 2}',
    "plus": PLUS,
    "default": DEFAULT,
    "central": 'training = "central"',
    "local": 'training = "local"',
    "auxiliary": 'training = "auxiliary"',
}
CONDITIONAL = {"[model]": "[model]\nclasses = 10", "steps = 5": "steps = 5\nguidance = 1.5"}


def study(folder: Path, runs: dict[str, str], **changes: str) -> Path:
    text = STUDY
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    text += "".join(RUN.format(name=name, more=more) for name, more in runs.items())
    path = folder / "study.toml"
    path.write_text(text, "utf-8")
    return path


def simulate(path: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    for _ in run_sweep(load_sweep(path), out, lambda *_: None):
        pass
    return {
        file.parent.name: [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for file in sorted(out.glob("*/metrics.jsonl"))
    }


def events(path: Path, memo: Path, federation: Federation | None = None) -> list[dict[str, Any]]:
    point: Point = next(load_sweep(path).points())
    silos = federation or federate(point, digits())
    return list(Study(point, silos, Memo(memo), Here()).events())
