"""Pickles as Python 2 wrote them, which Python 3 cannot write: CIFAR's, of protocol 2."""

from __future__ import annotations

import struct
from itertools import count
from typing import Any

import numpy as np


def python_2(value: Any) -> bytes:
    """Of dicts, lists, numbers, strings and uint8 arrays."""
    numbers = count(1)

    def put(content: bytes) -> bytes:
        n = next(numbers)
        return content + (b"q" + bytes([n]) if n < 256 else b"r" + struct.pack("<I", n))

    def text(value: bytes) -> bytes:
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + (
            value
        )

    def write(value: Any) -> bytes:
        match value:
            case int():
                return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
            case str():
                return put(text(value.encode("latin-1")))
            case list():
                return put(b"]") + b"(" + b"".join(map(write, value)) + b"e"
            case dict():
                items = b"".join(write(key) + write(item) for key, item in value.items())
                return put(b"}") + b"(" + items + b"u"
        called = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n")
        called += put(b"K\x00\x85") + put(b"U\x01b") + put(b"\x87") + put(b"R")
        dtype = put(b"cnumpy\ndtype\n") + put(b"U\x02u1") + b"K\x00K\x01" + put(b"\x87") + put(b"R")
        state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
        dtype += put(state + b"t") + b"b"
        shape = put(b"".join(map(write, value.shape)) + b"\x86")
        by_columns = b"\x89" if value.flags.c_contiguous else b"\x88"
        content = put(text(value.tobytes("A")))
        return called + put(b"(K\x01" + shape + dtype + by_columns + content + b"t") + b"b"

    return b"\x80\x02" + write(value) + b"."


def cifar_batch(images: np.ndarray[Any, Any], labels: list[int], fine: str = "") -> dict[str, Any]:
    """What a published batch of images uint8 (n, 3, 32, 32) holds."""
    names = [f"leptodactylus_pentadactylus_s_{n:06}.png" for n in range(len(images))]
    batch = {"batch_label": "training batch 1 of 5", f"{fine}labels": labels}
    coarse = {"coarse_labels": [0] * len(images)} if fine else {}
    return {**batch, **coarse, "data": images.reshape(len(images), -1), "filenames": names}
