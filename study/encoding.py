"""A model delta as ring words and back: what a model round of `SecureSum` over Z_2^b adds up.

A sum over a ring has no fractions, no overflow bit and no second look at an addend, so a delta is
weighted, clipped and rounded such that the *wrapped* sum over any subset of the N silos decodes
to one value only. Counters travel as its tail (`study.integers`); vectors that must not be
rounded to b bits have an encoding of their own (`study.fixed_point`). `parameters()` of each are
canonical bytes that go into the session's context, so that silos which were given different
parameters make masks that do not cancel.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from study.integers import FLAGS, WORD, Field, Integers, Ring, Words, voided

_SIGNED: dict[Ring, np.dtype[Any]] = {8: np.dtype("<i1"), 16: np.dtype("<i2"), 32: np.dtype("<i4")}
_CHUNK = 3 << 14  # elements: the temporaries of one chunk stay in a core's second-level cache
_CLIP_RANGE = (2.0**-50, 2.0**50)  # keeps c/(w·S) and its inverse normal in float32

_LOSS_BITS, _LOSS_FRACTION = 40, 24  # losses up to 2^16, in steps of 2^-24
_TAIL = (Field("loss", _LOSS_BITS), Field("saturated", 40), *FLAGS)


@dataclass(frozen=True)
class Encoded:
    """One silo's contribution to a model round."""

    vector: Words
    """[length] words, to be masked."""
    residual: NDArray[np.float32]
    """[n] what `vector` leaves out of delta + residual; carried once `vector` is in the sum."""
    saturated: int
    """Elements whose magnitude exceeded their tensor's clip."""
    fault: bool
    """The delta held NaN or Inf; zeros were encoded and the old residual is kept."""


@dataclass(frozen=True)
class Decoded:
    """What the sum of a model round says."""

    mean_delta: NDArray[np.float32]
    """[n] Σ_i w_i δ_i over the silos in the sum; one that was dropped counts as δ = 0."""
    loss: float
    """Σ_i w_i loss_i over the silos in the sum."""
    saturated: int
    faults: int
    void: int
    """Silos that made the sum unreadable (`Encoding.void`): where there is one, `mean_delta`,
    `loss` and `saturated` are zero, and nobody knows what they were."""


