"""Classification accuracy score: train on synthetic images, test on real ones.

    CAS = share of the real images whose label a classifier finds that saw synthetic images only

Ravuri, Vinyals: *Classification Accuracy Score for Conditional Generative Models* (arXiv
1905.10887); Esteban et al. call it train on synthetic, test on real (arXiv 1706.02633). What is
left out of the samples, a class or a way of writing it, is missed by the classifier as well; the
same classifier trained on real images is the bar to compare with.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from diffusion.batches import BatchOrder
from diffusion.features.network import FeatureNetwork
from diffusion.model import initialise

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

_LAYERS = ((16, 1), (32, 2), (48, 2))
_BATCH, _RATE = 128, 2e-3


def fit_classifier(
    images: Images, labels: Labels, classes: int, *, seed: int = 0, steps: int = 1000
) -> FeatureNetwork:
    """A small convolutional classifier of images (uint8 (n, c, h, w), as greyscale), on the CPU.

    AdamW on the cross entropy with smoothed labels, the rate falling to zero; weights and batches
    are functions of `seed`. Raises ValueError for labels (int64 (n,)) outside 0 … classes − 1.
    """
    _check(images, labels, classes)
    network = FeatureNetwork(min(images.shape[-1], 64), _LAYERS, classes)
    initialise(network, seed)
    adam = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    order, wanted = BatchOrder(len(images), _BATCH, seed), torch.from_numpy(labels)
    for step in range(steps):
        rows = order.indices(step)
        logits = network.classify(network(network.prepare(torch.from_numpy(images[rows]))))
        loss = functional.cross_entropy(logits, wanted[rows], label_smoothing=0.1)
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Images, labels: Labels) -> float:
    """Share of the images whose largest logit is their label."""
    logits = network.classify(torch.from_numpy(network.extract(images)))
    return float((logits.argmax(dim=1).numpy() == labels).mean())


def synthetic_to_real(
    synthetic: tuple[Images, Labels],
    real: tuple[Images, Labels],
    classes: int,
    *,
    seed: int = 0,
    steps: int = 1000,
) -> float:
    """Accuracy on the real images of a classifier trained on the synthetic ones."""
    _check(*real, classes)
    return accuracy(fit_classifier(*synthetic, classes, seed=seed, steps=steps), *real)


def _check(images: Images, labels: Labels, classes: int) -> None:
    if labels.shape != (len(images),) or not len(labels):
        raise ValueError(f"{len(images)} images and labels of shape {labels.shape}: give one each")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, the {classes} classes from 0 to "
            f"{classes - 1}"
        )
