"""Puts the fused GroupNorm + SiLU into a UNet that was built with torch's own modules."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from kernels.group_norm_silu import group_norm_silu

Model = TypeVar("Model", bound=nn.Module)


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm``, with the SiLU that follows it where ``silu`` is set; the same
    parameters.
    """

    silu = False

    @classmethod
    def of(cls, norm: nn.GroupNorm, *, silu: bool) -> GroupNormSiLU:
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        fused.silu = silu
        return fused.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.silu
        )


class SiLUOfVectors(nn.Module):
    """SiLU of the time embedding; images come here with theirs already applied."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) if x.dim() == 2 else x


def _fuse(owner: nn.Module, name: str, *, silu: bool) -> None:
    setattr(owner, name, GroupNormSiLU.of(getattr(owner, name), silu=silu))


def _is_plain(owner: nn.Module, *names: str) -> bool:
    norms = [getattr(owner, name, None) for name in names]
    return all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)


def _fuse_resnet_block(block: nn.Module) -> None:
    """norm1 -> nonlinearity -> conv1 -> (+ embedding) -> norm2 -> nonlinearity -> conv2"""
    activation = getattr(block, "nonlinearity", None)
    if not (_is_plain(block, "norm1", "norm2") and isinstance(activation, nn.SiLU)):
        return
    if getattr(block, "time_embedding_norm", "default") != "default":
        return  # the embedding scales between norm2 and its SiLU
    _fuse(block, "norm1", silu=True)
    _fuse(block, "norm2", silu=True)
    block.nonlinearity = SiLUOfVectors()


def _fuse_sequence(sequence: nn.Sequential) -> None:
    for i in range(len(sequence) - 1):
        if type(sequence[i]) is nn.GroupNorm and isinstance(sequence[i + 1], nn.SiLU):
            _fuse(sequence, str(i), silu=True)
            sequence[i + 1] = nn.Identity()


def apply_to_unet(model: Model) -> Model:
    """``model`` itself, with :func:`kernels.group_norm_silu` wherever it computes GroupNorm.

    SiLU is fused in residual blocks (``norm1``, ``norm2``, ``nonlinearity``, as in diffusers), at
    the output (``conv_norm_out``, ``conv_act``) and in ``nn.Sequential``; every other affine
    GroupNorm is replaced without SiLU. Parameters, their names and the results stay; applying it
    twice is harmless.
    """
    for module in list(model.modules()):
        _fuse_resnet_block(module)
        if isinstance(module, nn.Sequential):
            _fuse_sequence(module)
        if _is_plain(module, "conv_norm_out") and isinstance(
            getattr(module, "conv_act", None), nn.SiLU
        ):
            _fuse(module, "conv_norm_out", silu=True)
            module.conv_act = nn.Identity()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.GroupNorm and child.affine:
                _fuse(module, name, silu=False)
    return model
