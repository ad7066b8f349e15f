"""A second implementation of docs/secure-sum.md, from that page alone and with nothing of `secagg`.

It proves that the page suffices: what it computes from the fixed entropy of a vector is compared
byte for byte with what the state machines sent. HPKE is written out too (RFC 9180 §5.1, the hybrid
KEM of draft-ietf-hpke-pq), since sealing and opening are the library's in `secagg`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

LABEL = b"concilium/secure-sum/1"
P = 2**256 + 297


def u(bits: int, value: int) -> bytes:
    return value.to_bytes(bits // 8, "big")


def blob(x: bytes) -> bytes:
    return u(32, len(x)) + x


def items(xs: Iterable[bytes]) -> bytes:
    xs = list(xs)
    return u(32, len(xs)) + b"".join(xs)


def H(tag: str, *xs: bytes) -> bytes:
    return hashlib.sha256(b"".join(map(blob, (LABEL, tag.encode(), *xs)))).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, n: int = 32) -> bytes:
    """K: RFC 5869."""
    prk = hmac.digest(salt or bytes(32), secret, "sha256")
    out = block = b""
    for i in range(1, -(-n // 32) + 1):
        block = hmac.digest(prk, block + info + bytes([i]), "sha256")
        out += block
    return out[:n]


def signed(key: Ed25519PrivateKey, step: int, sender: int, ctx: bytes, body: bytes) -> bytes:
    signature = key.sign(blob(LABEL) + u(8, step) + u(16, sender) + blob(ctx) + blob(body))
    return u(8, step) + u(16, sender) + blob(body) + blob(signature)


# --- sealing


def sealing_key(
    seed: bytes, ctx: bytes, purpose: str
) -> tuple[MLKEM768PrivateKey, X25519PrivateKey, bytes]:
    """Both private halves, and the public key."""
    material = hkdf(seed, ctx, b"sealing key/" + purpose.encode(), 96)
    pq = MLKEM768PrivateKey.from_seed_bytes(material[:64])
    ec = X25519PrivateKey.from_private_bytes(material[64:])
    return pq, ec, pq.public_key().public_bytes_raw() + ec.public_key().public_bytes_raw()


def hpke_secret(pq: MLKEM768PrivateKey, ec: X25519PrivateKey, enc: bytes) -> bytes:
    """Decapsulation of MLKEM768-X25519 (KEM 0x647a, the construction of X-Wing)."""
    ss_pq = pq.decapsulate(enc[:1088])
    ss_ec = ec.exchange(X25519PublicKey.from_public_bytes(enc[1088:]))
    pk_ec = ec.public_key().public_bytes_raw()
    return hashlib.sha3_256(ss_pq + ss_ec + enc[1088:] + pk_ec + rb"\.//^\ "[:-1]).digest()


def hpke_schedule(shared: bytes, info: bytes, kem: int = 0x647A) -> tuple[bytes, bytes]:
    """Key and base nonce in base mode with HKDF-SHA256 and ChaCha20-Poly1305 (RFC 9180 §5.1)."""
    suite = b"HPKE" + u(16, kem) + u(16, 1) + u(16, 3)

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")

    def expand(prk: bytes, label: bytes, context: bytes, n: int) -> bytes:
        data = u(16, n) + b"HPKE-v1" + suite + label + context
        return hmac.digest(prk, data + b"\x01", "sha256")[:n]

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)


def hpke_open(
    pq: MLKEM768PrivateKey, ec: X25519PrivateKey, sealed: bytes, info: bytes, aad: bytes = b""
) -> bytes:
    key, nonce = hpke_schedule(hpke_secret(pq, ec, sealed[:1120]), info)
    return ChaCha20Poly1305(key).decrypt(nonce, sealed[1120:], aad)


# --- sharing and masking


def polynomial(secret: bytes, t: int, draw: Sequence[bytes]) -> tuple[list[int], int]:
    """Coefficients from 33-byte draws, rejected when ≥ p; and how many draws were used."""
    coefficients, used = [int.from_bytes(secret, "big")], 0
    while len(coefficients) < t:
        value = int.from_bytes(draw[used], "big") % 2**257
        used += 1
        if value < P:
            coefficients.append(value)
    return coefficients, used


def share(coefficients: Sequence[int], x: int) -> bytes:
    return (sum(c * pow(x, k, P) for k, c in enumerate(coefficients)) % P).to_bytes(33, "big")


def restore(shares: dict[int, bytes]) -> bytes:
    total = 0
    for x, y in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = weight * other * pow(other - x, -1, P) % P
        total += int.from_bytes(y, "big") * weight
    return (total % P).to_bytes(32, "big")


def keystream(key: bytes, ring: int, length: int) -> list[int]:
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    return elements(cipher.update(bytes(length * ring // 8)), ring)


def elements(raw: bytes, ring: int) -> list[int]:
    size = ring // 8
    return [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)]


def vector(values: Iterable[int], ring: int) -> bytes:
    return b"".join((v % 2**ring).to_bytes(ring // 8, "little") for v in values)


def added(values: Sequence[int], key: bytes, sign: int, ring: int) -> list[int]:
    return [
        (v + sign * k) % 2**ring
        for v, k in zip(values, keystream(key, ring, len(values)), strict=True)
    ]


def pair_seed(r: bytes, ctx: bytes, t1: bytes, i: int, j: int) -> bytes:
    return hkdf(r, ctx, b"pair seed" + blob(t1) + u(16, i) + u(16, j))


def pair_mask(seed: bytes, ctx: bytes, t2: bytes, i: int, j: int) -> bytes:
    low, high = min(i, j), max(i, j)
    return hkdf(seed, ctx, b"pair mask" + blob(t2) + u(16, low) + u(16, high))


def self_mask(b: bytes, ctx: bytes, t2: bytes, i: int) -> bytes:
    return hkdf(b, ctx, b"self mask" + blob(t2) + u(16, i))


def bound(tag: str, ctx: bytes, t1: bytes, i: int, j: int, *x: bytes) -> bytes:
    """info(kind, i, j) and C(kind, i, j, x)."""
    return H(tag, ctx, t1, u(16, i), u(16, j), *x)
