"""The way to the coordinator step by step, for messages that say which step fails.

gRPC answers "unavailable" whatever is wrong. Here a name is looked up, a port dialled, a proxy
asked to connect (HTTP CONNECT), and TLS spoken with this site's certificate, one after the other,
each with its own words. gRPC itself finds its proxy by the same rules.
"""

from __future__ import annotations

import base64
import os
import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

from cryptography import x509

from silo.errors import SiloError
from silo.files import write_file

_SECONDS = 10.0
_LARGEST_HEAD = 16_384


class Unreachable(SiloError):
    """A step of the way that fails: `step` is name, port, proxy or tls."""

    def __init__(self, step: str, text: str) -> None:
        super().__init__(text)
        self.step = step


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy; user and password are in no repr and no message."""

    host: str
    port: int
    credentials: str = field(default="", repr=False)
    """user:password, or nothing."""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Shown:
    """What TLS showed at the end of the way."""

    expires: datetime
    begins: datetime


def parse_proxy(url: str) -> Proxy:
    """http://[user:password@]host:port. Raises ValueError, without the URL in it."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = parts.port or 3128
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise ValueError("is no proxy: write http://proxy.example.org:3128, or with user:password@")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Proxy(parts.hostname, port, f"{user}:{password}" if user else "")


def proxy_of(address: str, configured: str) -> Proxy | None:
    """The proxy that gRPC would take: site.toml's, else that of the environment, unless no_proxy
    names the coordinator. Raises Unreachable where it is no proxy."""
    url = configured or next((os.environ[v] for v in _VARIABLES if os.environ.get(v)), "")
    if not url or (not configured and _bypassed(address)):
        return None
    try:
        return parse_proxy(url)
    except ValueError as error:
        where = "[coordinator] proxy in site.toml" if configured else "https_proxy"
        raise Unreachable("proxy", f"{where} {error}") from error


_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def _bypassed(address: str) -> bool:
    """As gRPC reads it: an entry is the end of a host's name, or a network."""
    names = next((os.environ[v] for v in _EXCEPTIONS if os.environ.get(v)), "")
    host = address.rpartition(":")[0].strip("[]").lower()
    entries = [entry.strip().lower() for entry in names.split(",")]
    return any(entry and (host.endswith(entry) or _in_network(host, entry)) for entry in entries)


def _in_network(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False


def dial(address: str, proxy: Proxy | None) -> socket.socket:
    """A connection to the coordinator's port, through the proxy if there is one.

    Raises Unreachable.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    first, at = (proxy.host, proxy.port) if proxy else (host, int(port))
    try:
        socket.getaddrinfo(first, at, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        what = f"the proxy's name {first!r}" if proxy else f"the study centre's name {first!r}"
        raise Unreachable(
            "name",
            f"{what} has no address here ({error.strerror}): check it, and "
            "the name server of this machine",
        ) from error
    try:
        plain = socket.create_connection((first, at), timeout=_SECONDS)
    except OSError as error:
        why = error.strerror or str(error)
        if proxy:
            raise Unreachable(
                "proxy", f"the proxy {proxy.address} cannot be reached ({why})"
            ) from error
        raise Unreachable(
            "port",
            f"{address} cannot be reached ({why}): check the network, the firewall's rule for "
            "outgoing connections, and that the study centre's service runs",
        ) from error
    if proxy:
        try:
            _connect(plain, proxy, f"{host}:{port}")
        except BaseException:
            plain.close()
            raise
    return plain


def _connect(plain: socket.socket, proxy: Proxy, address: str) -> None:
    head = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
    if proxy.credentials:
        token = base64.b64encode(proxy.credentials.encode()).decode()
        head += f"Proxy-Authorization: Basic {token}\r\n"
    try:
        plain.sendall(f"{head}\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < _LARGEST_HEAD:
            part = plain.recv(1)  # no byte of what comes after the head
            if not part:
                break
            answer += part
    except OSError as error:
        raise Unreachable("proxy", f"the proxy {proxy.address} does not answer") from error
    words = answer.split(b"\r\n")[0].decode("latin-1").split()
    code = words[1] if len(words) > 1 and words[0].startswith("HTTP/") else ""
    if code == "407":
        given = "does not take the name and password given" if proxy.credentials else "wants a name"
        raise Unreachable(
            "proxy",
            f"the proxy {proxy.address} {given} (407): write [coordinator] proxy = "
            '"http://user:password@host:port" in site.toml',
        )
    if not code.startswith("2"):
        shown = f"says {code}" if code.isdigit() else "does not speak HTTP"
        raise Unreachable(
            "proxy",
            f"the proxy {proxy.address} {shown} when asked for {address}: have it allow CONNECT to "
            "that address",
        )


def shake_hands(
    plain: socket.socket, address: str, authority: bytes, key: bytes, certificate: bytes
) -> Shown:
    """TLS with this site's certificate, as gRPC speaks it; closes the connection.

    Raises Unreachable.
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        with TemporaryDirectory() as folder, plain:
            context = _context(Path(folder), authority, key, certificate)
            with context.wrap_socket(plain, server_hostname=host) as secure:
                shown = x509.load_der_x509_certificate(secure.getpeercert(True) or b"")
                secure.settimeout(1.0)
                _read_refusal(secure)
                return Shown(shown.not_valid_after_utc, shown.not_valid_before_utc)
    except ssl.SSLCertVerificationError as error:
        raise Unreachable("tls", _distrusted(address, error)) from error
    except ssl.SSLError as error:
        raise Unreachable(
            "tls", f"{address} refuses this site's certificate ({error.reason})"
        ) from error
    except OSError as error:
        why = error.strerror or str(error) or "closed"
        raise Unreachable(
            "tls", f"{address} cannot be reached ({why}): something on the way ends the connection"
        ) from error


def _read_refusal(secure: ssl.SSLSocket) -> None:
    try:
        secure.recv(1)  # with TLS 1.3 a refused client certificate shows only here
    except TimeoutError:
        return


def _distrusted(address: str, error: ssl.SSLCertVerificationError) -> str:
    if "expired" in error.verify_message or "not yet valid" in error.verify_message:
        return (
            f"the certificate of {address} does not hold today, {datetime.now(UTC):%Y-%m-%d %H:%M} "
            f"UTC ({error.verify_message}): set this machine's clock, or tell the study centre"
        )
    return (
        f"{address} shows a certificate of another authority or for another name "
        f"({error.verify_message}): the address may belong to someone else now, or a firewall "
        "opens the connection; ask the study centre"
    )


def _context(folder: Path, authority: bytes, key: bytes, certificate: bytes) -> ssl.SSLContext:
    # The ssl module reads client certificates from files only; the folder is gone right after.
    context = ssl.create_default_context(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    both = folder / "client.pem"
    write_file(both, key + certificate)
    context.load_cert_chain(both)
    return context
