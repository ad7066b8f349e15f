"""Every launch that training, sampling and a secure sum make on a GPU, with its real sizes.

The tensors are on the CPU and stay uninitialised: `aot.py` compiles what is launched on them and
runs none of it. Sizes are those of the CIFAR-10 network of arXiv 2006.11239 where there are any;
a batch of 2 stands for every batch, since no kernel is compiled for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IMAGE = (2, 3, 32, 32)
HUGE = (1, (1 << 31) + 16)
PARAMETERS, TENSORS = 35_746_307, 328  # odd: the length of a delta is divisible by nothing
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
NCHW, NHWC = torch.contiguous_format, torch.channels_last


@dataclasses.dataclass(frozen=True)
class Launch:
    """`run` launches one kernel or more. `wide`: whether they must move 128 bits at a time."""

    name: str
    run: Callable[[], object]
    wide: bool = True


def _empty(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = NCHW
) -> Tensor:
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)


def _stream(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(1), torch.arange(batch), torch.tensor(2)


def _schedule(batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, dtype=torch.int64), torch.empty(1000)


def launches() -> Iterator[Launch]:
    yield from _noise()
    yield from _training()
    yield from _sampling()
    yield from _beyond_32_bits()
    yield from _optimiser()
    yield from _norms()
    yield from _masks()


def _noise() -> Iterator[Launch]:
    from kernels.noise import _launch_normal, _uniform_words

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
        stream = _stream(shape[0])
        return lambda: _launch_normal(torch.empty(shape, dtype=dtype), *stream)

    key, ids, step = _stream(2)
    words = _uniform_words._init_fn  # the op's own body, whose operations are to be seen
    yield Launch("timesteps", lambda: words((2, 1), key, ids, step))
    yield Launch("normal/fp32", normal(IMAGE, F32))
    yield Launch("normal/bf16", normal(IMAGE, BF16))
    yield Launch("normal/ragged", normal((2, 1, 31, 33), F32), wide=False)
    yield Launch("normal/one element", normal((2, 1), F32), wide=False)
    yield Launch("normal/beyond 2^31", normal(HUGE, BF16))  # never touched


def _training() -> Iterator[Launch]:
    from kernels.ddpm_loss import _ddpm_loss_cuda
    from kernels.q_sample import _add_noise_cuda, _q_sample_cuda

    stream, (t, table) = _stream(2), _schedule(2)
    for source, target, layout in (
        (U8, F32, NCHW), (U8, BF16, NCHW), (F32, F32, NCHW), (U8, F32, NHWC), (U8, F16, NCHW),
    ):  # fmt: skip
        x_0 = _empty(IMAGE, source, layout)
        yield Launch(
            f"q_sample/{_short(source)} to {_short(target)}{_short(layout)}",
            lambda x_0=x_0, target=target: _q_sample_cuda(x_0, t, table, *stream, target),
        )
    digits = _empty((2, 1, 28, 28), U8)
    yield Launch("q_sample/digits", lambda: _q_sample_cuda(digits, t, table, *stream, F32))
    x_0, eps = _empty(IMAGE, F32), _empty(IMAGE, F32)
    yield Launch("add_noise/fp32", lambda: _add_noise_cuda(x_0, eps, t, table, F32))
    images = _empty(IMAGE, U8)
    for objective, dtype, layout, gamma, keep in (
        ("eps", F32, NCHW, None, True), ("eps", BF16, NCHW, None, True),
        ("eps", BF16, NCHW, 5.0, True), ("v", BF16, NCHW, None, True),
        ("x0", BF16, NCHW, 5.0, True), ("x0", BF16, NHWC, None, True),
        ("v", BF16, NCHW, 5.0, True),
        ("v", BF16, NHWC, 5.0, True), ("eps", BF16, NCHW, 5.0, False),
        ("eps", F16, NCHW, None, True),
    ):  # fmt: skip
        pred = _empty(IMAGE, dtype, layout)
        name = f"ddpm_loss/{objective} {_short(dtype)}{_short(layout)}"
        name += (", min-SNR" if gamma else "") + ("" if keep else ", no gradient")
        yield Launch(
            name,
            lambda pred=pred, o=objective, g=gamma, k=keep: _ddpm_loss_cuda(
                pred, images, t, table, *stream, o, g, k
            ),
        )


def _sampling() -> Iterator[Launch]:
    from kernels.sampler_step import _launch_sampler_step

    stream, (t, table) = _stream(2), _schedule(2)
    full, half = _empty(IMAGE, F32), _empty(IMAGE, BF16)
    for name, objective, eta, clip, x_t, pred in (
        ("ddpm eps", "eps", None, 1.0, full, half),
        ("ddpm x0, no clip", "x0", None, None, full, half),
        ("ddim v", "v", 0.5, 1.0, full, half),
        ("ddim x0", "x0", 0.5, 1.0, full, half),
        ("ddim, eta 0", "eps", 0.0, 1.0, full, half),
        ("ddpm eps fp16", "eps", None, 1.0, half.half(), half.half()),
    ):
        yield Launch(
            f"sampler_step/{name}",
            lambda o=objective, e=eta, c=clip, x_t=x_t, pred=pred: _launch_sampler_step(
                x_t, pred, t, t, table, stream, o, e, c, torch.empty_like(x_t)
            ),
        )


def _beyond_32_bits() -> Iterator[Launch]:
    """Samples of more elements than an int32 counts, in memory that is never touched."""
    from kernels.ddpm_loss import _ddpm_loss_cuda
    from kernels.q_sample import _q_sample_cuda
    from kernels.sampler_step import _sampler_step_cuda

    stream, (t, table) = _stream(1), _schedule(1)
    images, pred = _empty(HUGE, U8), _empty(HUGE, BF16)
    yield Launch("q_sample/beyond 2^31", lambda: _q_sample_cuda(images, t, table, *stream, BF16))
    yield Launch(
        "ddpm_loss/beyond 2^31",
        lambda: _ddpm_loss_cuda(pred, images, t, table, *stream, "v", 5.0, True),
    )
    yield Launch(
        "sampler_step/beyond 2^31",
        lambda: _sampler_step_cuda(pred, pred, t, t, table, *stream, "eps", None, 1.0),
    )


def _optimiser() -> Iterator[Launch]:
    from kernels.adamw_ema import _launch_adamw_ema

    def step(
        grad: torch.dtype, average: bool = True, proximal: bool = False, control: bool = False
    ) -> Callable[[], object]:
        def buffer(given: bool = True, dtype: torch.dtype = F32) -> Tensor | None:
            return torch.empty(PARAMETERS, dtype=dtype) if given else None

        lr, number = torch.empty(()), torch.ones((), dtype=torch.int64)
        return lambda: _launch_adamw_ema(
            buffer(), buffer(dtype=grad), buffer(), buffer(), buffer(average), buffer(proximal),
            buffer(control), lr, number, torch.empty(()) if average else None,
            0.9, 0.999, 1e-8, 0.0, 0.1 if proximal else 0.0,
        )  # fmt: skip

    yield Launch("adamw_ema/all terms", step(BF16, proximal=True, control=True))
    yield Launch("adamw_ema/all terms fp16", step(F16, proximal=True, control=True))
    yield Launch("adamw_ema/average only", step(F32))
    yield Launch("adamw_ema/no average", step(F32, average=False))
    yield Launch("adamw_ema/average and proximal", step(F32, proximal=True))
    yield Launch("adamw_ema/average and control", step(F32, control=True))


def _norms() -> Iterator[Launch]:
    from kernels.group_norm_silu import _group_norm_silu_backward_cuda, _group_norm_silu_cuda

    for channels, pixels, groups, dtype, layout, silu, rows in (
        (128, 32, 32, BF16, NHWC, True, 1),
        (256, 16, 32, BF16, NHWC, True, 1),
        (384, 16, 32, BF16, NHWC, True, 1),  # where a skip connection joins: groups of 12
        (512, 16, 32, BF16, NHWC, True, 1),
        (512, 4, 32, BF16, NHWC, True, 1),
        (256, 4, 32, BF16, NHWC, True, 1),
        (256, 4, 32, BF16, NHWC, False, 1),  # attention in the middle
        (256, 16, 32, BF16, NHWC, True, 2),  # with the scale and shift of the time embedding
        (256, 16, 32, BF16, NHWC, False, 1),  # before attention
        (256, 16, 32, F32, NCHW, True, 1),
        (256, 16, 32, F16, NHWC, True, 1),
        (128, 16, 1, BF16, NHWC, True, 1),  # one group of all channels
    ):
        x = _empty((2, channels, pixels, pixels), dtype, layout)
        w, b = torch.empty(2, rows, channels)
        mean, rstd = torch.empty(2, 2, groups)
        name = f"group_norm_silu/{channels} channels of {pixels}x{pixels}, {groups} groups, "
        name += f"{_short(dtype)}{_short(layout)}"
        name += ("" if silu else ", no SiLU") + (", scale and shift" if rows > 1 else "")
        yield Launch(
            f"{name}/forward",
            lambda x=x, w=w, b=b, g=groups, s=silu: _group_norm_silu_cuda(x, w, b, g, 1e-5, s),
        )
        yield Launch(
            f"{name}/backward",
            lambda x=x, w=w, b=b, m=mean, r=rstd, g=groups, s=silu: _group_norm_silu_backward_cuda(
                x, x, w, b, m, r, g, s
            ),
        )


def _masks() -> Iterator[Launch]:
    from kernels.mask_add import _launch_mask_add, _launch_masks
    from kernels.quantiser import RING_DTYPES, Quantiser

    n, keys = PARAMETERS, torch.empty((5, 8), dtype=torch.int32)
    signs, sizes = torch.ones(5, dtype=torch.int64), [n // TENSORS] * TENSORS
    sizes[-1] += n % TENSORS
    for ring, dtype in RING_DTYPES.items():
        made = Quantiser.of(
            ring=ring, sizes=sizes, clips=[1.0] * TENSORS, count=1, total_count=4, scale=100
        )
        real = [torch.empty(n) for _ in range(3)]  # each where its memory begins
        given = (*real, made.ends, made.up, made.down, made.bounds, made.point, keys[0])
        words = torch.empty(n, dtype=dtype)
        yield Launch(
            f"mask_add/quantise and mask {ring}",
            lambda words=words, given=given: _launch_mask_add(words, keys, signs, given),
        )
        yield Launch(f"mask_add/mask {ring}", lambda words=words: _launch_masks(words, keys, signs))
        yield Launch(
            f"mask_add/mask {ring}, a tail",
            lambda words=words: _launch_masks(words[:1000].clone(), keys, signs, first=n),
            wide=False,
        )
        real = [torch.empty(n + 1)[1:] for _ in range(3)]
        given, words = (*real, *given[3:]), torch.empty(n + 1, dtype=dtype)[1:]
        yield Launch(
            f"mask_add/quantise and mask {ring}, not aligned",
            lambda words=words, given=given: _launch_mask_add(words, keys, signs, given),
            wide=False,
        )


def _short(of: torch.dtype | torch.memory_format) -> str:
    names = {F32: "fp32", BF16: "bf16", F16: "fp16", U8: "u8", NCHW: "", NHWC: "/nhwc"}
    return names[of]
