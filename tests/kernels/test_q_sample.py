import diffusers
import pytest
import torch

import kernels


def _float64(x_0, eps, t, alpha_bar):
    x = x_0.double() * 2 / 255 - 1 if x_0.dtype == torch.uint8 else x_0.double()
    a = alpha_bar.double()[t].view(-1, 1, 1, 1)
    return a.sqrt() * x + (1 - a).sqrt() * eps.double()


T = torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_q_sample_is_equation_4_in_every_layout(stream, alpha_bar, make_images, any_layout, source):
    s, x_0 = stream(4), any_layout(make_images(4, source))
    eps = kernels.normal(x_0.shape, **s.named)
    x_t = kernels.q_sample(x_0, T, alpha_bar, **s.named)
    torch.testing.assert_close(x_t.double(), _float64(x_0, eps, T, alpha_bar), rtol=1e-6, atol=1e-6)
    assert x_t.stride() == torch.empty_like(x_0).stride()
    assert torch.equal(x_t, kernels.add_noise(x_0, eps, T, alpha_bar))
    eps = any_layout(eps)
    x_t, want = kernels.add_noise(x_0, eps, T, alpha_bar), _float64(x_0, eps, T, alpha_bar)
    torch.testing.assert_close(x_t.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_is_computed_in_float32_and_rounded_once(stream, alpha_bar, make_images, dtype):
    s, x_0 = stream(4), make_images(4, torch.uint8)
    full = kernels.q_sample(x_0, T, alpha_bar, **s.named)
    assert torch.equal(kernels.q_sample(x_0, T, alpha_bar, dtype=dtype, **s.named), full.to(dtype))


def test_layout_does_not_change_the_numbers(stream, alpha_bar, make_images, layout):
    s, x_0 = stream(4), make_images(4, torch.uint8)
    assert torch.equal(
        kernels.q_sample(layout(x_0), T, alpha_bar, **s.named),
        kernels.q_sample(x_0, T, alpha_bar, **s.named),
    )


def test_one_image_expanded_to_a_batch(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(1)
    expanded = x_0.expand(4, -1, -1, -1)
    assert torch.equal(
        kernels.q_sample(expanded, T, alpha_bar, **s.named),
        kernels.q_sample(expanded.clone(), T, alpha_bar, **s.named),
    )


def test_black_and_white_map_to_the_ends_of_the_range(alpha_bar):
    x_0 = torch.tensor([0, 255, 127, 128], dtype=torch.uint8).view(1, 1, 2, 2)
    exact = torch.ones(1)
    x = kernels.add_noise(x_0, torch.zeros(1, 1, 2, 2), torch.tensor([0]), exact).flatten()
    assert x[0] == -1.0
    assert x[1] == 1.0
    assert x[2] == -x[3]


def test_a_sample_is_the_same_in_any_batch(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)
    whole = kernels.q_sample(x_0, T, alpha_bar, **s.named)
    for n in range(4):
        one = slice(n, n + 1)
        alone = kernels.q_sample(
            x_0[one], T[one], alpha_bar, key=s.key, sample_id=s.sample_id[one], step=s.step
        )
        assert torch.equal(alone, whole[one])


def test_agrees_with_diffusers_for_the_same_noise(stream, make_images):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    s, x_0 = stream(4), make_images(4)
    eps = kernels.normal(x_0.shape, **s.named)
    theirs = scheduler.add_noise(x_0, eps, T)
    ours = kernels.q_sample(x_0, T, scheduler.alphas_cumprod, **s.named)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (3,), (3, 5), (2, 1, 3, 2, 2)])
def test_shapes_from_empty_to_volumes(stream, alpha_bar, shape):
    s, t = stream(shape[0]), T[: shape[0]]
    x_t = kernels.q_sample(torch.zeros(shape), t, alpha_bar, **s.named)
    noise = (1 - alpha_bar[t]).sqrt().view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(x_t, noise * kernels.normal(shape, **s.named))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_for_upstream_ones_in_every_layout(
    stream, alpha_bar, make_images, any_layout, dtype
):
    s = stream(4)
    x_0 = make_images(4, dtype).requires_grad_()
    eps = torch.randn(x_0.shape).to(dtype).requires_grad_()
    upstream = any_layout(torch.randn(x_0.shape))
    a = alpha_bar.double()[T].view(-1, 1, 1, 1)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for x_t, leaves in (
        (kernels.q_sample(x_0, T, alpha_bar, **s.named), (x_0,)),
        (kernels.add_noise(x_0, eps, T, alpha_bar), (x_0, eps)),
    ):
        grads = torch.autograd.grad(x_t, leaves, upstream)
        for grad, factor in zip(grads, (a.sqrt(), (1 - a).sqrt()), strict=False):
            assert grad.dtype == dtype
            exact = upstream.double() * factor
            torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradients_pass_gradcheck_in_float32(stream, alpha_bar):
    s, t = stream(2), T[1:3]
    x_0 = torch.rand(2, 1, 2, 2, requires_grad=True)
    eps = torch.rand(2, 1, 2, 2, requires_grad=True)
    loose = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}
    torch.autograd.gradcheck(lambda x: kernels.q_sample(x, t, alpha_bar, **s.named), x_0, **loose)
    torch.autograd.gradcheck(
        lambda x, e: kernels.add_noise(x, e, t, alpha_bar), (x_0, eps), **loose
    )


