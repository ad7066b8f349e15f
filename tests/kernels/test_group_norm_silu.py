import copy
import io

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import nn
from torch.nn import functional

import kernels
from benchmarks.gpu_networks import NETWORKS
from kernels._group_norm_silu_cpu import group_norm_silu_reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=[True, False], ids=["", "older-torch"])
def torch_kernels(request, monkeypatch):
    """With torch's own kernels where these are fast, and as before they were for few channels."""
    monkeypatch.setattr("kernels._group_norm_silu_cpu._VECTORISED", request.param)


def _inputs(shape=(3, 12, 5, 7), dtype=torch.float32, *, embedded=False, mean=0.0):
    generator = torch.Generator().manual_seed(4)
    batch, channels = shape[:2]
    x = torch.randn(shape, generator=generator) + mean
    affine = [torch.randn(channels, generator=generator) for _ in range(2)]
    embedding = [0.3 * torch.randn(batch, channels, generator=generator) for _ in range(2)]
    return x.to(dtype), affine, embedding if embedded else [None, None]


def _float64(x, groups, weight, bias, scale, shift, silu):
    z = functional.group_norm(x, groups, weight, bias, 1e-5)
    if scale is not None:
        z = z * (1 + scale[..., None, None]) + shift[..., None, None]
    return functional.silu(z) if silu else z


def _close(got, want, dtype):
    largest = want.abs().max().clamp(min=1e-3)
    assert ((got.double() - want).abs().max() / largest) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_value_and_gradients_are_those_of_the_definition(
    any_layout, dtype, embedded, silu, torch_kernels
):
    x, affine, embedding = _inputs(dtype=dtype, embedded=embedded)
    leaves = [any_layout(x), *affine, *embedding]
    ours = [v if v is None else v.detach().requires_grad_() for v in leaves]
    exact = [v if v is None else v.detach().double().requires_grad_() for v in leaves]
    upstream = torch.randn(*x.shape[:3], 2 * x.shape[3]).to(dtype)[..., ::2]  # strided

    y = kernels.group_norm_silu(ours[0], 4, *ours[1:3], silu=silu, scale=ours[3], shift=ours[4])
    want = _float64(exact[0], 4, *exact[1:], silu)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(leaves[0]).stride()
    _close(y, want, dtype)
    y.backward(upstream)
    want.backward(upstream.double())
    for got, expected in zip(ours, exact, strict=True):
        if got is not None:
            _close(got.grad, expected.grad, dtype)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_large_mean_cancels_neither_variance_nor_gradient(layout, embedded, torch_kernels):
    x, affine, embedding = _inputs((2, 8, 16, 16), embedded=embedded)
    x[1] += 1000.0  # torch's own channels_last GroupNorm is wrong in the first digit here
    ours = layout(x).detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    scale, shift = embedding
    y = kernels.group_norm_silu(ours, 2, *affine, scale=scale, shift=shift)
    want = _float64(exact, 2, *(v if v is None else v.double() for v in affine + embedding), True)
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)
    upstream = torch.randn(x.shape)
    y.backward(upstream)
    want.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)


def test_half_precision_is_the_rounded_float32_result():
    x, affine, _ = _inputs(dtype=torch.bfloat16)
    full = kernels.group_norm_silu(x.float(), 4, *affine)
    assert torch.equal(kernels.group_norm_silu(x, 4, *affine), full.bfloat16())


