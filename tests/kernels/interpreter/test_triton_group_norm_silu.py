import pytest
import torch

from kernels._group_norm_silu_cpu import (
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
)
from kernels.group_norm_silu import _launch_backward, _launch_forward
from tests.kernels.conftest import in_layout

NAN = float("nan")


@pytest.mark.parametrize(
    ("shape", "groups"),
    [  # group sizes that are and aren't powers of two, several blocks of channels, several tiles
        ((2, 8, 5, 7), 2), ((2, 12, 4, 4), 4), ((1, 72, 3, 3), 12), ((1, 4, 67, 65), 1),
        ((2, 4, 1, 1), 4), ((0, 4, 2, 2), 2), ((1, 96, 3, 3), 8), ((1, 136, 2, 2), 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_forward_and_backward(shape, groups, channels_last, embedded, silu):
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    batch, channels = shape[:2]
    x = (torch.randn(shape) + 5).contiguous(memory_format=format_)
    grad = torch.randn(shape)
    weight, bias = torch.randn(2, batch if embedded else 1, channels)
    if embedded and batch == 0:
        weight, bias = torch.randn(2, 1, channels)
    y = torch.full_like(x, NAN)
    mean, rstd = torch.full((2, batch, groups), NAN)
    _launch_forward(x, weight, bias, groups, 1e-5, silu, y, mean, rstd)
    want = group_norm_silu_reference(x, weight, bias, groups, 1e-5, silu)
    for got, expected in zip((y, mean, rstd), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)

    dx = torch.full_like(x, NAN)
    dw, db = torch.full((2, batch, channels), NAN)
    statistics = (x, weight, bias, *want[1:], groups, silu)
    _launch_backward(grad, *statistics, dx, dw, db)
    if weight.shape[0] == 1:
        dw, db = dw.sum(0, keepdim=True), db.sum(0, keepdim=True)
    expected = group_norm_silu_backward_reference(grad, *statistics)
    for got, value in zip((dx, dw, db), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-3, atol=5e-4)


def _run(x, weight, bias, groups, grad):
    """(y, mean, rstd), then the gradients of x, weight and bias by sample: kernel and reference."""
    y, sizes = torch.full_like(x, NAN), (2, len(x), groups)
    mean, rstd = torch.full(sizes, NAN)
    _launch_forward(x, weight, bias, groups, 1e-5, True, y, mean, rstd)
    want = group_norm_silu_reference(x, weight, bias, groups, 1e-5, True)
    statistics = (x, weight, bias, *want[1:], groups, True)
    dx, (dw, db) = torch.full_like(x, NAN), torch.full((2, *x.shape[:2]), NAN)
    _launch_backward(grad, *statistics, dx, dw, db)
    theirs = group_norm_silu_backward_reference(grad, *statistics)
    return (y, mean, rstd, dx, dw, db), (*want, *theirs)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (5, 13)])  # 63, 64, 65 pixels, 64 to a tile
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_pixels_around_the_end_of_a_tile(size, layout):
    x = in_layout(torch.randn(1, 64, *size), layout)
    weight, bias = torch.randn(2, 1, 64)
    for got, want in zip(*_run(x, weight, bias, 1, torch.randn(x.shape)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("layout", ["sliced", "channels_last", "expanded"])
def test_upstream_gradients_may_lie_anywhere(layout):
    weight, bias = torch.randn(2, 2, 8)
    grad = in_layout(torch.randn(2, 8, 5, 7), layout)
    for like in ("nchw", "channels_last"):
        x = in_layout(torch.randn(2, 8, 5, 7), like)
        for got, want in zip(*_run(x, weight, bias, 2, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 5, 7), 4), ((1, 72, 3, 3), 12)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(shape, groups, layout, dtype):
    """One rounding at the end; to bfloat16 the interpreter cuts off."""
    x = in_layout((torch.randn(shape) + 2).to(dtype), layout)
    weight, bias = torch.randn(2, *shape[:2]).to(dtype)
    ours, theirs = _run(x, weight, bias, groups, torch.randn(shape).to(dtype))
    ulp = torch.finfo(dtype).eps
    for got, want in zip(ours, theirs, strict=True):
        rounded = got.dtype == dtype
        tolerance = {"rtol": ulp, "atol": ulp / 16} if rounded else {"rtol": 1e-3, "atol": 5e-4}
        torch.testing.assert_close(got, want, **tolerance)


def test_a_large_mean_does_not_cancel_the_variance():
    x = torch.randn(1, 4, 80, 80) + 1e4
    y, (mean, rstd) = torch.empty_like(x), torch.empty(2, 1, 1)
    _launch_forward(x, torch.ones(1, 4), torch.zeros(1, 4), 1, 0.0, False, y, mean, rstd)
    exact = x.double().var(unbiased=False).rsqrt()
    torch.testing.assert_close(rstd.double().squeeze(), exact, rtol=1e-4, atol=0)
