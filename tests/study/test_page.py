"""The section "What is summed" of docs/secure-sum.md, written again from the page.

With nothing of `study.encoding`, `fixed_point` and `integers` it gives ring, length and encoding
digest of every quantity.
"""

from __future__ import annotations

import hashlib
import math
import struct

import pytest

from study.plan import text_digest
from study.quantity import (
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    encode_work,
    vector_of,
)

Fields = dict[str, int]
SHA = "ab" * 32


def integers(ring: int, silos: int, fields: Fields) -> tuple[int, bytes]:
    limb = ring - math.ceil(math.log2(silos))
    length = sum(math.ceil(bits / limb) for bits in fields.values())
    parameters = struct.pack("<BII", ring, silos, len(fields))
    for name, bits in fields.items():
        parameters += struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", bits)
    return length, parameters


def fixed_point(silos: int, size: int, bound: float) -> tuple[int, bytes]:
    tail, parameters = integers(32, silos, {"clipped": 40, "faults": 1, "void": 1})
    limb = 32 - math.ceil(math.log2(silos))
    head = b"concilium/fixed-point/1" + struct.pack("<IQdB", silos, size, bound, 48)
    return math.ceil(48 / limb) * size + tail, head + parameters


def delta(
    ring: int, silos: int, total: int, sizes: list[int], clips: list[float]
) -> tuple[int, bytes]:
    fields = {"loss": 40, "saturated": 40, "faults": 1, "void": 1}
    tail, parameters = integers(ring, silos, fields)
    head = b"concilium/delta/1" + struct.pack("<BIQI", ring, silos, total, len(sizes))
    head += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack(f"<{len(clips)}f", *clips)
    return sum(sizes) + tail, head + parameters


@pytest.mark.parametrize("silos", [3, 4, 5, 33, 255])
@pytest.mark.parametrize("ring", [16, 32])
def test_the_page_alone_gives_ring_length_and_encoding(ring: int, silos: int) -> None:
    d = 8
    expected: list[tuple[Work, int, tuple[int, bytes]]] = [
        (CensusWork(), 32, integers(32, silos, {"count": 40})),
        (
            MomentsWork(total_count=70, network="digits", sha256=SHA, dimension=d, bound=4.5),
            32,
            fixed_point(silos, 1 + d + d * (d + 1) // 2, 4.5),
        ),
        (TagsWork(total_count=70, images=16, slots=4096), 32, (4096, b"")),
        (ImagesWork(tags=SHA, occupied=12, record_size=65), 8, (12 * 65, b"")),
        (
            RoundWork(total_count=70, sizes=(3, 4), clips=(0.5, 0.125)),
            ring,
            delta(ring, silos, 70, [3, 4], [0.5, 0.125]),
        ),
        (
            EvaluationWork(samples=SHA, images=10, network="digits", sha256=SHA, bins=10),
            32,
            fixed_point(silos, 13, 2.0**16),
        ),
    ]
    for work, bits, (length, parameters) in expected:
        parts = hashlib.sha256(encode_work(work)).digest() + hashlib.sha256(parameters).digest()
        digest = hashlib.sha256(parts).digest()
        found = vector_of(work, silos, 16 if ring == 16 else 32)
        assert found == (bits, length, digest), work.purpose


def test_the_page_alone_gives_the_digest_of_a_plan() -> None:
    text = "[study]\nname = 'x'\n"
    assert text_digest(text) == hashlib.sha256(b"concilium/plan/1\n" + text.encode()).digest()
