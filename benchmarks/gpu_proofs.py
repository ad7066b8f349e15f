"""What only a GPU can prove of the kernels; each proof says what it has shown, or None if it could
not be tried. `benchmarks.gpu_session` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.noise import _normal_kernel


def stream_of(batch: int, device: str, step: int = 3) -> dict[str, Tensor]:
    values = {"key": torch.tensor(kernels.derive_key(1, "gpu session")), "step": torch.tensor(step)}
    values["sample_id"] = torch.arange(batch) * (2**33 + 12_345) - 3
    return {name: value.to(device) for name, value in values.items()}


def normal_of(shape: tuple[int, ...], stream: dict[str, Tensor], out: torch.dtype) -> Tensor:
    return kernels.normal(shape, **stream, dtype=out)


class Batch:
    """One batch of everything, and every op on any rows of it."""

    def __init__(self, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
        self.x_0 = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.pred = torch.randn(shape, device=device, dtype=dtype)
        self.t = torch.arange(shape[0], device=device) % 1000
        self.table = torch.linspace(0.999, 0.001, 1000).to(device)
        self.weight = torch.linspace(0.5, 2.0, shape[1]).to(device)
        self.stream = stream_of(shape[0], device)

    def run(self, op: str, rows: slice = slice(None)) -> Tensor:
        x_0, pred, t, table = self.x_0[rows], self.pred[rows], self.t[rows], self.table
        ids = self.stream | {"sample_id": self.stream["sample_id"][rows]}
        made: Tensor
        if op == "q_sample":
            made = kernels.q_sample(x_0, t, table, **ids, dtype=pred.dtype)
        elif op == "ddpm_loss":
            made = kernels.ddpm_loss(pred, x_0, t, table, **ids)
        elif op == "ddpm_loss, gradient":
            leaf = pred.detach().requires_grad_()
            loss = kernels.ddpm_loss(leaf, x_0, t, table, **ids).sum()
            (made,) = torch.autograd.grad(loss, leaf)
        elif op == "sampler_step":
            made = kernels.sampler_step(pred, pred, t, t - 1, table, **ids)
        elif op == "group_norm_silu":
            made = kernels.group_norm_silu(pred, 1, self.weight, self.weight)
        else:  # its gradient
            leaf = pred.detach().requires_grad_()
            y = kernels.group_norm_silu(leaf, 1, self.weight, self.weight)
            (made,) = torch.autograd.grad(y, leaf, pred)
        return made


OPS = (
    "q_sample", "ddpm_loss", "ddpm_loss, gradient", "sampler_step", "group_norm_silu",
    "group_norm_silu, gradient",
)  # fmt: skip


def normals_have_the_bits_of_the_cpu(device: str = "cuda") -> str:
    total = 0
    for shape in ((64, 3, 32, 32), (3, 12_345), (1, 1 << 22)):
        there = normal_of(shape, stream_of(shape[0], device), torch.float32).cpu()
        here = normal_of(shape, stream_of(shape[0], "cpu"), torch.float32)
        assert torch.equal(there.view(torch.int32), here.view(torch.int32)), shape
        total += here.numel()
    return f"{total} normals"


def masks_have_the_bits_of_the_cpu(device: str = "cuda", n: int = 300_001) -> str:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 256, (5, 32), dtype=torch.uint8, generator=generator)
    signs = torch.tensor([1, -1, 1, -1, -1])
    delta, residual = torch.randn(2, n, generator=generator) * 0.01
    for ring in (8, 16, 32):
        results = []
        for where in ("cpu", device):
            quantiser = kernels.Quantiser.of(
                ring=ring, sizes=[n - 7, 7], clips=[2.0**-6, 2.0**-4], count=3, total_count=7,
                scale=2 ** (ring - 1) - 9, silo=4, device=where,
            )  # fmt: skip
            made = kernels.mask_add(
                delta.to(where), residual.to(where), quantiser, signs=signs.to(where),
                rounding_key=keys[0].to(where), keys=keys.to(where),
            )  # fmt: skip
            results.append([part.cpu() for part in made])
        words, carried, counts = (torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert words, f"words of {ring} bits differ"
        assert carried, f"residuals of {ring} bits differ"
        assert counts, f"counts of {ring} bits differ"
    return f"{n} elements, 5 keys, rings of 8, 16 and 32 bits"


def blocks_and_warps_leave_the_bits_alone(device: str = "cuda") -> str:
    stream, elements = stream_of(3, device), 5000
    want = normal_of((3, elements), stream, torch.float32)
    for block in (64, 512, 2048):
        for warps in (1, 2, 4, 8):
            out, blocks = torch.full_like(want, float("nan")), -(-elements // block)
            _normal_kernel[(3 * blocks,)](
                out, stream["key"], stream["sample_id"], stream["step"], elements, blocks,
                BLOCK=block, WIDE=False, enable_fp_fusion=False, num_warps=warps,
            )  # fmt: skip
            assert torch.equal(out, want), (block, warps)
    return "blocks of 64, 512, 2048 elements, 1 to 8 warps"


def a_batch_past_the_limits_of_a_grid(device: str = "cuda") -> str:
    samples = 70_001  # the second and third dimension of a grid end at 65,535
    batch = Batch((samples, 1, 2, 3), device, torch.float32)
    end = slice(samples - 3, samples)
    for op in OPS:
        assert torch.equal(batch.run(op)[end], batch.run(op, end)), op
    return f"{samples} samples, {len(OPS)} ops"


def norms_are_those_of_the_cpu(device: str = "cuda") -> str:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 96, 17, 9), (2, 384, 8, 8), (2, 192, 5, 5)):  # groups of 3, 12 and 6 channels
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            for layout in (torch.contiguous_format, torch.channels_last):
                _compare_norms(shape, dtype, layout, tolerance, device, generator)
    return "forward and backward, float32 and bfloat16, NCHW and channels_last, scale and shift"


def _compare_norms(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, tolerance: float,
    device: str, generator: torch.Generator,
) -> None:  # fmt: skip
    x, upstream = torch.randn(2, *shape, generator=generator).to(dtype)
    scale, shift = torch.randn(2, *shape[:2], generator=generator)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    results = []
    for where in ("cpu", device):
        given = [x.contiguous(memory_format=layout), weight, bias, scale, shift]
        # Leaves of this device alone: on the CPU `to` would give back the same tensor to both.
        leaves = [v.detach().to(where, copy=True).requires_grad_() for v in given]
        y = kernels.group_norm_silu(leaves[0], 32, *leaves[1:3], scale=leaves[3], shift=leaves[4])
        results.append([y, *torch.autograd.grad(y, leaves, upstream.to(where))])
    assert_close(*results, tolerance)


def assert_close(here: list[Tensor], there: list[Tensor], tolerance: float, of: str = "") -> None:
    """Relative to the largest number of each tensor."""
    for ours, theirs in zip(here, there, strict=True):
        assert ours.data_ptr() != theirs.data_ptr(), "compared with itself"
        largest = ours.abs().max().item()
        torch.testing.assert_close(
            theirs.cpu(), ours.cpu(), rtol=tolerance, atol=tolerance * largest,
            msg=lambda said: f"{of}: {said}" if of else said,
        )  # fmt: skip


def elementwise_ops_are_those_of_the_cpu(device: str = "cuda") -> str:
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 3, 33, 31), (3, 4099)):  # with tails of blocks and of 128 bits
        x_0 = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        x, eps = torch.randn(2, *shape, generator=generator)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            given = (x_0, x.to(dtype), eps.to(dtype))
            for objective in ("eps", "x0", "v"):
                results = [_of_images(*given, objective, where) for where in ("cpu", device)]
                assert_close(*results, tolerance)
    for dtype in (torch.float32, torch.bfloat16):
        flat = torch.randn(7, 70_001, generator=generator)
        results = [_optimised(flat, dtype, where) for where in ("cpu", device)]
        assert_close(*results, 1e-5)
    return "q_sample, add_noise, loss and gradient, DDPM, DDIM, optimiser; float32 and bfloat16"


def _of_images(x_0: Tensor, x: Tensor, eps: Tensor, objective: str, where: str) -> list[Tensor]:
    x_0, x, eps = (v.to(where) for v in (x_0, x, eps))
    t = torch.arange(x_0.shape[0], device=where) * 199
    table, stream = torch.linspace(0.999, 0.001, 1000).to(where), stream_of(x_0.shape[0], where)
    pred = eps.clone().requires_grad_()
    loss = kernels.ddpm_loss(pred, x_0, t, table, **stream, objective=objective, snr_gamma=5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    steps = [
        kernels.sampler_step(x, eps, t, t - 1, table, **stream, objective=objective, eta=eta)
        for eta in (None, 0.5)
    ]
    x_t = kernels.q_sample(x_0, t, table, **stream, dtype=x.dtype)
    return [x_t, kernels.add_noise(x, eps, t, table), loss.detach(), gradient, *steps]


def _optimised(flat: Tensor, dtype: torch.dtype, where: str) -> list[Tensor]:
    """Parameters, moments and average after three steps with all terms."""
    param, grad, m, v, average, anchor, control = flat.to(where, copy=True)
    v.square_()
    for i in (1, 2, 3):
        kernels.adamw_ema_(
            param, grad.to(dtype) * i, m, v, lr=torch.tensor(1e-2, device=where),
            step=torch.tensor(i, device=where), weight_decay=0.1, ema=average,
            ema_decay=torch.tensor(0.9, device=where), anchor=anchor, mu=0.3, control=control,
        )  # fmt: skip
    return [param, m, v, average]


def a_second_stream() -> str:
    """What is launched on another stream waits for nothing on the first, which is kept busy."""
    batch = Batch((64, 8, 16, 16), "cuda", torch.float32)
    expected = {op: batch.run(op) for op in OPS}
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # once for the memory: to get some may wait for everything
        got = {op: batch.run(op) for op in OPS}
    torch.cuda.synchronize()
    got.clear()
    torch.cuda._sleep(2_000_000_000)  # a second of the first stream
    with torch.cuda.stream(side):
        got = {op: batch.run(op) for op in OPS}
    side.synchronize()
    assert not torch.cuda.current_stream().query(), "something waited for the first stream"
    assert all(torch.equal(got[op], expected[op]) for op in OPS)
    return f"the same bits, {len(OPS)} ops"


def a_second_gpu() -> str | None:
    """Tensors on one device while another is current."""
    if torch.cuda.device_count() < 2:
        return None
    shape = (64, 3, 32, 32)
    got = normal_of(shape, stream_of(64, "cuda:1"), torch.float32)
    assert torch.equal(got.cpu(), normal_of(shape, stream_of(64, "cpu"), torch.float32))
    return "the same bits"


def n_replays_make_n_noises() -> str:
    stream, shape, replays = stream_of(8, "cuda"), (8, 3, 32, 32), 16
    step = stream["step"]
    normal_of(shape, stream, torch.float32)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    step.fill_(0)
    with torch.cuda.graph(graph):
        out = normal_of(shape, stream, torch.float32)
        step.add_(1)
    step.fill_(0)
    for i in range(replays):
        graph.replay()
        want = normal_of(shape, stream_of(8, "cuda", step=i), torch.float32)
        assert torch.equal(out, want), i
    return f"{replays} replays, each the noise of its step"


class _Step:
    """A training step of all ops on a network of one norm; step and rate lie in tensors."""

    def __init__(self, device: str) -> None:
        self.x_0 = torch.arange(8 * 4 * 64, device=device).view(8, 4, 8, 8).to(torch.uint8)
        self.stream = stream_of(8, device, step=1)
        self.table = torch.linspace(0.999, 0.001, 1000).to(device)
        self.flat = torch.linspace(0.5, 1.5, 8).to(device)
        self.moments = torch.zeros(2, 8, device=device)
        self.average = self.flat.clone()
        self.rates = torch.tensor([1e-2, 0.9]).to(device)
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        t = kernels.timesteps(1000, **self.stream)
        x_t = kernels.q_sample(self.x_0, t, self.table, **self.stream)
        leaf = self.flat.detach().requires_grad_()
        pred = kernels.group_norm_silu(x_t, 2, leaf[:4], leaf[4:])
        loss = kernels.ddpm_loss(pred, self.x_0, t, self.table, **self.stream).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        kernels.adamw_ema_(
            self.flat, gradient, self.moments[0], self.moments[1], lr=self.rates[0],
            step=self.stream["step"], ema=self.average, ema_decay=self.rates[1],
        )  # fmt: skip
        self.loss.copy_(loss.detach())
        self.stream["step"].add_(1)

    def state(self) -> list[Tensor]:
        return [self.flat, self.moments, self.average, self.loss, self.stream["step"]]


def replays_of_a_training_step_are_its_steps(device: str = "cuda", steps: int = 12) -> str:
    """Timesteps, noise, norm, loss, gradient and optimiser in one graph, replayed and by hand."""
    by_hand, captured = _Step(device), _Step(device)
    run: Callable[[], Any] = captured
    if device == "cuda":
        warm = _Step(device)  # compiles everything; a capture may not
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            warm()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured()
        run = graph.replay
    losses = []
    for i in range(steps):
        by_hand()
        run()
        for ours, theirs in zip(captured.state(), by_hand.state(), strict=True):
            assert torch.equal(ours, theirs), i
        losses.append(float(by_hand.loss))
    assert len(set(losses)) == steps
    return f"{steps} steps, the same bits by hand and replayed"


PROOFS: tuple[Callable[[], str | None], ...] = (
    normals_have_the_bits_of_the_cpu,
    masks_have_the_bits_of_the_cpu,
    blocks_and_warps_leave_the_bits_alone,
    a_batch_past_the_limits_of_a_grid,
    norms_are_those_of_the_cpu,
    elementwise_ops_are_those_of_the_cpu,
    n_replays_make_n_noises,
    replays_of_a_training_step_are_its_steps,
    a_second_stream,
    a_second_gpu,
)
