"""Results kept under the SHA-256 of everything they depend on.

A simulation that was killed is started again and finds what it had done; runs that share a past
(the same silos from the same model with the same seed) compute it once. A folder of such results
can be deleted at any time: it costs the time to compute them anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

VERSION = 2
"""To be raised with every change that makes the same inputs give other results."""


class Memo:
    """A folder of .npz files, one per result."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, inputs: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """What `compute` gives, from the folder where it is there already.

        `inputs` is everything that the result depends on, as JSON values; large things as digests.
        A crash leaves a whole file or none.
        """
        path = self._folder / f"{digest_of(inputs)}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        arrays = compute()
        # Processes of different machines may share the folder, and have the same number.
        partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return arrays


def digest_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `inputs`, hexadecimal."""
    text = json.dumps({"version": VERSION, **inputs}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_array(*arrays: NDArray[Any]) -> str:
    """SHA-256 of dtype, shape and bytes of arrays, hexadecimal."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
