"""Which images a training step sees: reshuffled epochs, as a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.labels import Labels
from diffusion.spec import shared_rows
from kernels.noise import derive_key, uniform

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Shared:
    """Images that take a fixed part of every batch, beside one's own."""

    images: Images
    """uint8 (n, c, h, w)."""
    labels: Labels | None
    """int64 (n,), for a conditional model."""
    part: float
    """Of a batch, above 0 and below 1; rounded to whole images, and one is always one's own."""


class Batches:
    """Batch k: one's own images, then the shared ones, each in a `BatchOrder` of their own."""

    def __init__(
        self,
        images: Images,
        labels: Labels | None,
        shared: Shared | None,
        batch_size: int,
        seed: int,
    ) -> None:
        taken = 0 if shared is None else shared_rows(shared.part, batch_size)
        self._size = batch_size
        self._sets = [(images, labels, BatchOrder(len(images), batch_size - taken, seed))]
        if shared is not None and taken:
            order = BatchOrder(len(shared.images), taken, seed, "shared batch order")
            self._sets.append((shared.images, shared.labels, order))

    def batch(self, step: int, rows: slice) -> tuple[Images, Labels | None]:
        """Those images of batch `step` that are in `rows`, and their labels where there are any."""
        images: list[Images] = []
        labels: list[Labels] = []
        begin = 0
        for own, known, order in self._sets:
            indices = order.indices(step)
            end = begin + len(indices)
            chosen = indices[[row - begin for row in range(self._size)[rows] if begin <= row < end]]
            begin = end
            images.append(own[chosen])
            if known is not None:
                labels.append(known[chosen])
        return np.concatenate(images), np.concatenate(labels) if labels else None


class BatchOrder:
    """Batches of `batch_size` out of `n` images, epoch after reshuffled epoch.

    Batch k holds the draws k·batch_size … (k + 1)·batch_size − 1 of the endless sequence of epochs:
    every image comes once before any comes twice, and training resumes at any step. The order of
    epoch e sorts the Philox uniforms of (seed, e); orders of different names differ.
    """

    def __init__(self, n: int, batch_size: int, seed: int, name: str = "batch order") -> None:
        if n < 1:
            raise ValueError("there is no image to train on: images has length 0")
        self._n = n
        self._batch_size = batch_size
        self._key = torch.tensor(derive_key(seed, name))
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Image numbers of batch `step`: int64 of shape (batch_size,)."""
        taken: list[NDArray[np.int64]] = []
        position, end = step * self._batch_size, (step + 1) * self._batch_size
        while position < end:
            epoch, offset = divmod(position, self._n)
            part = self._order_of(epoch)[offset : offset + end - position]
            taken.append(part)
            position += len(part)
        return np.concatenate(taken)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            sample_id = torch.tensor([epoch])
            step = torch.zeros(1, dtype=torch.int64)
            draws = uniform((1, self._n), key=self._key, sample_id=sample_id, step=step)[0]
            self._order = np.argsort(draws.numpy(), kind="stable")
            self._epoch = epoch
        return self._order
