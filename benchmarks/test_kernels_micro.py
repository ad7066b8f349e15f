"""The fused ops against what torch does without them, on whatever device there is.

    pytest benchmarks/test_kernels_micro.py --benchmark-columns=min,median,iqr,rounds

Every group is one job done by several means; ``extra_info`` holds the bytes that the job cannot
avoid moving, the rate that follows, and its share of this machine's measured copy bandwidth. Where
so little is moved that it stays in a GPU's second-level cache from one call to the next, the share
would say nothing of the memory and is "in cache". Noise is not drawn by both sides alike:
torch.randn is the cheaper, and not reproducible across batch splits or devices. Torch has no masks:
random integers of its own stand for them, which are neither secret nor the same on two devices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kernels
from kernels.quantiser import RING_DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64 if DEVICE == "cpu" else 512
SHAPE = (BATCH, 3, 32, 32)
LENGTH = (1 << 16 if DEVICE == "cpu" else 1 << 24) + 3  # of a masked vector: no round number


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _stays_in_cache(moved: int) -> bool:
    return DEVICE == "cuda" and moved < 2 * torch.cuda.get_device_properties().L2_cache_size


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy too large for the caches."""
    source = torch.empty(1 << 25, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        _wait()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


@pytest.fixture
def measure(benchmark, copy_bandwidth):
    def run(job: Callable[[], object], moved: int) -> None:
        def once() -> None:
            job()
            _wait()

        benchmark.pedantic(once, rounds=15, iterations=1, warmup_rounds=3)
        if benchmark.stats is None:  # --benchmark-disable
            return
        rate = moved / benchmark.stats.stats.median
        share = "in cache" if _stays_in_cache(moved) else round(rate / copy_bandwidth, 3)
        benchmark.extra_info |= {
            "megabytes": round(moved / 1e6, 2),
            "GB/s": round(rate / 1e9, 2),
            "share of copy": share,
        }

    return run


def _stream(batch: int) -> dict[str, Tensor]:
    return {
        "key": torch.tensor(kernels.derive_key(0, "benchmark"), device=DEVICE),
        "sample_id": torch.arange(batch, device=DEVICE),
        "step": torch.tensor(1, device=DEVICE),
    }


def _images() -> tuple[Tensor, Tensor, Tensor]:
    alpha_bar = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0).to(DEVICE)
    x_0 = torch.randint(0, 256, SHAPE, dtype=torch.uint8, device=DEVICE)
    return x_0, torch.randint(0, 1000, SHAPE[:1], device=DEVICE), alpha_bar


def _eager_q_sample(x_0: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x = x_0.float() * (2 / 255) - 1
    return a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)


@pytest.mark.benchmark(group="normal")
@pytest.mark.parametrize("by", ["torch.randn", "kernels"])
def test_normal(measure, by):
    stream = _stream(BATCH)
    jobs = {
        "torch.randn": lambda: torch.randn(SHAPE, device=DEVICE),
        "kernels": lambda: kernels.normal(SHAPE, **stream),
    }
    measure(jobs[by], 4 * torch.Size(SHAPE).numel())


@pytest.mark.benchmark(group="q_sample")
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_q_sample(measure, by):
    images, stream = _images(), _stream(BATCH)
    jobs = {
        "eager": lambda: _eager_q_sample(*images),
        "kernels": lambda: kernels.q_sample(*images, **stream),
    }
    measure(jobs[by], 5 * images[0].numel())


@pytest.mark.benchmark(group="add_noise")
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_add_noise(measure, by):
    (_, t, alpha_bar), (x_0, eps) = _images(), torch.randn(2, *SHAPE, device=DEVICE)

    def eager() -> Tensor:
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * x_0 + (1 - a).sqrt() * eps

    jobs = {"eager": eager, "kernels": lambda: kernels.add_noise(x_0, eps, t, alpha_bar)}
    measure(jobs[by], 3 * 4 * x_0.numel())


@pytest.mark.benchmark(group="ddpm_loss forward + backward")
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_ddpm_loss(measure, by):
    """Eager gets its noise for nothing, as a stored tensor."""
    (x_0, t, alpha_bar), stream = _images(), _stream(BATCH)
    pred = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    eps = torch.randn(SHAPE, device=DEVICE)
    jobs = {
        "eager": lambda: (pred - eps).square().flatten(1).mean(1),
        "kernels": lambda: kernels.ddpm_loss(pred, x_0, t, alpha_bar, **stream),
    }
    measure(lambda: torch.autograd.grad(jobs[by]().mean(), pred), 3 * 4 * pred.numel())


def _eager_sampler_step(
    x_t: Tensor, pred: Tensor, t: Tensor, alpha_bar: Tensor, eta: float | None
) -> Tensor:
    a = alpha_bar[t].view(-1, 1, 1, 1)
    b = torch.where(t > 0, alpha_bar[t - 1], 1.0).view(-1, 1, 1, 1)
    x_0 = ((x_t - (1 - a).sqrt() * pred) / a.sqrt()).clamp(-1, 1)
    if eta == 0.0:
        return b.sqrt() * x_0 + (1 - b).sqrt() * pred
    beta, rest = 1 - a / b, (1 - b) / (1 - a)
    mean = b.sqrt() * beta / (1 - a) * x_0 + (a / b).sqrt() * rest * x_t
    return mean + (rest * beta).sqrt() * torch.randn_like(x_t)


