import pytest
import torch

import kernels

SIZE = 70_001  # more than one chunk, and no multiple of anything
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def _buffers():
    generator = torch.Generator().manual_seed(1)
    param = torch.randn(SIZE, generator=generator)
    grads = torch.randn(5, SIZE, generator=generator)
    return param, grads, torch.zeros(SIZE), torch.zeros(SIZE)


def _run(param, grads, m, v, *, rates=(1e-2,) * 5, **options):
    for i, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        kernels.adamw_ema_(
            param, grad, m, v, lr=torch.tensor(rate), step=torch.tensor(i), **(OPTIONS | options)
        )


def test_it_is_adamw():
    param, grads, m, v = _buffers()
    theirs = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, **OPTIONS)
    rates = (1e-2, 1e-2, 5e-3, 1e-3, 0.0)  # lr may change from step to step
    for grad, rate in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = torch.tensor(rate).item()
        theirs.grad = grad.clone()
        optimizer.step()
    _run(param, grads, m, v, rates=rates)
    torch.testing.assert_close(param, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"])


def test_decay_is_decoupled_and_the_definition_holds_in_float64():
    param, grads, m, v = _buffers()
    anchor, control, ema = torch.randn(SIZE), torch.randn(SIZE), param.clone()
    p, e, m_, v_ = (x.double() for x in (param, ema, m, v))
    (b1, b2), eps, decay = OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"]
    for i, grad in enumerate(grads, start=1):
        kernels.adamw_ema_(
            param, grad, m, v, lr=torch.tensor(1e-2), step=torch.tensor(i), ema=ema,
            ema_decay=torch.tensor(0.75), anchor=anchor, mu=0.3, control=control, **OPTIONS,
        )  # fmt: skip
        g = grad.double() + 0.3 * (p - anchor) + control
        m_, v_ = b1 * m_ + (1 - b1) * g, b2 * v_ + (1 - b2) * g * g
        update = m_ / (1 - b1**i) / ((v_ / (1 - b2**i)).sqrt() + eps)
        p = (1 - 1e-2 * decay) * p - 1e-2 * update  # the decay meets neither m nor v
        e = 0.75 * e + 0.25 * p
    for got, want in ((param, p), (ema, e), (m, m_), (v, v_)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_twice_the_same_bits():
    runs = []
    for _ in range(2):
        param, grads, m, v = _buffers()
        _run(param, grads, m, v)
        runs.append((param, m, v))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_proximal_term_and_control_variate_are_added_to_the_gradient():
    param, grads, m, v = _buffers()
    anchor, control = torch.randn(SIZE), torch.randn(SIZE)
    plain, m_, v_ = param.clone(), m.clone(), v.clone()
    for i, grad in enumerate(grads):
        corrected = grad + 0.3 * (plain - anchor) + control
        kernels.adamw_ema_(
            plain, corrected, m_, v_, lr=torch.tensor(1e-2), step=torch.tensor(i + 1), **OPTIONS
        )
    _run(param, grads, m, v, anchor=anchor, mu=0.3, control=control)
    torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-6)


def test_the_average_follows_the_parameters():
    param, grads, m, v = _buffers()
    ema = param.clone()
    expected = ema.double()
    for i, grad in enumerate(grads):
        decay = torch.tensor(0.5 + 0.1 * i)
        kernels.adamw_ema_(
            param, grad, m, v, lr=torch.tensor(1e-2), step=torch.tensor(i + 1),
            ema=ema, ema_decay=decay,
        )  # fmt: skip
        expected = decay.double() * expected + (1 - decay.double()) * param.double()
    torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_used_as_they_are(dtype):
    param, grads, m, v = _buffers()
    full, m_, v_ = param.clone(), m.clone(), v.clone()
    _run(param, grads.to(dtype), m, v)
    _run(full, grads.to(dtype).float(), m_, v_)
    assert torch.equal(param, full)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_gradients_and_terms_in_other_layouts(layout):
    param, grads, m, v = _buffers()
    same, m_, v_ = param.clone(), m.clone(), v.clone()
    anchor, control = torch.randn(2, SIZE)
    given = torch.cat([grads, anchor[None], control[None]])
    if layout == "strided":
        other = given.T.contiguous().T
    else:  # as the gradient of a sum is
        other = given[:, :1].expand(-1, SIZE)
        given = other.clone()
    _run(param, other[:5], m, v, anchor=other[5], mu=0.3, control=other[6])
    _run(same, given[:5], m_, v_, anchor=given[5], mu=0.3, control=given[6])
    assert torch.equal(param, same)


def test_empty_buffers():
    nothing = torch.zeros(0)
    _run(nothing, torch.zeros(5, 0), nothing.clone(), nothing.clone())


def test_op_passes_opcheck_and_compiles_once_for_all_steps():
    param, grads, m, v = _buffers()
    scalars = (torch.tensor(1e-2), torch.tensor(2), torch.tensor(0.9))
    numbers = (0.9, 0.99, 1e-8, 0.1)
    op = torch.ops.concilium.adamw_ema_.default
    full = (param, grads[0], m, v, param.clone(), param.clone(), param.clone())
    torch.library.opcheck(op, (*full, *scalars, *numbers, 0.3))
    bare = (param, grads[0], m, v, None, None, None, *scalars[:2], None)
    torch.library.opcheck(op, (*bare, *numbers, 0.0))

    torch.compiler.reset()
    compiled = torch.compile(kernels.adamw_ema_, fullgraph=True, backend="aot_eager")
    expected, m_, v_ = param.clone(), m.clone(), v.clone()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, rate in ((1, 1e-2), (2, 1e-3), (3, 1e-4)):
            scalars = {"lr": torch.tensor(rate), "step": torch.tensor(i)}
            compiled(param, grads[0], m, v, **scalars)
            kernels.adamw_ema_(expected, grads[0], m_, v_, **scalars)
    assert torch.equal(param, expected)


def test_errors_say_what_was_wrong():
    param, grads, m, v = _buffers()
    good = {"lr": torch.tensor(1e-2), "step": torch.tensor(1)}
    wrong = [
        (TypeError, "lr must be a tensor", {"lr": 1e-2}),
        (TypeError, "step must be torch.int64", {"step": torch.tensor(1.0)}),
        (ValueError, "ema and ema_decay belong together", {"ema": param.clone()}),
        (ValueError, "anchor and mu belong together", {"mu": 0.1}),
        (ValueError, "control has shape", {"control": torch.zeros(3)}),
        (ValueError, "betas must be in", {"betas": (1.0, 0.9)}),
        (ValueError, "lr is on meta, the data on cpu", {"lr": torch.tensor(1e-2, device="meta")}),
        (TypeError, "control must be torch.float32", {"control": param.double()}),
        (ValueError, "step is 0; the first step is 1", {"step": torch.tensor(0)}),
        (ValueError, "weight_decay must be finite and not negative", {"weight_decay": -0.1}),
        (ValueError, "weight_decay must be finite and not", {"weight_decay": float("nan")}),
        (ValueError, "mu must be finite and not negative", {"mu": -0.1, "anchor": param.clone()}),
        (ValueError, "ema and param are the same", {"ema": param, "ema_decay": torch.tensor(0.9)}),
        (ValueError, "anchor and param are the same", {"anchor": param, "mu": 0.1}),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            kernels.adamw_ema_(param, grads[0], m, v, **(good | change))
    with pytest.raises(ValueError, match="grad and param are the same tensor"):
        kernels.adamw_ema_(param, param, m, v, **good)
    with pytest.raises(ValueError, match="exp_avg_sq and exp_avg are the same tensor"):
        kernels.adamw_ema_(param, grads[0], m, m, **good)
    with pytest.raises(TypeError, match="param must be a tensor .*, got list"):
        kernels.adamw_ema_([1.0], grads[0], m, v, **good)
    with pytest.raises(TypeError, match="grad must be a tensor .*, got list"):
        kernels.adamw_ema_(param, [1.0], m, v, **good)
    assert torch.equal(param, _buffers()[0])  # nothing was updated before it was refused
    with pytest.raises(ValueError, match="flat buffer"):
        kernels.adamw_ema_(param.view(1, -1), grads[0], m, v, **good)
    with pytest.raises(ValueError, match="exp_avg is updated in place and must be contiguous"):
        kernels.adamw_ema_(param, grads[0], torch.zeros(2 * SIZE)[::2], v, **good)
