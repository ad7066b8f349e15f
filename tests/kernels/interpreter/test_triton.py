"""The Triton kernels against their torch references: equal bits wherever the arithmetic allows."""

import pytest
import torch

import kernels
from kernels._ddpm_loss_cpu import ddpm_loss_reference
from kernels.ddpm_loss import _launch_ddpm_loss
from kernels.noise import _launch_normal, _normal_kernel
from kernels.q_sample import _launch_q_sample
from kernels.sampler_step import _launch_sampler_step, sampler_step_reference
from tests.kernels.conftest import in_layout

NAN = float("nan")


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 3), (2, 63), (2, 64), (2, 65), (2, 2047), (1, 2049), (2, 3, 9, 11), (0, 4)],
)
def test_normals_are_equal_in_every_bit(stream, shape):
    s, out = stream(shape[0]), torch.full(shape, NAN)
    _launch_normal(out, *s.triple)
    assert same_bits(out, kernels.normal(shape, **s.named))


def test_half_a_million_normals_are_equal_in_every_bit(stream):
    s, out = stream(1, seed=9), torch.full((1, 1 << 19), NAN)
    blocks = 2  # few large blocks: the interpreter's cost is per program
    _normal_kernel[(blocks,)](
        out, *s.triple, out.numel(), blocks, BLOCK=out.numel() // blocks, WIDE=False
    )
    assert same_bits(out, kernels.normal(out.shape, **s.named))