@pytest.mark.benchmark(group="sampler_step")
@pytest.mark.parametrize("eta", [0.0, None], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_sampler_step(measure, by, eta):
    (_, t, alpha_bar), stream = _images(), _stream(BATCH)
    x_t, pred = torch.randn(2, *SHAPE, device=DEVICE)
    s = t - 1
    jobs = {
        "eager": lambda: _eager_sampler_step(x_t, pred, t, alpha_bar, eta),
        "kernels": lambda: kernels.sampler_step(x_t, pred, t, s, alpha_bar, eta=eta, **stream),
    }
    measure(jobs[by], 3 * 4 * x_t.numel())


@pytest.mark.benchmark(group="adamw + ema")
@pytest.mark.parametrize("by", ["torch.optim, fused", "kernels"])
def test_adamw_ema(measure, by):
    size = 1 << 21
    param, grad = torch.randn(2, size, device=DEVICE)
    ema, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    theirs = nn.Parameter(param.clone())
    theirs.grad = grad
    optimizer = torch.optim.AdamW([theirs], lr=1e-4, fused=True)
    scalars = {
        "lr": torch.tensor(1e-4, device=DEVICE),
        "step": torch.tensor(10, device=DEVICE),
        "ema_decay": torch.tensor(0.999, device=DEVICE),
    }

    def with_torch() -> None:
        optimizer.step()
        ema.lerp_(theirs.detach(), 1e-3)

    jobs = {
        "torch.optim, fused": with_torch,
        "kernels": lambda: kernels.adamw_ema_(param, grad, m, v, ema=ema, **scalars),
    }
    measure(jobs[by], 9 * 4 * size)


@pytest.mark.benchmark(group="group_norm_silu")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (64, 128, 16, 16), (64, 32, 28, 28)], ids=str)
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_group_norm_silu(measure, shape, layout, dtype, by, backward):
    channels, groups = shape[1], 32 if shape[1] >= 128 else 8
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=formats[layout])
    x.requires_grad_(backward)
    weight, bias = torch.randn(2, channels, device=DEVICE)
    weight, bias = weight.requires_grad_(backward), bias.requires_grad_(backward)
    upstream = torch.randn_like(x)
    own = (weight.to(dtype), bias.to(dtype))  # eager wants the parameters in the dtype of x
    jobs = {
        "eager": lambda: functional.silu(functional.group_norm(x, groups, *own)),
        "kernels": lambda: kernels.group_norm_silu(x, groups, weight, bias),
    }
    once = x.element_size() * x.numel()
    if not backward:
        measure(jobs[by], 2 * once)
        return
    measure(
        lambda: torch.autograd.grad(jobs[by](), (x, weight, bias), upstream, retain_graph=True),
        5 * once,
    )


def _eager_masks(words: Tensor, peers: int) -> Tensor:
    least, most = torch.iinfo(words.dtype).min, torch.iinfo(words.dtype).max
    for _ in range(peers):
        words += torch.randint(least, most + 1, words.shape, dtype=words.dtype, device=DEVICE)
    return words


@pytest.mark.benchmark(group="mask_add")
@pytest.mark.parametrize("ring", [8, 16, 32])
@pytest.mark.parametrize("peers", [0, 4])
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_mask_add(measure, ring, peers, by):
    size = LENGTH
    delta, residual = torch.randn(2, size, device=DEVICE) * 1e-3
    quantiser = kernels.Quantiser.of(
        ring=ring, sizes=[size], clips=[2.0**-8], count=1, total_count=4,
        scale=2 ** (ring - 1) - 9, device=DEVICE,
    )  # fmt: skip
    keys = torch.randint(0, 256, (peers + 1, 32), dtype=torch.uint8, device=DEVICE)
    signs = torch.ones(peers, dtype=torch.int64, device=DEVICE)

    def eager() -> tuple[Tensor, Tensor]:
        wanted = (delta + residual).to(quantiser.up.dtype)
        limit = quantiser.bounds[0]
        q = (wanted * quantiser.up).clamp(-limit, limit).add(torch.rand_like(wanted)).floor()
        carried = (wanted - q * quantiser.down).float()
        words = q.to(torch.int32).to(RING_DTYPES[ring])
        return _eager_masks(words, peers), carried

    ours = functools.partial(
        kernels.mask_add, delta, residual, quantiser,
        rounding_key=keys[0], keys=keys[1:], signs=signs,
    )  # fmt: skip
    measure({"eager": eager, "kernels": ours}[by], size * (3 * 4 + ring // 8))


@pytest.mark.benchmark(group="add_masks_")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("by", ["eager", "kernels"])
def test_add_masks(measure, dtype, by):
    peers, words = 4, torch.zeros(LENGTH, dtype=dtype, device=DEVICE)
    keys = torch.randint(0, 256, (peers, 32), dtype=torch.uint8, device=DEVICE)
    signs = torch.ones(peers, dtype=torch.int64, device=DEVICE)
    jobs = {
        "eager": lambda: _eager_masks(words, peers),
        "kernels": lambda: kernels.add_masks_(words, keys=keys, signs=signs),
    }
    measure(jobs[by], 2 * words.element_size() * LENGTH)


@pytest.mark.benchmark(group="uniform")
@pytest.mark.parametrize("by", ["torch.rand", "kernels"])
def test_uniform(measure, by):
    stream = _stream(BATCH)
    jobs = {
        "torch.rand": lambda: torch.rand(SHAPE, device=DEVICE),
        "kernels": lambda: kernels.uniform(SHAPE, **stream),
    }
    measure(jobs[by], 4 * torch.Size(SHAPE).numel())


@pytest.mark.benchmark(group="timesteps")
@pytest.mark.parametrize("by", ["torch.randint", "kernels"])
def test_timesteps(measure, by):
    stream = _stream(BATCH)
    jobs = {
        "torch.randint": lambda: torch.randint(0, 1000, (BATCH,), device=DEVICE),
        "kernels": lambda: kernels.timesteps(1000, **stream),
    }
    measure(jobs[by], 8 * BATCH)
