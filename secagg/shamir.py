"""Shamir secret sharing (CACM 22(11), 1979) of 32-byte secrets modulo p = 2^256 + 297.

p is the smallest prime above 2^256, so every 32-byte string is a field element. A share is the
value f(x) of a random polynomial of degree t − 1 with f(0) = secret, at x = roster index ≥ 1,
as 33 big-endian bytes. Any t shares give the secret; t − 1 say nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secagg.errors import MalformedMessage
from secagg.primitives import SECRET_BYTES, Entropy, Secret

PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(secret: Secret, threshold: int, at: Iterable[int], entropy: Entropy) -> dict[int, Secret]:
    """Shares of `secret` at the roster indices `at`, any `threshold` of which give it back."""
    polynomial = [int.from_bytes(secret.reveal(), "big")]
    polynomial += [_field_element(entropy) for _ in range(threshold - 1)]
    return {x: Secret(_evaluate(polynomial, x).to_bytes(SHARE_BYTES, "big")) for x in at}


def combine(shares: Mapping[int, Secret]) -> Secret:
    """f(0) by Lagrange interpolation through all of `shares`: pass exactly the threshold.

    Raises `MalformedMessage` where a share is no field element or the result is no 32-byte secret.
    """
    values = {x: parse_share(share) for x, share in shares.items()}
    total = 0
    for x, y in values.items():
        numerator = denominator = 1
        for other in values:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        total = (total + y * numerator * pow(denominator, -1, PRIME)) % PRIME
    if total >= 2**256:
        raise MalformedMessage("the shares do not lie on one polynomial")
    return Secret(total.to_bytes(SECRET_BYTES, "big"))


def parse_share(share: Secret) -> int:
    raw = share.reveal()
    value = int.from_bytes(raw, "big")
    if len(raw) != SHARE_BYTES or value >= PRIME:
        raise MalformedMessage("a share is not a field element of 33 bytes")
    return value


def _field_element(entropy: Entropy) -> int:
    # Rejection keeps the draw uniform: 257 random bits fall below p with probability 1/2.
    while True:
        value = int.from_bytes(entropy(SHARE_BYTES), "big") & ((1 << 257) - 1)
        if value < PRIME:
            return value


def _evaluate(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
