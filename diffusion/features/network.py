"""The feature network: a small convolutional classifier whose penultimate layer is the feature.

    x  = images as greyscale, resized, v·2/255 − 1              (n, 1, s, s)
    f  = tanh(W·convs(x) + b)                                   (n, 64), within ±FEATURE_BOUND
    c  = mean of f over the held-out training images            (64,), public: it is stored with
    the weights

f is bounded, so that each entry of f − c is at most CENTRED_BOUND and each of (f − c)(f − c)ᵀ at
most its square: the sums fit a fixed-point range known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from diffusion.features.file import FEATURE_BOUND, FEATURES, read_network
from diffusion.features.pinned import FEATURE_NETWORKS

Images = NDArray[np.uint8]

CENTRED_BOUND = 2.0 * FEATURE_BOUND
_MOST_VALUES = 1 << 25  # of one layer and one batch: 128 MiB


class FeatureNetwork(nn.Module):
    """See the module's docstring. `classify(features)` are the logits it was trained on."""

    center: torch.Tensor

    def __init__(self, image_size: int, layers: tuple[tuple[int, int], ...], classes: int) -> None:
        super().__init__()
        self.image_size = image_size
        convolutions: list[nn.Module] = []
        channels, size = 1, image_size
        widest = size * size
        for width, stride in layers:
            convolutions += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ReLU()]
            channels, size = width, -(-size // stride)
            widest = max(widest, channels * size * size)
        self._largest_batch = max(1, _MOST_VALUES // widest)
        self.convolutions = nn.Sequential(*convolutions)
        self.project = nn.Linear(channels * size * size, FEATURES)
        self.classify = nn.Linear(FEATURES, classes)
        self.register_buffer("center", torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (n, 64) of x (n, 1, s, s) in [−1, 1]."""
        hidden = self.convolutions(x).flatten(1)
        features: torch.Tensor = self.project(hidden).tanh()
        return features

    @torch.no_grad()
    def extract(self, images: Images, batch_size: int = 512) -> NDArray[np.float32]:
        """Features of uint8 images (n, c, h, w) of any size, c = 1 or 3: float32 (n, 64)."""
        features = np.empty((len(images), FEATURES), dtype=np.float32)
        batch_size = min(batch_size, self._largest_batch)
        for start in range(0, len(images), batch_size):
            f = self(self.prepare(torch.tensor(images[start : start + batch_size])))
            features[start : start + len(f)] = f.cpu().numpy()
        return features

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, c, h, w) → float32 (n, 1, s, s) in [−1, 1], bilinear with antialiasing."""
        x = images.to(self.center.device).float().mean(dim=1, keepdim=True) * (2.0 / 255.0) - 1.0
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = functional.interpolate(x, size, mode="bilinear", antialias=True)
        return x

    def public_center(self) -> NDArray[np.float32]:
        """c, the same for everyone: float32 (64,)."""
        center: NDArray[np.float32] = self.center.cpu().numpy()
        return center


def build_feature_network(name: str, classes: int = 10) -> FeatureNetwork:
    """The untrained network `name`; raises KeyError for an unknown name."""
    pinned = FEATURE_NETWORKS[name]
    return FeatureNetwork(pinned.image_size, pinned.layers, classes)


def load_feature_network(
    name: str, sha256: str | None = None, files: Sequence[Path] = ()
) -> FeatureNetwork:
    """The network `name` on the CPU, as `diffusion.features.file.read_network` finds it.

    Raises FeatureFileError for an unknown name and for a file that is not the pinned one.
    """
    stored = read_network(name, sha256, files)
    architecture = stored.architecture
    network = FeatureNetwork(architecture.image_size, architecture.layers, architecture.classes)
    network.load_state_dict({key: torch.from_numpy(t) for key, t in stored.tensors.items()})
    return network.eval()
