"""The primitives of the secure sum, each from `cryptography`; nothing is invented here.

    H(tag, x1 … xn) = SHA-256(blob(LABEL) || blob(tag) || blob(x1) || … || blob(xn))
    K(secret, salt, info) = HKDF-SHA256 (RFC 5869)
    sealing         HPKE base mode (RFC 9180), ML-KEM-768 + X25519, HKDF-SHA256, ChaCha20-Poly1305
    signatures      Ed25519 (RFC 8032)
    keystream       ChaCha20 (RFC 8439), see `secagg.masking`

Every use has its own tag, so no hash, key or signature of one step means anything in another.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secagg.codec import blob
from secagg.errors import Reason, Refused

LABEL = b"concilium/secure-sum/1"
HASH_BYTES = 32
SECRET_BYTES = 32
SIGNATURE_BYTES = 64
MLKEM_PUBLIC_BYTES = 1184
X25519_PUBLIC_BYTES = 32
PUBLIC_KEY_BYTES = MLKEM_PUBLIC_BYTES + X25519_PUBLIC_BYTES
# What sealing adds: the encapsulated key (1088 bytes of ML-KEM, 32 of X25519) and the AEAD's tag.
SEALING_BYTES = 1088 + 32 + 16

Entropy = Callable[[int], bytes]
"""`entropy(n)` returns n unpredictable bytes: `os.urandom` in earnest, fixed bytes in vectors."""

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


class Secret:
    """Bytes that must not be printed, compared by timing, or outlive their session.

    `wipe` overwrites the buffer. It cannot reach copies that the interpreter or OpenSSL made;
    docs/secure-sum.md says how far that goes.
    """

    __slots__ = ("_bytes",)

    def __init__(self, value: bytes) -> None:
        self._bytes = bytearray(value)

    def reveal(self) -> bytes:
        return bytes(self._bytes)

    def wipe(self) -> None:
        self._bytes[:] = bytes(len(self._bytes))

    def __repr__(self) -> str:
        return f"Secret({len(self._bytes)} bytes)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._bytes, other._bytes)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> str:
        raise TypeError("a Secret is never pickled")


def digest(tag: str, *parts: bytes) -> bytes:
    """H(tag, parts): 32 bytes."""
    h = hashlib.sha256(blob(LABEL) + blob(tag.encode("ascii")))
    for part in parts:
        h.update(blob(part))
    return h.digest()


def derive(secret: Secret, salt: bytes, info: bytes, length: int = SECRET_BYTES) -> Secret:
    """K(secret, salt, info): `length` bytes of HKDF-SHA256 output."""
    hkdf = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info)
    return Secret(hkdf.derive(secret.reveal()))


class SealingKey:
    """The private half of a hybrid key pair that other silos seal to."""

    def __init__(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._key = hpke.MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    @classmethod
    def from_seed(cls, seed: Secret, context: bytes, purpose: str) -> SealingKey:
        """Both halves from one 32-byte seed: ML-KEM takes 64 derived bytes, X25519 takes 32.

        Safe because HKDF separates the two, and `context` and `purpose` separate every session
        and use: the same seed never yields one key twice.
        """
        material = derive(seed, context, b"sealing key/" + purpose.encode("ascii"), 96)
        raw = material.reveal()
        material.wipe()
        return cls(
            MLKEM768PrivateKey.from_seed_bytes(raw[:64]),
            X25519PrivateKey.from_private_bytes(raw[64:]),
        )

    def open(self, ciphertext: bytes, info: bytes) -> Secret:
        """The plaintext, or `Refused(BAD_CIPHERTEXT)` for anything not sealed to us with `info`."""
        try:
            return Secret(_SUITE.decrypt(ciphertext, self._key, info))
        except (InvalidTag, ValueError) as error:
            raise Refused(Reason.BAD_CIPHERTEXT) from error

    def __repr__(self) -> str:
        return "SealingKey()"


def seal(plaintext: Secret, public: bytes, info: bytes) -> bytes:
    """HPKE to the holder of `public`; `info` binds who seals what to whom in which session."""
    try:
        key = hpke.MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC_BYTES:]),
        )
        return _SUITE.encrypt(plaintext.reveal(), key, info)
    except ValueError as error:  # an ML-KEM key out of range, or an all-zero X25519 result
        raise Refused(Reason.BAD_KEY) from error


def usable(public: bytes) -> bool:
    """Whether one can seal to this public key at all."""
    try:
        seal(Secret(b""), public, b"")
    except Refused:
        return False
    return True


def sign(key: Ed25519PrivateKey, message: bytes) -> bytes:
    return key.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def lock(key: Secret, plaintext: Secret, bound_to: bytes, entropy: Entropy) -> bytes:
    """Authenticated encryption at rest: nonce || ChaCha20-Poly1305(plaintext, bound_to).

    The nonce is random; a ledger writes a handful of records a session, far from the 2^32 at
    which a random 96-bit nonce would need a second thought.
    """
    nonce = entropy(12)
    return nonce + ChaCha20Poly1305(key.reveal()).encrypt(nonce, plaintext.reveal(), bound_to)


def unlock(key: Secret, locked: bytes, bound_to: bytes) -> Secret:
    try:
        return Secret(ChaCha20Poly1305(key.reveal()).decrypt(locked[:12], locked[12:], bound_to))
    except (InvalidTag, ValueError) as error:
        raise Refused(Reason.KEYS_LOST, "the ledger key does not open this record") from error