@pytest.mark.parametrize("block", [64, 256, 1024])
@pytest.mark.parametrize("wide", [False, True])
def test_block_size_and_index_width_leave_the_bits_alone(stream, block, wide):
    s, out = stream(2), torch.full((2, 700), NAN)
    blocks = -(-700 // block)
    _normal_kernel[(2 * blocks,)](out, *s.triple, 700, blocks, BLOCK=block, WIDE=wide)
    assert same_bits(out, kernels.normal((2, 700), **s.named))


T = torch.tensor([0, 999, 500])


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
def test_q_sample_is_equal_in_every_bit(stream, alpha_bar, make_images, any_layout, source):
    s, x_0 = stream(3), any_layout(make_images(3, source))
    want = kernels.q_sample(x_0, T, alpha_bar, **s.named)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = torch.full(x_0.shape, NAN).contiguous(memory_format=memory_format)
        _launch_q_sample(x_0, T, alpha_bar, out, stream=s.triple)
        assert same_bits(out, want)
        eps = kernels.normal(x_0.shape, **s.named)
        out.fill_(NAN)
        _launch_q_sample(x_0, T, alpha_bar, out, eps=eps)
        assert same_bits(out, want)
    eps = any_layout(eps)
    _launch_q_sample(x_0, T, alpha_bar, out.fill_(NAN), eps=eps)
    assert same_bits(out, kernels.add_noise(x_0, eps, T, alpha_bar))


def test_a_timestep_outside_the_table_makes_nan_and_touches_nothing_else(stream, alpha_bar):
    s, x_0 = stream(3), torch.zeros(3, 1, 4, 4)
    out = torch.empty_like(x_0)
    _launch_q_sample(x_0, torch.tensor([5, 1000, -1]), alpha_bar, out, stream=s.triple)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


# Around the ends of a block, which has 64 to 2048 elements, and past the end of a second one.
TAILS = (0, 1, 3, 63, 65, 2047, 2048, 2049, 4100)


def assert_rounded(got, want):
    """Equal bits, but for bfloat16, to which the interpreter cuts off instead of rounding."""
    if got.dtype != torch.bfloat16:
        assert torch.equal(got, want)
    else:
        ulps = got.view(torch.int16).int() - want.view(torch.int16).int()
        assert not ulps.numel() or ulps.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("elements", TAILS)
def test_tails_in_every_dtype(stream, alpha_bar, elements, dtype):
    s, t = stream(2), T[1:]
    x, pred = torch.randn(2, 2, elements).to(dtype)
    out = torch.full_like(x, NAN)
    _launch_q_sample(x, t, alpha_bar, out, stream=s.triple)
    assert_rounded(out, kernels.q_sample(x, t, alpha_bar, dtype=dtype, **s.named))

    out.fill_(NAN)
    arguments = (x, pred, t, t - 1, alpha_bar, s.triple, "v", 0.5, 1.0)
    _launch_sampler_step(*arguments, out)
    assert_rounded(out, sampler_step_reference(*arguments))

    arguments = (pred, x, t, alpha_bar, s.triple, "v", 5.0)
    (loss, scale), residual = torch.full((2, 2), NAN), out.fill_(NAN)
    _launch_ddpm_loss(*arguments, residual, loss, scale)
    want = ddpm_loss_reference(*arguments, True)
    torch.testing.assert_close(loss, want[0], rtol=2e-6, atol=0, equal_nan=elements == 0)
    torch.testing.assert_close(scale, want[1], rtol=1e-6, atol=0)
    assert_rounded(residual, want[2])


@pytest.mark.parametrize("source", [torch.uint8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_and_half_precision(stream, alpha_bar, make_images, source, dtype):
    s, x_0 = stream(3), make_images(3, source)
    pred = torch.randn(x_0.shape).to(dtype)
    out = torch.full_like(pred, NAN)
    _launch_q_sample(x_0, T, alpha_bar, out, stream=s.triple)
    assert_rounded(out, kernels.q_sample(x_0, T, alpha_bar, dtype=dtype, **s.named))

    _launch_q_sample(x_0, T, alpha_bar, out.fill_(NAN), eps=pred)
    assert_rounded(out, kernels.add_noise(x_0, pred, T, alpha_bar, dtype=dtype))

    arguments = (pred, x_0, T, alpha_bar, s.triple, "v", None)
    loss, scale = torch.full((2, 3), NAN)
    _launch_ddpm_loss(*arguments, out.fill_(NAN), loss, scale)
    want = ddpm_loss_reference(*arguments, True)
    torch.testing.assert_close(loss, want[0], rtol=2e-6, atol=0)
    assert_rounded(out, want[2])


@pytest.mark.parametrize("op", ["q_sample", "sampler_step", "ddpm_loss"])
def test_what_a_sample_has_one_of_may_be_strided_or_expanded(stream, alpha_bar, op):
    s, x = stream(3), torch.randn(3, 5)

    def run(t, t_next, table, ids):
        out, loss, scale = torch.full_like(x, NAN), torch.zeros(3), torch.zeros(3)
        of = (s.key.expand(1, 4)[:, 2:3], ids, torch.tensor([9, 7, 9])[1:2])
        if op == "q_sample":
            _launch_q_sample(x, t, table, out, stream=of)
        elif op == "sampler_step":
            _launch_sampler_step(x, x, t, t_next, table, of, "eps", 0.5, None, out)
        else:
            _launch_ddpm_loss(x, x, t, table, of, "v", 5.0, out, loss, scale)
        return torch.cat([out.flatten(), loss, scale])

    def between(v):
        return torch.stack([v, v.flip(0)], -1)[:, 0]

    t, t_next = torch.tensor([999, 500, 20]), torch.tensor([499, 19, -1])
    strided = run(between(t), between(t_next), between(alpha_bar), between(s.sample_id))
    assert same_bits(strided, run(t, t_next, alpha_bar, s.sample_id))
    one = [v[:1].expand(3) for v in (t, t_next, s.sample_id)]
    whole = [v.clone() for v in one]
    expanded = run(*one[:2], alpha_bar, one[2])
    assert same_bits(expanded, run(*whole[:2], alpha_bar, whole[2]))


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_loss_and_residual(stream, alpha_bar, make_images, objective, gamma):
    s = stream(3)
    for layout in ("nchw", "channels_last", "sliced", "expanded"):
        x_0 = in_layout(make_images(3, torch.uint8), layout)
        pred = in_layout(torch.randn(x_0.shape), layout)
        loss, scale = torch.full((3,), NAN), torch.full((3,), NAN)
        residual = torch.full_like(pred, NAN)
        arguments = (pred, x_0, T, alpha_bar, s.triple, objective, gamma)
        _launch_ddpm_loss(*arguments, residual, loss, scale)
        want = ddpm_loss_reference(*arguments, True)
        torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(scale, want[1], rtol=1e-6, atol=0)
        assert same_bits(residual, want[2])
        again = torch.empty_like(loss)
        _launch_ddpm_loss(*arguments, None, again, scale)
        assert same_bits(again, loss)  # the same bits twice, with and without the residual


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_a_timestep_outside_the_table_makes_a_loss_of_nan(stream, alpha_bar, objective, gamma):
    s, (pred, x_0) = stream(3), torch.randn(2, 3, 4)
    loss, scale = torch.zeros(2, 3)
    t = torch.tensor([5, 1000, -1])
    _launch_ddpm_loss(pred, x_0, t, alpha_bar, s.triple, objective, gamma, None, loss, scale)
    for of_sample in (loss, scale):
        assert of_sample[0].isfinite()
        assert of_sample[1:].isnan().all()


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (0, 3)])
def test_the_loss_of_nothing(stream, alpha_bar, shape):
    pred, residual = torch.zeros(shape), torch.full(shape, NAN)
    loss, scale = torch.full((2, shape[0]), 5.0)
    arguments = (pred, pred, T[: shape[0]], alpha_bar, stream(shape[0]).triple, "eps", None)
    _launch_ddpm_loss(*arguments, residual, loss, scale)
    want = ddpm_loss_reference(*arguments, True)
    for got, expected in zip((loss, scale, residual), want, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("elements", [1, 3, 2048 * 4 - 1, 2048 * 4 + 1, 2048 * 9])
def test_loss_of_samples_around_the_size_of_a_chunk(stream, alpha_bar, elements):
    s, pred = stream(2), torch.randn(2, elements)
    x_0, t = torch.zeros(2, elements), T[:2]
    loss, scale = torch.full((2,), NAN), torch.full((2,), NAN)
    arguments = (pred, x_0, t, alpha_bar, s.triple, "eps", None)
    _launch_ddpm_loss(*arguments, None, loss, scale)
    want, *_ = ddpm_loss_reference(*arguments, False)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