def test_a_sample_is_the_same_in_any_batch(monkeypatch):
    x, affine, embedding = _inputs((5, 8, 6, 6), embedded=True)
    scale, shift = embedding
    whole = kernels.group_norm_silu(x, 4, *affine, scale=scale, shift=shift)
    monkeypatch.setattr("kernels._group_norm_silu_cpu._CHUNK", 2 * x[0].numel())
    again = kernels.group_norm_silu(x, 4, *affine, scale=scale, shift=shift)
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=1e-6)
    alone = kernels.group_norm_silu(x[3:4], 4, *affine, scale=scale[3:4], shift=shift[3:4])
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("embedded", [False, True])
def test_half_precision_is_the_same_in_chunks_of_any_size(
    layout, embedded, monkeypatch, torch_kernels
):
    x, affine, embedding = _inputs((5, 8, 6, 6), torch.bfloat16, embedded=embedded)
    x[3] += 300.0  # this one is centred first
    x, upstream = layout(x), torch.randn(x.shape).bfloat16()

    def run():
        leaves = [v if v is None else v.detach().requires_grad_() for v in (x, *affine, *embedding)]
        y = kernels.group_norm_silu(leaves[0], 4, *leaves[1:3], scale=leaves[3], shift=leaves[4])
        y.backward(upstream)
        return y.detach(), [leaf.grad for leaf in leaves if leaf is not None]

    y, grads = run()
    for samples in (1, 2, 3):
        monkeypatch.setattr("kernels._group_norm_silu_cpu._CHUNK", samples * x[0].numel())
        again, other = run()
        assert torch.equal(again, y)
        for got, want in zip(other, grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_channels_as_attention_has_them_are_not_copied(dtype, torch_kernels):
    x, affine, _ = _inputs((3, 12, 35), dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = kernels.group_norm_silu(x, 4, *affine)
    assert y.stride() == x.stride()
    exact = x.detach().double().requires_grad_()
    want = functional.silu(functional.group_norm(exact, 4, *(v.double() for v in affine)))
    _close(y, want, dtype)
    upstream = torch.randn(x.shape).to(dtype)
    y.backward(upstream)
    want.backward(upstream.double())
    _close(x.grad, exact.grad, dtype)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 1, 1), (2, 4), (2, 4, 9), (2, 4, 2, 2, 2)])
