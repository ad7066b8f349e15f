"""The ops inside torch.compile and autocast, as a training step uses them."""

import pathlib
import re

import pytest
import torch

import kernels


def _step(weight, x_0, t, alpha_bar, key, sample_id, step):
    stream = {"key": key, "sample_id": sample_id, "step": step}
    x_t = kernels.q_sample(x_0, t, alpha_bar, **stream)
    pred = torch.nn.functional.conv2d(x_t, weight, padding=1)
    return kernels.ddpm_loss(pred, x_0, t, alpha_bar, snr_gamma=5.0, **stream)


@pytest.fixture
def weight():
    return torch.randn(3, 3, 3, 3, requires_grad=True)


def test_one_graph_serves_every_batch_size(stream, alpha_bar, make_images, weight):
    torch.compiler.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 6, 9):
            s, x_0 = stream(batch, step=batch), make_images(batch, torch.uint8)
            t = kernels.timesteps(1000, **s.named)
            for tensor in (x_0, t, s.sample_id):
                torch._dynamo.mark_dynamic(tensor, 0)
            expected = _step(weight, x_0, t, alpha_bar, *s.triple)
            (want,) = torch.autograd.grad(expected.sum(), weight)
            loss = compiled(weight, x_0, t, alpha_bar, *s.triple)
            (got,) = torch.autograd.grad(loss.sum(), weight)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(got, want)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow  # inductor compiles C++
def test_timesteps_and_noise_compile_with_the_default_backend(stream):
    def draw(key, sample_id, step):
        stream = {"key": key, "sample_id": sample_id, "step": step}
        batch = sample_id.shape[0]
        return (
            kernels.timesteps(1000, **stream),
            kernels.uniform((batch, 2), **stream),
            kernels.normal((batch, 3, 4, 4), **stream) * 2.0,
        )

    torch.compiler.reset()
    s = stream(5)
    for got, want in zip(
        torch.compile(draw, fullgraph=True)(*s.triple), draw(*s.triple), strict=True
    ):
        assert torch.equal(got, want)


def test_autocast_changes_the_network_and_not_the_ops(stream, alpha_bar, make_images, weight):
    s, x_0 = stream(4), make_images(4, torch.uint8)
    t = kernels.timesteps(1000, **s.named)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_t = kernels.q_sample(x_0, t, alpha_bar, **s.named)
        loss = _step(weight, x_0, t, alpha_bar, *s.triple)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, kernels.q_sample(x_0, t, alpha_bar, **s.named))
    loss.mean().backward()
    exact = _step(weight, x_0, t, alpha_bar, *s.triple)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    assert loss.dtype == torch.float32
    assert weight.grad.isfinite().all()


def test_a_large_batch_is_that_of_its_parts(stream, alpha_bar):
    """On a CPU, which has no grids; for those see below, and `benchmarks.gpu_proofs`."""
    batch = 70_001
    s, t = stream(batch), torch.arange(batch) % 1000
    x_0, pred = torch.rand(batch, 1, 1, 3), torch.rand(batch, 1, 1, 3)
    weight, bias = torch.rand(2, 1)
    end = slice(batch - 2, batch)
    last = s.named | {"sample_id": s.sample_id[end]}
    for op in (
        lambda x, p, t, ids: kernels.q_sample(x, t, alpha_bar, **ids),
        lambda x, p, t, ids: kernels.ddpm_loss(p, x, t, alpha_bar, **ids),
        lambda x, p, t, ids: kernels.sampler_step(x, p, t, t - 1, alpha_bar, **ids),
        lambda x, p, t, ids: kernels.group_norm_silu(x, 1, weight, bias),
    ):
        whole = op(x_0, pred, t, s.named)
        torch.testing.assert_close(whole[end], op(x_0[end], pred[end], t[end], last))


def test_kernels_use_the_dimension_of_a_grid_that_has_room():
    """CUDA's first grid dimension takes 2^31 - 1 programs, the others 65,535; aot.py sees to it
    that no launch has another.
    """
    files = pathlib.Path(kernels.__file__).parent.glob("*.py")
    axes = {a for file in files for a in re.findall(r"program_id\(([^)]*)\)", file.read_text())}
    assert axes == {"0"}
