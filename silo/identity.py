"""The keys of an institution. They are made on its own machine and never leave it.

* *identity* (Ed25519) signs the messages of the secure sum; its public half is pinned in rosters.
* *TLS* (ECDSA P-256) is certified by the study centre's authority: it says who dials in.
* *ledger* (32 bytes) encrypts the shares that the ledger keeps between two steps of a session.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from secagg.primitives import SECRET_BYTES, Secret
from silo.errors import EnrolmentError
from silo.files import read_json, write_file
from silo.home import SiloHome

JOIN_LABEL = b"concilium/join/1"


@dataclass(frozen=True)
class Identity:
    """The three keys."""

    signing: Ed25519PrivateKey = field(repr=False)
    tls_pem: bytes = field(repr=False)
    ledger: Secret = field(repr=False)

    @property
    def public(self) -> bytes:
        """The raw Ed25519 public key (32 bytes)."""
        return self.signing.public_key().public_bytes_raw()

    def prove(self, request: bytes) -> bytes:
        """The signature that ties a certificate request to this identity."""
        return self.signing.sign(JOIN_LABEL + hashlib.sha256(request).digest())


def load_or_make_identity(home: SiloHome) -> Identity:
    """The keys in HOME/keys; those that are missing are made, those that exist are kept."""
    signing = _load_or_make(home.keys / "identity.pem", lambda: _pem(Ed25519PrivateKey.generate()))
    tls = _load_or_make(
        home.keys / "tls.pem", lambda: _pem(ec.generate_private_key(ec.SECP256R1()))
    )
    ledger = _load_or_make(home.keys / "ledger.key", lambda: os.urandom(SECRET_BYTES))
    key = serialization.load_pem_private_key(signing, None)
    if not isinstance(key, Ed25519PrivateKey) or len(ledger) != SECRET_BYTES:
        raise EnrolmentError(f"{home.keys} holds keys of another kind: restore them from a backup")
    return Identity(key, tls, Secret(ledger))


def certificate_request(home: SiloHome, identity: Identity, site: str) -> bytes:
    """The PKCS#10 request (DER), the same at every call: ECDSA signatures are random, and a
    coordinator takes a repeated request for the same one only if its bytes are."""
    path = home.certificates / "request.der"
    if path.exists():
        return path.read_bytes()
    request = build_request(identity, site)
    write_file(path, request)
    return request


def build_request(identity: Identity, site: str) -> bytes:
    """A fresh PKCS#10 request (DER) for the TLS key."""
    key = serialization.load_pem_private_key(identity.tls_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnrolmentError("keys/tls.pem is not an ECDSA key: restore it from a backup")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def join_fingerprint(site: str, request: bytes, identity: bytes) -> str:
    """100 bits over what this site hands in, in groups of four letters to be read aloud.

    Computed from what is on this machine, so that comparing it with what the study centre sees
    tells whether somebody in between put in other keys.
    """
    fields = (site.encode(), request, identity)
    parts = b"".join(hashlib.sha256(part).digest() for part in fields)
    digest = hashlib.sha256(b"concilium/join-fingerprint/1" + parts).digest()
    letters = base64.b32encode(digest)[:20].decode()
    return " ".join(letters[i : i + 4] for i in range(0, 20, 4))


@dataclass(frozen=True)
class Enrolment:
    """What an enrolled site needs to dial in."""

    site: str
    address: str
    authority_pem: bytes
    certificate_pem: bytes

    @property
    def expires(self) -> datetime:
        return self._certificate.not_valid_after_utc

    def renewal_due(self) -> datetime:
        """When two thirds of the certificate's life are over."""
        start, end = self._certificate.not_valid_before_utc, self.expires
        return start + (end - start) * 2 / 3

    def check(self, now: datetime | None = None) -> None:
        """Raises EnrolmentError for a certificate that has expired."""
        now = now or datetime.now(UTC)
        if now >= self.expires:
            raise EnrolmentError(
                f"this site's certificate expired on {self.expires:%Y-%m-%d %H:%M} UTC: ask the "
                "study centre for a new invitation and join again"
            )
        if self._certificate.not_valid_before_utc - now > timedelta(0):
            raise EnrolmentError("this site's certificate is not valid yet: set this clock right")

    @property
    def _certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate_pem)


def load_enrolment(home: SiloHome) -> Enrolment:
    """Raises EnrolmentError where this site has not joined yet."""
    stored = read_json(home.enrolment)
    certificate = home.certificates / "site.pem"
    if stored is None or not certificate.exists():
        raise EnrolmentError(
            "this site has not joined a coordinator yet: ask the study centre for an invitation "
            "and run `concilium silo join TOKEN`"
        )
    authority = (home.certificates / "authority.pem").read_bytes()
    return Enrolment(stored["site"], stored["address"], authority, certificate.read_bytes())


def _load_or_make(path: Path, make: Callable[[], bytes]) -> bytes:
    if not path.exists():
        write_file(path, make())
    return path.read_bytes()


def _pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