@dataclass(frozen=True)
class Encoding:
    """A weighted, clipped, stochastically rounded model delta in Z_2^b, and its tail of counters.

    With counts ñ_i and w_i = ñ_i / Σñ, silo i encodes element e of tensor l as

        q = stochastic_round(w_i · clip(δ_e, −c_l, c_l) / c_l · S)  mod 2^b,    S = 2^(b−1) − 1 − N
        mean δ_e = signed(Σ_i q) · c_l / S

    The weights are a convex combination, so |Σ_i w_i clip(δ)/c · S| ≤ S whatever the number of
    silos, and each silo's rounding adds less than one: the N units held back keep the signed sum
    from wrapping. Stochastic rounding is unbiased; what was clipped or rounded away is handed
    back as a residual (error feedback, arXiv 1901.09847).

    Silo i rounds ⌊x_i + u_i⌋ with a u_i that is uniform in [0, 1), but all of them are made from
    one u (correlated quantisation, arXiv 2203.04925): u_i = u ⊕ c_i on its bits, with the points
    c_1, c_3, … of van der Corput's sequence and their complements between them. With x_i of any
    fraction ⌊x_i + u_i⌋ − x_i is u_i less something uniform, and each pair of u_i adds up to a
    constant: the variance of the sum is N/12 (for odd N, (N + 1)/12), not N/6.
    """

    ring: Ring
    silos: int
    """N, the pinned roster (not those who showed up)."""
    total_count: int
    """Σñ over the roster, from the census."""
    sizes: tuple[int, ...]
    """Elements of each tensor, in the order of the flat vector."""
    clips: tuple[float, ...]
    """c_l of each tensor: float32 values."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(
                f"silos = {self.silos} leave no room in words of {self.ring} bits: use a wider ring"
            )
        if len(self.sizes) != len(self.clips) or not self.sizes or min(self.sizes) < 1:
            raise ValueError(
                f"{len(self.sizes)} sizes and {len(self.clips)} clips: one of each per tensor, ≥ 1"
            )
        low, high = _CLIP_RANGE
        for clip in self.clips:
            if not low <= clip <= high or float(np.float32(clip)) != clip:
                raise ValueError(f"clip = {clip!r} is no float32 between {low} and {high}")
        if self.total_count < 1:
            raise ValueError(f"total_count = {self.total_count}: the census counted no sample")

    @property
    def scale(self) -> int:
        """S: the largest magnitude of the unrounded sum, in units of the last place."""
        return (1 << self.ring - 1) - 1 - self.silos

    @property
    def tail(self) -> Integers:
        """The encoding of loss, saturated elements, faults and void."""
        return Integers(self.ring, self.silos, _TAIL)

    @property
    def length(self) -> int:
        """Words in the encoded vector: n for the delta, then the tail."""
        return sum(self.sizes) + self.tail.length

    def parameters(self) -> bytes:
        """Canonical bytes; different for any two encodings that differ in anything."""
        return b"".join(
            [
                b"concilium/delta/1",
                struct.pack("<BIQI", self.ring, self.silos, self.total_count, len(self.sizes)),
                np.array(self.sizes, dtype="<u8").tobytes(),
                np.array(self.clips, dtype="<f4").tobytes(),
                self.tail.parameters(),
            ]
        )

    def zeros(self) -> Words:
        """What a silo that rests in a round contributes: an unchanged model, counters at zero."""
        return np.zeros(self.length, dtype=WORD[self.ring])

    def void(self, draw: Callable[[int], bytes]) -> Words:
        """What a silo contributes that will not let this sum be read (`study.integers.voided`)."""
        return voided(self.ring, self.silos, self.length, draw)

    def encode(
        self,
        delta: NDArray[np.float32],
        residual: NDArray[np.float32],
        *,
        count: int,
        loss: float,
        key: bytes,
        silo: int = 1,
        consume: bool = False,
    ) -> Encoded:
        """Encode delta + residual (both float32 [n]) for a silo with coarse count ñ_i = `count`.

        `key` is 32 bytes, the same for all silos of a sum and different ones for each sum: u is a
        function of it (ChaCha20, RFC 8439). `silo` is i, the roster index, 1 … N. No secret rests
        on either.
        `loss` enters the tail weighted by w_i, in steps of 2^-24, limited to [0, 2^16). `residual`
        is not changed: a caller whose vector was dropped from the sum goes on with the one it
        already has. With `consume` the new residual takes the memory of `delta`, whose values are
        lost; else `delta` is not changed either.

        A delta (or loss) with NaN or Inf gives zeros with the fault counter at 1.
        Raises ValueError for wrong shapes or dtypes and for a count or silo out of range.
        """
        n = sum(self.sizes)
        for name, array in (("delta", delta), ("residual", residual)):
            if array.shape != (n,) or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not float32[{n}]")
        if not 1 <= count <= self.total_count:
            raise ValueError(
                f"count = {count} is outside 1 … {self.total_count}, the census' total"
            )
        if not 1 <= silo <= self.silos:
            raise ValueError(f"silo = {silo} is outside 1 … {self.silos}")
        vector = np.empty(self.length, dtype=WORD[self.ring])
        carried = delta if consume else np.empty(n, dtype=np.float32)
        words = vector[:n].view(_SIGNED[self.ring])
        dither = _Dither(key, self._real, silo)
        saturated = self._round(delta, residual, words, carried, count=count, random=dither)
        weighted = loss * count / self.total_count
        if saturated is None or not math.isfinite(weighted):
            fault = self.zeros()
            fault[n:] = self.tail.encode({"loss": 0, "saturated": 0, "faults": 1, "void": 0})
            return Encoded(fault, residual, 0, True)
        steps = round(min(max(weighted, 0.0), 2.0**16) * 2**_LOSS_FRACTION)
        steps = min(steps, (1 << _LOSS_BITS) - 1)
        counters = {"loss": steps, "saturated": saturated, "faults": 0, "void": 0}
        vector[n:] = self.tail.encode(counters)
        return Encoded(vector, carried, saturated, False)

    def decode(self, total: Words) -> Decoded:
        """Mean delta and counters, from the wrapped sum [length] of at most N encoded vectors."""
        n, real = sum(self.sizes), self._real
        if total.shape != (self.length,) or total.dtype != WORD[self.ring]:
            raise ValueError(
                f"sum is {total.dtype}{list(total.shape)}, not {WORD[self.ring]}[{self.length}]"
            )
        tail = self.tail.decode(total[n:])
        if tail["void"]:
            return Decoded(np.zeros(n, np.float32), 0.0, 0, tail["faults"], tail["void"])
        words = total[:n].view(_SIGNED[self.ring])
        mean = np.empty(n, dtype=np.float32)
        unit = np.array([[clip / self.scale for clip in self.clips]], dtype=real)
        value = np.empty(_CHUNK, dtype=real)
        for at, (scale,) in self._chunks(unit):
            y = value[: at.stop - at.start]
            np.copyto(y, words[at])
            np.multiply(y, scale, out=mean[at], casting="same_kind")
        loss = tail["loss"] / 2**_LOSS_FRACTION
        return Decoded(mean, loss, tail["saturated"], tail["faults"], 0)

    def _round(
        self,
        delta: NDArray[np.float32],
        residual: NDArray[np.float32],
        words: NDArray[np.signedinteger[Any]],
        carried: NDArray[np.float32],
        *,
        count: int,
        random: _Dither,
    ) -> int | None:
        """Fill `words` and `carried`; how many were clipped, None where one was not finite."""
        real, share = self._real, count * self.scale / self.total_count
        limit = _limit(share, -(-count * self.scale // self.total_count), real)
        scales = np.array(
            [[share / clip for clip in self.clips], [clip / share for clip in self.clips]],
            dtype=real,
        )  # δ → q, and back
        buffers = np.empty((2, _CHUNK), dtype=real)
        in_place = real is np.float32  # then the sum needs no memory but the residual's
        saturated = 0
        with np.errstate(over="ignore", invalid="ignore"):
            for at, (up, down) in self._chunks(scales):
                wide, q = buffers[:, : at.stop - at.start]
                wanted = carried[at] if in_place else wide
                np.add(delta[at], residual[at], out=wanted)
                np.multiply(wanted, up, out=q)
                high, low = float(np.maximum.reduce(q)), float(np.minimum.reduce(q))
                if not math.isfinite(high - low) and not np.isfinite(wanted).all():
                    return None
                if high > limit or low < -limit:
                    saturated += int(np.count_nonzero(np.abs(q) > share * (1 + 1e-6)))
                    np.clip(q, -limit, limit, out=q)
                q += random.next(len(q))
                np.floor(q, out=q)
                np.copyto(words[at], q, casting="unsafe")
                q *= down
                np.subtract(wanted, q, out=carried[at], casting="same_kind")
        return saturated

    @property
    def _real(self) -> type[np.float32] | type[np.float64]:
        return np.float64 if self.ring == 32 else np.float32

    def _chunks(self, per_tensor: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Slices of the flat vector, and the columns of `per_tensor` [rows, tensors] spread over
        their elements: [rows, elements], or [rows] where the slice is within one tensor."""
        ends = list(accumulate(self.sizes))
        n, tensor = ends[-1], 0
        spread = np.empty((len(per_tensor), _CHUNK), dtype=per_tensor.dtype)
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            while ends[tensor] <= start:
                tensor += 1
            if stop <= ends[tensor]:
                yield slice(start, stop), per_tensor[:, tensor]
                continue
            inside, low = tensor, start
            while low < stop:
                high = min(ends[inside], stop)
                spread[:, low - start : high - start] = per_tensor[:, inside, None]
                inside, low = inside + 1, high
            yield slice(start, stop), spread[:, : stop - start]


