"""What a process that serves for weeks does with memory that it needed for a moment."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def keep_what_is_there() -> None:
    """Call when everything is imported and begun: the collector need not look at that again, which
    makes each later collection a matter of milliseconds."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Collect what only cycles hold, and let the system have what is free.

    Python puts a full collection off until there is a quarter more to look at, and glibc keeps a
    thread's freed memory for that thread: a service whose work wanders from thread to thread
    would hold a round's worth in each.
    """
    gc.collect()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
