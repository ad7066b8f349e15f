"""What holds for every public op alike: bits, written outputs, one graph, autocast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import kernels
from tests.kernels.conftest import images, in_layout, make_stream

NO_OPS = {"Quantiser", "apply_to_unet", "derive_key", "remove_from_unet"}
ALPHA_BAR = torch.linspace(0.999, 0.001, 1000)
SIZES = (1400, 7)
QUANTISER = kernels.Quantiser.of(
    ring=16, sizes=SIZES, clips=[0.5, 0.25], count=3, total_count=7, scale=9000
)
Given = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An op with inputs for any batch size; of those named, the first dimension is the batch."""

    run: Callable[..., Any]
    given: Callable[[int, str], Given]
    batched: tuple[str, ...]


def _numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _given_images(batch: int, layout: str) -> Given:
    t = torch.arange(batch) * 99 + 1
    floats = {"x": _numbers(batch, 3, 6, 5), "y": _numbers(batch, 3, 6, 5, seed=2)}
    pixels = images(batch, torch.uint8)[..., :6, :5]
    found = {name: in_layout(x, layout) for name, x in (floats | {"pixels": pixels}).items()}
    return found | {"t": t} | make_stream(batch).named


def _given_norm(batch: int, layout: str) -> Given:
    embedding = {"scale": _numbers(batch, 8), "shift": _numbers(batch, 8, seed=2)}
    x = in_layout(_numbers(batch, 8, 6, 5, seed=3), layout)
    return embedding | {"x": x, "weight": _numbers(8), "bias": _numbers(8, seed=2)}


def _given_buffers(batch: int, _: str) -> Given:
    names = ("param", "grad", "m", "v", "ema", "anchor", "control")
    flat = {name: _numbers(100 * batch, seed=i) for i, name in enumerate(names)}
    numbers = {"lr": torch.tensor(1e-2), "step": torch.tensor(3), "decay": torch.tensor(0.9)}
    return flat | numbers | {"v": flat["v"].square()}


def _given_masks(batch: int, _: str) -> Given:
    keys = torch.arange(32 * batch, dtype=torch.uint8).view(batch, 32)
    delta = {"delta": _numbers(sum(SIZES)), "residual": 1e-3 * _numbers(sum(SIZES), seed=2)}
    words = torch.arange(100, dtype=torch.int16)
    return delta | {"keys": keys, "signs": torch.arange(batch) % 2 * 2 - 1, "words": words}


def _adamw(param, grad, m, v, ema, anchor, control, lr, step, decay):
    state = tuple(x.clone() for x in (param, m, v, ema))
    kernels.adamw_ema_(
        state[0], grad, *state[1:3], lr=lr, step=step, ema=state[3], ema_decay=decay,
        anchor=anchor, mu=0.1, control=control, weight_decay=0.1,
    )  # fmt: skip
    return state


def _masked(keys, signs, words, **_):
    words = words.clone()
    kernels.add_masks_(words, keys=keys, signs=signs, first=5)
    return words


def _norm(x, weight, bias, scale, shift):
    return kernels.group_norm_silu(x, 4, weight, bias, scale=scale, shift=shift)


def _stream(key, sample_id, step, **_):
    return {"key": key, "sample_id": sample_id, "step": step}


