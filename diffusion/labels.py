"""Class labels of a conditional model, and classifier-free guidance.

A model of K classes has K + 1 class embeddings; the last, the *null* class, stands for "any". In
training a label is replaced by it with probability p, so that one network learns both the
conditional and the unconditional distribution. In sampling the two are extrapolated:

    f_guided(x_t, c) = f(x_t, null) + s·(f(x_t, c) − f(x_t, null))

Ho & Salimans: *Classifier-Free Diffusion Guidance* (arXiv 2207.12598, algorithms 1 and 2); s is
diffusers' `guidance_scale`, 1 + w in the paper. s = 1 is plain conditional sampling, s = 0
unconditional. eps, x0 and v are, at a given x_t, affine functions of one another and the weights
1 − s and s add up to one, so guiding any of the three guides the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kernels.noise import derive_key, uniform

Labels = NDArray[np.int64]


def classes_of(model: nn.Module) -> int | None:
    """K of a conditional model, None of an unconditional one."""
    config: Any = model.config
    embeddings = config.num_class_embeds
    return None if embeddings is None else int(embeddings) - 1


def check_labels(model: nn.Module, labels: Labels | None, n: int, *, null: bool = False) -> None:
    """Raises ValueError unless a conditional model has n labels 0 … K − 1 (with `null`, … K), and
    an unconditional one none."""
    classes = classes_of(model)
    if classes is None:
        if labels is not None:
            raise ValueError("the model has no classes: leave labels out, or set model.classes")
        return
    if labels is None:
        raise ValueError(f"the model has {classes} classes: give one label for each image")
    if labels.dtype != np.int64 or labels.shape != (n,):
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}: give int64 ({n},)")
    if n and not (labels.min() >= 0 and labels.max() < classes + null):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, the model's {classes} classes "
            f"from 0 to {classes - 1}: raise model.classes, or correct the labels"
        )


def drop_labels(
    labels: torch.Tensor,
    rate: float,
    null: int,
    *,
    key: torch.Tensor,
    sample_id: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """`labels` int64 (B,), each replaced by `null` with probability `rate`; which ones is a
    function of (key, sample_id, step)."""
    u = uniform((len(labels), 1), key=key, sample_id=sample_id, step=step)[:, 0]
    return torch.where(u < rate, null, labels)


def even_labels(n: int, classes: int) -> Labels:
    """n labels in ascending order, as many of each class as of any other up to one: int64 (n,)."""
    return np.arange(n, dtype=np.int64) * classes // max(n, 1)


def drawn_labels(weights: NDArray[Any], n: int, *, seed: int, first_index: int = 0) -> Labels:
    """Labels of the images number `first_index` … drawn with probabilities ∝ `weights` (K,), each
    a function of (seed, its number): int64 (n,)."""
    number = torch.arange(first_index, first_index + n)
    key, step = torch.tensor([derive_key(seed, "labels")]), torch.zeros(1, dtype=torch.int64)
    u = uniform((n, 1), key=key, sample_id=number, step=step)[:, 0].double().numpy()
    edges = np.cumsum(np.asarray(weights, dtype=np.float64))
    return np.searchsorted(edges / edges[-1], u, side="right").astype(np.int64)
