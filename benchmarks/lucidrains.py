"""One training step of denoising-diffusion-pytorch, run in an environment of its own.

Its Unet, of about as many parameters as ours, and its Trainer's step: fp32, eager, Adam, gradient
clip, EMA every 10 steps. What the package imports for data sets and metrics only is replaced by
empty modules, since a CPU build of torch has no torchvision to go with it.
"""

from __future__ import annotations

import importlib.machinery
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks.worker import ROOT, Unavailable, serve

FOLDER = ROOT / ".venv-lucidrains"
PACKAGE = "denoising-diffusion-pytorch==2.3.4"
NEEDS = ("numpy", "packaging", "einops", "tqdm", "scipy", "pillow")
UNUSED = ("torchvision", "torchvision.transforms", "torchvision.utils", "accelerate", "pytorch_fid")


def environment() -> str:
    """The python that has the package; made on first use. Raises `Unavailable`."""
    python, done = FOLDER / "bin" / "python", FOLDER / ".done"
    if not done.exists():
        torch = "torch==" + metadata.version("torch").partition("+")[0]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(FOLDER)],
            [*pip, torch],
            [*pip, *NEEDS],
            [*pip, "--no-deps", "ema-pytorch", PACKAGE],
        ):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise Unavailable(f"its environment could not be made: {command[-1]}")
        done.touch()
    return str(python)


def _without_unused() -> None:
    for name in UNUSED:
        module: Any = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["accelerate"].Accelerator = object  # type: ignore[attr-defined]


def make(device: str) -> tuple[Callable[[], object], dict[str, Any]]:
    import torch
    from denoising_diffusion_pytorch import (  # type: ignore[import-not-found]
        GaussianDiffusion,
        Unet,
    )
    from ema_pytorch import EMA  # type: ignore[import-not-found]

    size, channels, batch = 32, 3 if device == "cuda" else 1, 128 if device == "cuda" else 64
    width, multiples = (64, (1, 2, 4, 8)) if device == "cuda" else (32, (1, 2, 2))
    unet = Unet(dim=width, dim_mults=multiples, channels=channels)
    diffusion = GaussianDiffusion(unet, image_size=size, timesteps=1000).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (batch, channels, size, size), generator=generator) / 255.0
    data = data.to(device)

    def step() -> None:
        diffusion(data).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    count = sum(p.numel() for p in unet.parameters())
    return step, {"parameters": count, "how": "fp32, eager, NCHW, its own Unet"}


def main() -> None:
    (device,) = sys.argv[1:]
    _without_unused()
    import torch

    if device == "cuda":
        serve(lambda: make(device), torch.cuda.synchronize, torch.cuda.max_memory_allocated)
    else:
        serve(lambda: make(device))


if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    main()
