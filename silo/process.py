"""What every child process of this site begins with: it gives way, stays in its bounds, keeps its
memory to itself, and ends with its parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import threading

from silo.memory import keep_private

_MIB = 1 << 20
_pause = threading.Event()  # set by a signal, which finds no other way into a running order


def begin(niceness: int, memory_mib: int | None = None) -> None:
    """In the child, once. The parent's death ends it, whatever killed the parent.

    `memory_mib` bounds what it allocates: its data segment and private mappings (RLIMIT_DATA), not
    the images that are mapped from the cache, and not what a GPU holds.
    """
    os.umask(0o077)
    keep_private()  # before the first image is read: what was exec'd is open again
    os.nice(niceness)
    if memory_mib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib * _MIB, memory_mib * _MIB))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGUSR1, lambda *_: _pause.set())
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def pause_requested() -> bool:
    """Whether the parent wants the order under way to leave a checkpoint and end."""
    return _pause.is_set()


def forget_pause() -> None:
    """Before an order: a pause is for the one that was under way."""
    _pause.clear()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
