"""Proofs with more than 2^31 elements, which take up to 50 GB of a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

import kernels
from benchmarks.gpu_proofs import OPS, Batch, assert_close, normal_of, stream_of
from kernels._mask_add_cpu import mask_add_reference
from kernels.noise import fill_normal_reference

_PAST = (1 << 31) + (1 << 20) + 5


def more_than_2_to_the_31_elements_in_a_sample(device: str = "cuda", elements: int = _PAST) -> str:
    """The last full groups of four, against those that the CPU makes of their counters."""
    stream, here = stream_of(1, device), stream_of(1, "cpu")
    made = normal_of((1, elements), stream, torch.bfloat16)[0]
    for first in (0, elements // 8, elements // 4 - 1024):
        want = torch.empty(1, 1024, 4)
        fill_normal_reference(want, here["key"], here["sample_id"], here["step"], first)
        got = made[4 * first : 4 * first + 4096].cpu()
        assert torch.equal(got, want.view(-1).bfloat16()), first
    return f"{elements} elements, compared with the CPU's at both ends and in between"


def more_than_2_to_the_31_elements_in_a_batch(
    device: str = "cuda", samples: int = (1 << 15) + 2
) -> str:
    batch = Batch((samples, 256, 16, 16), device, torch.bfloat16)
    end = slice(samples - 2, samples)
    for op in OPS:
        assert torch.equal(batch.run(op)[end], batch.run(op, end)), op
    return f"{batch.x_0.numel()} elements, {len(OPS)} ops"


def samples_of_more_than_2_to_the_31_elements(device: str = "cuda", elements: int = _PAST) -> str:
    """q_sample, loss, its gradient and sampler_step of one image whose index needs 64 bits: windows
    of it against the CPU's, and the loss against torch's of the same numbers."""
    image = _Image(device, elements)
    for first in (0, elements // 8 * 4, elements - elements % 4 - 4096):
        image.compare(first)
    image.compare_loss()
    return f"{elements} elements, q_sample, ddpm_loss, its gradient, sampler_step with noise"


class _Image:
    """One sample and what the ops make of it. The prediction is large at its end alone, so that the
    loss is mostly that of the last elements, and is wrong where they are not found."""

    def __init__(self, device: str, elements: int) -> None:
        self.there, self.here = stream_of(1, device), stream_of(1, "cpu")
        self.x_0 = torch.randint(0, 256, (1, elements), dtype=torch.uint8, device=device)
        pred = torch.zeros(1, elements, device=device, dtype=torch.bfloat16)
        pred[:, -elements // 2048 :] = 100.0
        self.pred = pred.requires_grad_()
        self.t, self.s = torch.tensor([500]), torch.tensor([100])  # far apart: much noise between
        self.table = torch.linspace(0.999, 0.001, 1000)
        schedule = (self.t.to(device), self.table.to(device))
        self.x_t = kernels.q_sample(self.x_0, *schedule, **self.there, dtype=torch.bfloat16)
        self.loss = kernels.ddpm_loss(self.pred, self.x_0, *schedule, **self.there)
        (self.gradient,) = torch.autograd.grad(self.loss, self.pred, self.loss.new_ones(1))
        with torch.no_grad():
            self.x_s = kernels.sampler_step(
                self.x_t, self.pred, schedule[0], self.s.to(device), schedule[1], **self.there
            )

    def compare(self, first: int) -> None:
        """4,096 elements from `first` on, which four divides: noise comes four at a time."""
        x_0, pred, x_t = (v.detach()[:, first : first + 4096].cpu() for v in
                          (self.x_0, self.pred, self.x_t))  # fmt: skip
        noise = torch.empty(1, 1024, 4)
        key, sample_id, step = (self.here[name] for name in ("key", "sample_id", "step"))
        fill_normal_reference(noise, key, sample_id, step, first // 4)
        eps, t, s = noise.view(1, 4096), self.t, self.s
        # A step with the noise of the first elements, which is then exchanged for this window's.
        stepped = kernels.sampler_step(x_t, pred, t, s, self.table, **self.here).float()
        a, b = self.table[t], self.table[s]
        sigma = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        made = normal_of((1, 4096), self.here, torch.float32)
        want = [
            kernels.add_noise(x_0, eps, t, self.table, dtype=torch.bfloat16),
            2 * (pred - eps) / self.x_0.numel(), stepped + sigma * (eps - made),
        ]  # fmt: skip
        got = [v[:, first : first + 4096].float() for v in (self.x_t, self.gradient, self.x_s)]
        assert_close([v.float() for v in want], got, 1e-2, f"elements from {first} on")

    def compare_loss(self) -> None:
        eps = normal_of(self.pred.shape, self.there, torch.bfloat16)
        total = torch.zeros((), dtype=torch.float64, device=eps.device)
        chunks = (whole.detach()[0].split(1 << 28) for whole in (self.pred, eps))
        for pred, noise in zip(*chunks, strict=True):
            total += (pred.float() - noise.float()).square().sum(dtype=torch.float64)
        assert_close([total[None].float() / eps.numel()], [self.loss.detach()], 1e-3, "loss")


def masks_of_more_than_2_to_the_31_elements(device: str = "cuda", n: int = _PAST) -> str:
    """Two tensors that meet in the last 700 elements; what is compared is the vector's end."""
    tail, sizes = slice(n - 1000, n), [n - 700, 700]
    quantisers = {
        where: kernels.Quantiser.of(
            ring=8, sizes=sizes, clips=[2.0**-6, 2.0**-4], count=3, total_count=7, scale=99,
            silo=4, device=where,
        ) for where in (device, "cpu")
    }  # fmt: skip
    keys = torch.arange(64, dtype=torch.uint8, device=device).view(2, 32)
    signs = torch.tensor([1, -1], device=device)
    delta, residual = (torch.randn(n, device=device) * 0.01 for _ in range(2))
    words, carried, _ = kernels.mask_add(
        delta, residual, quantisers[device], rounding_key=keys[0], keys=keys, signs=signs
    )
    q, words_here, carried_here = quantisers["cpu"], words.new_zeros(1000).cpu(), torch.zeros(1000)
    as_words = keys.cpu().view(torch.int32)
    mask_add_reference(
        words_here, delta[tail].cpu(), residual[tail].cpu(), carried_here,
        q.ends, q.up, q.down, q.bounds, q.point, as_words[0], as_words, signs.cpu(), n - 1000,
    )  # fmt: skip
    assert torch.equal(words[tail].cpu(), words_here), "words differ"
    assert torch.equal(carried[tail].cpu(), carried_here), "residuals differ"
    kernels.add_masks_(words, keys=keys, signs=-signs)  # without masks: what was quantised
    kernels.add_masks_(words_here, keys=keys.cpu(), signs=-signs.cpu(), first=n - 1000)
    assert torch.equal(words[tail].cpu(), words_here), "words without masks differ"
    return f"{n} elements quantised and masked to 8 bits, the last 1,000 compared with the CPU's"


