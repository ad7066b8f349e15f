"""What is registered for a GPU, from the op to its kernels, on memory that held NaN before: values
and gradients of every op are those of the CPU, in every layout."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from benchmarks.op_cases import cases, outputs_and_gradients
from tests.kernels.conftest import AsOnAGpu

CASES = cases("cpu")
ROUNDED = {
    "ddpm_loss": {"rtol": 2e-6, "atol": 0.0},
    "group_norm_silu": {"rtol": 1e-3, "atol": 5e-4},
    "adamw_ema_": {"rtol": 1e-5, "atol": 1e-6},
}  # the others are equal in every bit
VECTORS = ("adamw_ema_", "mask_add", "add_masks_")  # which have one layout
WITH_LAYOUT = [
    (name, layout)
    for name in CASES
    for layout in ("nchw", "channels_last", "sliced", "expanded")
    if layout == "nchw" or name not in VECTORS
]

pytestmark = pytest.mark.usefixtures("poison")


def _compare(name, run):
    want = run()
    with AsOnAGpu():
        got = run()
    for here, there in zip(got, want, strict=True):
        assert here.stride() == there.stride()
        tolerance = ROUNDED.get(name, {"rtol": 0.0, "atol": 0.0})
        torch.testing.assert_close(here, there, **tolerance)


@pytest.mark.parametrize(("name", "layout"), WITH_LAYOUT)
def test_values_and_gradients_are_those_of_the_cpu(name, layout):
    _compare(name, lambda: outputs_and_gradients(CASES[name].run, CASES[name].given(2, layout)))


@pytest.mark.parametrize("name", [name for name in CASES if name != "mask_add"])
def test_of_no_samples_too(name):
    _compare(name, lambda: outputs_and_gradients(CASES[name].run, CASES[name].given(0, "nchw")))


@pytest.mark.parametrize("shape", [(3, 8, 0, 5), (3, 8, 0), (3, 8, 5), (2, 8, 2, 3, 2)])
def test_norms_in_other_dimensions_and_of_no_pixels(shape):
    def run():
        x, weight, bias = (
            torch.linspace(-1.0, 1.0, size.numel()).view(size).requires_grad_()
            for size in map(torch.Size, (shape, shape[1:2], shape[1:2]))
        )
        y = kernels.group_norm_silu(x, 4, weight, bias)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))

    _compare("group_norm_silu", run)


@pytest.mark.parametrize("outside", [-1, 1000, 2**40])
def test_a_timestep_outside_the_table_spoils_its_sample_and_its_gradient_alone(
    outside, stream, alpha_bar
):
    s, t = stream(3), torch.tensor([5, outside, 999])
    x_0, eps = torch.rand(2, 3, 2, 4, 4).requires_grad_().unbind()
    with AsOnAGpu():
        for x_t, leaves in (
            (kernels.q_sample(x_0, t, alpha_bar, **s.named), (x_0,)),
            (kernels.add_noise(x_0, eps, t, alpha_bar), (x_0, eps)),
        ):
            for found in (x_t, *torch.autograd.grad(x_t.sum(), leaves)):
                assert found[1].isnan().all()
                assert found[::2].isfinite().all()


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_of_a_norm_fills_nothing_beforehand_and_sums_once():
    x, (weight, bias) = torch.randn(3, 8, 6, 5, requires_grad=True), torch.randn(2, 8)
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    with _Counted() as counted, AsOnAGpu():
        y = kernels.group_norm_silu(x, 4, weight[:], bias[:])
        counted.calls.clear()
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert counted.calls["sum"] == 1
    assert not counted.calls.keys() & {"zeros", "zeros_like", "zero_", "fill_"}
