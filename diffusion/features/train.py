"""Train the feature networks that ship with the project, on images that no silo gets.

    python -m diffusion.features.train digits FOLDER
    python -m diffusion.features.train fashion-mnist FOLDER --data FOLDER_WITH_T10K_IDX_FILES

writes FOLDER/<name>.safetensors and logs the hash and the accuracies. One thread and a fixed seed:
the same bits on the same kind of machine. `digits` needs scikit-learn; the files of Fashion-MNIST
are those of its publishers (Debian: dataset-fashion-mnist).

`concilium feature-network` makes one for other images, in the same way.
"""

from __future__ import annotations

import argparse
import gzip
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional

from diffusion.features.file import METADATA, Architecture
from diffusion.features.holdout import holdout_split
from diffusion.features.network import FeatureNetwork, build_feature_network
from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.model import initialise, model_digest

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

SHRINKAGE = 1.0  # weight of the mean squared feature: keeps tanh away from its flat ends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Images to train on, and images of the silos' kind on which only the accuracy is measured."""

    training: tuple[Images, Labels]
    others: tuple[Images, Labels]


def digits() -> Data:
    """scikit-learn's digits: 297 held-out images to train on, the silos' 1,500 to measure."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    silos, held_out = holdout_split(len(images))
    return Data((images[held_out], bunch.target[held_out]), (images[silos], bunch.target[silos]))


def fashion_mnist(folder: Path) -> Data:
    """Fashion-MNIST: its 10,000 test images to train on, 10,000 training images to measure."""
    return Data(
        (_idx(folder / "t10k-images-idx3-ubyte.gz", 16), _labels(folder, "t10k")),
        (
            _idx(folder / "train-images-idx3-ubyte.gz", 16)[:10_000],
            _labels(folder, "train")[:10_000],
        ),
    )


def _idx(path: Path, header: int) -> Images:
    content = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)
    return content.reshape(-1, 1, 28, 28)


def _labels(folder: Path, part: str) -> Labels:
    content = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(content, dtype=np.uint8, offset=8).astype(np.int64)


def architecture_for(image_size: int, classes: int) -> Architecture:
    """That of Fashion-MNIST's network, wider: halved until at most 4×4 are left."""
    layers, size = [(16, 1)], image_size
    while size > 4:
        layers.append((32 if len(layers) == 1 else 64, 2))
        size = -(-size // 2)
    parts = {"image_size": image_size, "layers": layers, "classes": classes}
    return Architecture.model_validate(parts)


def train_network(network: FeatureNetwork, data: tuple[Images, Labels], steps: int) -> None:
    """From the weights of a fixed seed; the centre is the features' mean over the images."""
    initialise(network, seed=0)
    fit(network, data, steps=steps, rate=2e-3)
    network.center.copy_(torch.from_numpy(network.extract(data[0])).mean(dim=0))


def save_network(network: FeatureNetwork, architecture: Architecture, path: Path) -> None:
    """The file that `diffusion.features.file` reads."""
    save_file(network.state_dict(), path, metadata={METADATA: architecture.model_dump_json()})


def fit(network: FeatureNetwork, data: tuple[Images, Labels], *, steps: int, rate: float) -> None:
    """AdamW on the cross entropy (labels smoothed by 0.1) of randomly shifted images, plus
    SHRINKAGE·mean(f²); the rate falls linearly to zero.
    """
    x, labels = network.prepare(torch.tensor(data[0])), torch.tensor(data[1])
    shift = max(1, network.image_size // 14)
    x = functional.pad(x, (shift,) * 4, value=-1.0)
    draw = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=draw)
        dy, dx = torch.randint(2 * shift + 1, (2,), generator=draw).tolist()
        crop = x[rows, :, dy : dy + network.image_size, dx : dx + network.image_size]
        features = network(crop)
        logits = network.classify(features)
        loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
        loss = loss + SHRINKAGE * features.square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()


@torch.no_grad()
def accuracy(network: FeatureNetwork, data: tuple[Images, Labels]) -> float:
    """Share of images whose largest logit is their label."""
    logits = network.classify(torch.from_numpy(network.extract(data[0])))
    return float((logits.argmax(dim=1).numpy() == data[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(FEATURE_NETWORKS))
    parser.add_argument("folder", type=Path, help="where the weights are written")
    parser.add_argument("--data", type=Path, help="folder of the Fashion-MNIST files")
    arguments = parser.parse_args()
    if arguments.name == "fashion-mnist" and arguments.data is None:
        parser.error("fashion-mnist needs --data FOLDER")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    data = digits() if arguments.name == "digits" else fashion_mnist(arguments.data)
    network = build_feature_network(arguments.name)
    train_network(network, data.training, steps=3000)
    path = arguments.folder / FEATURE_NETWORKS[arguments.name].file
    save_file(network.state_dict(), path)
    log.info("%s: %s, %d bytes", path, model_digest(path), path.stat().st_size)
    log.info("accuracy on the training images %.4f", accuracy(network, data.training))
    log.info("accuracy on other images %.4f", accuracy(network, data.others))


if __name__ == "__main__":
    main()
