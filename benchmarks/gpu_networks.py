"""What only a GPU can prove of whole networks: the fused norms in them, steps of training, the step
that a CUDA graph replays. Needs what `concilium[silo]` does; each proof imports that by itself.

float32 means float32 here. cuDNN's convolutions would multiply in TF32 unless told not to, and its
ten bits of mantissa hide what is compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import kernels

if TYPE_CHECKING:
    from diffusion.training import _Run

NETWORKS: dict[str, dict[str, Any]] = {  # the second a third as deep, a sixth as wide
    "google/ddpm-cifar10-32": dict(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        norm_eps=1e-6,
    ),
    "openai/diffusers-cd_imagenet64_l2": dict(
        sample_size=64, block_out_channels=(32, 64, 96, 128), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"), norm_eps=1e-5,
        attention_head_dim=16, attn_norm_num_groups=8, norm_num_groups=8, num_class_embeds=1000,
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
    ),
    "classes, convolutions between scales": dict(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10,
        mid_block_scale_factor=2**0.5,
    ),
}  # fmt: skip
LOSS, CHANGE = 1e-4, 0.02  # relative, of a loss and of the norm of what three steps have changed


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def fused_networks_compute_what_plain_ones_do(
    device: str = "cuda", names: Sequence[str] = tuple(NETWORKS)
) -> str:
    """Output and gradients, within the tolerances of `kernels.apply_to_unet`."""
    said = []
    for name in names:
        unet = _unet(name, device)
        with _in_float32():
            plain = _answer(unet, device)
            fused = _answer(kernels.apply_to_unet(unet), device)
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(fused[1:], plain[1:], strict=True):
            largest = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * (1 + largest))
        said.append(name)
    return f"float32, TF32 off: {'; '.join(said)}"


def fused_networks_are_as_near_in_bfloat16(
    device: str = "cuda", names: Sequence[str] = tuple(NETWORKS)[1:]
) -> str:
    """In channels_last, to what they compute in float32, as networks with torch's norms are."""
    said = []
    for name in names:
        unet = _unet(name, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with _in_float32():
            exact = _output_and_gradient(unet, device, torch.float32)
        theirs = _distances(_output_and_gradient(unet, device, torch.bfloat16), exact)
        kernels.apply_to_unet(unet)
        ours = _distances(_output_and_gradient(unet, device, torch.bfloat16), exact)
        for part, a, b in zip(("output", "gradient"), ours, theirs, strict=True):
            assert a <= 0.02, f"{name}: {part} is {a:.4f} of its norm off"
            assert a <= 1.1 * b, f"{name}: {part} is {a:.4f} of its norm off, torch's {b:.4f}"
        said.append(f"{name}: {_shown(ours)}, torch's {_shown(theirs)}")
    return f"output and gradient off by, of their norms: {'; '.join(said)}"


def _unet(name: str, device: str) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DModel(in_channels=3, out_channels=3, **NETWORKS[name])
    return unet.to(device)


def _answer(
    unet: nn.Module, device: str, dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:  # fmt: skip
    """The output for a batch that is the same at every call, and the gradient of each parameter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 16, 16, generator=generator).to(device).contiguous(memory_format=layout)
    t, labels = torch.tensor([3, 500, 900, 20]).to(device), torch.tensor([1, 7, 0, 9]).to(device)
    conditional = getattr(unet, "class_embedding", None) is not None
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        y = unet(x, t, class_labels=labels if conditional else None).sample
    y = y.float()
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(unet.parameters()))]


def _output_and_gradient(unet: nn.Module, device: str, dtype: torch.dtype) -> list[Tensor]:
    y, *gradients = _answer(unet, device, dtype, torch.channels_last)
    return [y, torch.cat([gradient.flatten() for gradient in gradients])]


def _shown(distances: list[float]) -> str:
    return " and ".join(f"{distance:.4f}" for distance in distances)


def _distances(made: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(made, exact, strict=True)]


def three_steps_are_those_of_the_cpu(
    device: str = "cuda", network: str = "cuda", dtype: torch.dtype = torch.float32, batch: int = 8
) -> str:
    """Of `diffusion.training`: fused and channels_last there, torch's own norms in NCHW here."""
    from diffusion.execution import Execution

    there = Execution(torch.device(device), dtype, torch.channels_last, fused_norms=True)
    here = Execution(torch.device("cpu"), torch.float32, torch.contiguous_format)
    model, x_0 = _network(network, batch)
    with _in_float32():
        runs = [_trained(copy.deepcopy(model), execution, x_0) for execution in (here, there)]
    (losses, change), (losses_there, change_there) = runs
    off = float(((losses_there - losses) / losses).abs().max())
    change_off = float((change_there - change).norm() / change.norm())
    assert off <= LOSS, f"losses {losses_there.tolist()}, on the CPU {losses.tolist()}"
    assert change_off <= CHANGE, f"the change of the parameters is {change_off:.4f} of its norm off"
    return f"losses within {off:.1e}, the change of the parameters within {change_off:.1e}"


def _network(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    from benchmarks.contenders import SPECS
    from diffusion.model import build_model, initialise

    spec = SPECS[name]
    model = build_model(spec)
    initialise(model, seed=0)
    shape = (batch, spec.channels, spec.image_size, spec.image_size)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _trained(model: nn.Module, execution: Any, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Three losses, and what the steps have changed."""
    from benchmarks.contenders import our_run

    run = our_run(model, execution, len(x_0))
    before = run.flat.vector(run.flat.values)
    for _ in range(3):
        run.step(x_0.to(execution.device), None)
    change = torch.from_numpy(run.flat.vector(run.flat.values) - before)
    return run.losses[:3].cpu(), change


def a_replayed_step_trains_as_an_eager_one(
    device: str = "cuda", network: str = "cuda", batch: int = 128, replays: int = 4
) -> str:
    """The very graph that `benchmarks.train_step` times, beside as many steps taken one by one. Not
    bit by bit: torch's attention sums its gradients in any order."""
    from benchmarks.contenders import WARMUP, captured, our_run
    from diffusion.execution import choose_execution

    model, x_0 = _network(network, batch)

    def made() -> tuple[Callable[[], None], _Run]:
        run, there = our_run(copy.deepcopy(model), choose_execution(device), batch), x_0.to(device)
        return lambda: run.step(there, None), run

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        replay, replayed = captured(made) if device == "cuda" else _by_hand(made, WARMUP)
        again, eager = _by_hand(made, WARMUP)
        losses = []
        for i in range(replays):
            replay()
            again()
            ours, theirs = (float(run.losses[WARMUP]) for run in (replayed, eager))
            assert abs(ours - theirs) <= 1e-3 * theirs, f"replay {i}: {ours}, eager {theirs}"
            losses.append(ours)
    fell = all(abs(a - b) > 1e-3 * a for a, b in pairwise(losses))
    assert fell, f"losses that do not move tell of no training: {losses}"
    return f"{replays} replays, losses {losses[0]:.3f} to {losses[-1]:.3f}, within 0.001 of eager's"


def _by_hand(
    make: Callable[[], tuple[Callable[[], None], _Run]], warmup: int
) -> tuple[Callable[[], None], _Run]:
    """Step by step what a replay does: the step after the warm-up, with its number, again."""
    step, run = make()
    for _ in range(warmup):
        step()

    def again() -> None:
        run.done = warmup
        step()

    return again, run


PROOFS: tuple[Callable[[], str], ...] = (
    fused_networks_compute_what_plain_ones_do,
    fused_networks_are_as_near_in_bfloat16,
    three_steps_are_those_of_the_cpu,
    a_replayed_step_trains_as_an_eager_one,
)
