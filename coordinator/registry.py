"""Transactions about sites: invited, pending, approved, revoked; their certificates and contact.

Every function runs inside `Store.run` or `Store.do`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from coordinator.authority import Issued, join_fingerprint
from coordinator.schema import certificates, invitations, sites
from coordinator.store import note


class RegistryError(Exception):
    """A site is not in the state that was asked for; the text says what to do."""


class TooOften(Exception):
    """A site asks for certificates faster than any agent needs them; later it gets one."""


class TokenRefused(RegistryError):
    """An invitation that is not good any more."""


# An agent renews once in two thirds of a certificate's life; where answers are lost, or its disk is
# full, it asks again after a restart. By hand a person may renew while the agent goes on with an
# older one. No site needs more than this, and one that asks without end must not fill the store.
_CERTIFICATES_AN_HOUR = 10
_CERTIFICATES = 6


@dataclass(frozen=True)
class Site:
    """One institution."""

    name: str
    status: str
    """invited, pending, approved or revoked."""
    identity: bytes | None
    fingerprint: str | None
    agent_version: str | None
    last_contact: float | None
    changed: float
    countersigned: int | None
    """The last entry of the audit log that it signed."""
    certificate_expires: float | None
    """The end of its newest certificate."""


_EXPIRES = (
    select(func.max(certificates.c.expires))
    .where(certificates.c.site == sites.c.name, certificates.c.revoked.is_(False))
    .scalar_subquery()
)
_SITES = select(sites, _EXPIRES.label("certificate_expires"))


def all_sites(c: Connection) -> list[Site]:
    # Sorted here: a database may order names by the rules of a language, a roster goes by bytes.
    return sorted(map(_site, c.execute(_SITES)), key=lambda found: found.name)


def site(c: Connection, name: str) -> Site:
    row = c.execute(_SITES.where(sites.c.name == name)).first()
    if row is None:
        raise RegistryError(f"there is no site '{name}': invite it first")
    return _site(row)


def _site(row: Any) -> Site:
    return Site(**{name: getattr(row, name) for name in Site.__dataclass_fields__})


def invite(c: Connection, name: str, token: str, expires: float) -> None:
    """A new invitation for `name`; an earlier one that was not used is void.

    Raises RegistryError where the site is enrolled already.
    """
    row = c.execute(select(sites).where(sites.c.name == name)).first()
    if row is not None and row.status in ("pending", "approved"):
        raise RegistryError(
            f"site '{name}' has joined already (it is {row.status}): revoke it before you invite "
            "it anew, or choose another name"
        )
    now = time.time()
    values = {"status": "invited", "token": token, "changed": now}
    values |= {"request": None, "identity": None, "fingerprint": None}
    if row is None:
        c.execute(insert(sites).values(name=name, **values))
    else:
        c.execute(update(sites).where(sites.c.name == name).values(**values))
    c.execute(insert(invitations).values(token=token, site=name, issued=now, expires=expires))
    note(c, "site.invited", site=name, expires=expires)


def join(c: Connection, name: str, token: str, request: bytes, identity: bytes, agent: str) -> Site:
    """Hand in a request under an invitation; the same request again changes nothing.

    Raises TokenRefused where the invitation is unknown, replaced, expired or was used for another
    request.
    """
    row = c.execute(
        select(invitations, sites.c.token.label("current"))
        .join(sites, sites.c.name == invitations.c.site)
        .where(invitations.c.token == token, invitations.c.site == name)
    ).first()
    if row is None or row.current != token:
        raise TokenRefused("this invitation was replaced by a later one: use that one")
    digest = hashlib.sha256(request + identity).hexdigest()
    if row.used_by not in (None, digest):
        raise TokenRefused(
            "this invitation was used already, with another key: if that was not you, tell the "
            "study centre at once; else ask it for a new invitation"
        )
    if row.used_by is None:
        if row.expires < time.time():
            raise TokenRefused("this invitation has expired: ask the study centre for a new one")
        _check_identity_is_new(c, identity)
        c.execute(update(invitations).where(invitations.c.token == token).values(used_by=digest))
        fingerprint = join_fingerprint(name, request, identity)
        c.execute(
            update(sites)
            .where(sites.c.name == name)
            .values(
                status="pending",
                request=request,
                identity=identity,
                fingerprint=fingerprint,
                agent_version=agent,
                changed=time.time(),
            )
        )
        known = {"fingerprint": fingerprint, "identity": identity.hex(), "agent": agent}
        note(c, "site.joined", site=name, **known)
    return site(c, name)


def _check_identity_is_new(c: Connection, identity: bytes) -> None:
    # Two sites with one identity key could not be told apart, and no roster admits them.
    taken = c.execute(select(sites.c.name).where(sites.c.identity == identity)).first()
    if taken is not None:
        raise TokenRefused(
            f"this identity key belongs to site '{taken.name}': each site makes its own"
        )


def approve(c: Connection, name: str) -> Site:
    """Let a pending site in; approving it twice changes nothing."""
    found = site(c, name)
    if found.status == "approved":
        return found
    if found.status != "pending":
        raise RegistryError(
            f"site '{name}' is {found.status}, not pending: "
            + ("it has not used its invitation yet" if found.status == "invited" else "invite it")
        )
    _set_status(c, name, "approved")
    note(c, "site.approved", site=name, fingerprint=found.fingerprint)
    return site(c, name)


def revoke(c: Connection, name: str) -> Site:
    """Shut a site out: its certificates and its invitation are void from now on."""
    site(c, name)
    c.execute(update(certificates).where(certificates.c.site == name).values(revoked=True))
    # The identity is freed with it: an institution that is invited anew makes new keys anyway.
    c.execute(update(sites).where(sites.c.name == name).values(identity=None, token="-"))  # noqa: S106
    _set_status(c, name, "revoked")
    note(c, "site.revoked", site=name)
    return site(c, name)


def _set_status(c: Connection, name: str, status: str) -> None:
    values = {"status": status, "changed": time.time()}
    c.execute(update(sites).where(sites.c.name == name).values(**values))


def certificate_for(c: Connection, name: str, request: bytes) -> bytes | None:
    """The unexpired certificate that answers this very request, if there is one."""
    digest = hashlib.sha256(request).hexdigest()
    found = c.execute(
        select(certificates.c.pem).where(
            certificates.c.site == name,
            certificates.c.request == digest,
            certificates.c.expires > time.time(),
            certificates.c.revoked.is_(False),
        )
    ).first()
    return None if found is None else found.pem


def record_certificate(
    c: Connection, name: str, request: bytes, issued: Issued, shown: str = ""
) -> None:
    """A new certificate of a site. Its newest stay good, and the one with the serial `shown`, by
    which it asks: it has no other one if this answer is lost too. Raises TooOften."""
    now, ours = time.time(), certificates.c.site == name
    lately = (certificates.c.issued > now - 3600) & (certificates.c.expires > now)
    count = select(func.count()).select_from(certificates).where(ours, lately)
    if c.execute(count).scalar_one() >= _CERTIFICATES_AN_HOUR:
        raise TooOften(
            f"site '{name}' got {_CERTIFICATES_AN_HOUR} certificates within an hour: the one that "
            "it has stays good, and it gets another one later. If its agent restarts again and "
            "again, see its log for the reason"
        )
    values = {
        "serial": issued.serial,
        "site": name,
        "pem": issued.pem,
        "request": hashlib.sha256(request).hexdigest(),
        "issued": now,
        "expires": issued.expires.timestamp(),
        "revoked": False,
    }
    c.execute(insert(certificates).values(**values))
    note(c, "certificate.issued", site=name, serial=issued.serial)
    good = (certificates.c.revoked.is_(False)) & (certificates.c.expires > now)
    newest_first = (
        select(certificates.c.serial).where(ours, good).order_by(certificates.c.issued.desc())
    )
    kept = {issued.serial, shown, *c.execute(newest_first.limit(_CERTIFICATES)).scalars()}
    old = ours & good & certificates.c.serial.not_in(kept)
    c.execute(update(certificates).where(old).values(revoked=True))


def admitted(c: Connection) -> dict[str, str]:
    """serial → site of every certificate that is good now."""
    rows = c.execute(
        select(certificates.c.serial, certificates.c.site)
        .join(sites, sites.c.name == certificates.c.site)
        .where(
            sites.c.status == "approved",
            certificates.c.revoked.is_(False),
            certificates.c.expires > time.time(),
        )
    )
    return {row.serial: row.site for row in rows}


def record_contacts(c: Connection, seen: Mapping[str, float]) -> None:
    for name, at in seen.items():
        c.execute(update(sites).where(sites.c.name == name).values(last_contact=at))


def approved(c: Connection, names: Sequence[str] | None) -> list[Site]:
    """The sites for a study: those named, or all that are approved. Raises RegistryError where
    one of those named cannot take part."""
    if names is None:
        return [found for found in all_sites(c) if found.status == "approved"]
    chosen = [site(c, name) for name in sorted(set(names))]
    for found in chosen:
        if found.status != "approved":
            raise RegistryError(f"site '{found.name}' is {found.status}: approve it first")
    return chosen
