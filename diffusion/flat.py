"""A model's parameters and gradients as views of two flat buffers.

The optimiser is then one pass over memory, the gradient norm one reduction, and the exchange
between several GPUs of a site one all-reduce.
"""

from __future__ import annotations

import torch
from torch import nn

from diffusion.model import Vector, join_vector, parameters, split_vector

_ALIGNMENT = 64  # elements: every parameter starts on a 256-byte boundary, what GPU kernels like


class FlatParameters:
    """Moves the parameters of a model, which keep shapes and memory layout, into `values`.

    Further buffers of the same form (moments, averages, anchors) come from `buffer`; the elements
    between two parameters are zero in all of them and stay zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = parameters(model)
        self._offsets = []
        end = 0
        for parameter in self._parameters:
            self._offsets.append(end)
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self._length = end
        self.values = self.buffer([p.detach() for p in self._parameters])
        self.gradient = self.buffer()
        pairs = zip(self._views(self.values), self._views(self.gradient), strict=True)
        for parameter, (value, gradient) in zip(self._parameters, pairs, strict=True):
            parameter.data, parameter.grad = value, gradient

    def buffer(self, content: Vector | list[torch.Tensor] | None = None) -> torch.Tensor:
        """A float32 buffer on the model's device: zero, or holding a vector as in `to_vector`."""
        made = torch.zeros(self._length, device=self._parameters[0].device)
        if content is not None:
            parts = content if isinstance(content, list) else split_vector(self._model, content)
            for view, part in zip(self._views(made), parts, strict=True):
                view.copy_(part)
        return made

    def vector(self, buffer: torch.Tensor) -> Vector:
        """The content of a buffer, in the order of `parameter_layout`."""
        return join_vector(self._views(buffer))

    def release(self) -> None:
        """Give every parameter storage of its own again, with the values trained so far."""
        for parameter in self._parameters:
            parameter.data, parameter.grad = parameter.data.clone(), None

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [
            buffer.as_strided(parameter.shape, parameter.stride(), offset)
            for parameter, offset in zip(self._parameters, self._offsets, strict=True)
        ]
