"""What a process that serves for weeks does with memory that it needed for a moment."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT, _LARGE = 32 << 20, 4 << 20


def keep_buffers() -> None:
    """Have glibc keep up to 32 MiB of freed memory, until `give_back`, map blocks of 4 MiB and more
    only, and take all smaller ones from one heap.

    By itself it gives what is free above 2 MiB back to the system and asks for it again: each chunk
    of an upload then costs its page faults anew, a seventh of the processor time of a session with
    a large model. And it has a heap for each of a dozen threads, of which each keeps what the
    largest piece of work that ever came to that thread has left in pieces: over hundreds of rounds
    35 MiB more. One heap is enough, since most threads wait for Python's lock anyway.

    Call it before there are threads: one that has a heap of its own keeps it.
    """
    with suppress(AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_ARENA_MAX, 1)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)


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
