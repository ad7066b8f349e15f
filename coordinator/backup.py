"""Copies of a coordinator: one before each upgrade of the store, and those an operator makes.

A backup is one tar file, made while the service runs: coordinator.toml, the authority with its
keys, the store as an SQLite file whatever database it came from, artifacts, whole uploads and what
the studies published, and at its end MANIFEST.json with the SHA-256 of each. What it holds is what
the coordinator holds, so it is to be kept as safe.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.engine import make_url

from coordinator import lease, migrations, records, schema
from coordinator.audit import verified
from coordinator.config import Home, config_text
from coordinator.store import Store, StoreError, note

_MANIFEST, _STORE = "MANIFEST.json", "store.sqlite"
_FOLDERS = ("authority", "artifacts", "spool", "studies")
_ROWS = 500
_ATTEMPTS = 5
# After a restore session numbers go on so much higher: silos may have seen some since the backup.
_SKIPPED = 1000


class BackupError(Exception):
    """The copy cannot be made, or cannot be used; the text says why and what to do."""


def copy_before_upgrade(home: Home, version: str) -> Path | None:
    """A copy of an SQLite store beside it; None where the store is on a server, whose operator
    makes it."""
    source = _sqlite_file(home.database(home.config()))
    if source is None:
        return None
    target = source.with_name(f"{source.name}.before-upgrade-from-{version}")
    _copy_sqlite(source, target)
    return target


def backup(home: Path, target: Path) -> int:
    """Write a backup of the coordinator of `home` to the file `target`, which may not exist; its
    size in bytes. The service may be running. Raises BackupError, ConfigError, StoreError."""
    place = Home(home)
    url = place.database(place.config())
    if target.exists():
        raise BackupError(f"{target} exists already: name another file, or remove it")
    with TemporaryDirectory(prefix=".backup-", dir=home) as folder:
        stage = Path(folder)
        for _ in range(_ATTEMPTS):
            shutil.rmtree(stage)
            stage.mkdir(mode=0o700)
            # The service writes a file before the row that names it, and removes it after the last
            # step that reads it: what the store names is there before or after it is copied.
            _link_files(home, stage)
            _copy_store(url, stage / _STORE)
            _link_files(home, stage)
            missing = _missing(stage)
            if not missing:
                break
        else:
            raise BackupError(f"{home} lacks files that its store names: {', '.join(missing[:3])}")
        partial = target.with_name(f".{target.name}.part")
        try:
            _write_tar(stage, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target.stat().st_size


def restore(source: Path, home: Path, database: str | None = None) -> list[str]:
    """Make the coordinator of a backup anew in `home`; the studies that were not over.

    `database` is the store's URL if it is to be another one than before. Nothing is overwritten:
    raises BackupError where `home` or the database holds something, or the backup is damaged.
    """
    if home.exists() and any(home.iterdir()):
        raise BackupError(f"{home} is not empty: restore to another folder, or move it away first")
    home.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".restore-", dir=home.parent) as folder:
        stage = Path(folder) / "home"
        stage.mkdir(mode=0o700)
        _read_tar(source, stage)
        config = Home(stage).config()
        if database is not None:
            config = config.model_copy(update={"database": database})
            (stage / "coordinator.toml").write_text(config_text(config))
        unfinished = _revive_store(stage / _STORE)
        url = Home(home).database(config)
        file = _sqlite_file(url)
        if file is None or file != (home / _STORE).resolve():
            _fill(url, stage / _STORE)
        if home.exists():
            home.rmdir()
        os.replace(stage, home)
    return unfinished


# --- files


def _link_files(home: Path, stage: Path) -> None:
    """Hard links to all that is whole; a file that grows or goes meanwhile is not one of them."""
    for name in _FOLDERS:
        for file in _files(home / name):
            target = stage / file.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if name not in ("artifacts", "spool"):
                    shutil.copyfile(file, target)
                elif not target.exists():
                    os.link(file, target)
            except FileNotFoundError:
                continue
    shutil.copyfile(home / "coordinator.toml", stage / "coordinator.toml")


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix not in (".part", ".copy", ".new"):
            yield file


def _missing(stage: Path) -> list[str]:
    """Artifacts that the copied store names and that were not copied."""
    with closing(sqlite3.connect(stage / _STORE)) as store:
        named = [row[0].hex() for row in store.execute("SELECT sha256 FROM artifacts")]
    return [n for n in named if not (stage / "artifacts" / n[:2] / n).exists()]


def _write_tar(stage: Path, target: Path) -> None:
    digests = {}
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(p for p in stage.rglob("*") if p.is_file()):
                name = path.relative_to(stage).as_posix()
                with open(path, "rb") as content:
                    digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
                    content.seek(0)
                    tar.addfile(_member(name, path.stat().st_size), content)
            head = {"made": time.time(), "version": migrations.NEWEST, "files": digests}
            text = json.dumps(head, indent=1).encode()
            tar.addfile(_member(_MANIFEST, len(text)), io.BytesIO(text))
        file.flush()
        os.fsync(file.fileno())


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time.time())
    return member


def _read_tar(source: Path, stage: Path) -> None:
    """Unpack, and compare with the manifest. Raises BackupError."""
    found: dict[str, str] = {}
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                path = PurePosixPath(member.name)
                if content is None or path.is_absolute() or ".." in path.parts:
                    raise BackupError(f"{source} holds '{member.name}': it is no backup of ours")
                target = stage / path
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with open(target, "xb", opener=_private) as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                with open(target, "rb") as copy:
                    found[member.name] = hashlib.file_digest(copy, "sha256").hexdigest()
        found.pop(_MANIFEST)
        wanted = json.loads((stage / _MANIFEST).read_bytes())["files"]
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise BackupError(f"{source} cannot be read as a whole backup: {error!r}") from error
    damaged = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if damaged:
        raise BackupError(f"{source} is damaged: {', '.join(damaged[:3])}; use another backup")
    (stage / _MANIFEST).unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# --- the store


def _sqlite_file(url: str) -> Path | None:
    found = make_url(url)
    if found.get_backend_name() != "sqlite" or not found.database:
        return None
    return Path(found.database).resolve()


def _copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy of a database that others are using; readable by this user only."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)


def _copy_store(url: str, target: Path) -> None:
    source = _sqlite_file(url)
    if source is not None:
        _copy_sqlite(source, target)
        return
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    live, copy = Store(url), Store(f"sqlite:///{target}")
    try:
        live.run(_copy_rows_to, copy)
    finally:
        live.close()
        copy.close()


def _copy_rows_to(source: Connection, copy: Store) -> None:
    # One transaction on each side: what is copied is the state of one moment.
    copy.run(_copy_rows, source)


def _copy_rows(target: Connection, source: Connection) -> None:
    for table in reversed(schema.metadata.sorted_tables):
        target.execute(delete(table))
    for table in schema.metadata.sorted_tables:
        rows = source.execution_options(yield_per=_ROWS).execute(select(table)).mappings()
        for part in rows.partitions(_ROWS):
            target.execute(insert(table), [dict(row) for row in part])


def _fill(url: str, source: Path) -> None:
    """Copy the restored store into another database. Raises BackupError if that holds a study."""
    live, copy = Store(url), Store(f"sqlite:///{source}")
    try:
        if live.run(verified).entries:
            name = make_url(url).render_as_string()
            raise BackupError(f"the database {name} holds a coordinator already: name an empty one")
        copy.run(_copy_rows_to, live)
    finally:
        live.close()
        copy.close()
    source.unlink()


def _revive_store(file: Path) -> list[str]:
    """Check the copied store, bring it to this version, and make it one that was restored."""
    with closing(sqlite3.connect(file)) as store:
        (verdict,) = store.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        raise BackupError(f"the store in the backup is damaged: {verdict}")
    store_ = Store(f"sqlite:///{file}", upgrade=True)
    try:
        store_.run(migrations.upgrade)
        store_.run(verified)
        return store_.run(_mark_restored)
    except StoreError as error:
        raise BackupError(f"the store in the backup cannot be used: {error}") from error
    finally:
        store_.close()


def _mark_restored(c: Connection) -> list[str]:
    seen = lease.look(c)
    c.execute(update(schema.lease).values(epoch=seen.epoch + 1, beat=0, holder=""))
    unfinished = [row.id for row in records.all_studies(c) if not row.over]
    for study in unfinished:
        records.skip_numbers(c, study, _SKIPPED)
    note(c, "coordinator.restored", unfinished=unfinished)
    return unfinished
