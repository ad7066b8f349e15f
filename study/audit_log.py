"""The study centre's audit log as both sides see it: a hash chain whose heads silos sign.

    digest_p  = SHA-256(JSON [digest_(p−1), place, repr(at), study, kind, detail]),  digest_0 = 0…0
    signature = Ed25519("concilium/log-head/1" || u64(place) || digest_p)

A silo signs the head that comes with the outcome of each session, and keeps what it signed. What
was signed is noted in the log itself, so one entry cannot be changed, removed or moved without
changing every digest after it, and with them heads that institutions have signed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
GENESIS = "0" * 64
COUNTERSIGNED = "log.countersigned"
# A store from before countersigning notes the keys that there were when it is upgraded.
KEYS = ("site.joined", "site.identity")


class AuditError(ValueError):
    """The log was changed, or is not what a silo signed; the text says where."""


@dataclass(frozen=True)
class Entry:
    """One event. `at` is seconds since 1970, `detail` JSON, `digest` hexadecimal."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    place: int
    at: float
    study: str
    kind: str
    detail: str
    digest: str

    def follows(self, before: str) -> str:
        """The digest that this entry has to have after one with the digest `before`."""
        fields = [before, self.place, repr(self.at), self.study, self.kind, self.detail]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


@dataclass(frozen=True)
class Head:
    """What a silo signed: the log's entry at `place` has `digest` (hexadecimal)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    site: str
    place: int
    digest: str
    signature: str

    @classmethod
    def sign(cls, key: Ed25519PrivateKey, site: str, place: int, digest: str) -> Head:
        return cls(site, place, digest, key.sign(_signed(place, digest)).hex())

    def is_by(self, identity: bytes) -> bool:
        """Whether the holder of this raw Ed25519 public key signed it."""
        try:
            key = Ed25519PublicKey.from_public_bytes(identity)
            key.verify(bytes.fromhex(self.signature), _signed(self.place, self.digest))
        except (InvalidSignature, ValueError, OverflowError):
            return False
        return True


@dataclass(frozen=True)
class Verified:
    """A log in which nothing was found changed."""

    entries: int
    heads: dict[str, int] = field(default_factory=dict)
    """Site → the highest place that it signed; nothing up to there can have been changed."""

    @property
    def countersigned(self) -> int:
        return max(self.heads.values(), default=0)


def verify(entries: Iterable[Entry], heads: Iterable[Head] = ()) -> Verified:
    """Check the chain, every signature noted in it, and `heads` as the silos keep them.

    Raises AuditError for an entry that was edited, removed or moved, for a signature that is not
    the site's, and for a log that ends before, or differs at, a place that a silo signed. Without
    `heads`, a log that was cut off, or written anew without its signatures, shows only in that
    `countersigned` is lower than it should be.
    """
    digest, digests, found = GENESIS, [GENESIS], dict[str, int]()
    keys: dict[str, list[bytes]] = {}
    for entry in entries:
        digest = entry.follows(digest)
        if entry.place != len(digests) or entry.digest != digest:
            raise AuditError(f"the audit log was changed at or before entry {entry.place}")
        digests.append(digest)
        if entry.kind in KEYS:
            _learn(keys, entry)
        if entry.kind == COUNTERSIGNED:
            _note(found, _checked(_head_of(entry), digests, keys))
    for head in heads:
        _note(found, _checked(head, digests, keys))
    return Verified(len(digests) - 1, found)


def _checked(head: Head, digests: list[str], keys: dict[str, list[bytes]]) -> Head:
    if not 0 < head.place < len(digests):
        raise AuditError(
            f"{head.site} signed entry {head.place}, the audit log ends at {len(digests) - 1}: "
            "its end was cut off, or it comes from an older backup"
        )
    if not any(head.is_by(key) for key in keys.get(head.site, [])):
        raise AuditError(f"the signature of {head.site} under entry {head.place} is not its own")
    if head.digest != digests[head.place]:
        raise AuditError(
            f"the audit log was changed at or before entry {head.place}: {head.site} signed "
            "another one"
        )
    return head


def _note(found: dict[str, int], head: Head) -> None:
    found[head.site] = max(found.get(head.site, 0), head.place)


def _learn(keys: dict[str, list[bytes]], entry: Entry) -> None:
    detail = _detail(entry)
    if "identity" in detail:
        keys.setdefault(str(detail["site"]), []).append(bytes.fromhex(detail["identity"]))


def _head_of(entry: Entry) -> Head:
    detail = _detail(entry)
    try:
        return Head(detail["site"], detail["place"], detail["digest"], detail["signature"])
    except KeyError as error:
        raise AuditError(f"entry {entry.place} of the audit log lacks {error}") from error


def _detail(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(entry.detail)
    return found


def write_entries(entries: Iterable[Entry]) -> Iterator[str]:
    """One line of JSON each."""
    return (json.dumps(vars(entry), ensure_ascii=False) + "\n" for entry in entries)


def read_entries(text: str) -> list[Entry]:
    """What `write_entries` wrote. Raises AuditError for anything else."""
    return _lines(text, TypeAdapter(Entry))


def read_heads(text: str) -> list[Head]:
    """Lines of JSON as `concilium silo heads` prints them. Raises AuditError for anything else."""
    return _lines(text, TypeAdapter(Head))


def _lines(text: str, kind: TypeAdapter[T]) -> list[T]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.append(kind.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise AuditError(f"line {number}: {where}: {first['msg']}") from error
    return found


def _signed(place: int, digest: str) -> bytes:
    return b"concilium/log-head/1" + place.to_bytes(8, "big") + bytes.fromhex(digest)
