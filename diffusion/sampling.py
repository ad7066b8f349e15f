"""Drawing images from a trained model with diffusers' schedulers, and showing them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from diffusion.execution import Execution
from diffusion.schedule import sampling_scheduler
from diffusion.spec import ObjectiveSpec, SamplerSpec, ScheduleSpec
from kernels.noise import derive_key, normal

Images = NDArray[np.uint8]


@torch.no_grad()
def sample(
    model: nn.Module,
    n: int,
    *,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    sampler: SamplerSpec,
    seed: int,
    execution: Execution,
    batch_size: int = 256,
    first_index: int = 0,
) -> Images:
    """Images number `first_index` … `first_index + n − 1` of `seed`: uint8 (n, c, h, w).

    All noise of an image is a function of (seed, its number): batch size and place in the batch
    change nothing but the rounding inside the network. Pixels are round((x_0 + 1)·127.5), clipped
    to 0 … 255.

    Raises ValueError when the sampler's steps do not fit the schedule.
    """
    sampler.check_against(schedule)
    execution.place(model)
    model.eval()
    key = torch.tensor([derive_key(seed, "sampling noise")], device=execution.device)
    size: Any = model.config
    images = np.empty((n, size.in_channels, size.sample_size, size.sample_size), dtype=np.uint8)
    for start in range(0, n, batch_size):
        part = images[start : start + batch_size]
        number = torch.arange(len(part), device=execution.device) + (first_index + start)
        noise = _Noise(part.shape, key, number)
        scheduler = sampling_scheduler(schedule, objective, sampler)
        x_0 = _denoise(model, scheduler, sampler, noise, execution)
        part[:] = _to_uint8(x_0)
    return images


class _Noise:
    """The k-th standard normal tensor of the images `number`."""

    def __init__(self, shape: tuple[int, ...], key: torch.Tensor, number: torch.Tensor) -> None:
        self._shape, self._key, self._number = shape, key, number

    def __call__(self, k: int) -> torch.Tensor:
        step = torch.tensor([k], device=self._key.device)
        return normal(self._shape, key=self._key, sample_id=self._number, step=step)


def _denoise(
    model: nn.Module, scheduler: Any, sampler: SamplerSpec, noise: _Noise, execution: Execution
) -> torch.Tensor:
    x_t = noise(0)
    eta = 1.0 if sampler.kind == "ddpm" else sampler.eta
    for k, t in enumerate(scheduler.timesteps):
        times = t.to(execution.device).expand(len(x_t))
        prediction = execution.predict(model, x_t, times).float()
        options: dict[str, Any] = {}
        if isinstance(scheduler, DDIMScheduler):
            options = {"eta": eta, "use_clipped_model_output": True}
            options["variance_noise"] = noise(k + 1) if eta else None
        x_t = scheduler.step(prediction, t, x_t, **options).prev_sample
    return x_t


def _to_uint8(x_0: torch.Tensor) -> Images:
    levels = ((x_0 + 1.0) * 127.5).round().clamp(0, 255)
    pixels: Images = levels.to(torch.uint8).cpu().numpy()
    return pixels


def _enlarged(image: Images, scale: int) -> Images:
    """uint8 (c, h, w) → (h·scale, w·scale, c)."""
    channels, height, width = image.shape
    pixels = image[0] if channels == 1 else image.transpose(1, 2, 0)
    size = (width * scale, height * scale)
    large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return large.reshape(height * scale, width * scale, channels)


def grid_png(images: Images, path: Path, columns: int = 10, tile: int = 64) -> None:
    """Write images (uint8 (n, 1 or 3, h, w)) as one PNG grid, left to right, top to bottom.

    Small images are enlarged (bicubic) by the largest whole factor that keeps them within `tile`
    pixels: squares of eight by eight hide from the eye what it reads easily in a smooth picture.
    Missing tiles of the last row stay white.
    """
    n, channels, height, width = images.shape
    scale = max(1, tile // max(height, width))
    large = [_enlarged(image, scale) for image in images]
    gap = 2
    rows = math.ceil(n / columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(large):
        top, left = gap + i // columns * cell_h, gap + i % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path, format="PNG")