def test_second_derivatives_are_those_of_a_linear_map(stream, alpha_bar):
    """Of the sum of x_t²: 2 ā by x_0, 2 (1 - ā) by the noise."""
    x_0, eps = torch.rand(2, 4, 3, 9, 11).requires_grad_().unbind()
    a = alpha_bar[T].view(-1, 1, 1, 1)
    for x_t, by in (
        (kernels.q_sample(x_0, T, alpha_bar, **stream(4).named), {x_0: a}),
        (kernels.add_noise(x_0, eps, T, alpha_bar), {x_0: a, eps: 1 - a}),
    ):
        for leaf, factor in by.items():
            total = x_t.square().sum()
            (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
            (second,) = torch.autograd.grad(grad.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(second, (2 * factor).expand_as(leaf), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_ops_pass_opcheck(stream, alpha_bar, make_images, layout):
    s = stream(4)
    for x_0 in (layout(make_images(4, torch.uint8)), layout(make_images(4)).requires_grad_()):
        arguments = (x_0, T, alpha_bar, *s.triple, torch.float32)
        torch.library.opcheck(torch.ops.concilium.q_sample.default, arguments)
    eps = layout(torch.randn(4, 3, 9, 11)).requires_grad_()
    arguments = (make_images(4), eps, T, alpha_bar, torch.bfloat16)
    torch.library.opcheck(torch.ops.concilium.add_noise.default, arguments)


def test_errors_say_what_was_wrong(stream, alpha_bar, make_images):
    s, x_0 = stream(4), make_images(4)

    def call(x_0=x_0, t=T, alpha_bar=alpha_bar, **change):
        return kernels.q_sample(x_0, t, alpha_bar, **(s.named | change))

    wrong = [
        (TypeError, "x_0 must be torch.uint8", {"x_0": x_0.double()}),
        (TypeError, "t must be torch.int64", {"t": T.int()}),
        (TypeError, "alpha_bar must be torch.float32", {"alpha_bar": alpha_bar.double()}),
        (ValueError, "table of a schedule", {"alpha_bar": alpha_bar[:0]}),
        (ValueError, r"t must hold one number per sample, shape \(4,\)", {"t": T[:2]}),
        (ValueError, "t runs from 0 to 999, alpha_bar has", {"alpha_bar": alpha_bar[:10]}),
        (ValueError, "t runs from -1", {"t": T - 1}),
        (ValueError, "t is on meta, the data on cpu", {"t": T.to("meta")}),
        (TypeError, "dtype must be one of", {"dtype": torch.float64}),
        (TypeError, "x_0 must be a tensor .*, got list", {"x_0": [[0.0]]}),
        (TypeError, r"t must be a tensor .*; pass torch.tensor\(..., dtype=", {"t": [1, 2, 3, 4]}),
        (TypeError, "alpha_bar must be a tensor .*, got list", {"alpha_bar": [0.9, 0.8]}),
        (TypeError, "sample_id must be a tensor .*, got list", {"sample_id": [0, 1, 2, 3]}),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            call(**change)
    for images in ([[0.0]], x_0):  # one of the two is no tensor
        with pytest.raises(TypeError, match="must be a tensor .*, got list"):
            kernels.add_noise(images, [[0.0]], T, alpha_bar)
    for error, message, eps, options in (
        (ValueError, "eps has shape", x_0[:, :1], {}),
        (TypeError, "eps must be torch.float32", x_0.double(), {}),
        (ValueError, "eps is on meta, the data on cpu", x_0.to("meta"), {}),
        (TypeError, "add_noise: dtype must be one of", x_0, {"dtype": torch.float64}),
    ):
        with pytest.raises(error, match=message):
            kernels.add_noise(x_0, eps, T, alpha_bar, **options)
