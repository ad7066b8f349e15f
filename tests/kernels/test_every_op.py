"""What holds for every public op alike: bits, written outputs, one graph, autocast."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import kernels
from benchmarks.op_cases import (
    Given,
    cases,
    in_layout,
    numbers,
    outputs_and_gradients,
    same,
    stream,
)

NO_OPS = {"Quantiser", "apply_to_unet", "derive_key", "remove_from_unet"}
ALPHA_BAR = torch.linspace(0.999, 0.001, 1000)
CASES = cases("cpu")
WITHOUT_DTYPE = ("uniform", "timesteps", "mask_add", "add_masks_")
IN_EVERY_DTYPE = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or name not in WITHOUT_DTYPE
]


def test_these_are_all_the_ops():
    assert set(CASES) == set(kernels.__all__) - NO_OPS


X, T, NAMED = numbers(2, 3, 6, 5), torch.tensor([99, 1]), stream(2)
W, B = numbers(2, 3)
OF_ONE_FLOAT = {
    "q_sample: x_0": lambda v: kernels.q_sample(v, T, ALPHA_BAR, **NAMED),
    "add_noise: x_0": lambda v: kernels.add_noise(v, X, T, ALPHA_BAR),
    "add_noise: eps": lambda v: kernels.add_noise(X, v, T, ALPHA_BAR),
    "ddpm_loss: pred": lambda v: kernels.ddpm_loss(v, X, T, ALPHA_BAR, **NAMED),
    "ddpm_loss: x_0": lambda v: kernels.ddpm_loss(X, v, T, ALPHA_BAR, **NAMED),
    "sampler_step: x_t": lambda v: kernels.sampler_step(v, X, T, T - 1, ALPHA_BAR, **NAMED),
    "sampler_step: pred": lambda v: kernels.sampler_step(X, v, T, T - 1, ALPHA_BAR, **NAMED),
    "group_norm_silu: x": lambda v: kernels.group_norm_silu(v, 1, W, B),
    "group_norm_silu: bias": lambda v: kernels.group_norm_silu(X, 1, W, v[0, :, 0, 0]),
    "group_norm_silu: shift": lambda v: kernels.group_norm_silu(
        X, 1, W, B, scale=X[..., 0, 0], shift=v[..., 0, 0]
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own decompositions
@pytest.mark.parametrize("name", OF_ONE_FLOAT)
def test_forward_mode_is_refused(name):
    """Of ops that have a derivative; for torch one in a mode that they do not have is zero."""
    with pytest.raises(RuntimeError, match=f"{name} has a tangent, and no forward-mode"):
        torch.func.jvp(OF_ONE_FLOAT[name], (X,), (X,))


@pytest.mark.parametrize("op", ["q_sample", "add_noise", "ddpm_loss", "sampler_step"])
def test_a_schedule_that_wants_a_gradient_is_refused(op):
    """It would get none, without a word."""
    of = {
        "q_sample": lambda table: kernels.q_sample(X, T, table, **NAMED),
        "add_noise": lambda table: kernels.add_noise(X, X, T, table),
        "ddpm_loss": lambda table: kernels.ddpm_loss(X, X, T, table, **NAMED),
        "sampler_step": lambda table: kernels.sampler_step(X, X, T, T - 1, table, **NAMED),
    }[op]
    learned = ALPHA_BAR.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: alpha_bar requires a gradient"):
        of(learned)
    with torch.no_grad():
        of(learned)


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_twice_the_same_bits(name, layout_name, dtype):
    case = CASES[name]
    first, second = (
        outputs_and_gradients(case.run, case.given(4, layout_name), dtype) for _ in range(2)
    )
    assert same(first, second)


@pytest.mark.parametrize("upstream", ["sliced", "expanded"])
@pytest.mark.parametrize("name", ["add_noise", "ddpm_loss", "group_norm_silu"])
def test_an_upstream_gradient_may_lie_anywhere(name, layout_name, upstream):
    runs = []
    for like in (lambda g: in_layout(g, upstream), lambda g: in_layout(g, upstream).clone()):
        runs.append(
            outputs_and_gradients(
                CASES[name].run, CASES[name].given(4, layout_name), upstream_like=like
            )
        )
    assert len(runs[0]) > 1
    assert same(*runs)


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_poisoned_outputs_are_fully_written(name, layout_name, dtype, request):
    case = CASES[name]
    clean = outputs_and_gradients(case.run, case.given(4, layout_name), dtype)
    request.getfixturevalue("poison")
    poisoned = outputs_and_gradients(case.run, case.given(4, layout_name), dtype)
    assert same(poisoned, clean)
    assert all(v.isfinite().all() for v in poisoned)


@pytest.fixture(params=["nchw", "channels_last", "sliced"])
def layout_name(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_batch_size(name):
    """Where the batch is marked dynamic; otherwise torch compiles again at its first change."""
    case = CASES[name]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 9, 2):
            given = case.given(batch, "nchw")
            want = outputs_and_gradients(case.run, case.given(batch, "nchw"))
            for part in case.batched:
                if part in given:
                    torch._dynamo.mark_dynamic(given[part], 0)
            assert same(outputs_and_gradients(compiled, given), want)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["q_sample", "group_norm_silu"])  # it is so for all of them
def test_without_a_mark_the_first_change_of_the_batch_compiles_once_more(name):
    case = CASES[name]
    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, backend=counted)
    for batch, graphs in ((4, 1), (4, 1), (6, 2), (9, 2), (5, 2)):
        given = case.given(batch, "nchw")
        assert same(
            outputs_and_gradients(compiled, given),
            outputs_and_gradients(case.run, case.given(batch, "nchw")),
        )
        assert counted.frame_count == graphs


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [(name, torch.float32, "sliced") for name in CASES]
    + [(name, torch.bfloat16, "channels_last") for name in CASES if name not in WITHOUT_DTYPE],
)
def test_the_default_backend_gives_the_same_bits(name, dtype, layout):
    case = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(case.run, fullgraph=True)
    got = outputs_and_gradients(compiled, case.given(4, layout), dtype)
    want = outputs_and_gradients(case.run, case.given(4, layout), dtype)
    assert same(got, want)


def _all_of_them(given: dict[str, Given]) -> tuple[Tensor, list[Any]]:
    """Every op in one function, and a matrix product that shows whether autocast is on."""
    x = given["group_norm_silu"]["weight"][:, None]
    return x @ x.T, [case.run(**given[name]) for name, case in CASES.items()]


@pytest.mark.parametrize("place", ["around", "inside"])
def test_autocast_leaves_the_compiled_ops_alone(place):
    given = {name: case.given(4, "nchw") for name, case in CASES.items()}
    cast = torch.autocast("cpu", dtype=torch.bfloat16)

    def cast_inside(given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _all_of_them(given)

    torch.compiler.reset()
    if place == "inside":
        product, made = torch.compile(cast_inside, fullgraph=True, backend="aot_eager")(given)
    else:
        compiled = torch.compile(_all_of_them, fullgraph=True, backend="aot_eager")
        with cast:
            product, made = compiled(given)
    assert product.dtype == torch.bfloat16  # the network's own products are cast
    for got, (name, case) in zip(made, CASES.items(), strict=True):
        want = case.run(**given[name])
        got, want = (list(v) if isinstance(v, tuple) else [v] for v in (got, want))
        assert same(got, want), name
        assert [v.dtype for v in got] == [v.dtype for v in want]
