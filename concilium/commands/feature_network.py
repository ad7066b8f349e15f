"""`concilium feature-network FILE`: what FID and KID are measured by, where no shipped one fits."""

from __future__ import annotations

import re
from pathlib import Path

import click

from concilium.datasets import DataMissing, Images, Labels, load_dataset
from diffusion.features.pinned import FEATURE_NETWORKS, NETWORK_NAME


@click.command("feature-network")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--data",
    required=True,
    help="Labelled images that no silo has: a file or folder that a silo could read.",
)
@click.option("--image-size", required=True, type=click.IntRange(4, 256), help="As in the plan.")
@click.option(
    "--channels",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="As in the plan; the network sees their mean.",
)
@click.option("--steps", type=click.IntRange(1, 1_000_000), default=3000, show_default=True)
def command(file: Path, data: str, image_size: int, channels: int, steps: int) -> None:
    """Train a small classifier on labelled images, for a study to pin: NAME.safetensors.

    A tenth of the images is left out of the training, and shows how good it is. The same images
    give the same file on the same kind of machine.
    """
    name = file.stem
    if file.suffix != ".safetensors" or not re.fullmatch(NETWORK_NAME, name):
        raise click.UsageError(f"{file}: call it NAME.safetensors, with a NAME for the plan")
    if name in FEATURE_NETWORKS:
        raise click.UsageError(f'"{name}" ships with the project: choose another name')
    if file.exists():
        raise click.UsageError(f"{file} is there already, and plans may pin it: name another file")
    try:
        found = load_dataset(data, image_size, channels, remedy="correct --data")
    except DataMissing as error:
        raise click.ClickException(str(error)) from error
    if found.labels is None:
        raise click.ClickException(
            f"{found.unlabelled} of {len(found.images)} images of {data} have no class: give a "
            "source that has them, such as a folder with a subfolder per class"
        )
    click.echo(_made(file.absolute(), found.images, found.labels, image_size, steps))


def _made(file: Path, images: Images, labels: Labels, image_size: int, steps: int) -> str:
    import torch

    from diffusion.features.holdout import holdout_split
    from diffusion.features.network import FeatureNetwork, load_feature_network
    from diffusion.features.train import accuracy, architecture_for, save_network, train_network
    from diffusion.model import model_digest

    classes = 1 + int(labels.max())
    if not 2 <= classes <= 1000 or len(labels) < 20:
        raise click.ClickException(
            f"{len(labels)} images of {classes} classes: give at least 20, of 2 to 1000"
        )
    chosen = holdout_split(len(labels), len(labels) // 10)
    training, held_out = ((images[part], labels[part]) for part in chosen)
    architecture = architecture_for(image_size, classes)
    torch.set_num_threads(1)  # several add in another order
    network = FeatureNetwork(image_size, architecture.layers, classes)
    train_network(network, training, steps)
    save_network(network, architecture, file)
    sha256 = model_digest(file)
    network = load_feature_network(file.stem, sha256, [file])
    return (
        f"{file}: {file.stat().st_size:,} bytes, {classes} classes\n"
        f"accuracy on {len(training[0]):,} images that it was trained on "
        f"{accuracy(network, training):.3f}, on {len(held_out[0]):,} others "
        f"{accuracy(network, held_out):.3f}\n\n"
        f"# in the plan\n"
        f'[evaluation]\nfeature_network = "{file.stem}"\nsha256 = "{sha256}"\n\n'
        f"# in site.toml of every site, beside what [policy] says already; send them the file\n"
        f'[policy]\nfeature_networks = ["{file.stem}"]\nfeature_files = ["{file.name}"]\n\n'
        f"# in coordinator.toml\n"
        f'feature_files = ["{file}"]\n\n'
        f"# in a file for `concilium simulate`\n"
        f'[simulation]\nfeature_file = "{file}"'
    )
