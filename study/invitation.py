"""An invitation: the one-time token with which an institution's agent enters the coordinator.

One line of text that a person passes on by a channel of their own (mail, phone, paper). It holds
the coordinator's address, the authority's certificate, and a short-lived client certificate with
its key that is good for nothing but asking to join. The agent therefore knows whom it speaks to,
and is known, before the first byte of the first call.

    token = "concilium-" || base64url(zlib(version || expires || fields))

`expires` is eight bytes of seconds since 1970; each field has a length of two bytes in front. All
integers are big-endian.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime

PREFIX = "concilium-"
_VERSION = 1
_MAX_TOKEN = 16 * 1024
# A whole invitation is below two KiB; what inflates beyond this was not made by `encode`.
_MAX_CONTENT = 16 * 1024
_PEM = re.compile(r"-----BEGIN ([A-Z ]+)-----\n([A-Za-z0-9+/=\n]+)-----END \1-----\n?")
_LABELS = ("CERTIFICATE", "CERTIFICATE", "PRIVATE KEY")


class InvitationError(ValueError):
    """A token that cannot be used; the text says what to do."""


@dataclass(frozen=True)
class Invitation:
    """What a token holds. Whoever has it can ask to join as `site` until a person decides."""

    site: str
    """The name under which the institution is invited."""
    address: str
    """host:port of the coordinator, as silos dial it."""
    authority_pem: bytes
    """The certificate of the coordinator's authority: what the agent trusts."""
    certificate_pem: bytes
    """The client certificate for Enrolment.Join."""
    private_key_pem: bytes = field(repr=False)
    """Its key (PKCS#8, not encrypted)."""
    expires: datetime
    """When the client certificate ends (UTC, whole seconds)."""

    def encode(self) -> str:
        """The token. Raises ValueError where a part is not one PEM block of its kind."""
        parts = [self.site.encode(), self.address.encode()]
        pems = (self.authority_pem, self.certificate_pem, self.private_key_pem)
        parts += [_pem_to_der(pem, label) for pem, label in zip(pems, _LABELS, strict=True)]
        content = struct.pack(">BQ", _VERSION, int(self.expires.timestamp()))
        content += b"".join(struct.pack(">H", len(part)) + part for part in parts)
        return PREFIX + base64.urlsafe_b64encode(zlib.compress(content, 9)).decode().rstrip("=")

    @classmethod
    def decode(cls, token: str) -> Invitation:
        """Raises InvitationError for anything that `encode` did not write, whole.

        Blanks and line breaks, as mail programs add them, are forgiven. Whether the invitation
        has expired is left to the caller, who has a clock.
        """
        expires, parts = _parse(_unpack("".join(token.split())))
        try:
            site, address = parts[0].decode(), parts[1].decode()
            when = datetime.fromtimestamp(expires, UTC)
        except (UnicodeDecodeError, OverflowError, ValueError, OSError) as error:
            raise _damaged("its content is not an invitation") from error
        if not site or not re.fullmatch(r"\S+:[0-9]{1,5}", address):
            raise _damaged("it names no site or no address")
        authority, certificate, key = (
            _der_to_pem(der, label) for der, label in zip(parts[2:], _LABELS, strict=True)
        )
        return cls(site, address, authority, certificate, key, when)


def _unpack(token: str) -> bytes:
    if not token.startswith(PREFIX):
        raise InvitationError(
            f"this is no invitation: a token starts with '{PREFIX}'; "
            "copy the whole line that the study centre sent"
        )
    if len(token) > _MAX_TOKEN:
        raise _damaged("it is too long")
    text = token.removeprefix(PREFIX)
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        content = inflate.decompress(packed, _MAX_CONTENT)
    except (ValueError, zlib.error) as error:  # binascii.Error, and characters beyond ASCII
        raise _damaged("characters are missing or changed") from error
    # zlib's checksum is at the end of the stream: a shortened token never reaches it.
    if not inflate.eof or inflate.unused_data:
        raise _damaged("characters are missing or were added")
    return content


def _parse(content: bytes) -> tuple[int, list[bytes]]:
    try:
        version, expires = struct.unpack_from(">BQ", content)
        if version != _VERSION:
            raise InvitationError(
                f"this invitation has format {version}, this program reads format {_VERSION}: "
                "update the agent, or ask the study centre for an invitation of its version"
            )
        parts, place = [], struct.calcsize(">BQ")
        for _ in range(5):
            (size,) = struct.unpack_from(">H", content, place)
            parts.append(content[place + 2 : place + 2 + size])
            place += 2 + size
    except struct.error as error:
        raise _damaged("it ends too early") from error
    if place != len(content):
        raise _damaged("its lengths do not add up")
    return expires, parts


def _damaged(what: str) -> InvitationError:
    return InvitationError(
        f"the invitation is damaged ({what}): copy the whole line again, "
        "or ask the study centre for a new one"
    )


def _pem_to_der(pem: bytes, label: str) -> bytes:
    match = _PEM.fullmatch(pem.decode("ascii"))
    if match is None or match[1] != label:
        raise ValueError(f"not one PEM block of a {label}")
    return base64.b64decode(match[2])


def _der_to_pem(der: bytes, label: str) -> bytes:
    text = base64.b64encode(der).decode("ascii")
    lines = "".join(f"{text[i : i + 64]}\n" for i in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}-----END {label}-----\n".encode("ascii")
