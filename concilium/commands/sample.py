"""`concilium sample MODEL`: images from a published model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("sample")
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("grid.png"))
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(model: Path, count: int, out: Path, steps: int, seed: int) -> None:
    """Draw images from MODEL, a diffusers folder such as a study publishes, into one PNG."""
    import numpy as np
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler

    from diffusion.model import load_pipeline
    from diffusion.sampling import grid_png

    try:
        published = load_pipeline(model)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{model} is no model folder: {error}") from error
    # diffusers is not typed throughout.
    scheduler: Any = DDIMScheduler.from_config(  # type: ignore[no-untyped-call]
        published.scheduler.config
    )
    pipeline: Any = DDIMPipeline(published.unet, scheduler)  # type: ignore[no-untyped-call]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = pipeline.to(device)(
        batch_size=count,
        generator=torch.Generator(device).manual_seed(seed),
        num_inference_steps=steps,
        output_type="np",
    )
    images = np.round(drawn.images * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    grid_png(images, out, columns=max(1, round(count**0.5)))
    click.echo(f"{count} images in {out}")
