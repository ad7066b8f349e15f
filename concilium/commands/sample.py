"""`concilium sample MODEL`: images from a published model."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("sample")
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("grid.png"))
@click.option(
    "--steps",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="Of DDIM: a divisor of the steps that the model was trained on.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--label", type=click.IntRange(0), help="Of a conditional model: one class only.")
@click.option(
    "--guidance",
    type=click.FloatRange(0.0, 100.0),
    help="Of a conditional model: how strongly samples are drawn to their class; 1 = plainly.",
)
def command(
    model: Path,
    count: int,
    out: Path,
    steps: int,
    seed: int,
    label: int | None,
    guidance: float | None,
) -> None:
    """Draw images from MODEL, a diffusers folder such as a study publishes, into one PNG.

    A class-conditional model gives as many images of each class, in their order.
    """
    import numpy as np

    from diffusion.execution import choose_execution
    from diffusion.labels import classes_of, even_labels
    from diffusion.model import load_pipeline
    from diffusion.sampling import grid_png, sample_published

    try:
        published = load_pipeline(model)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{model} is no model folder: {error}") from error
    classes, labels = classes_of(published.unet), None
    if classes is None and (label is not None or guidance is not None):
        raise click.UsageError(f"{model} has no classes: leave --label and --guidance out")
    if classes is not None:
        if label is not None and label >= classes:
            raise click.UsageError(f"--label {label}: {model} has the classes 0 to {classes - 1}")
        labels = even_labels(count, classes) if label is None else np.full(count, label)
    execution = choose_execution()
    try:
        images = sample_published(
            published,
            count,
            steps=steps,
            seed=seed,
            execution=execution,
            labels=labels,
            guidance=1.0 if guidance is None else guidance,
        )
    except ValueError as error:
        raise click.UsageError(f"{model} cannot be sampled so: {error}") from error
    grid_png(images, out, columns=max(1, round(count**0.5)))
    click.echo(f"{count} images in {out}")
