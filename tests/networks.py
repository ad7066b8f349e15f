"""A feature network that does not ship, as anybody may make one."""

from __future__ import annotations

from pathlib import Path

from diffusion.features.network import FeatureNetwork
from diffusion.features.train import architecture_for, save_network
from diffusion.model import initialise, model_digest


def make_network(path: Path, seed: int = 1, size: int = 8) -> str:
    """An untrained one at `path`; its SHA-256."""
    parts = architecture_for(size, 3)
    network = FeatureNetwork(size, parts.layers, parts.classes)
    initialise(network, seed)
    network.center.fill_(0.25)
    save_network(network, parts, path)
    return model_digest(path)
