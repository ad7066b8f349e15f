"""Several training processes at one site are one training run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import sys
import numpy as np
import torch
from torch import distributed
from diffusion.execution import Execution
from diffusion.model import build_model, initialise, to_vector
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, ScheduleSpec
from diffusion.training import train

rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if processes > 1:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
model = build_model(
    ModelSpec(image_size=8, block_out_channels=(8,), attention=(False,), attention_head_dim=4)
)
initialise(model, seed=1)
start = to_vector(model)
images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
result = train(
    model,
    images,
    steps=3,
    schedule=ScheduleSpec(),
    objective=ObjectiveSpec(),
    optimizer=OptimizerSpec(batch_size=6),
    seed=2,
    # bfloat16, chosen on a CPU with AMX, rounds by batch, and AdamW's first steps magnify that
    execution=Execution(torch.device("cpu"), torch.float32, torch.contiguous_format),
)
np.savez(
    f"{folder}/{processes}-{rank}",
    start=start,
    vector=to_vector(model),
    loss=result.loss_per_step,
)
"""


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(processes), str(tmp_path)],
            env=environment,
        )
        for processes in (1, 2)
        for rank in range(processes)
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0, 0]
    alone, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("1-0", "2-0", "2-1"))
    assert np.array_equal(first["vector"], second["vector"])
    np.testing.assert_allclose(first["loss"], alone["loss"], rtol=1e-4)
    moved = np.linalg.norm(alone["vector"] - alone["start"])
    assert np.linalg.norm(first["vector"] - alone["vector"]) < 0.05 * moved
