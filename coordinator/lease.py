"""Which process holds the studies: one row, a fencing number, and no clock of any machine.

Each transaction of the holder counts `beat` up by one, under the `epoch` that it took the lease
with. A standby takes the lease when `beat` has stood still for as long as it is told to wait, by
its own clock; that counts `epoch` up. From then on the UPDATE of every transaction of the old
holder finds no row and the transaction is rolled back: a process that was stopped and goes on can
commit nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from coordinator.schema import lease


@dataclass(frozen=True)
class Lease:
    """The row. `holder` is "" after a holder that ended in order."""

    epoch: int
    beat: int
    holder: str


def look(c: Connection, *, settled: bool = False) -> Lease:
    """The row as it was last committed; `settled`: once no transaction that changed it is under
    way any more (PostgreSQL; SQLite lets nobody else in anyway)."""
    query = select(lease).with_for_update() if settled else select(lease)
    row = c.execute(query).one()
    return Lease(row.epoch, row.beat, row.holder)


def take(c: Connection, seen: Lease, holder: str) -> int | None:
    """The new epoch; None where the lease is not what was `seen` any more."""
    where = (lease.c.epoch == seen.epoch) & (lease.c.beat == seen.beat)
    values = {"epoch": seen.epoch + 1, "beat": 0, "holder": holder}
    taken = c.execute(update(lease).where(where).values(**values)).rowcount
    return seen.epoch + 1 if taken else None


def beat(c: Connection, epoch: int) -> bool:
    """Count one transaction of `epoch`; False where another process has taken the lease.

    The row stays locked until the transaction ends: nobody takes the lease before the commit."""
    where = lease.c.epoch == epoch
    return c.execute(update(lease).where(where).values(beat=lease.c.beat + 1)).rowcount == 1


def release(c: Connection, epoch: int) -> None:
    """Let the next process have the lease without waiting."""
    where = lease.c.epoch == epoch
    c.execute(update(lease).where(where).values(holder=""))
