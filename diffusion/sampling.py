"""Drawing images from a trained model with diffusers' schedulers, and showing them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from diffusion.execution import Execution
from diffusion.labels import Labels, check_labels, classes_of
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
    labels: Labels | None = None,
    batch_size: int = 256,
    first_index: int = 0,
) -> Images:
    """Images number `first_index` … `first_index + n − 1` of `seed`: uint8 (n, c, h, w).

    All noise of an image is a function of (seed, its number): batch size and place in the batch
    change nothing but the rounding inside the network. Pixels are round((x_0 + 1)·127.5), clipped
    to 0 … 255. A conditional model is given every image's label: int64 (n,), K for any class; the
    same number under another label is the same noise.

    Raises ValueError when the sampler's steps do not fit the schedule, for labels that do not fit
    the model, and for a guidance scale other than 1 where there are none.
    """
    sampler.check_against(schedule)
    eta = 1.0 if sampler.kind == "ddpm" else sampler.eta
    images = _blank(model, n)
    key = torch.tensor([derive_key(seed, "sampling noise")], device=execution.device)
    predict = Guided(model, execution, labels, n, sampler.guidance)
    for start in range(0, n, batch_size):
        part = images[start : start + batch_size]
        number = torch.arange(len(part), device=execution.device) + (first_index + start)
        noise = _Noise(part.shape, key, number)
        scheduler = sampling_scheduler(schedule, objective, sampler)
        part[:] = _to_uint8(_denoise(predict.part(start, len(part)), scheduler, eta, noise))
    return images


@torch.no_grad()
def sample_published(
    pipeline: DDPMPipeline,
    n: int,
    *,
    steps: int,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
    guidance: float = 1.0,
    batch_size: int = 256,
) -> Images:
    """Images of a published model (`load_pipeline`) by `steps` steps of DDIM, else as `sample`.

    Raises ValueError when the steps do not divide those that the model was trained on, for labels
    that do not fit the model, and for guidance without labels.
    """
    trained_on = ScheduleSpec(num_train_timesteps=pipeline.scheduler.config.num_train_timesteps)
    SamplerSpec(kind="ddim", steps=steps).check_against(trained_on)
    model: Any = pipeline.unet
    images = _blank(model, n)
    key = torch.tensor([derive_key(seed, "sampling noise")], device=execution.device)
    predict = Guided(model, execution, labels, n, guidance)
    for start in range(0, n, batch_size):
        part = images[start : start + batch_size]
        noise = _Noise(part.shape, key, torch.arange(len(part), device=execution.device) + start)
        scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        part[:] = _to_uint8(_denoise(predict.part(start, len(part)), scheduler, 0.0, noise))
    return images


def _blank(model: nn.Module, n: int) -> Images:
    size: Any = model.config
    return np.empty((n, size.in_channels, size.sample_size, size.sample_size), dtype=np.uint8)


class Guided:
    """A model in its place, as the function (x_t, t) → prediction that a sampler asks: guided
    towards labels int64 (n,), where it has classes (`diffusion.labels` has the equation)."""

    def __init__(
        self,
        model: nn.Module,
        execution: Execution,
        labels: Labels | None,
        n: int,
        guidance: float,
    ) -> None:
        check_labels(model, labels, n, null=True)
        if labels is None and guidance != 1.0:
            raise ValueError(f"guidance = {guidance} needs a model with classes: leave it out")
        execution.place(model)
        self._model, self._execution, self._guidance = model.eval(), execution, guidance
        self._labels, self._null = labels, classes_of(model)

    def part(self, start: int, n: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The function for images `start` … `start + n − 1`; its t is int64 (n,)."""
        model, predict, s = self._model, self._execution.predict, self._guidance
        if self._labels is None:
            return lambda x_t, t: predict(model, x_t, t).float()
        known = torch.tensor(self._labels[start : start + n], device=self._execution.device)
        if s == 1.0:
            return lambda x_t, t: predict(model, x_t, t, known).float()
        both = torch.cat([torch.full_like(known, self._null or 0), known])

        def guided(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            doubled = predict(model, torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
            anything, wanted = doubled.chunk(2)
            return anything + s * (wanted - anything)

        return guided


class _Noise:
    """The k-th standard normal tensor of the images `number`."""

    def __init__(self, shape: tuple[int, ...], key: torch.Tensor, number: torch.Tensor) -> None:
        self._shape, self._key, self._number = shape, key, number

    def __call__(self, k: int) -> torch.Tensor:
        step = torch.tensor([k], device=self._key.device)
        return normal(self._shape, key=self._key, sample_id=self._number, step=step)


def _denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Any,
    eta: float,
    noise: _Noise,
) -> torch.Tensor:
    x_t = noise(0)
    for k, t in enumerate(scheduler.timesteps):
        prediction = predict(x_t, t.to(x_t.device).expand(len(x_t)))
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
