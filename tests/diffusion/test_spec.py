"""A plan that cannot work is refused where it is read, with the key, the value and the fix."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from pydantic import ValidationError

from diffusion.spec import (
    ModelSpec,
    ObjectiveSpec,
    OptimizerSpec,
    SamplerSpec,
    ScheduleSpec,
    Spec,
)

SPECS = [ModelSpec, ScheduleSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec]
MODEL = {"image_size": 8, "block_out_channels": [32, 64], "attention": [False, True]}


def test_reading_specs_never_loads_torch() -> None:
    code = "import sys, diffusion, diffusion.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_holdout_split_never_loads_torch() -> None:
    code = "import sys, diffusion.features.holdout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_toml_tables_become_specs() -> None:
    plan = tomllib.loads(
        """
        [model]
        image_size = 8
        block_out_channels = [32, 32]
        attention = [false, false]
        [schedule]
        kind = "cosine"
        [optimizer]
        learning_rate = 2e-3
        betas = [0.9, 0.99]
        """
    )
    assert ModelSpec.model_validate(plan["model"]).block_out_channels == (32, 32)
    assert ScheduleSpec.model_validate(plan["schedule"]).num_train_timesteps == 1000
    assert OptimizerSpec.model_validate(plan["optimizer"]).betas == (0.9, 0.99)


@pytest.mark.parametrize("spec", SPECS)
def test_every_field_is_described(spec: type[Spec]) -> None:
    for name, field in spec.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("spec", SPECS)
def test_unknown_keys_are_refused(spec: type[Spec]) -> None:
    known = MODEL if spec is ModelSpec else {}
    with pytest.raises(ValidationError, match="learning_rat\n"):
        spec.model_validate({**known, "learning_rat": 1})


def test_specs_cannot_be_changed() -> None:
    spec = OptimizerSpec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": [True]}, "one true/false per level"),
        ({"image_size": 9}, "image_size = 9 .* use a multiple of 2"),
        ({"norm_num_groups": 5}, "norm_num_groups = 5 does not divide 32 .* use 32"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24 does not divide 64"),
        ({"image_size": 2048}, "image_size\n.*less than or equal to 1024.*2048"),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate({**MODEL, **changes})


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rate\n.*finite"):
        OptimizerSpec(learning_rate=float("nan"))


def test_a_schedule_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"beta_start = 0.1 exceeds beta_end = 0.02: swap"):
        ScheduleSpec(kind="linear", beta_start=0.1)
    with pytest.raises(ValidationError, match=r"sigmoid_start = 4.0 is not below"):
        ScheduleSpec(kind="sigmoid", sigmoid_start=4.0)


def test_eta_belongs_to_ddim() -> None:
    with pytest.raises(ValidationError, match=r"eta = 0.5 has no meaning for kind = 'ddpm'"):
        SamplerSpec(kind="ddpm", eta=0.5)


def test_sampling_steps_that_would_miss_the_last_timestep_are_refused() -> None:
    schedule = ScheduleSpec(num_train_timesteps=100)
    SamplerSpec(steps=25).check_against(schedule)
    SamplerSpec(kind="dpmsolver++", steps=30).check_against(schedule)
    with pytest.raises(ValueError, match=r"steps = 30 does not divide .* = 100: use 25"):
        SamplerSpec(steps=30).check_against(schedule)
    with pytest.raises(ValueError, match=r"steps = 200 exceeds .* = 100: use at most 100"):
        SamplerSpec(steps=200).check_against(schedule)
