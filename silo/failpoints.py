"""For tests: die at a named point, as if the power had failed there.

    CONCILIUM_FAILPOINT=after-share            the first time that point is reached
    CONCILIUM_FAILPOINT=after-upload:round=2   when it is reached for model round 2
    CONCILIUM_FAILPOINT_RECORD=points.txt      write down every point that is reached

Points of a session, in order: `after-advertise` (ADVERTISE acknowledged), `after-share` (SHARE
acknowledged), `before-mask` (nothing masked yet), `after-upload` (MASKED_INPUT acknowledged),
`after-confirm` (CONFIRM acknowledged). A limit names a purpose and its round, e.g. `tags=1`. Every
file that is written and every entry of a ledger is a point before and after, so none can be
forgotten: `before 3.certificate`, `after ledger masked:round=2`. Only the agent dies, never its
worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal

from secagg.context import Quantity

VARIABLE, RECORD = "CONCILIUM_FAILPOINT", "CONCILIUM_FAILPOINT_RECORD"


def reach(point: str, quantity: Quantity | None = None) -> None:
    """Kill this process (SIGKILL: no handler, no flush) if it was asked to die here."""
    wanted, record = os.environ.get(VARIABLE), os.environ.get(RECORD)
    if (wanted is None and record is None) or multiprocessing.parent_process() is not None:
        return
    at = "" if quantity is None else f":{quantity.purpose}={quantity.round}"
    if record is not None:
        with open(record, "a") as file:
            file.write(f"{point}{at}\n")
    if wanted in (point, f"{point}{at}"):
        os.kill(os.getpid(), signal.SIGKILL)
