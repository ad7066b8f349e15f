"""The audit log's readers: export, verification, and what the silos sign under it.

Writing it is `coordinator.store.note`, in the transaction that does what is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, select, update

from coordinator import schema
from coordinator.registry import RegistryError
from coordinator.store import StoreError, note
from coordinator.wire import BadRequest
from study.audit_log import AuditError, Entry, Head, Verified, verify


def entries(c: Connection) -> Iterator[Entry]:
    """The whole log, oldest first."""
    query = select(schema.events).order_by(schema.events.c.place)
    for row in c.execute(query).mappings():
        yield Entry(**row)


def verified(c: Connection, heads: Sequence[Head] = ()) -> Verified:
    """Check the log that the store holds. Raises StoreError where it was changed."""
    try:
        found = verify(entries(c), heads)
    except AuditError as error:
        raise StoreError(str(error)) from error
    head = c.execute(select(schema.chain_head)).one()
    if head.place != found.entries:
        raise StoreError(f"the audit log ends at entry {found.entries}, {head.place} were written")
    return found


def countersign(c: Connection, head: Head) -> None:
    """Note that a silo vouches for the log up to an entry; an earlier one than its last, or the
    same again, changes nothing.

    Raises BadRequest for a digest that is not the log's and for a signature that is not the site's.
    """
    sites, events = schema.sites, schema.events
    site = c.execute(select(sites).where(sites.c.name == head.site)).first()
    if site is None:
        raise RegistryError(f"there is no site '{head.site}'")
    if site.countersigned is not None and head.place <= site.countersigned:
        return
    if head.place > c.execute(select(schema.chain_head.c.place)).scalar_one():
        raise BadRequest(f"CountersignRequest.log: there is no entry {head.place} yet")
    entry = c.execute(select(events.c.digest).where(events.c.place == head.place)).first()
    if entry is None or entry.digest != head.digest:
        raise BadRequest(f"CountersignRequest.log: entry {head.place} is not in this log")
    if site.identity is None or not head.is_by(site.identity):
        raise BadRequest("CountersignRequest.signature is not by the site's identity key")
    note(c, "log.countersigned", **vars(head))
    c.execute(update(sites).where(sites.c.name == head.site).values(countersigned=head.place))
