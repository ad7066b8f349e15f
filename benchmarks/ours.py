"""Our side of the secure sum's benchmarks: one silo's work on a vector, and the coordinator's."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from coordinator.spool import Spool
from protos.v1 import coordination_pb2 as pb
from secagg.masking import CHUNK_BYTES, MaskKey, Vector, apply_masks
from secagg.primitives import Secret
from silo.client import CHUNK_BYTES as UPLOAD_CHUNK
from study.encoding import Encoded, Encoding
from study.integers import Ring

COUNT, TOTAL = 100, 1000
RING: Ring = 16
_GRPC_PREFIX = 5  # length and flag before each message


def sizes_of(n: int) -> tuple[int, ...]:
    """Tensors as a UNet has them: convolutions of growing width, each with three small vectors."""
    sizes: list[int] = []
    left = n
    while left:
        for width in (128, 128, 256, 256, 512, 512):
            for size in (9 * width * width, width, width, width):
                take = min(size, left)
                sizes += [take] if take else []
                left -= take
    return tuple(sizes)


def delta_of(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).normal(0, 0.01, n).astype(np.float32)


@dataclass
class Client:
    """One silo's work on a vector of n parameters for `peers` others."""

    n: int
    peers: int

    def __post_init__(self) -> None:
        self.delta = delta_of(self.n)
        self.residual = np.random.default_rng(self.n + 1).normal(0, 1e-6, self.n).astype(np.float32)
        self.fresh = self.delta.copy()
        sizes = sizes_of(self.n)
        self.encoding = Encoding(RING, self.peers + 1, TOTAL, sizes, (0.0625,) * len(sizes))
        self.keys = mask_keys(self.peers + 1)  # one a peer, and the self mask
        self.words: Vector = np.ones(self.encoding.length, dtype=np.uint16)
        self.copy = np.ones_like(self.delta)

    def encode(self) -> Encoded:
        """The delta is spent, as in a round."""
        return self.encoding.encode(
            self.fresh, self.residual, count=COUNT, loss=0.5, key=bytes(32), consume=True
        )

    def mask(self) -> None:
        apply_masks(self.words, self.keys)

    def serialise(self) -> int:
        """The vector as the messages that the client uploads; their bytes."""
        content, sent = self.words.data.cast("B"), 0
        for at in range(0, len(content), UPLOAD_CHUNK):
            data = bytes(content[at : at + UPLOAD_CHUNK])
            chunk = pb.UploadChunk(study="benchmark", session=7, offset=at, data=data)
            sent += _GRPC_PREFIX + len(chunk.SerializeToString())
        return sent

    def mask_and_serialise(self) -> None:
        self.mask()
        self.serialise()

    def everything(self) -> None:
        self.words = self.encode().vector
        self.mask_and_serialise()

    def keystream(self) -> None:
        """The bytes of all masks, made and dropped."""
        zeros, out = memoryview(bytes(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))
        streams = [_stream(key) for key in self.keys]
        for at in range(0, self.words.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, self.words.nbytes - at)
            for stream in streams:
                stream.update_into(zeros[:size], out[:size])

    def add(self) -> None:
        """As many additions as there are masks, of a chunk that stays in the cache."""
        step = CHUNK_BYTES // self.words.itemsize
        addend = np.ones(step, dtype=self.words.dtype)
        for at in range(0, self.words.size, step):
            part = self.words[at : at + step]
            for _ in self.keys:
                np.add(part, addend[: part.size], out=part)

    def memcpy(self) -> None:
        np.copyto(self.copy, self.delta)

    def on_processor(self, job: Callable[[], object]) -> float:
        """Processor seconds of the job, on a delta that was not spent."""
        np.copyto(self.fresh, self.delta)
        return on_processor(job)


def _stream(key: MaskKey) -> Any:
    return Cipher(algorithms.ChaCha20(key.key.reveal(), bytes(16)), None).encryptor()


def mask_keys(n: int) -> list[MaskKey]:
    return [MaskKey(Secret(os.urandom(32)), 1 if i % 2 else -1) for i in range(n)]


def on_processor(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


class Server:
    """A spool with the uploads of `silos` silos, of whom one more vanished after sharing keys."""

    def __init__(self, folder: pathlib.Path, n: int, silos: int) -> None:
        self._spool, self.n = Spool(folder / "spool"), n
        place = folder / "spool" / "study" / "1"
        place.mkdir(parents=True)
        # Equal bytes in one file: what a fold reads is in the page cache either way.
        words = np.random.default_rng(n).integers(0, 1 << 16, n, dtype=np.uint16)
        (place / "vector").write_bytes(words.tobytes())
        self._inputs = {silo: bytes(32) for silo in range(1, silos + 1)}
        for silo, digest in self._inputs.items():
            os.link(place / "vector", place / f"{silo}-{digest.hex()}")
        # Self masks of those in the sum, pair masks of the one that is not.
        self._keys = mask_keys(2 * silos)

    def fold(self) -> None:
        self._spool.fold("study", 1, self._inputs, RING, self.n, self._keys)
