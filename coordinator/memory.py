"""Giving memory back that a round needed and the next minutes do not."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Let the system have what was freed. glibc keeps a thread's freed memory for that thread; a
    service whose work wanders from thread to thread for weeks would hold a round's worth in each.
    """
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
