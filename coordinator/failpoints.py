"""For tests: die at a named point, as if the power had failed there.

    CONCILIUM_FAILPOINT='after put_result census'     SIGKILL when that point is reached
    CONCILIUM_FAILPOINT='artifact kept#3'             when it is reached for the third time
    CONCILIUM_FAILPOINT_RECORD=points.txt             write down every point that is reached

Every transaction that changes the store is a point before and after its commit, so a new one cannot
be forgotten; the steps on files (artifacts, spool, outputs of the worker) name theirs. `#n` counts
how often this process has reached the point. tests/coordinator/walk.py walks them all.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

VARIABLE, RECORD = "CONCILIUM_FAILPOINT", "CONCILIUM_FAILPOINT_RECORD"
_reached: Counter[str] = Counter()


def reach(point: str) -> None:
    """Kill this process (SIGKILL: no handler, no flush) if it was asked to die here."""
    wanted, record = os.environ.get(VARIABLE), os.environ.get(RECORD)
    if wanted is None and record is None:
        return
    _reached[point] += 1
    name = f"{point}#{_reached[point]}"
    if record is not None:
        with open(record, "a") as file:
            file.write(f"{name}\n")
    if wanted in (name, point):
        os.kill(os.getpid(), signal.SIGKILL)


def transaction(work: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The name of a transaction: its function, and what of its arguments tells the step."""
    name = getattr(work, "__name__", "transaction")
    told: dict[str, Callable[[], Any]] = {
        "put_result": lambda: args[1],
        "set_stage": lambda: args[1],
        "set_state": lambda: args[1],
        "record_artifact": lambda: args[2],
        "open_session": lambda: args[0].quantity,
        "append_event": lambda: f"session {args[1]} {args[4].phase}",
        "end_session": lambda: f"session {args[1]}",
    }
    return f"{name} {told[name]()}" if name in told else name
