"""Which images a training step sees: reshuffled epochs, as a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.noise import derive_key, uniform


class BatchOrder:
    """Batches of `batch_size` out of `n` images, epoch after reshuffled epoch.

    Batch k holds the draws k·batch_size … (k + 1)·batch_size − 1 of the endless sequence of epochs:
    every image comes once before any comes twice, and training resumes at any step. The order of
    epoch e sorts the Philox uniforms of (seed, e).
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise ValueError("there is no image to train on: images has length 0")
        self._n = n
        self._batch_size = batch_size
        self._key = torch.tensor(derive_key(seed, "batch order"))
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
