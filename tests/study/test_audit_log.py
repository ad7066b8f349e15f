"""The audit log: no edit, deletion or reordering goes unseen where a silo has signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from study.audit_log import (
    GENESIS,
    AuditError,
    Entry,
    Head,
    read_entries,
    read_heads,
    verify,
    write_entries,
)

KEY = Ed25519PrivateKey.generate()


def chained(*events: tuple[str, dict[str, object]]) -> list[Entry]:
    entries, digest = list[Entry](), GENESIS
    for place, (kind, detail) in enumerate(events, start=1):
        draft = Entry(place, 1e9 + place / 7, "s", kind, json.dumps(detail), "")
        digest = draft.follows(digest)
        entries.append(replace(draft, digest=digest))
    return entries


EVENTS: list[tuple[str, dict[str, object]]] = [
    ("coordinator.made", {}),
    ("site.joined", {"site": "north", "identity": KEY.public_key().public_bytes_raw().hex()}),
    ("study.created", {"roster": "ABCD"}),
    ("session.summed", {"session": 1}),
]
SIGNED = Head.sign(KEY, "north", 4, chained(*EVENTS)[3].digest)
LOG = chained(*EVENTS, ("log.countersigned", vars(SIGNED)), ("study.finished", {}))


def test_an_untouched_log_verifies_and_says_how_far_it_is_certain() -> None:
    found = verify(LOG)
    assert (found.entries, found.heads, found.countersigned) == (6, {"north": 4}, 4)
    assert verify(read_entries("".join(write_entries(LOG)))) == found


def rewritten(change: Callable[[list[tuple[str, dict[str, object]]]], None]) -> list[Entry]:
    """The log as somebody writes it anew who can compute every digest."""
    events = [(entry.kind, json.loads(entry.detail)) for entry in LOG]
    change(events)
    return chained(*events)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("field", ["place", "at", "study", "kind", "detail", "digest"])
def test_an_edit_of_any_field_of_any_entry_is_found(place: int, field: str) -> None:
    value = getattr(LOG[place], field)
    changed: object = value + 1 if isinstance(value, int | float) else f"{value} "
    log = [*LOG]
    log[place] = replace(LOG[place], **{field: changed})  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="changed at or before entry"):
        verify(log)


@pytest.mark.parametrize("place", range(5))
def test_a_deletion_and_a_swap_are_found(place: int) -> None:
    with pytest.raises(AuditError, match="changed at or before"):
        verify(LOG[:place] + LOG[place + 1 :])
    swapped = [*LOG]
    swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
    with pytest.raises(AuditError, match="changed at or before"):
        verify(swapped)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_log_written_anew_contradicts_what_was_signed(place: int) -> None:
    def edit(events: list[tuple[str, dict[str, object]]]) -> None:
        events[place] = (events[place][0], {"roster": "other"})

    with pytest.raises(AuditError, match="north signed another one"):
        verify(rewritten(edit))


def test_without_its_signatures_only_the_sites_own_copies_find_it() -> None:
    def edit(events: list[tuple[str, dict[str, object]]]) -> None:
        events[2] = ("study.created", {"roster": "other"})
        del events[4]

    anew = rewritten(edit)
    assert verify(anew).countersigned == 0
    with pytest.raises(AuditError, match="north signed another one"):
        verify(anew, [SIGNED])


def test_a_log_cut_before_a_signed_entry_is_found_by_the_sites_copy() -> None:
    assert verify(LOG[:3]).countersigned == 0
    with pytest.raises(AuditError, match="north signed entry 4, the audit log ends at 3"):
        verify(LOG[:3], [SIGNED])
    assert verify(LOG[:4], [SIGNED]).countersigned == 4


def test_a_signature_by_another_key_is_no_signature() -> None:
    forged = Head.sign(Ed25519PrivateKey.generate(), "north", 4, LOG[3].digest)
    for head in (forged, replace(SIGNED, site="south"), replace(SIGNED, signature="zz")):
        with pytest.raises(AuditError, match="is not its own"):
            verify(LOG, [head])


def test_files_that_are_not_exports_are_refused_with_line_and_field() -> None:
    good = json.dumps(vars(SIGNED))
    for text, words in (
        ("nonsense", "line 1: it"),
        (good + "\n{}", "line 2: site"),
        (good.replace('"place": 4', '"place": "4"'), "line 1: place"),
        (good[:-1] + ', "more": 1}', "line 1: more"),
    ):
        with pytest.raises(AuditError, match=words):
            read_heads(text)
