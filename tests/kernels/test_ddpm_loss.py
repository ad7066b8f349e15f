import diffusers
import pytest
import torch

import kernels

T = torch.tensor([0, 1, 500, 999])
OBJECTIVES = ("eps", "x0", "v")


def _float64(pred, x_0, eps, t, alpha_bar, objective, gamma):
    """The definition in float64, differentiable by torch."""
    x = x_0.double() * 2 / 255 - 1 if x_0.dtype == torch.uint8 else x_0.double()
    a = alpha_bar.double()[t].view(-1, 1, 1, 1)
    target = {"eps": eps, "x0": x, "v": a.sqrt() * eps - (1 - a).sqrt() * x}[objective]
    loss = (pred.double() - target).square().flatten(1).mean(1)
    if gamma is None:
        return loss
    snr = (a / (1 - a)).flatten()
    least = snr.clamp(max=gamma)
    return loss * {"eps": least / snr, "x0": least, "v": least / (snr + 1)}[objective]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def dtype(request):
    return request.param


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_definition(
    stream, alpha_bar, make_images, any_layout, dtype, objective, gamma
):
    s, x_0 = stream(4), any_layout(make_images(4, torch.uint8))
    eps = kernels.normal(x_0.shape, **s.named).double()
    pred = any_layout(torch.randn(x_0.shape).to(dtype)).requires_grad_()
    scaled = 1e3 * torch.rand(4, 3)  # as a GradScaler does
    upstream = scaled[:, 1] if x_0.stride(0) else scaled[0, :1].expand(4)
    loss = kernels.ddpm_loss(
        pred, x_0, T, alpha_bar, objective=objective, snr_gamma=gamma, **s.named
    )
    (grad,) = torch.autograd.grad(loss, pred, upstream)

    exact = pred.detach().double().requires_grad_()
    expected = _float64(exact, x_0, eps, T, alpha_bar, objective, gamma)
    expected.backward(upstream.double())
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert grad.stride() == torch.empty_like(pred).stride()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    scale = exact.grad.abs().amax((1, 2, 3), keepdim=True)
    assert ((grad.double() - exact.grad).abs() <= TOLERANCE[dtype] * scale).all()


