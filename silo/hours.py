"""Working hours: when local work may use this machine, by the clock on the wall.

Only the time of day decides, so a night with a change of the clock is simply an hour longer or
shorter, and hours may go over midnight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time

PATTERN = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"


@dataclass(frozen=True)
class Hours:
    """From `begin` until before `end`, over midnight where `end` is the earlier one."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Hours:
        """ "19:00-06:00". Raises ValueError."""
        if not re.fullmatch(PATTERN, text):
            raise ValueError(f"{text!r} are no hours: write them like 19:00-06:00")
        begin, end = (time.fromisoformat(part) for part in text.split("-"))
        return cls(begin, end)

    def open_at(self, moment: datetime) -> bool:
        """Whether work may go on at a local time; the same begin and end mean always."""
        now = moment.time()
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end
