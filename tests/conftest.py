"""What has to be settled before the first test module is imported."""

import os
import sqlite3
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()

# Properties, not speed: one stall of a busy machine among thousands of examples is no failure.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

# @triton.jit reads it when it decorates, and many tests import `kernels` in passing. A process
# that compiles ahead of time, or that a test starts as a service, has to drop it again.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def _nobody_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so none of this process's files has to reach the disk: a loop that
    silos and coordinator share would stand still meanwhile. Programs that tests start do sync."""
    from coordinator import store

    prepare = store._prepare_sqlite

    def prepare_unsynced(connection: sqlite3.Connection, record: object) -> None:
        prepare(connection, record)
        connection.execute("PRAGMA synchronous = OFF")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_prepare_sqlite", prepare_unsynced)
        patch.setattr(os, "fsync", lambda _file: None)
        yield