def test_the_loss_of_the_true_noise_is_zero_in_all_objectives(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    eps = kernels.normal(x_0.shape, **s.named)
    v = scheduler.get_velocity(x_0, eps, T)
    for objective, target in (("eps", eps), ("x0", x_0), ("v", v)):
        loss = kernels.ddpm_loss(target, x_0, T, alpha_bar, objective=objective, **s.named)
        assert loss.max() < 1e-12


def test_it_regenerates_the_noise_of_q_sample(stream, alpha_bar, make_images):
    """The eps recovered from x_t is the target of the loss."""
    s, x_0 = stream(4), make_images(4)
    t = T.clamp(min=400)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = kernels.q_sample(x_0, t, alpha_bar, **s.named)
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    assert kernels.ddpm_loss(eps, x_0, t, alpha_bar, **s.named).max() < 1e-11


def test_min_snr_weights_make_the_three_objectives_agree(stream, make_images):
    """Predictions of one and the same x_0 have one weighted loss, whatever they are called."""
    s, x_0 = stream(4), make_images(4)
    alpha_bar = torch.tensor([0.9, 0.6, 0.3, 0.1])
    t = torch.arange(4)
    a = alpha_bar.view(-1, 1, 1, 1)
    x_t = kernels.q_sample(x_0, t, alpha_bar, **s.named)
    x_hat = x_0 + 0.1 * torch.randn_like(x_0)
    eps_hat = (x_t - a.sqrt() * x_hat) / (1 - a).sqrt()
    v_hat = a.sqrt() * eps_hat - (1 - a).sqrt() * x_hat
    losses = [
        kernels.ddpm_loss(p, x_0, t, alpha_bar, objective=o, snr_gamma=5.0, **s.named)
        for p, o in ((eps_hat, "eps"), (x_hat, "x0"), (v_hat, "v"))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_finite_at_the_ends_of_a_schedule(stream, make_images, objective):
    s, x_0 = stream(2), make_images(2)
    ends = torch.tensor([1.0, 0.0])  # no noise at all; zero terminal SNR
    pred = torch.randn_like(x_0).requires_grad_()
    loss = kernels.ddpm_loss(
        pred, x_0, torch.tensor([0, 1]), ends, objective=objective, snr_gamma=5.0, **s.named
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pred.grad.isfinite().all()


def test_a_sample_is_the_same_in_any_batch_and_twice(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    pred = torch.randn_like(x_0)
    whole = kernels.ddpm_loss(pred, x_0, T, alpha_bar, **s.named)
    assert torch.equal(whole, kernels.ddpm_loss(pred, x_0, T, alpha_bar, **s.named))
    for n in range(4):
        one = slice(n, n + 1)
        stream_of_one = s.named | {"sample_id": s.sample_id[one]}
        alone = kernels.ddpm_loss(pred[one], x_0[one], T[one], alpha_bar, **stream_of_one)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_gradients_are_rounded_twice_and_no_more(
    dtype, within, stream, alpha_bar, make_images
):
    s, x_0 = stream(4), make_images(4)
    pred = torch.randn(x_0.shape).to(dtype).requires_grad_()
    loss = kernels.ddpm_loss(pred, x_0, T, alpha_bar, objective="x0", **s.named)
    upstream = torch.tensor([300.0, 700.0, -1100.0, 1300.0])
    (grad,) = torch.autograd.grad(loss, pred, upstream)
    residual = pred.detach().double() - x_0.double()
    exact = 2 / x_0[0].numel() * upstream.double().view(-1, 1, 1, 1) * residual
    torch.testing.assert_close(grad.double(), exact, rtol=1.01 * within, atol=1e-6)
    once = (grad.double() - exact.to(dtype).double()).abs() > 0
    assert 0.05 < once.double().mean() < 0.5, "how many the second rounding moves"


def test_float16_gradients_survive_the_division_by_the_sample_size(stream, alpha_bar):
    """2 / D is far below float16's range; only the product with a scaled upstream is rounded."""
    s, x_0 = stream(1), torch.zeros(1, 3, 64, 64)
    pred = torch.randn(x_0.shape).half().requires_grad_()
    loss = kernels.ddpm_loss(pred, x_0, T[1:2], alpha_bar, objective="x0", **s.named)
    (loss * 65536.0).sum().backward()
    expected = 2 * 65536.0 / x_0.numel() * pred.detach().double()
    torch.testing.assert_close(pred.grad.double(), expected, rtol=2e-3, atol=0)


def test_without_grad_nothing_is_kept(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    pred = torch.randn_like(x_0, requires_grad=True)
    with torch.no_grad():
        loss = kernels.ddpm_loss(pred, x_0, T, alpha_bar, **s.named)
    assert not loss.requires_grad
    *_, residual = torch.ops.concilium.ddpm_loss(
        pred.detach(), x_0, T, alpha_bar, *s.triple, "eps", None, False
    )
    assert residual.numel() == 0


def test_double_backward_raises(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    pred = torch.randn_like(x_0, requires_grad=True)
    loss = kernels.ddpm_loss(pred, x_0, T, alpha_bar, **s.named).sum()
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradcheck_in_float32(stream, alpha_bar):
    s = stream(2)
    pred = torch.rand(2, 1, 2, 2, requires_grad=True)
    for objective in OBJECTIVES:
        torch.autograd.gradcheck(
            lambda p, o=objective: kernels.ddpm_loss(
                p, torch.zeros(2, 1, 2, 2), T[1:3], alpha_bar, objective=o, **s.named
            ),
            pred, eps=1e-2, atol=2e-3, rtol=2e-3,
        )  # fmt: skip


def test_empty_batch(stream, alpha_bar):
    pred = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = kernels.ddpm_loss(pred, pred.detach(), T[:0], alpha_bar, **stream(0).named)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert pred.grad.shape == pred.shape


def test_samples_without_elements_have_the_mean_of_nothing(stream, alpha_bar):
    """As in torch, and as the kernel has it (interpreter/test_triton.py)."""
    pred = torch.zeros(2, 0, 4, 4, requires_grad=True)
    for objective in OBJECTIVES:
        loss = kernels.ddpm_loss(
            pred, pred.detach(), T[:2], alpha_bar, objective=objective, **stream(2).named
        )
        assert loss.shape == (2,)
        assert loss.isnan().all()
        loss.sum().backward()
        assert pred.grad.shape == pred.shape
        with torch.no_grad():
            loss = kernels.ddpm_loss(pred, pred, T[:2], alpha_bar, **stream(2).named)
        assert loss.isnan().all()
    assert pred.detach().square().flatten(1).mean(1).isnan().all()


@pytest.mark.filterwarnings("ignore")
def test_op_passes_opcheck(stream, alpha_bar, make_images, layout):
    s, x_0 = stream(4), make_images(4, torch.uint8)
    for objective, gamma, keep in (("eps", None, True), ("v", 5.0, True), ("x0", 5.0, False)):
        pred = layout(torch.randn(x_0.shape)).requires_grad_(keep)
        arguments = (pred, x_0, T, alpha_bar, *s.triple, objective, gamma, keep)
        torch.library.opcheck(torch.ops.concilium.ddpm_loss.default, arguments)
    arguments = (layout(torch.randn(x_0.shape)), torch.rand(4))
    torch.library.opcheck(torch.ops.concilium.ddpm_loss_backward.default, arguments)


def test_errors_say_what_was_wrong(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)

    def call(pred=x_0, x_0=x_0, t=T, alpha_bar=alpha_bar, **change):
        return kernels.ddpm_loss(pred, x_0, t, alpha_bar, **(s.named | change))

    wrong = [
        (TypeError, "pred must be torch.float32", {"pred": x_0.double()}),
        (ValueError, "x_0 has shape", {"x_0": x_0[:, :1]}),
        (ValueError, "objective must be one of", {"objective": "epsilon"}),
        (ValueError, "snr_gamma must be positive", {"snr_gamma": 0.0}),
        (ValueError, "snr_gamma must be positive and finite", {"snr_gamma": float("inf")}),
        (ValueError, "snr_gamma must be positive and finite", {"snr_gamma": float("nan")}),
        (ValueError, "pred only", {"x_0": x_0.clone().requires_grad_()}),
        (ValueError, "t runs from", {"t": T + 1}),
        (ValueError, "x_0 is on meta, the data on cpu", {"x_0": x_0.to("meta")}),
        (TypeError, "step must be a tensor", {"step": 3}),
        (TypeError, "pred must be a tensor .*, got list", {"pred": [[0.0]]}),
        (TypeError, "x_0 must be a tensor .*, got list", {"x_0": [[0.0]]}),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            call(**change)
