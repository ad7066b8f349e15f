"""Which feature networks ship with the project; no torch here."""

from __future__ import annotations

from dataclasses import dataclass

NETWORK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Of these and of others."""


@dataclass(frozen=True)
class PinnedNetwork:
    """A feature network that ships with the project."""

    file: str
    sha256: str
    image_size: int
    layers: tuple[tuple[int, int], ...]
    """(channels, stride) of each 3×3 convolution."""


FEATURE_NETWORKS = {
    "digits": PinnedNetwork(
        file="digits.safetensors",
        sha256="9fb79a8912226791a58ea0d29720e44da22c67879da2f1e7ddf219bdcb70dfed",
        image_size=8,
        layers=((24, 1), (32, 1), (32, 2)),
    ),
    "fashion-mnist": PinnedNetwork(
        file="fashion-mnist.safetensors",
        sha256="b8802055349c7142cd7740b03105384f77d8f22dd19b32fd99571fcb49836241",
        image_size=28,
        layers=((16, 1), (32, 2), (36, 2), (36, 2)),
    ),
}
