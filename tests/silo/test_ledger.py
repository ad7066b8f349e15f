"""The ledger file: durable before it returns, whole after a crash, refused when it is damaged."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from secagg.ledger import Aborted, Confirmed, Entry, Masked, Opened, Settled, Unmasked
from silo import ledger as module
from silo.errors import LedgerError
from silo.ledger import LedgerFile
from tests.secagg.world import make_context, make_roster


@functools.cache
def entries() -> list[Entry]:
    roster, _ = make_roster(4)
    context = make_context(roster)
    ctx, other = context.digest, bytes(32)
    return [
        Opened(context),
        Masked(ctx, other),
        Confirmed(ctx, other, (1, 2, 3), (1, 2), other, b"locked"),
        Unmasked(ctx),
        Aborted(other),
        Settled(ctx, other, True, True),
    ]


def write(path: Path, written: list[Entry]) -> None:
    ledger = LedgerFile(path, "trial")
    for entry in written:
        ledger.append(entry)
    ledger.close()


def test_entries_are_there_again_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path / "ledger", entries()[:3])
    write(tmp_path / "ledger", entries()[3:])
    assert LedgerFile(tmp_path / "ledger", "trial").entries() == tuple(entries())


def test_append_returns_only_after_the_bytes_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    write_, fsync = os.write, os.fsync

    def noted_write(file: int, data: bytes) -> int:
        calls.append("write")
        return write_(file, data)

    def noted_fsync(file: int) -> None:
        calls.append("fsync")
        fsync(file)

    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    ledger = LedgerFile(tmp_path / "ledger", "trial")
    assert calls == ["write", "fsync", "fsync"], "magic, file, folder"
    ledger.append(entries()[0])
    assert calls[3:] == ["write", "fsync"]


def test_a_tail_torn_at_any_byte_is_cut_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, entries())
    whole = path.read_bytes()
    ends = []
    for count in range(len(entries()) + 1):
        write(tmp_path / f"part-{count}", entries()[:count])
        ends.append(len((tmp_path / f"part-{count}").read_bytes()))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        ledger = LedgerFile(path, "trial")
        kept = max((i for i, end in enumerate(ends) if end <= length), default=0)
        assert ledger.entries() == tuple(entries()[:kept])
        ledger.close()
        assert path.read_bytes() == whole[: ends[kept]]


def test_a_tail_that_the_file_system_filled_with_zeros_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, entries()[:2])
    whole = path.read_bytes()
    write(tmp_path / "more", entries()[:3])
    third = (tmp_path / "more").read_bytes()[len(whole) :]
    for kept in (0, 4, 8, 20, len(third) - 32):
        path.write_bytes(whole + third[:kept] + bytes(len(third) - kept))
        ledger = LedgerFile(path, "trial")
        assert ledger.entries() == tuple(entries()[:2])
        ledger.close()


def test_damage_anywhere_before_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, entries())
    whole = path.read_bytes()
    write(tmp_path / "all-but-one", entries()[:-1])
    last = len((tmp_path / "all-but-one").read_bytes())
    for at in range(last):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(LedgerError, match="damaged at byte|is not a ledger"):
            LedgerFile(path, "trial")
        assert path.read_bytes() == bytes(damaged), "evidence is left as it was found"


def test_a_record_taken_out_or_of_another_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, entries())
    whole = path.read_bytes()
    sizes = []
    for count in (1, 2):
        write(tmp_path / f"part-{count}", entries()[:count])
        sizes.append(len((tmp_path / f"part-{count}").read_bytes()))
    path.write_bytes(whole[: sizes[0]] + whole[sizes[1] :])
    with pytest.raises(LedgerError, match="damaged at byte"):
        LedgerFile(path, "trial")
    path.write_bytes(whole)
    with pytest.raises(LedgerError, match="damaged at byte"):
        LedgerFile(path, "another")


def test_a_second_agent_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = LedgerFile(tmp_path / "ledger", "trial")
    with pytest.raises(LedgerError, match="held by another agent"):
        LedgerFile(tmp_path / "ledger", "trial")
    first.close()
    LedgerFile(tmp_path / "ledger", "trial").close()


def test_after_a_failed_write_nothing_is_appended_until_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = LedgerFile(tmp_path / "ledger", "trial")
    ledger.append(entries()[0])

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            ledger.append(entries()[1])
    with pytest.raises(LedgerError, match="open it again"):
        ledger.append(entries()[1])
    ledger.close()
    assert LedgerFile(tmp_path / "ledger", "trial").entries()[0] == entries()[0]
