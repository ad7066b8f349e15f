"""The network: built from its spec, initialised from a seed, as one vector and as files.

A model crosses the project in three forms: a `UNet2DModel`, one float32 vector (what is averaged)
and safetensors (what is stored). `parameter_layout` alone fixes the order of the vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from diffusion.schedule import training_scheduler
from diffusion.spec import ModelSpec, ObjectiveSpec, ScheduleSpec
from kernels.noise import derive_key, uniform

Vector = NDArray[np.float32]


class ModelFileError(ValueError):
    """A model file does not hold exactly the parameters of the architecture the study agreed on."""


def build_model(spec: ModelSpec) -> nn.Module:
    """The diffusers.UNet2DModel of `spec`, its weights still arbitrary (see `initialise`).

    forward(x_t (B, c, h, w), t int64 (B,)).sample -> (B, c, h, w); a model with classes takes
    labels int64 (B,) as its third argument, K for "any class".
    """
    down = ["AttnDownBlock2D" if used else "DownBlock2D" for used in spec.attention]
    up = ["AttnUpBlock2D" if used else "UpBlock2D" for used in reversed(spec.attention)]
    model: nn.Module = UNet2DModel(
        sample_size=spec.image_size,
        in_channels=spec.channels,
        out_channels=spec.channels,
        block_out_channels=spec.block_out_channels,
        layers_per_block=spec.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        add_attention=spec.mid_attention,
        attention_head_dim=spec.attention_head_dim,
        norm_num_groups=spec.norm_num_groups,
        num_class_embeds=None if spec.classes is None else spec.classes + 1,
    )
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter from `seed` and its own name, to the same bits on every machine.

    Convolutions and linear layers: U(−b, b) with b = 1/√fan_in, torch's default; class embeddings:
    b = √3, for the variance of torch's default; norms: ones and zeros. Each draw u is a multiple of
    2⁻²⁴ in [0, 1) from the Philox stream of (seed, name); the weight is (2u − 1 + 2⁻²⁴)·b in
    float64, rounded once to float32.

    Raises TypeError for a layer whose default is not known here.
    """
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                values = _initial_values(module, name, parameter, seed)
                parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))


def _initial_values(module: nn.Module, name: str, parameter: nn.Parameter, seed: int) -> Vector:
    if isinstance(module, nn.GroupNorm):
        return np.full(parameter.numel(), float(name.endswith("weight")), dtype=np.float32)
    if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        fan_in = 1 / 3 if isinstance(module, nn.Embedding) else module.weight[0].numel()
        bound = 1.0 / math.sqrt(fan_in)
        key = torch.tensor(derive_key(seed, f"initialise {name}"))
        zero = torch.zeros(1, dtype=torch.int64)
        u = uniform((1, parameter.numel()), key=key, sample_id=zero, step=zero)[0].double().numpy()
        return ((2.0 * u - 1.0 + 2.0**-24) * bound).astype(np.float32)
    raise TypeError(f"{name}: no initial values are defined for {type(module).__name__}")


def parameter_layout(model: nn.Module) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, offset) of every parameter in the model's vector, sorted by name."""
    layout, offset = [], 0
    for name, parameter in sorted(model.named_parameters()):
        layout.append((name, tuple(parameter.shape), offset))
        offset += parameter.numel()
    return layout


def to_vector(model: nn.Module) -> Vector:
    """All parameters as one float32 vector in the order of `parameter_layout`."""
    return join_vector(parameters(model))


def load_vector(model: nn.Module, vector: Vector) -> None:
    """Copy a vector made by `to_vector` into the parameters of `model`.

    Raises ValueError when the vector is not float32 of exactly the model's length.
    """
    total = sum(p.numel() for p in model.parameters())
    if vector.shape != (total,) or vector.dtype != np.float32:
        raise ValueError(
            f"vector is {vector.dtype} of shape {vector.shape}, "
            f"the model needs float32 of shape ({total},)"
        )
    with torch.no_grad():
        for parameter, part in zip(parameters(model), split_vector(model, vector), strict=True):
            parameter.copy_(part)


def split_vector(model: nn.Module, vector: Vector) -> list[torch.Tensor]:
    """A copy of `vector` cut into tensors as `parameter_layout` says."""
    flat = torch.tensor(vector)
    return [
        flat[offset : offset + math.prod(shape)].view(shape)
        for _, shape, offset in parameter_layout(model)
    ]


def join_vector(tensors: Sequence[torch.Tensor]) -> Vector:
    """The inverse of `split_vector`: tensors on any device as one float32 vector."""
    return np.concatenate([t.detach().float().cpu().reshape(-1).numpy() for t in tensors])


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` in the order of `parameter_layout`."""
    return [parameter for _, parameter in sorted(model.named_parameters())]


def write_model(path: Path, model: nn.Module) -> None:
    """Write the parameters as one safetensors file: float32, the same bytes every time."""
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, path)


def read_model(path: Path, spec: ModelSpec) -> nn.Module:
    """The model of `spec` with the parameters stored at `path`.

    Raises ModelFileError when the file is not safetensors or does not hold exactly the parameters
    of the architecture, all float32. Nothing in the file is executed.
    """
    model = build_model(spec)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: _described(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
            _refuse_differences(path, found, model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise ModelFileError(f"{path} is not a readable safetensors file: {error}") from error
    return model


def _described(entry: object) -> str:
    return f"{entry.get_dtype()} {list(entry.get_shape())}"  # type: ignore[attr-defined]


def _refuse_differences(path: Path, found: dict[str, str], model: nn.Module) -> None:
    wanted = {name: f"F32 {list(p.shape)}" for name, p in model.named_parameters()}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(problems[:3]) + ("; …" if len(problems) > 3 else "")
        raise ModelFileError(
            f"{path} does not fit the agreed architecture ({len(problems)} differences): {shown}"
        )


def model_digest(path: Path) -> str:
    """SHA-256 of the file at `path`, lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_pipeline(
    folder: Path, model: nn.Module, schedule: ScheduleSpec, objective: ObjectiveSpec
) -> None:
    """Write the folder that `diffusers.DDPMPipeline.from_pretrained(folder)` reads."""
    plain = UNet2DModel.from_config(model.config)
    load_vector(plain, to_vector(model))
    pipeline = DDPMPipeline(plain, training_scheduler(schedule, objective))  # type: ignore[arg-type]
    pipeline.save_pretrained(folder)


def load_pipeline(folder: Path) -> DDPMPipeline:
    """The pipeline written by `save_pipeline`, from disk only."""
    pipeline: DDPMPipeline = DDPMPipeline.from_pretrained(folder, local_files_only=True)
    return pipeline