def test_shapes_from_empty_to_volumes(shape, torch_kernels):
    x, affine, _ = _inputs(shape)
    x.requires_grad_()
    y = kernels.group_norm_silu(x, 2, *affine)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if shape[0]:
        torch.testing.assert_close(y, functional.silu(functional.group_norm(x, 2, *affine)))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expanded_inputs_and_upstream_gradients_and_the_same_bits_twice(dtype):
    x, affine, embedding = _inputs((1, 12, 5, 7), dtype, embedded=True)
    x = x.expand(4, -1, -1, -1)
    upstream = torch.randn(1, 12, 1, 1).to(dtype).expand(4, -1, 5, 7)
    embedding = [v.expand(4, -1) for v in embedding]
    runs = []
    for _ in range(2):
        leaves = [v.detach().requires_grad_() for v in (x, *affine, *embedding)]
        y = kernels.group_norm_silu(leaves[0], 4, *leaves[1:3], scale=leaves[3], shift=leaves[4])
        y.backward(upstream)
        runs.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [v.detach().double().requires_grad_() for v in (x, *affine, *embedding)]
    want = _float64(exact[0], 4, *exact[1:], True)
    want.backward(upstream.double())
    expected = [want.detach(), *(leaf.grad for leaf in exact)]
    for got, value in zip(runs[0], expected, strict=True):
        _close(got, value, dtype)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradients_pass_gradcheck_in_float32(layout):
    x, affine, embedding = _inputs((2, 4, 2, 3), embedded=True)
    leaves = [v.detach().requires_grad_() for v in (layout(x), *affine, *embedding)]

    def norm(x, weight, bias, scale, shift):
        return kernels.group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)

    torch.autograd.gradcheck(norm, leaves, eps=1e-2, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_image_whose_batch_stride_says_nothing(dtype):
    x, affine, _ = _inputs((1, 12, 5, 7), dtype)
    odd = x.movedim(1, -1).contiguous().as_strided((1, 5, 7, 12), (1, 84, 12, 1)).movedim(-1, 1)
    odd.requires_grad_()
    y = kernels.group_norm_silu(odd, 4, *affine)
    _close(y, _float64(x.double(), 4, *(v.double() for v in affine), None, None, True), dtype)
    y.sum().backward()
    assert odd.grad.isfinite().all()


def test_double_backward_raises():
    x, affine, _ = _inputs()
    x.requires_grad_()
    y = kernels.group_norm_silu(x, 4, *affine).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


def test_op_passes_opcheck(layout):
    x, (weight, bias), _ = _inputs()
    x = layout(x).requires_grad_()
    for w, b in ((weight[None], bias[None]), (weight.expand(3, -1), bias.expand(3, -1))):
        w, b = (v.clone().requires_grad_() for v in (w, b))
        torch.library.opcheck(torch.ops.concilium.group_norm_silu.default, (x, w, b, 4, 1e-5, True))
        _, mean, rstd = group_norm_silu_reference(x.detach(), w.detach(), b.detach(), 4, 1e-5, True)
        arguments = (torch.randn_like(x), x, w, b, mean, rstd, 4, True)
        arguments = tuple(v.detach() if torch.is_tensor(v) else v for v in arguments)
        torch.library.opcheck(torch.ops.concilium.group_norm_silu_backward.default, arguments)


def test_one_graph_serves_every_batch_size_and_autocast():
    norm = nn.GroupNorm(4, 8)
    conv = nn.Conv2d(8, 8, 3, padding=1)

    def step(x):
        return conv(kernels.group_norm_silu(x, 4, norm.weight, norm.bias)).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 6, 9):
            x = torch.randn(batch, 8, 5, 5)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), step(x))
    x = torch.randn(4, 8, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.group_norm_silu(x.bfloat16(), 4, norm.weight, norm.bias)
        torch.testing.assert_close(step(x), step(x.clone()), rtol=2e-2, atol=2e-2)
    assert y.dtype == torch.bfloat16


def test_errors_say_what_was_wrong():
    x, (weight, bias), (scale, shift) = _inputs(embedded=True)
    wrong = [
        (TypeError, "x must be torch.float32", (x.double(), 4, weight, bias), {}),
        (ValueError, "C divisible by groups", (x, 5, weight, bias), {}),
        (ValueError, r"weight must have shape \(12,\)", (x, 4, weight[:3], bias), {}),
        (ValueError, "belong together", (x, 4, weight, bias), {"scale": scale}),
        (
            ValueError,
            r"shift must have shape \(3, 12\)",
            (x, 4, weight, bias),
            {"scale": scale, "shift": shift[:1]},
        ),
        (ValueError, "is on meta", (x, 4, weight.to("meta"), bias), {}),
        (
            ValueError,
            r"3221225472 elements a sample, the kernel counts to 2\^31 - 4096",
            (x[:, :, :1, :1].expand(-1, -1, 1 << 14, 1 << 14), 4, weight, bias),
            {},
        ),
        (
            ValueError,  # one pixel too many: the counter of the kernel's loop would wrap
            "2147479553 elements a sample",
            (x[:1, :1, :1].expand(1, 1, 1 << 31, -1)[..., 4095:, :1], 1, weight[:1], bias[:1]),
            {},
        ),
        (TypeError, "x must be a tensor .*, got list", ([1.0], 4, weight, bias), {}),
    ]
    for error, message, arguments, options in wrong:
        with pytest.raises(error, match=message):
            kernels.group_norm_silu(*arguments, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_diffusers_unet_computes_the_same_and_can_be_had_back(name):
    unet = diffusers.UNet2DModel(in_channels=3, out_channels=3, **NETWORKS[name])
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    labels = None if unet.class_embedding is None else torch.tensor([1, 7])
    names, modules = list(unet.state_dict()), list(unet.modules())

    def run():
        unet.zero_grad()
        y = unet(x, t, class_labels=labels).sample
        y.square().sum().backward()
        return y.detach(), {k: p.grad.clone() for k, p in unet.named_parameters()}

    y, grads = run()
    assert kernels.apply_to_unet(unet) is unet
    fused_y, fused_grads = run()
    kernels.apply_to_unet(unet)  # twice is harmless
    assert not any(type(m) is nn.GroupNorm for m in unet.modules())
    silus = [m for m in unet.modules() if type(m) is nn.SiLU]
    assert len(silus) == 1  # what is left is that of the time embedding
    assert list(unet.state_dict()) == names
    torch.testing.assert_close(fused_y, y, rtol=1e-4, atol=1e-5)
    for key, grad in grads.items():
        largest = grad.abs().max().item()
        torch.testing.assert_close(
            fused_grads[key], grad, rtol=1e-3, atol=1e-4 * (1 + largest), msg=key
        )
    assert kernels.remove_from_unet(unet) is unet
    assert all(a is b for a, b in zip(unet.modules(), modules, strict=True))
    assert torch.equal(run()[0], y)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bfloat16_and_channels_last_it_is_as_near_to_float32_as_torch(name):
    """Under autocast, as training runs it: output and whole gradient, by their norms."""
    unet = diffusers.UNet2DModel(in_channels=3, out_channels=3, **NETWORKS[name])
    unet.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([3, 500, 900, 20])
    labels = None if unet.class_embedding is None else torch.tensor([1, 7, 0, 9])

    def run(dtype):
        unet.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = unet(x, t, class_labels=labels).sample
        y.float().square().sum().backward()
        return y.detach().float(), torch.cat([p.grad.flatten() for p in unet.parameters()])

    def distances(made):
        return [(a - b).norm() / b.norm() for a, b in zip(made, exact, strict=True)]

    exact, torchs = run(torch.float32), run(torch.bfloat16)
    kernels.apply_to_unet(unet)
    for ours, theirs in zip(distances(run(torch.bfloat16)), distances(torchs), strict=True):
        assert ours <= 0.02
        assert ours <= 1.1 * theirs


def test_a_block_for_videos_whose_embedding_is_no_vector_computes_the_same():
    """Its time embedding, (B, frames, C), goes through the same SiLU as its images."""
    block = TemporalResnetBlock(32, 64, temb_channels=16)
    x, embedding = torch.randn(2, 32, 3, 4, 4), torch.randn(2, 3, 16)
    want = block(x, embedding)
    kernels.apply_to_unet(block)
    assert not any(type(m) is nn.GroupNorm for m in block.modules())
    torch.testing.assert_close(block(x, embedding), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", ["saved", "deepcopy"])
@pytest.mark.parametrize("embedding", ["default", "scale_shift"])
def test_a_copy_of_a_fused_model_is_fused_and_has_parameters_of_its_own(embedding, copied):
    block = ResnetBlock2D(
        in_channels=4, out_channels=8, temb_channels=6, groups=2, time_embedding_norm=embedding
    )
    x, temb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    plain = block(x, temb)
    want = kernels.apply_to_unet(block)(x, temb)
    if copied == "saved":
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(block)
    assert torch.equal(other(x, temb), want)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(other(x, temb), want)
    kernels.remove_from_unet(other)
    assert type(other.norm1) is nn.GroupNorm
    assert torch.equal(other(x, temb), plain)


def test_norms_in_a_sequence_take_their_silu_along():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    x = torch.randn(2, 4, 3, 3)
    want = model(x)
    torch.testing.assert_close(kernels.apply_to_unet(model)(x), want)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(kernels.remove_from_unet(model)(x), want)
    assert type(model[1]) is nn.SiLU


def test_the_very_modules_come_back_with_their_hooks_and_the_present_parameters():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(inplace=True), nn.GroupNorm(2, 4))
    before, heard = list(model.modules()), []
    for module in before[1:]:
        module.register_forward_hook(lambda module, *_: heard.append(module))
    x, names = torch.randn(2, 4, 3, 3), list(model.state_dict())
    kernels.apply_to_unet(model)
    assert not any(a is b for a, b in zip(list(model.modules())[1:], before[1:], strict=True))
    assert list(model.state_dict()) == names
    model.load_state_dict({k: torch.rand(4) for k in names}, assign=True)  # other parameters
    want = model.eval()(x)
    assert not heard
    kernels.remove_from_unet(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert model[1].inplace
    assert not any(module.training for module in before)
    torch.testing.assert_close(model(x), want)
    assert [id(module) for module in heard] == [id(module) for module in before[1:]]