BATCH = ("x", "y", "pixels", "t", "sample_id")
OPS = {
    "normal": lambda x, **s: kernels.normal((x.shape[0], 3, 5), dtype=x.dtype, **_stream(**s)),
    "uniform": lambda x, **s: kernels.uniform((x.shape[0], 3, 5), **_stream(**s)),
    "timesteps": lambda **s: kernels.timesteps(1000, **_stream(**s)),
    "q_sample": lambda x, pixels, t, **s: kernels.q_sample(
        pixels, t, ALPHA_BAR, dtype=x.dtype, **_stream(**s)
    ),
    "add_noise": lambda x, y, t, **_: kernels.add_noise(x, y, t, ALPHA_BAR, dtype=x.dtype),
    "ddpm_loss": lambda x, pixels, t, **s: kernels.ddpm_loss(
        x, pixels, t, ALPHA_BAR, objective="v", snr_gamma=5.0, **_stream(**s)
    ),
    "sampler_step": lambda x, y, t, **s: kernels.sampler_step(
        x.detach(), y.detach(), t, t - 1, ALPHA_BAR, eta=0.5, **_stream(**s)
    ),
}
CASES = {name: Case(run, _given_images, BATCH) for name, run in OPS.items()} | {
    "group_norm_silu": Case(_norm, _given_norm, ("x", "scale", "shift")),
    "adamw_ema_": Case(_adamw, _given_buffers, ("param", "grad", "m", "v", "ema", "anchor",
                                                "control")),
    "mask_add": Case(
        lambda delta, residual, keys, signs, **_: kernels.mask_add(
            delta, residual, QUANTISER, rounding_key=keys[0], keys=keys, signs=signs
        ),
        _given_masks, ("keys", "signs"),
    ),
    "add_masks_": Case(_masked, _given_masks, ("keys", "signs")),
}  # fmt: skip
LEAVES = ("x", "y", "weight", "bias", "scale", "shift")
WITHOUT_DTYPE = ("uniform", "timesteps", "mask_add", "add_masks_")
IN_EVERY_DTYPE = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or name not in WITHOUT_DTYPE
]


def _run(
    run: Callable[..., Any], given: Given, dtype: torch.dtype = torch.float32,
    upstream_like: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:  # fmt: skip
    """What the op returns, and the gradients of what may have one."""
    given = {k: v.to(dtype) if k in (*LEAVES, "grad") else v for k, v in given.items()}
    leaves = [v.requires_grad_() for k, v in given.items() if k in LEAVES]
    made = run(**given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    if not outputs[0].requires_grad:
        return outputs
    upstream = torch.linspace(0.5, 2.0, outputs[0].numel()).view(outputs[0].shape)
    upstream = upstream_like(upstream.to(outputs[0].dtype))
    grads = torch.autograd.grad(outputs[0], leaves, upstream, allow_unused=True)
    return [v.detach() for v in (*outputs, *grads) if v is not None]


def _same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_these_are_all_the_ops():
    assert set(CASES) == set(kernels.__all__) - NO_OPS


X, T, NAMED = _numbers(2, 3, 6, 5), torch.tensor([99, 1]), make_stream(2).named
W, B = _numbers(2, 3)
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


@pytest.fixture
def poison():
    """What torch.empty gives is NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_twice_the_same_bits(name, layout_name, dtype):
    case = CASES[name]
    first, second = (_run(case.run, case.given(4, layout_name), dtype) for _ in range(2))
    assert _same(first, second)


@pytest.mark.parametrize("upstream", ["sliced", "expanded"])
@pytest.mark.parametrize("name", ["add_noise", "ddpm_loss", "group_norm_silu"])
def test_an_upstream_gradient_may_lie_anywhere(name, layout_name, upstream):
    runs = []
    for like in (lambda g: in_layout(g, upstream), lambda g: in_layout(g, upstream).clone()):
        runs.append(_run(CASES[name].run, CASES[name].given(4, layout_name), upstream_like=like))
    assert len(runs[0]) > 1
    assert _same(*runs)


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_poisoned_outputs_are_fully_written(name, layout_name, dtype, request):
    case = CASES[name]
    clean = _run(case.run, case.given(4, layout_name), dtype)
    request.getfixturevalue("poison")
    poisoned = _run(case.run, case.given(4, layout_name), dtype)
    assert _same(poisoned, clean)
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
            want = _run(case.run, case.given(batch, "nchw"))
            for part in case.batched:
                if part in given:
                    torch._dynamo.mark_dynamic(given[part], 0)
            assert _same(_run(compiled, given), want)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["q_sample", "group_norm_silu"])  # it is so for all of them
def test_without_a_mark_the_first_change_of_the_batch_compiles_once_more(name):
    case = CASES[name]
    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, backend=counted)
    for batch, graphs in ((4, 1), (4, 1), (6, 2), (9, 2), (5, 2)):
        given = case.given(batch, "nchw")
        assert _same(_run(compiled, given), _run(case.run, case.given(batch, "nchw")))
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
    got = _run(compiled, case.given(4, layout), dtype)
    want = _run(case.run, case.given(4, layout), dtype)
    assert _same(got, want)


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
        assert _same(got, want), name
        assert [v.dtype for v in got] == [v.dtype for v in want]
