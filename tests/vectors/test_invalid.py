"""The writer of the invalid requests still writes what is recorded."""

from __future__ import annotations

from tests.vectors import generate, invalid


def test_the_recorded_invalid_requests_are_what_their_writer_writes() -> None:
    recorded = (generate.FOLDER / "invalid.json").read_text("utf-8")
    assert generate.text_of(invalid.cases()) == recorded
