import itertools

import diffusers
import pytest
import torch

import kernels

T = torch.tensor([999, 500, 20, 0])
S = torch.tensor([979, 480, 0, -1])
OBJECTIVES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def _theirs(scheduler, pred, x_t, **options):
    """One sample after the other, since diffusers takes one timestep for the whole batch."""
    steps = [
        scheduler.step(pred[n : n + 1], int(t), x_t[n : n + 1], **_of_sample(options, n))
        for n, t in enumerate(T)
    ]
    return torch.cat([step.prev_sample for step in steps])


def _of_sample(options, n):
    return {k: v[n : n + 1] if torch.is_tensor(v) else v for k, v in options.items()}


def _float64(x_t, pred, z, t, s, alpha_bar, objective, eta, clip):
    """The equations of the module's docstring."""
    a = alpha_bar.double()[t].view(-1, 1, 1, 1)
    b = torch.where(s < 0, 1.0, alpha_bar.double()[s]).view(-1, 1, 1, 1)
    x, y, z = x_t.double(), pred.double(), z.double()
    signal, noise = a.sqrt(), (1 - a).sqrt()
    x_0, eps = {
        "eps": ((x - noise * y) / signal, y),
        "x0": (y, (x - signal * y) / noise),
        "v": (signal * x - noise * y, noise * x + signal * y),
    }[objective]
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    beta = 1 - a / b
    var = (1 - b) / (1 - a) * beta
    if eta is not None:
        return b.sqrt() * x_0 + (1 - b - eta**2 * var).sqrt() * eps + eta * var.sqrt() * z
    mean = b.sqrt() * beta / (1 - a) * x_0 + (a / b).sqrt() * (1 - b) / (1 - a) * x
    return mean + var.sqrt() * z


