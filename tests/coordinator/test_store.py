"""The store on both databases: transactions happen once, versions, the lease that fences."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, insert, select, text, update
from sqlalchemy.engine import make_url

from coordinator import lease, migrations, records, registry, schema
from coordinator.audit import verified
from coordinator.store import Fenced, Store, StoreError, note
from secagg.roster import Member, Roster
from tests.coordinator import postgres
from tests.proxy import Proxy


def count(c: Connection) -> int:
    return c.execute(select(schema.chain_head.c.place)).scalar_one()


def test_what_many_writers_note_at_once_is_one_unbroken_log(database: str) -> None:
    stores = [Store(database) for _ in range(4)]

    def write(store: Store) -> None:
        for n in range(10):
            store.run(note, "test", number=n)

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].run(verified).entries == 40
    for store in stores:
        store.close()


def test_two_that_read_before_they_write_lose_no_change_of_each_other(database: str) -> None:
    """`join` reads that an invitation is good, then makes the site pending; a revocation in between
    must not be undone by it."""
    store, other = Store(database), Store(database)
    store.run(registry.invite, "st-marys", "token", time.time() + 60)
    read, raced = threading.Event(), threading.Event()

    def revoke() -> None:
        read.wait()
        other.run(registry.revoke, "st-marys")
        raced.set()

    def slow_join(c: Connection) -> None:
        c.execute(select(schema.sites)).all()
        read.set()
        # SQLite lets nobody in between, so there the wait ends by time.
        raced.wait(0.3)
        registry.join(c, "st-marys", "token", b"request", b"identity", "1")

    thread = threading.Thread(target=revoke)
    thread.start()
    with suppress(registry.TokenRefused):  # where the revocation came first, and stands
        store.run(slow_join)
    thread.join()
    assert store.run(registry.site, "st-marys").status == "revoked"
    assert store.run(verified).entries > 0
    store.close()
    other.close()


def test_bytes_text_and_times_come_back_as_they_went_in(database: str) -> None:
    store = Store(database)
    at, raw = 1765000000.123456, bytes(range(256)) * 40
    said = "Größe µ – “ok”"
    names = ("a", "b", "c")
    members = tuple(Member(name, name.encode() * 32) for name in names)
    store.run(records.create_study, "s", said, Roster("s", 1, 3, 1, members))

    def set_times(c: Connection) -> None:
        c.execute(update(schema.studies).values(created=at, model=raw, roster=raw))

    store.run(set_times)
    row = store.run(records.study, "s")
    assert (row.plan, row.roster, row.model, row.created) == (said, raw, raw, at)
    store.close()


def test_the_tables_of_the_models_and_of_the_migrations_agree(database: str) -> None:
    store = Store(database)

    def differences(c: Connection) -> list[Any]:
        # SQLite does not keep every type, so types are compared where they are kept.
        options = {"compare_type": c.dialect.name == "postgresql"}
        context = MigrationContext.configure(c, opts=options)
        return compare_metadata(context, schema.metadata)

    assert store.run(differences) == []
    store.close()


def test_the_newest_version_is_the_head_of_one_line_of_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    line = [revision.revision for revision in script.walk_revisions()]
    assert tuple(reversed(line)) == migrations.KNOWN
    assert script.get_heads() == [migrations.NEWEST]


@pytest.mark.parametrize("noted", [True, False], ids=["version-0001", "made-before-versions"])
def test_a_store_of_the_first_version_keeps_its_data_through_every_upgrade(
    database: str, noted: bool
) -> None:
    engine = create_engine(database)
    with engine.begin() as c:
        migrations.upgrade(c, migrations.FIRST)
        site = {"name": "st-marys", "status": "approved", "token": "-", "changed": 1.5}
        c.execute(insert(schema.sites).values(site | {"identity": b"\0\1", "fingerprint": "ABCD"}))
        study = {"id": "s-1", "plan": "p", "roster": b"r", "wanted": "run", "state": "running"}
        c.execute(insert(schema.studies).values(study | {"stage": "round 3", "created": 2.5}))
        c.execute(insert(schema.chain_head).values(id=1, place=0, digest="0" * 64))
        note(c, "study.created", "s-1", site="Zürich")
        if not noted:
            c.execute(text("DROP TABLE alembic_version"))
    engine.dispose()

    with pytest.raises(StoreError, match="make a backup .* restart `concilium coordinator serve`"):
        Store(database)
    store = Store(database, upgrade=True)
    store.run(migrations.upgrade)
    store.close()
    store = Store(database)
    assert store.run(migrations.standing) == "current"
    assert store.run(registry.site, "st-marys").identity == b"\0\1"
    assert store.run(records.study, "s-1").stage == "round 3"
    assert store.run(verified).entries == 2  # the site's identity was noted
    kept = store.run(lambda c: c.execute(select(schema.rosters)).one())
    assert (kept.epoch, kept.roster, kept.entered) == (1, b"r", 2.5)
    assert store.run(lease.look).holder == ""
    store.run(note, "after")
    assert store.run(verified).entries == 3
    store.close()


def test_a_store_of_a_newer_version_is_left_alone_with_a_clear_message(database: str) -> None:
    Store(database).close()
    engine = create_engine(database)
    with engine.begin() as c:
        c.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    for upgrade in (False, True):
        with pytest.raises(StoreError, match="has version 9999, .* a newer concilium wrote it"):
            Store(database, upgrade=upgrade)


def lead(store: Store, told: list[str]) -> int:
    while (epoch := store.run(lease.take, store.run(lease.look), "me")) is None:
        pass  # the holder's transaction came in between
    store.hold(epoch, lambda: told.append("fenced"))
    return epoch


def test_who_lost_the_lease_can_commit_nothing_and_is_told(database: str) -> None:
    old, new, told = Store(database), Store(database), list[str]()
    first = lead(old, told)
    old.run(note, "before")
    assert lead(new, told) == first + 1
    with pytest.raises(Fenced, match="another coordinator has taken over"):
        old.run(note, "after")
    assert told == ["fenced"]
    assert new.run(count) == 1
    new.run(note, "after")
    assert new.run(verified).entries == 2
    old.close()
    new.close()


def test_the_lease_cannot_be_taken_between_the_fence_and_the_commit(database: str) -> None:
    """A transaction that passed the fence commits before the lease goes, or not at all."""
    old, new, told = Store(database), Store(database), list[str]()
    lead(old, told)
    order: list[str] = []
    inside = threading.Event()

    def slow(c: Connection) -> None:
        note(c, "slow")
        inside.set()
        time.sleep(0.3)

    def take_over() -> None:
        inside.wait()
        lead(new, told)
        order.append(f"taken, {new.run(count)} noted")

    thread = threading.Thread(target=take_over)
    thread.start()
    try:
        old.run(slow)
        order.append("committed")
    except Fenced:
        order.append("fenced")
    thread.join()
    assert sorted(order) in (["committed", "taken, 1 noted"], ["fenced", "taken, 0 noted"])
    assert new.run(verified).entries == (1 if "committed" in order else 0)
    old.close()
    new.close()


def test_a_locked_sqlite_store_is_waited_for(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    thread = threading.Thread(target=store.run, args=(note, "waited"))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    other.execute("COMMIT")
    thread.join(10)
    assert store.run(verified).entries == 1
    store.close()


def test_a_postgresql_that_restarts_is_connected_to_again(
    postgres_server: postgres.Server,
) -> None:
    store = Store(postgres_server.new_database())
    store.run(note, "before")
    postgres_server.halt()
    postgres_server.start()
    store.run(note, "after")
    assert store.run(verified).entries == 2
    store.close()


class CutAtCommit(Proxy):
    """Cuts the line at a COMMIT of a client: before it has reached the server, or just after."""

    armed = after = False

    async def _read(self, source: asyncio.StreamReader) -> bytes:
        data = await super()._read(source)
        if self.armed and b"COMMIT" in data:
            self.armed = False
            if self.after:
                asyncio.get_running_loop().call_later(0.2, self.cut)
                self.mute = True
            else:
                self.cut()
                return b""
        return data


# At the commit of every entry: it outlives the connection that asked for it.
SLOW_COMMIT = (
    "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END'",
    "CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION dawdle()",
)


@pytest.mark.parametrize("cut", ["before-it-arrived", "after-it-arrived", "while-under-way"])
async def test_a_commit_whose_answer_is_lost_happens_exactly_once(
    postgres_server: postgres.Server, cut: str
) -> None:
    proxy = CutAtCommit(f"127.0.0.1:{postgres_server.port}")
    await proxy.start()
    url = postgres_server.new_database(int(proxy.address.rpartition(":")[2]))
    store = await asyncio.to_thread(Store, url)
    await asyncio.to_thread(lead, store, [])
    await store.do(note, "first")
    if cut == "while-under-way":
        engine = create_engine(make_url(url).set(port=postgres_server.port))
        with engine.begin() as c:
            for statement in SLOW_COMMIT:
                c.execute(text(statement))
        engine.dispose()
    proxy.armed, proxy.after = True, cut != "before-it-arrived"
    await store.do(note, "second")
    assert proxy.cuts == 1
    await store.do(note, "third")
    assert (await store.do(verified)).entries == 3
    await asyncio.to_thread(store.close)
    await proxy.stop()
