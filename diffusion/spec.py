"""What a diffusion study fixes in advance: architecture, schedule, objective, optimiser, sampler.

Frozen pydantic models without torch. Each is one TOML table, unknown keys are refused, and an
error names the key, its value and what to write instead.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Prediction = Literal["eps", "x0", "v"]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=4096)]


class Spec(BaseModel):
    """Base of all specs: immutable, unknown keys refused, infinities and NaN refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(Spec):
    """A UNet of the `diffusers.UNet2DModel` family (arXiv 2006.11239, appendix B)."""

    architecture: Literal["unet2d"] = "unet2d"
    """Family of the network; `unet2d` is diffusers' UNet2DModel."""

    image_size: Annotated[int, Field(ge=4, le=1024)]
    """Height and width of the images in pixels."""

    channels: Annotated[int, Field(ge=1, le=16)] = 1
    """Channels of the images (1 = greyscale, 3 = RGB)."""

    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]
    """Width of each level; every level after the first halves the resolution."""

    layers_per_block: Annotated[int, Field(ge=1, le=8)] = 1
    """Residual blocks per level on the way down (one more on the way up)."""

    attention: Annotated[tuple[bool, ...], Field(min_length=1, max_length=8)]
    """For each level, whether its residual blocks are followed by self-attention."""

    mid_attention: bool = True
    """Whether the block at the lowest resolution has self-attention."""

    attention_head_dim: Annotated[int, Field(ge=1, le=512)] = 32
    """Channels per attention head."""

    norm_num_groups: Annotated[int, Field(ge=1, le=256)] = 8
    """Groups of every GroupNorm."""

    classes: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """K of a class-conditional model, whose images have labels 0 … K − 1; absent = unconditional.
    The network has K + 1 class embeddings, the last for "any class" (arXiv 2207.12598)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        if len(self.attention) != levels:
            raise ValueError(
                f"attention = {list(self.attention)} has {len(self.attention)} entries but "
                f"block_out_channels has {levels}: write one true/false per level"
            )
        shrink = 2 ** (levels - 1)
        if self.image_size % shrink:
            raise ValueError(
                f"image_size = {self.image_size} cannot be halved {levels - 1} times: use a "
                f"multiple of {shrink}, or fewer entries in block_out_channels"
            )
        for width in widths:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups = {self.norm_num_groups} does not divide {width} in "
                    f"block_out_channels = {list(widths)}: use {math.gcd(*widths)} or a divisor"
                )
        attended = {w for w, used in zip(widths, self.attention, strict=True) if used}
        if self.mid_attention:
            attended.add(widths[-1])
        for width in sorted(attended):
            if width % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim = {self.attention_head_dim} does not divide {width}, the "
                    "width of a level with attention: use one of its divisors"
                )
        return self


class ScheduleSpec(Spec):
    """The noise schedule alpha_bar(t), t = 0 … num_train_timesteps − 1."""

    kind: Literal["linear", "cosine", "sigmoid"] = "cosine"
    """linear (arXiv 2006.11239), cosine (arXiv 2102.09672) or sigmoid (arXiv 2301.10972)."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=10_000)] = 1000
    """Number T of diffusion steps the model is trained on."""

    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-4
    """First beta of the linear schedule (unused by the others)."""

    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Last beta of the linear schedule (unused by the others)."""

    sigmoid_start: Annotated[float, Field(ge=-20.0, le=20.0)] = -3.0
    """Left end of the sigmoid's argument (sigmoid schedule only)."""

    sigmoid_end: Annotated[float, Field(ge=-20.0, le=20.0)] = 3.0
    """Right end of the sigmoid's argument (sigmoid schedule only)."""

    sigmoid_tau: Annotated[float, Field(ge=0.05, le=20.0)] = 1.0
    """Temperature of the sigmoid's argument (sigmoid schedule only)."""

    @model_validator(mode="after")
    def _increases(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"beta_start = {self.beta_start} exceeds beta_end = {self.beta_end}: swap them"
            )
        if self.sigmoid_start >= self.sigmoid_end:
            raise ValueError(
                f"sigmoid_start = {self.sigmoid_start} is not below "
                f"sigmoid_end = {self.sigmoid_end}: swap them"
            )
        return self


class ObjectiveSpec(Spec):
    """What the network predicts, and how its squared error is weighted over timesteps."""

    prediction: Prediction = "v"
    """eps (noise), x0 (image) or v = √alpha_bar·eps − √(1 − alpha_bar)·x0 (arXiv 2202.00512)."""

    snr_gamma: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Min-SNR weighting (arXiv 2303.09556) with this gamma; absent = the unweighted loss."""

    label_dropout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the labels replaced by "any class" in training (conditional models only)."""


class OptimizerSpec(Spec):
    """AdamW (arXiv 1711.05101), batch size and the exponential moving average of the weights."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-3
    """Step size after the warm-up."""

    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps, from step 0 of the whole training, over which the learning rate rises linearly."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moment."""

    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Decoupled weight decay."""

    gradient_clip: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """Largest global L2 norm of the loss gradient; longer gradients are scaled down to it."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Images per step."""

    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Largest decay of the moving average of the weights."""

    ema_ramp: Annotated[float, Field(ge=1.0, le=1e6)] = 10.0
    """The decay at step k is min(ema_decay, (1 + k) / (ema_ramp + k)): early averages forget."""


class SamplerSpec(Spec):
    """How images are drawn from a trained model."""

    kind: Literal["ddpm", "ddim", "dpmsolver++"] = "ddim"
    """ddpm (arXiv 2006.11239), ddim (arXiv 2010.02502) or dpmsolver++ (arXiv 2211.01095)."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Network evaluations per image; ddpm and ddim need a divisor of num_train_timesteps."""

    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of fresh noise per step of ddim: 0 = deterministic, 1 = as much as ddpm."""

    guidance: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Scale of classifier-free guidance (conditional models only): 1 = none, larger = more typical
    of the class and less diverse, 0 = any class. Every value but 1 doubles the network's work."""

    @model_validator(mode="after")
    def _eta_belongs_to_ddim(self) -> Self:
        if self.eta and self.kind != "ddim":
            raise ValueError(
                f"eta = {self.eta} has no meaning for kind = {self.kind!r}: leave eta out"
            )
        return self

    def check_against(self, schedule: ScheduleSpec) -> None:
        """Raise ValueError if these steps cannot be taken on that schedule.

        diffusers' DDIM steps by T // steps, which reaches t = 0 only when steps divides T.
        """
        total = schedule.num_train_timesteps
        if self.steps > total:
            raise ValueError(
                f"steps = {self.steps} exceeds num_train_timesteps = {total}: use at most {total}"
            )
        if self.kind != "dpmsolver++" and total % self.steps:
            nearest = min((d for d in range(1, total + 1) if total % d == 0), key=self._distance)
            raise ValueError(
                f"steps = {self.steps} does not divide num_train_timesteps = {total}: use {nearest}"
            )

    def _distance(self, steps: int) -> int:
        return abs(steps - self.steps)


def shared_rows(part: float, batch_size: int) -> int:
    """How many images of a batch are shared ones: `part` of it, but one is always one's own."""
    return min(round(part * batch_size), batch_size - 1)