@pytest.fixture
def state(stream, make_images):
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(4, 3, 9, 11, generator=generator)
    return x_t, torch.randn(x_t.shape, generator=generator), stream(4)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_is_that_of_diffusers(state, objective, eta, clip):
    x_t, pred, s = state
    scheduler = diffusers.DDIMScheduler(
        prediction_type=OBJECTIVES[objective], clip_sample=clip, timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    z = kernels.normal(x_t.shape, **s.named)
    theirs = _theirs(scheduler, pred, x_t, eta=eta, variance_noise=z if eta else None)
    ours = kernels.sampler_step(
        x_t, pred, T, S, scheduler.alphas_cumprod, objective=objective, eta=eta,
        clip=1.0 if clip else None, **s.named,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddpm_is_that_of_diffusers(state, objective, clip, monkeypatch):
    x_t, pred, s = state
    scheduler = diffusers.DDPMScheduler(prediction_type=OBJECTIVES[objective], clip_sample=clip)
    scheduler.set_timesteps(timesteps=[999, 979, 500, 480, 20, 0])
    noise = iter(kernels.normal(x_t.shape, **s.named).split(1))
    monkeypatch.setattr(  # DDPMScheduler has no argument for its noise; it draws none at t = 0
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise)
    )
    theirs = _theirs(scheduler, pred, x_t)
    ours = kernels.sampler_step(
        x_t, pred, T, S, scheduler.alphas_cumprod, objective=objective,
        clip=1.0 if clip else None, **s.named,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddpm_is_ddim_with_eta_one_where_nothing_is_clipped(state, alpha_bar, objective):
    x_t, pred, s = state
    steps = [
        kernels.sampler_step(
            x_t, pred, T, S, alpha_bar, objective=objective, eta=eta, clip=None, **s.named
        )
        for eta in (None, 1.0)
    ]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_the_definition_in_float64(state, alpha_bar, any_layout, objective, eta, clip):
    x_t, pred, s = state
    x_t, pred = any_layout(x_t), any_layout(pred)
    z = kernels.normal(x_t.shape, **s.named)
    want = _float64(x_t, pred, z, T, S, alpha_bar, objective, eta, clip)
    got = kernels.sampler_step(
        x_t, pred, T, S, alpha_bar, objective=objective, eta=eta, clip=clip, **s.named
    )
    largest = want.abs().amax((1, 2, 3), keepdim=True)
    assert ((got.double() - want).abs() <= 1e-6 * largest).all()


@pytest.mark.parametrize("eta", [None, 0.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_any_noise_the_image_is_the_models(state, objective, eta):
    """alpha_bar = 1 at t, as a schedule may begin: what the formulas tend to."""
    x_t, pred, s = state
    table, nearly = torch.ones(3), torch.tensor([1.0, 1.0, 1.0 - 2.0**-24])
    t, t_next = torch.tensor([0, 1, 2, 2]), torch.tensor([-1, 0, 1, -1])
    options = {"objective": objective, "eta": eta, "clip": None}
    got = kernels.sampler_step(x_t, pred, t, t_next, table, **options, **s.named)
    assert torch.equal(got, pred if objective == "x0" else x_t)
    near = kernels.sampler_step(x_t, pred, t, t_next, nearly, **options, **s.named)
    torch.testing.assert_close(near, got, rtol=0, atol=2e-3)


def test_a_perfect_model_walks_back_to_the_image(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    walk = [999, 700, 300, 50, 3, -1]
    x = kernels.q_sample(x_0, torch.full((4,), walk[0]), alpha_bar, **s.named)
    for t, t_next in itertools.pairwise(walk):
        t, t_next = torch.full((4,), t), torch.full((4,), t_next)
        x = kernels.sampler_step(
            x, x_0, t, t_next, alpha_bar, objective="x0", eta=0.0, clip=None, **s.named
        )
    torch.testing.assert_close(x, x_0)


def test_layout_and_batch_do_not_change_the_bits(state, alpha_bar, layout):
    x_t, pred, s = state
    whole = kernels.sampler_step(x_t, pred, T, S, alpha_bar, **s.named)
    moved = kernels.sampler_step(layout(x_t), layout(pred), T, S, alpha_bar, **s.named)
    assert torch.equal(moved, whole)
    assert moved.stride() == torch.empty_like(layout(x_t)).stride()
    for n in range(4):
        one = slice(n, n + 1)
        alone = kernels.sampler_step(
            x_t[one], pred[one], T[one], S[one], alpha_bar,
            key=s.key, sample_id=s.sample_id[one], step=s.step,
        )  # fmt: skip
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(state, alpha_bar, dtype):
    x_t, pred, s = state
    x_t, pred = x_t.to(dtype), pred.to(dtype)
    full = kernels.sampler_step(x_t.float(), pred.float(), T, S, alpha_bar, **s.named)
    assert torch.equal(kernels.sampler_step(x_t, pred, T, S, alpha_bar, **s.named), full.to(dtype))


def test_op_passes_opcheck_and_compiles(state, alpha_bar, layout):
    x_t, pred, s = state
    arguments = (layout(x_t), pred, T, S, alpha_bar, *s.triple, "v")
    for eta, clip in ((None, 1.0), (0.5, None)):
        torch.library.opcheck(torch.ops.concilium.sampler_step.default, (*arguments, eta, clip))
    torch.compiler.reset()
    compiled = torch.compile(kernels.sampler_step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 3, 2):
            batched = [v[:n].clone() for v in (x_t, pred, T, S, s.sample_id)]
            for tensor in batched:
                torch._dynamo.mark_dynamic(tensor, 0)
            *images, ids = batched
            stream = {"key": s.key, "step": s.step, "sample_id": ids}
            want = kernels.sampler_step(*images, alpha_bar, **stream)
            assert torch.equal(compiled(*images, alpha_bar, **stream), want)


def test_errors_say_what_was_wrong(state, alpha_bar):
    x_t, pred, s = state

    def call(x_t=x_t, pred=pred, t=T, s_=S, **options):
        return kernels.sampler_step(x_t, pred, t, s_, alpha_bar, **(s.named | options))

    wrong = [
        (TypeError, "x_t must be torch.float32", {"x_t": x_t.double()}),
        (TypeError, "x_t must be a tensor .*, got list", {"x_t": [[0.0]]}),
        (TypeError, "s must be a tensor .*, got list", {"s_": [0, 0, 0, 0]}),
        (TypeError, "pred must be torch.float32", {"pred": pred.double()}),
        (ValueError, "pred is on meta, the data on cpu", {"pred": pred.to("meta")}),
        (ValueError, "s is on meta, the data on cpu", {"s_": S.to("meta")}),
        (ValueError, "t is on meta, the data on cpu", {"t": T.to("meta")}),
        (ValueError, "key is on meta, the data on cpu", {"key": s.key.to("meta")}),
        (ValueError, "pred has shape", {"pred": pred[:, :1]}),
        (ValueError, "eta must be 0 to 1", {"eta": 2.0}),
        (ValueError, "clip must be positive", {"clip": 0.0}),
        (ValueError, "objective must be one of", {"objective": "noise"}),
        (ValueError, "t runs from 1 to 1000, alpha_bar has", {"t": T + 1}),
        (ValueError, "t runs from -1 to 998, alpha_bar has", {"t": T - 1}),
        (ValueError, r"s is -2 where t is 0 \(sample 3\)", {"s_": S - 1}),
        (ValueError, r"s is 0 where t is 0 \(sample 3\); s must be before t", {"s_": S + 1}),
        (ValueError, r"s is 999 where t is 999 \(sample 0\)", {"s_": T}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            call(**options)
    x = x_t.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        call(x_t=x).sum().backward()
