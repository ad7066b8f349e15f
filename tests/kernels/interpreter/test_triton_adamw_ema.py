import pytest
import torch

from kernels.adamw_ema import _launch_adamw_ema, adamw_ema_reference


@pytest.mark.parametrize("size", [0, 1, 3, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adamw_ema(size, terms, step):
    state = [torch.randn(size), torch.randn(size), torch.randn(size), torch.rand(size)]
    extra = [torch.randn(size) for _ in range(3)] if terms else [None] * 3
    decay = torch.tensor(0.99) if terms else None
    rest = (torch.tensor(1e-2), torch.tensor(step), decay, 0.9, 0.999, 1e-8, 0.1)
    ours = [None if b is None else b.clone() for b in state + extra]
    theirs = [None if b is None else b.clone() for b in state + extra]
    mu = 0.3 if terms else 0.0
    _launch_adamw_ema(*ours, *rest, mu)
    adamw_ema_reference(*theirs, *rest, mu)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1025])
def test_gradients_in_half_precision(size, dtype):
    ours, theirs = torch.rand(2, 3, size)
    theirs.copy_(ours)
    grad = torch.randn(size).to(dtype)
    rest = (torch.tensor(1e-2), torch.tensor(2), None, 0.9, 0.999, 1e-8, 0.1, 0.0)
    _launch_adamw_ema(ours[0], grad, *ours[1:], None, None, None, *rest)
    adamw_ema_reference(theirs[0], grad, *theirs[1:], None, None, None, *rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_what_is_read_may_be_strided_or_expanded(layout):
    ours, theirs = torch.rand(2, 4, 10)
    theirs.copy_(ours)
    read = torch.randn(3, 20)[:, ::2]  # grad, anchor, control
    if layout == "expanded":
        read = read[:, :1].expand(-1, 10)
    rest = (torch.tensor(1e-2), torch.tensor([[7, 3]])[:, 1:], None, 0.9, 0.999, 1e-8, 0.1, 0.3)
    _launch_adamw_ema(ours[0], read[0], *ours[1:3], None, *read[1:], *rest)
    adamw_ema_reference(theirs[0], read[0], *theirs[1:3], None, *read[1:], *rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* encountered in divide")
@pytest.mark.parametrize("step", [0, -1])
def test_a_step_before_the_first_makes_nan(step):
    param, grad, m, v = torch.rand(4, 5)
    rest = (torch.tensor(1e-2), torch.tensor(step), None, 0.9, 0.999, 1e-8, 0.1, 0.0)
    _launch_adamw_ema(param, grad, m, v, None, None, None, *rest)
    assert param.isnan().all()
