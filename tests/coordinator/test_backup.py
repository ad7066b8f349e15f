"""Backups: made while a study runs, restored to where it goes on, or says why it cannot."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from concilium.cli import main
from coordinator import admin, lease, records
from coordinator.audit import verified
from coordinator.backup import BackupError, backup, restore
from coordinator.config import Home, config_text
from coordinator.store import Store
from secagg.ledger import History
from tests.coordinator import postgres
from tests.coordinator.agent import TestSilo, Vanish, nothing
from tests.coordinator.federation import Federation


async def test_a_study_goes_on_from_a_backup_made_in_the_middle_of_a_sum(
    tmp_path: Path, database: str
) -> None:
    """The last silo holds its masked input back; the others' are in the backup."""
    async with Federation(tmp_path, 20.0, database) as federation:
        silos = await federation.join_four()
        here, go = asyncio.Event(), asyncio.Event()

        async def wait(silo: TestSilo, where: str) -> None:
            if where == "before upload":
                silo.hook = nothing
                here.set()
                await go.wait()

        silos[2].hook = wait
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=60.0))

        def three_uploaded() -> bool:
            # Three are there for a moment in each earlier step too; by the time of the restore the
            # silos would be past that one.
            now = federation.study(study)
            return (now.phase, now.present) == ("collecting", 3)

        await federation.until(three_uploaded)
        file = tmp_path / "backup.tar"
        await asyncio.to_thread(backup, federation.home, file)
        assert file.stat().st_mode & 0o777 == 0o600

        await federation.stop()
        shutil.rmtree(federation.home)
        fresh = f"sqlite:///{tmp_path / 'other.sqlite'}"
        assert restore(file, federation.home, fresh) == [study]
        await federation.start()
        go.set()
        await federation.until(lambda: federation.result(study, "census"), 40)
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert federation.result(study, "census")["session"]["number"] == 1
        assert federation.study(study).error is None
        # Sessions that the silos may have seen since the backup are not given another meaning.
        store = Store(fresh)
        assert store.run(records.next_number, study) > 1000
        store.close()


