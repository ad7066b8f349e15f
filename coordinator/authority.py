"""The study centre's certificate authority: it says who a TLS peer is, and nothing else.

Certificates are ECDSA over P-256 (BoringSSL, which gRPC speaks TLS with, has no Ed25519 there).
Who somebody is stands in a URI SAN:

    concilium://silo/<name>                     an institution's agent
    concilium://invitation/<name>/<token id>    the bearer of an invitation; may ask to join

What makes a sum safe does not rest on this: silos sign with identity keys of their own, which
the sites compare by phone.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator import failpoints
from study.invitation import Invitation

SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_URI = re.compile(rf"concilium://(?:silo/({SITE_NAME})|invitation/({SITE_NAME})/([0-9a-f]{{32}}))")
_AUTHORITY_DAYS, _SERVER_DAYS = 3650, 90
# Clocks of hospitals are not always right; a certificate is good from a little before it is made.
_CLOCK_SKEW = timedelta(minutes=10)

_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


class AuthorityError(Exception):
    """The authority cannot do what it was asked; the text says why, and what to do."""


@dataclass(frozen=True)
class Peer:
    """Who a verified certificate speaks for."""

    site: str
    token: str | None
    """The id of the invitation, or None for an enrolled silo."""
    serial: str


@dataclass(frozen=True)
class Issued:
    """A certificate that was just signed."""

    pem: bytes
    serial: str
    expires: datetime


class Authority:
    """The key and certificate in `folder`; made by `create`, read by `load`."""

    def __init__(
        self, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> None:
        self._folder, self._key, self.certificate = folder, key, certificate
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, now: datetime | None = None) -> Authority:
        """Raises AuthorityError where there is one already: all silos trust it."""
        if (folder / "ca.key").exists():
            raise AuthorityError(f"{folder} holds an authority already; silos trust it, keep it")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Concilium authority")
        builder = _builder(name, name, key.public_key(), now, timedelta(days=_AUTHORITY_DAYS))
        usage = _usage(sign_certificates=True)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        _write_private(folder / "ca.key", _key_pem(key))
        (folder / "ca.pem").write_bytes(_pem(certificate))
        return cls(folder, key, certificate)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        try:
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        except FileNotFoundError as error:
            raise AuthorityError(
                f"{error.filename} is missing: run `concilium coordinator init`, or restore the "
                "folder from the backup that holds it"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise AuthorityError(f"{folder / 'ca.key'} is not an ECDSA key; restore the backup")
        return cls(folder, key, certificate)

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, as the operator and the sites compare it."""
        return ":".join(f"{byte:02X}" for byte in self.certificate.fingerprint(hashes.SHA256()))

    def server_credentials(self, host: str, now: datetime | None = None) -> tuple[bytes, bytes]:
        """(key, certificate) of the server, both PEM, made anew after two thirds of its life or
        when it is for another host. May be called from any thread."""
        file = self._folder / "server.pem"  # both in one file: they can never be of different age
        with self._lock:
            if file.exists():
                content = file.read_bytes()
                certificate = x509.load_pem_x509_certificate(content)
                names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
                age = (now or datetime.now(UTC)) - certificate.not_valid_before_utc
                if age < timedelta(days=_SERVER_DAYS) * 2 / 3 and names.value == _host(host):
                    key_pem, _, _ = content.partition(b"-----BEGIN CERTIFICATE")
                    return key_pem, _pem(certificate)
            key, life = ec.generate_private_key(ec.SECP256R1()), timedelta(days=_SERVER_DAYS)
            issued = self._issue(host, key.public_key(), _host(host), _SERVER, life, now)
            _write_private(file, _key_pem(key) + issued.pem)
            return _key_pem(key), issued.pem

    def invitation(
        self, site: str, token: str, address: str, hours: float, now: datetime | None = None
    ) -> Invitation:
        """A client key and certificate that only Enrolment.Join accepts, ready to be handed on."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = _uri(f"concilium://invitation/{site}/{token}")
        issued = self._issue(site, key.public_key(), names, _CLIENT, timedelta(hours=hours), now)
        return Invitation(site, address, self.pem, issued.pem, _key_pem(key), issued.expires)

    def probe_credentials(self, now: datetime | None = None) -> tuple[bytes, bytes]:
        """(key, certificate), both PEM, for asking the service on this machine whether it is well:
        good for a minute, and it names nobody who may call anything else."""
        key, names = ec.generate_private_key(ec.SECP256R1()), _uri("concilium://probe")
        life = timedelta(minutes=1)
        issued = self._issue("probe", key.public_key(), names, _CLIENT, life, now)
        return _key_pem(key), issued.pem

    def silo_certificate(
        self,
        site: str,
        request: x509.CertificateSigningRequest,
        days: float,
        now: datetime | None = None,
    ) -> Issued:
        """A certificate over the key of a request that `parse_request` checked. What else the
        request says, names above all, is ignored: the name is the one the site was invited by."""
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - parse_request
        names = _uri(f"concilium://silo/{site}")
        return self._issue(site, key, names, _CLIENT, timedelta(days=days), now)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        life: timedelta,
        now: datetime | None,
    ) -> Issued:
        authority = self._key.public_key()
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority)
        certificate = (
            _builder(_name(name), self.certificate.subject, key, now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        serial = f"{certificate.serial_number:x}"
        return Issued(_pem(certificate), serial, certificate.not_valid_after_utc)


def parse_request(der: bytes) -> x509.CertificateSigningRequest:
    """Raises ValueError unless it is a PKCS#10 request for a P-256 key that signs itself."""
    try:
        request = x509.load_der_x509_csr(der)
        proven = request.is_signature_valid
        key = request.public_key()
    except Exception as error:
        # The parser has no single base class for what it refuses.
        raise ValueError("certificate_request is no PKCS#10 request in DER") from error
    if not proven:
        raise ValueError("certificate_request does not prove its key: its signature is wrong")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("certificate_request is for another kind of key: use ECDSA over P-256")
    return request


def peer_of(certificate_pem: bytes) -> Peer | None:
    """Who a certificate that TLS has verified speaks for; None where it names nobody of ours."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None:
        return None
    silo, invited, token = match.groups()
    return Peer(silo or invited, token, f"{certificate.serial_number:x}")


def join_fingerprint(site: str, request: bytes, identity: bytes) -> str:
    """100 bits over what a silo hands in, in groups of four letters to be read aloud."""
    fields = (site.encode(), request, identity)
    digest = hashlib.sha256(
        b"concilium/join-fingerprint/1" + b"".join(hashlib.sha256(f).digest() for f in fields)
    ).digest()
    letters = base64.b32encode(digest)[:20].decode()
    return " ".join(letters[i : i + 4] for i in range(0, 20, 4))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime | None,
    life: timedelta,
) -> x509.CertificateBuilder:
    start = (now or datetime.now(UTC)).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - min(_CLOCK_SKEW, life / 10))
        .not_valid_after(start + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _uri(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def _host(host: str) -> x509.SubjectAlternativeName:
    try:
        return x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    except ValueError:
        return x509.SubjectAlternativeName([x509.DNSName(host)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_private(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".new")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    failpoints.reach(f"before {path.name}")
    os.replace(partial, path)
    failpoints.reach(f"after {path.name}")