class _Dither:
    """Uniform multiples of 2^-16 (float32) or 2^-32 (float64) in [0, 1): ChaCha20 ⊕ c of `silo`."""

    def __init__(self, key: bytes, real: type[np.float32] | type[np.float64], silo: int) -> None:
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._raw = np.empty(_CHUNK, dtype="<u2" if real is np.float32 else "<u4")
        bits = 8 * self._raw.itemsize
        point = int(f"{(silo - 1) // 2:0{bits}b}"[::-1], 2)
        point = point if silo % 2 else point ^ (1 << bits) - 1
        # Encrypting it adds it to the keystream, at no cost.
        self._plain = np.full(_CHUNK, point, dtype=self._raw.dtype).tobytes()
        self._step = real(2.0**-bits)
        self._out = np.empty(_CHUNK, dtype=real)

    def next(self, n: int) -> NDArray[Any]:
        self._stream.update_into(self._plain, self._raw.data.cast("B"))
        np.copyto(self._out, self._raw)  # casting on the way into multiply would take twice as long
        self._out *= self._step
        return self._out[:n]


def _limit(share: float, most: int, real: type[Any]) -> Any:
    """The largest x ≤ share whose floor(x + u) is at most `most` = ceil(share) for every u < 1.

    In exact arithmetic that is `share` itself; in float32 x + u can round up across an integer.
    """
    x, u = real(share), real(1 - 2.0 ** (-16 if real is np.float32 else -32))
    while x > share or np.floor(x + u) > most:
        x = np.nextafter(x, real(0))
    return x


