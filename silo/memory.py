"""Keeping what is in this process's memory in it."""

from __future__ import annotations

import ctypes
import resource
import sys

import structlog

_PR_SET_DUMPABLE = 4

log = structlog.get_logger(__name__)


def keep_private() -> None:
    """No core dump of this process or its children; on Linux also no debugger, and no reading of
    /proc/PID/mem, by another process of the same user.

    During a session the memory holds seeds, shares and mask keys; a core file would put them on a
    disk where nothing wipes them (prctl(2), PR_SET_DUMPABLE). A child that executes a program is
    open to debuggers again, so secrets of the protocol stay out of the worker.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            log.warning("memory is open to debuggers", errno=ctypes.get_errno())
