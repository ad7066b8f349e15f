"""How many parameters a model spec means, counted without building it (and without torch)."""

from __future__ import annotations

from diffusion.spec import ModelSpec


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of diffusers' UNet2DModel with this spec: weights, biases and norms."""
    widths = spec.block_out_channels
    time = 4 * widths[0]
    total = _conv(spec.channels, widths[0]) + _linear(widths[0], time) + _linear(time, time)
    total += _down(spec, time) + _up(spec, time)
    middle = widths[-1]
    total += 2 * _resnet(middle, middle, time) + spec.mid_attention * _attention(middle)
    total += 2 * widths[0] + _conv(widths[0], spec.channels)
    if spec.classes is not None:
        total += (spec.classes + 1) * time
    return total


def _down(spec: ModelSpec, time: int) -> int:
    total, before = 0, spec.block_out_channels[0]
    for level, width in enumerate(spec.block_out_channels):
        for layer in range(spec.layers_per_block):
            total += _resnet(before if layer == 0 else width, width, time)
            total += spec.attention[level] * _attention(width)
        if level + 1 < len(spec.block_out_channels):
            total += _conv(width, width)
        before = width
    return total


def _up(spec: ModelSpec, time: int) -> int:
    widths = spec.block_out_channels
    total, before = 0, widths[-1]
    for level in reversed(range(len(widths))):
        width, skip_below = widths[level], widths[max(level - 1, 0)]
        for layer in range(spec.layers_per_block + 1):
            skip = skip_below if layer == spec.layers_per_block else width
            total += _resnet((before if layer == 0 else width) + skip, width, time)
            total += spec.attention[level] * _attention(width)
        if level:
            total += _conv(width, width)
        before = width
    return total


def _resnet(inside: int, outside: int, time: int) -> int:
    total = 2 * inside + _conv(inside, outside) + _linear(time, outside)
    total += 2 * outside + _conv(outside, outside)
    return total + (inside != outside) * (inside * outside + outside)


def _attention(width: int) -> int:
    return 2 * width + 4 * _linear(width, width)


def _conv(inside: int, outside: int) -> int:
    return 9 * inside * outside + outside


def _linear(inside: int, outside: int) -> int:
    return inside * outside + outside