def next_clips(
    mean_delta: NDArray[np.float32],
    encoding: Encoding,
    *,
    parts: int = 1,
    factor: float | None = None,
    reopen: float = 3.0,
    level: float = 0.5,
    shrink: float = 0.25,
) -> tuple[float, ...]:
    """Clips of the next round from the aggregate of this one: public in, public out.

        m_l  = max |mean δ_e|, e in tensor l
        c_l' = max(f_l · max(m_l, level · max_k m_k), shrink · c_l)
        f_l  = reopen where m_l > 0.9 c_l, else factor

    A maximum and not a quantile, since an element that exceeds its clip in every round would pile
    up residual for ever, and since a maximum is exact: all who compute this get the same bits.
    `factor` is room for silos whose delta is larger than the mean: towards the end of training,
    when silos agree less, theirs grow to 1.8 times the last mean's largest, and with a factor of
    1.5 a few clipped elements then outweighed all rounding. The rounding error is proportional to
    it (`benchmarks/encoding.py`), but words of 32 bits have room: there it is 8 by default, else 2.
    `reopen` is the least rate at which a clip opens again that cuts off the mean itself. `level`
    keeps small tensors, where silos tend to cancel one another, from being
    clipped by their mean: AdamW moves all tensors about alike, so it costs few bits. `shrink` keeps
    a round of faults, whose mean is zero, from closing the clips.
    `mean_delta` is float32 [n]; where it consists of several `parts` of the model's size, each has
    a largest m_k of its own.
    """
    if factor is None:
        factor = 8.0 if encoding.ring == 32 else 2.0
    starts = [0, *accumulate(encoding.sizes)][:-1]
    largest = np.maximum(
        np.maximum.reduceat(mean_delta, starts), -np.minimum.reduceat(mean_delta, starts)
    ).astype(np.float64)
    before = np.array(encoding.clips)
    factors = np.where(largest > 0.9 * before, max(reopen, factor), factor)
    of_part = largest.reshape(parts, -1).max(axis=1)
    wanted = factors * np.maximum(largest, level * np.repeat(of_part, len(largest) // parts))
    wanted = np.maximum(wanted, shrink * before)
    clips = np.clip(wanted, *_CLIP_RANGE).astype(np.float32)
    return tuple(float(clip) for clip in clips)
