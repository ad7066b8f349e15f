from __future__ import annotations

import numpy as np
import pytest

from diffusion.execution import Execution, choose_execution
from diffusion.spec import ModelSpec


@pytest.fixture(scope="session")
def execution() -> Execution:
    return choose_execution("cpu", threads=1)


@pytest.fixture(scope="session")
def tiny() -> ModelSpec:
    """8×8×1, two levels, attention in the middle: every kind of layer, about 4,000 parameters."""
    return ModelSpec(
        image_size=8,
        block_out_channels=(8, 8),
        attention=(False, True),
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(20, 1, 8, 8), dtype=np.uint8)
