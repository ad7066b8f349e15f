"""Puts the fused GroupNorm + SiLU into a UNet that was built with torch's own modules."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import Tensor, nn

from kernels.group_norm_silu import group_norm_silu

Model = TypeVar("Model", bound=nn.Module)


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm``, with the SiLU that follows it where ``silu`` is set; the same
    parameters.
    """

    silu = False
    replaced: tuple[nn.GroupNorm, ...] = ()  # a tuple: a module would add names to the state

    @classmethod
    def of(cls, norm: nn.GroupNorm, *, silu: bool) -> GroupNormSiLU:
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        fused.silu, fused.replaced = silu, (norm,)
        return fused.train(norm.training)

    def given_back(self) -> nn.GroupNorm:
        """The module that stood here, with the parameters that this one has now."""
        (norm,) = self.replaced
        norm.weight, norm.bias = self.weight, self.bias
        return norm.train(self.training)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias,
            eps=self.eps, silu=self.silu, scale=scale, shift=shift,
        )  # fmt: skip


class _InPlaceOfSiLU(nn.Module):
    def __init__(self, replaced: nn.SiLU) -> None:
        super().__init__()
        self.replaced = (replaced,)
        self.train(replaced.training)

    def given_back(self) -> nn.SiLU:
        (silu,) = self.replaced
        return silu.train(self.training)


class SiLUInTheNorm(_InPlaceOfSiLU, nn.Identity):
    """Stands where a SiLU stood that the norm before it now applies."""


class SiLUOfVectors(_InPlaceOfSiLU):
    """SiLU of the time embedding, (B, C); images come here with theirs already applied."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) if x.dim() == 2 else x


def _fuse(owner: nn.Module, name: str, *, silu: bool) -> None:
    setattr(owner, name, GroupNormSiLU.of(getattr(owner, name), silu=silu))


def _is_plain(owner: nn.Module, *names: str) -> bool:
    norms = [getattr(owner, name, None) for name in names]
    return all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)


def _is_resnet_block(module: nn.Module) -> bool:
    """By name, since diffusers may not be there. Other blocks with the same attributes send other
    things through their SiLU: ``TemporalResnetBlock`` an embedding per frame.
    """
    return any(base.__name__ == "ResnetBlock2D" for base in type(module).__mro__)


def _fuse_resnet_block(block: nn.Module) -> None:
    """norm1 -> nonlinearity -> conv1 -> (+ embedding) -> norm2 -> nonlinearity -> conv2"""
    activation = getattr(block, "nonlinearity", None)
    if not (_is_resnet_block(block) and isinstance(activation, nn.SiLU)):
        return
    if not _is_plain(block, "norm1", "norm2"):
        return
    embedding = getattr(block, "time_embedding_norm", "default")
    scale_shift = embedding == "scale_shift" and getattr(block, "time_emb_proj", None) is not None
    if scale_shift and not getattr(block, "skip_time_act", False):
        # Not a bound method: that is pickled as the name of an attribute, which it is not.
        block.forward = functools.partial(_scale_shift_forward, block)
    elif embedding != "default":
        return  # the embedding does something else between norm2 and its SiLU
    _fuse(block, "norm1", silu=True)
    _fuse(block, "norm2", silu=True)
    block.nonlinearity = SiLUOfVectors(activation)


def _scale_shift_forward(block: Any, x: Tensor, temb: Tensor, *_: object, **__: object) -> Tensor:
    """conv1(silu(norm1(x))), then conv2(silu(norm2(.) (1 + scale) + shift)), plus the shortcut."""
    scale, shift = block.time_emb_proj(block.nonlinearity(temb)).chunk(2, dim=1)
    h = block.norm1(x)
    resize = block.downsample if block.upsample is None else block.upsample
    if resize is not None:
        x, h = resize(x), resize(h)
    h = block.conv2(block.dropout(block.norm2(block.conv1(h), scale, shift)))
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    out: Tensor = (shortcut + h) / block.output_scale_factor
    return out


def _fuse_sequence(sequence: nn.Sequential) -> None:
    for i in range(len(sequence) - 1):
        silu = sequence[i + 1]
        if type(sequence[i]) is nn.GroupNorm and isinstance(silu, nn.SiLU):
            _fuse(sequence, str(i), silu=True)
            sequence[i + 1] = SiLUInTheNorm(silu)


def apply_to_unet(model: Model) -> Model:
    """``model`` itself, with :func:`kernels.group_norm_silu` wherever it computes GroupNorm.

    SiLU is fused in the residual blocks of diffusers (``ResnetBlock2D``), with the scale and shift
    of the time embedding where the model has them between norm and SiLU
    (``resnet_time_scale_shift="scale_shift"``), at the output (``conv_norm_out``, ``conv_act``) and
    in ``nn.Sequential``; every other affine GroupNorm is replaced without SiLU. Parameters and
    their names stay; applying it twice is harmless, and :func:`remove_from_unet` takes it back. The
    modules that were replaced, and with them their hooks, rest until then. The fused
    model can be copied and pickled.

    Results differ by rounding. In float32 the output is within 1e-4 |y| + 1e-5 of what it was and a
    parameter's gradient within 1e-3 |g| + 1e-4 (1 + max |g|), on diffusers' configurations in
    ``tests/kernels/test_group_norm_silu.py``. In bfloat16 and channels_last, under autocast, output
    and gradient are as near to float32's as with torch's modules: within 0.02 of their norm.
    """
    for module in list(model.modules()):
        _fuse_resnet_block(module)
        if isinstance(module, nn.Sequential):
            _fuse_sequence(module)
        activation = getattr(module, "conv_act", None)
        if _is_plain(module, "conv_norm_out") and isinstance(activation, nn.SiLU):
            _fuse(module, "conv_norm_out", silu=True)
            module.conv_act = SiLUInTheNorm(activation)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.GroupNorm and child.affine:
                _fuse(module, name, silu=False)
    return model


def remove_from_unet(model: Model) -> Model:
    """``model`` itself with the very modules, hooks and all, that :func:`apply_to_unet` replaced;
    they get the parameters and the training mode that the model has now.
    """
    for module in list(model.modules()):
        if getattr(vars(module).get("forward"), "func", None) is _scale_shift_forward:
            del module.forward
        for name, child in list(module.named_children()):
            if isinstance(child, GroupNormSiLU | _InPlaceOfSiLU):
                setattr(module, name, child.given_back())
    return model
