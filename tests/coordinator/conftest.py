"""The databases that a store can live in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.coordinator import postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    found = postgres.programs()
    if found is None:
        pytest.skip(postgres.WANTED)
    server = postgres.Server(found)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    server: postgres.Server = request.getfixturevalue("postgres_server")
    return server.new_database()
