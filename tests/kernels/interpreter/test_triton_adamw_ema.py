import pytest
import torch

from kernels.adamw_ema import _launch_adamw_ema, adamw_ema_reference


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2049])
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