def optimiser_of_more_than_2_to_the_31_elements(device: str = "cuda", n: int = _PAST) -> str:
    """The end of the buffers after a step, against a step of that end alone."""
    whole = [torch.rand(n, device=device) for _ in range(5)]
    grad = whole[1].bfloat16()
    ends = [buffer[-1000:].clone() for buffer in (whole[0], grad, *whole[2:])]
    for param, gradient, m, v, average in ((whole[0], grad, *whole[2:]), ends):
        kernels.adamw_ema_(
            param, gradient, m, v, lr=torch.tensor(1e-2, device=device),
            step=torch.tensor(3, device=device), weight_decay=0.1, ema=average,
            ema_decay=torch.tensor(0.9, device=device),
        )  # fmt: skip
    compared = [(whole[0], ends[0]), *zip(whole[2:], ends[2:], strict=True)]
    assert_close([end for _, end in compared], [all_[-1000:] for all_, _ in compared], 1e-6)
    return f"{n} parameters, the last 1,000 compared with a step of theirs alone"


PROOFS: tuple[Callable[[], str], ...] = (
    more_than_2_to_the_31_elements_in_a_sample,
    more_than_2_to_the_31_elements_in_a_batch,
    samples_of_more_than_2_to_the_31_elements,
    masks_of_more_than_2_to_the_31_elements,
    optimiser_of_more_than_2_to_the_31_elements,
)
