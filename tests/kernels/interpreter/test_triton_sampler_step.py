import pytest
import torch

from kernels.sampler_step import _launch_sampler_step, sampler_step_reference
from tests.kernels.conftest import in_layout


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_sampler_step_is_equal_in_every_bit(stream, alpha_bar, objective, eta):
    s, x_t = stream(3), torch.randn(3, 3, 7, 5)
    pred = torch.randn(x_t.shape)
    t, t_next = torch.tensor([999, 20, 0]), torch.tensor([980, 0, -1])
    for clip in (1.0, None):
        arguments = (x_t, pred, t, t_next, alpha_bar, s.triple, objective, eta, clip)
        for format_ in (torch.contiguous_format, torch.channels_last):
            out = torch.full(x_t.shape, float("nan")).contiguous(memory_format=format_)
            _launch_sampler_step(*arguments, out)
            assert torch.equal(out, sampler_step_reference(*arguments))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_images_may_lie_anywhere(stream, alpha_bar, layout):
    x_t, pred = (in_layout(torch.randn(3, 3, 7, 5), layout) for _ in range(2))
    t, t_next = torch.tensor([999, 20, 0]), torch.tensor([980, 0, -1])
    arguments = (x_t, pred, t, t_next, alpha_bar, stream(3).triple, "v", 0.5, 1.0)
    out = torch.empty_like(x_t).fill_(float("nan"))
    _launch_sampler_step(*arguments, out)
    assert torch.equal(out, sampler_step_reference(*arguments))


@pytest.mark.filterwarnings("ignore:.* encountered in divide")
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [None, 0.5])
def test_an_image_without_noise_is_equal_in_every_bit(stream, objective, eta):
    x_t, pred = torch.randn(2, 3, 5)
    t, t_next = torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1])
    table = torch.tensor([1.0, 1.0, 0.9])
    arguments = (x_t, pred, t, t_next, table, stream(3).triple, objective, eta, None)
    out = torch.full_like(x_t, float("nan"))
    _launch_sampler_step(*arguments, out)
    assert out.isfinite().all()
    assert torch.equal(out, sampler_step_reference(*arguments))


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_steps_that_are_none_make_nan_and_touch_nothing_else(stream, alpha_bar, objective, eta):
    t = torch.tensor([20, 20, 20, 20, 1000, 1000, 1000, -1, -1])
    s = torch.tensor([10, 20, 30, -2, 20, 1000, -1, -1, -2])  # only the first goes back in time
    x_t, pred = torch.randn(2, len(t), 5)
    out = torch.empty_like(x_t)
    arguments = (stream(len(t)).triple, objective, eta, 1.0)
    _launch_sampler_step(x_t, pred, t, s, alpha_bar, *arguments, out)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
