"""For tests: die at a named point, as if the power had failed there.

    CONCILIUM_FAILPOINT=after-share            the first time that point is reached
    CONCILIUM_FAILPOINT=after-upload:round=2   when it is reached for model round 2

Points, in the order of a session: `after-advertise` (ADVERTISE acknowledged), `after-share` (SHARE
acknowledged), `before-mask` (nothing masked yet), `after-upload` (MASKED_INPUT acknowledged),
`after-confirm` (CONFIRM acknowledged). A limit names a purpose and its round, e.g. `tags=1`.
"""

from __future__ import annotations

import os
import signal

from secagg.context import Quantity

VARIABLE = "CONCILIUM_FAILPOINT"


def reach(point: str, quantity: Quantity) -> None:
    """Kill this process (SIGKILL: no handler, no flush) if it was asked to die here."""
    name, _, limit = os.environ.get(VARIABLE, "").partition(":")
    if name and name == point and limit in ("", f"{quantity.purpose}={quantity.round}"):
        os.kill(os.getpid(), signal.SIGKILL)
