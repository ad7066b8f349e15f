"""Which images of a small public data set feature networks are trained on, and which silos get."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HOLDOUT = 297
_SEED = 20200619  # arXiv 2006.11239 appeared on 2020-06-19; any fixed number will do


def holdout_split(n: int, holdout: int = HOLDOUT) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(silo images, held-out images) as index arrays that together are a permutation of 0 … n − 1.

    The last `holdout` of the permutation train the feature network, and no silo may have them. The
    permutation sorts raw Philox words, so that it is the same with every version of numpy.

    Raises ValueError when nothing would be left for the silos.
    """
    if not 0 < holdout < n:
        raise ValueError(f"cannot hold out {holdout} of {n} images: hold out fewer")
    order = np.argsort(np.random.Philox(key=_SEED).random_raw(n), kind="stable")
    return order[:-holdout], order[-holdout:]
