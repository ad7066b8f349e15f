"""Every silo starts from the same bits, and a model file is what it says or it is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion.model import (
    ModelFileError,
    build_model,
    initialise,
    load_pipeline,
    load_vector,
    model_digest,
    parameter_layout,
    read_model,
    save_pipeline,
    to_vector,
    write_model,
)
from diffusion.spec import ModelSpec, ObjectiveSpec, ScheduleSpec


@pytest.fixture
def model(tiny: ModelSpec) -> nn.Module:
    model = build_model(tiny)
    initialise(model, seed=1)
    return model


def test_initial_weights_are_these_bits_on_every_machine(model: nn.Module) -> None:
    """If this fails, silos of different versions start from different models."""
    digest = hashlib.sha256(to_vector(model).tobytes()).hexdigest()
    assert digest == "e6e2891c6518e30d622fbc1e830cf43dab1390ae2a785c69c54ff5ac0ec2df8f"


def test_initial_weights_depend_on_seed_and_name_only(tiny: ModelSpec, model: nn.Module) -> None:
    again, other = build_model(tiny), build_model(tiny)
    initialise(again, seed=1)
    initialise(other, seed=2)
    assert np.array_equal(to_vector(again), to_vector(model))
    assert not np.array_equal(to_vector(other), to_vector(model))
    first, second = model.get_parameter("conv_in.weight"), model.get_parameter("conv_out.weight")
    assert not torch.equal(first.flatten()[:8], second.flatten()[:8])


def test_initial_weights_have_torchs_default_bounds(model: nn.Module) -> None:
    wide = nn.Linear(400, 300)
    initialise(wide, seed=3)
    assert wide.weight.abs().max() <= 1 / 20
    assert wide.weight.abs().max() > 0.999 / 20
    assert abs(wide.weight.std().item() - 1 / 20 / 3**0.5) < 2e-4
    assert wide.bias.abs().max() <= 1 / 20
    norm = model.get_submodule("conv_norm_out")
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()


def test_a_layer_without_defined_initial_values_is_refused() -> None:
    with pytest.raises(TypeError, match=r"0.weight: no initial values are defined for Bilinear"):
        initialise(nn.Sequential(nn.Bilinear(2, 2, 2)), seed=0)


def test_vector_and_model_carry_the_same_weights(tiny: ModelSpec, model: nn.Module) -> None:
    other = build_model(tiny).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_vector(other, to_vector(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    assert np.array_equal(to_vector(other), to_vector(model))


def test_layout_tells_where_each_parameter_lies(model: nn.Module) -> None:
    vector, layout = to_vector(model), parameter_layout(model)
    names = [name for name, _, _ in layout]
    assert names == sorted(names)
    for name, shape, offset in layout:
        part = vector[offset : offset + int(np.prod(shape))].reshape(shape)
        assert np.array_equal(part, model.get_parameter(name).detach().numpy())
    assert sum(int(np.prod(shape)) for _, shape, _ in layout) == len(vector)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(3, np.float64)])
def test_a_vector_of_another_model_is_refused(model: nn.Module, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the model needs float32 of shape"):
        load_vector(model, wrong)


def test_diffusers_reads_the_published_folder(model: nn.Module, tmp_path: Path) -> None:
    save_pipeline(tmp_path, model, ScheduleSpec(kind="sigmoid"), ObjectiveSpec(prediction="v"))
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert np.array_equal(to_vector(load_pipeline(tmp_path).unet), to_vector(model))


def test_a_model_survives_its_file(tiny: ModelSpec, model: nn.Module, tmp_path: Path) -> None:
    write_model(tmp_path / "a", model)
    back = read_model(tmp_path / "a", tiny)
    write_model(tmp_path / "b", back.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    assert np.array_equal(to_vector(back), to_vector(model))
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    assert model_digest(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_files_that_are_not_the_agreed_model_are_refused(
    tiny: ModelSpec, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, model)
    good = load_file(path)
    name = "conv_in.bias"
    cases = {
        "conv_in.bias is missing": {k: v for k, v in good.items() if k != name},
        "extra is unexpected": {**good, "extra": torch.zeros(1)},
        r"conv_in.bias is F32 \[9\], expected F32 \[8\]": {**good, name: torch.zeros(9)},
        r"conv_in.bias is F16 \[8\], expected F32 \[8\]": {**good, name: good[name].half()},
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ModelFileError, match=rf"\(1 differences\): {message}"):
            read_model(path, tiny)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelFileError, match="is not a readable safetensors file"):
        read_model(path, tiny)
