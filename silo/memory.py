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

    During a session the memory holds seeds, shares and mask keys, and a worker's holds images; a
    core file would put them on a disk where nothing wipes them. A limit of 0 is not asked where
    dumps are piped to a program (core(5)), a limit of 1 byte is: the kernel then starts none, and
    writes no file either, for which it wants room for a page (fs/coredump.c). Dumpable is a
    process's own (prctl(2), PR_SET_DUMPABLE) and ends with exec, so each child calls this anew.
    """
    # A hard limit of 0, by the service's unit for example, cannot be raised.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    most = 0 if hard == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            log.warning("memory is open to debuggers", errno=ctypes.get_errno())