async def test_a_backup_from_before_a_sum_that_ended_says_why_the_study_cannot_go_on(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        study = admin.start_study(federation.home, federation.plan())
        admin.pause_study(federation.home, study)
        for silo in silos:
            silo.start()
        await federation.until(lambda: len(federation.study(study).silos) == 4)
        file = tmp_path / "backup.tar"
        await asyncio.to_thread(backup, federation.home, file)
        admin.resume_study(federation.home, study)
        await federation.until(lambda: all(s.studies[study].settled for s in silos if s.studies))
        await federation.until(lambda: federation.result(study, "census"))
        await federation.until(lambda: any(s.studies[study].settled for s in silos))
        await federation.stop()
        shutil.rmtree(federation.home)
        restore(file, federation.home)
        await federation.start()
        error = await federation.until(lambda: federation.study(study).error)
        assert "has seen session 1 end, this store knows of none after 0" in error
        assert "restore a later backup, or stop it and start a new one" in error


async def restored_behind_the_silos(
    federation: Federation, folder: Path, released: int
) -> tuple[str, list[TestSilo]]:
    """A study whose coordinator was restored to three of four masked inputs of the first sum, after
    all silos had confirmed it and `released` of them had released their shares."""
    silos = await federation.join_four()
    here, go = asyncio.Event(), asyncio.Event()

    async def wait(silo: TestSilo, where: str) -> None:
        if where == "before upload" and silo is silos[3]:
            here.set()
            await go.wait()
        if where == "confirmations" and silo not in silos[:released]:
            raise Vanish
        if where == "after UNMASK":
            raise Vanish

    for silo in silos:
        silo.hook = wait
        silo.start()
    study = admin.start_study(federation.home, federation.plan(deadline=15.0))
    await here.wait()
    await federation.until(
        lambda: (
            (federation.study(study).phase, federation.study(study).present) == ("collecting", 3)
        )
    )
    await asyncio.to_thread(backup, federation.home, folder / "backup.tar")
    go.set()
    await federation.until(lambda: not any(silo.alive for silo in silos))
    assert federation.study(study).phase == "unmasking"
    await federation.stop()
    shutil.rmtree(federation.home)
    restore(folder / "backup.tar", federation.home)
    await federation.start()
    for silo in silos:
        silo.hook = nothing
        silo.start()
    return study, silos


async def test_a_backup_that_silos_have_gone_beyond_gives_the_sum_up_and_begins_it_anew(
    tmp_path: Path,
) -> None:
    """Who confirmed, and released nothing, may still sign the session away."""
    async with Federation(tmp_path) as federation:
        study, silos = await restored_behind_the_silos(federation, tmp_path, released=0)
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert federation.result(study, "census")["session"]["number"] > 1000

        def certain() -> bool:
            return not any(History.of(silo.studies[study].disk).in_doubt for silo in silos)

        await federation.until(certain, 60)  # silos hear of the outcome after the result is there


async def test_a_session_that_nothing_can_end_any_more_is_abandoned_with_its_study(
    tmp_path: Path,
) -> None:
    """Two of four have released their shares, so three cannot sign; nobody sums anything again."""
    async with Federation(tmp_path) as federation:
        study, silos = await restored_behind_the_silos(federation, tmp_path, released=2)
        admin.stop_study(federation.home, study)

        def told() -> str | None:
            error = federation.study(study).error or ""
            return error if "2 have, not yet site-1, site-2" in error else None

        error = await federation.until(told, 60)
        assert f"`concilium study stop {study} --abandon`" in error
        await federation.restart()
        assert federation.study(study).state == "running"
        command = ["study", "stop", study, "--abandon", "--home", str(federation.home)]
        done = await asyncio.to_thread(CliRunner().invoke, main, command)
        assert done.exit_code == 0
        assert f"stopping {study}\n" in done.output, "among what the service in this process logs"
        await federation.until(lambda: all(study in silo.ended for silo in silos))
        assert federation.study(study).state == "stopped"
        assert federation.result(study, "census") is None
        # What two released is of one sum; that it was summed, or was not, nothing proves to them.
        doubtful = [silo for silo in silos if History.of(silo.studies[study].disk).in_doubt]
        assert doubtful == silos
        store = Store(Home(federation.home).database(Home(federation.home).config()))
        assert store.run(records.sessions_under_way) == set()
        assert store.run(verified).entries > 0
        store.close()
        with pytest.raises(admin.AdminError, match="is stopped"):
            admin.stop_study(federation.home, study, abandon=True)


def made(folder: Path, database: str | None = None) -> Path:
    home = folder / "coordinator"
    admin.init(home, "127.0.0.1:7443")
    if database is not None:
        config = Home(home).config().model_copy(update={"database": database})
        (home / "coordinator.toml").write_text(config_text(config))
    admin.invite(home, "st-marys")
    (home / "artifacts").mkdir()
    return home


def test_a_backup_moves_a_coordinator_from_sqlite_to_postgresql_and_back(
    tmp_path: Path, postgres_server: postgres.Server
) -> None:
    home, there, back = made(tmp_path), tmp_path / "there", tmp_path / "back"
    backup(home, tmp_path / "1.tar")
    url = postgres_server.new_database()
    restore(tmp_path / "1.tar", there, url)
    assert not (there / "store.sqlite").exists()
    assert [site.name for site in admin.sites(there)] == ["st-marys"]
    admin.invite(there, "northgate")
    backup(there, tmp_path / "2.tar")
    restore(tmp_path / "2.tar", back, f"sqlite:///{back / 'store.sqlite'}")
    assert [site.name for site in admin.sites(back)] == ["northgate", "st-marys"]
    for folder in (there, back):
        store = Store(Home(folder).database(Home(folder).config()))
        assert store.run(verified).entries > 2
        assert store.run(lease.look).holder == ""
        store.close()
    with pytest.raises(BackupError, match="holds a coordinator already: name an empty one"):
        restore(tmp_path / "2.tar", tmp_path / "again", url)


def test_nothing_is_overwritten_and_the_commands_say_so(tmp_path: Path) -> None:
    home, file = made(tmp_path), tmp_path / "b.tar"
    call = CliRunner().invoke
    assert call(main, ["coordinator", "backup", str(file), "--home", str(home)]).exit_code == 0
    again = call(main, ["coordinator", "backup", str(file), "--home", str(home)])
    assert "exists already" in again.output
    onto = call(main, ["coordinator", "restore", str(file), "--home", str(home)])
    assert "is not empty: restore to another folder" in onto.output
    other = tmp_path / "other"
    done = call(main, ["coordinator", "restore", str(file), "--home", str(other)])
    assert "start it with: concilium coordinator serve" in done.output
    assert (other / "authority" / "ca.key").read_bytes() == (
        home / "authority" / "ca.key"
    ).read_bytes()
    assert (other / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_damaged_or_foreign_backup_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    home, file = made(tmp_path), tmp_path / "b.tar"
    backup(home, file)
    whole = file.read_bytes()
    at = whole.index(b"-----BEGIN") + 60
    other = tmp_path / "other"
    damaged = {
        "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackupError, match=r"is damaged|cannot be read as a whole backup"):
            restore(tmp_path / name, other)
        assert not other.exists()
    with tarfile.open(tmp_path / "foreign", "w") as tar:
        tar.add(file, "../outside")
    with pytest.raises(BackupError, match="is no backup of ours"):
        restore(tmp_path / "foreign", other)
    assert not list(tmp_path.glob(".restore-*"))
