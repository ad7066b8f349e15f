"""Who is in contact, how far their work is, and what went over the wire.

All of it is for people and for closing steps early: it is kept in memory and written to the store
once a second, since losing a second of it costs nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from coordinator.registry import record_contacts
from coordinator.schema import progress, traffic

# The time of the last contact in the store is at most this old while a silo waits in a long poll.
_NOTE_EVERY = 5.0


class Bell:
    """Wakes everybody who waits for a change; whoever waits looks again at what it waits for."""

    def __init__(self) -> None:
        self.rung = 0
        self._event = asyncio.Event()

    def ring(self) -> None:
        self.rung += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float, since: int | None = None) -> None:
        """Until the bell rings, `seconds` at most; not at all where it has rung since `since`."""
        if since is not None and since != self.rung:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._event.wait()


@dataclass(frozen=True)
class Progress:
    """What a silo says it is doing. Steps are the plan's, so they say nothing about data."""

    session: int
    activity: str
    step: int
    steps: int


class Contacts:
    """Signs of life of the silos, by site name."""

    def __init__(self) -> None:
        # Whether somebody is in contact is told by a clock that nobody sets.
        self._since = math.inf
        self._heard: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._progress: dict[tuple[str, str], Progress] = {}
        self._traffic: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._fresh: set[str] = set()
        self._noted: dict[str, float] = {}

    def listening(self) -> None:
        """From now on silos can call. Before, nobody is absent: a standby may wait for weeks."""
        self._since = time.monotonic()

    @contextmanager
    def call(self, site: str) -> Iterator[None]:
        """While a call of `site` is open it is in contact: a long poll is a sign of life."""
        self._calls[site] += 1
        self._mark(site)
        try:
            yield
        finally:
            self._calls[site] -= 1
            self._mark(site)

    def _mark(self, site: str) -> None:
        self._seen[site], self._heard[site] = time.time(), time.monotonic()
        self._fresh.add(site)

    def present(self, site: str, within: float) -> bool:
        """Whether there was a sign of life in the last `within` seconds."""
        heard = self._heard.get(site)
        return self._calls[site] > 0 or (heard is not None and time.monotonic() - heard < within)

    def absent(self, site: str, within: float) -> bool:
        """Whether there was none, although this service has listened for that long."""
        return not self.present(site, within) and time.monotonic() - self._since >= within

    def progress(self, study: str, site: str, now: Progress) -> None:
        self._progress[study, site] = now

    def count(self, study: str, site: str, *, received: int = 0, sent: int = 0) -> None:
        """Add to the bytes of messages that went between a site and us for a study."""
        both = self._traffic[study, site]
        both[0] += received
        both[1] += sent

    def take(self) -> News:
        """What is new since the last time."""
        now = time.time()
        open_calls = {site for site, calls in self._calls.items() if calls}
        live = {s for s in open_calls if now - self._noted.get(s, 0.0) > _NOTE_EVERY}
        live |= {s for s in self._fresh if now - self._noted.get(s, 0.0) > _NOTE_EVERY / 5}
        self._noted.update(dict.fromkeys(live, now))
        seen = {site: now if self._calls[site] else self._seen[site] for site in live}
        news = News(seen, self._progress, self._traffic)
        self._fresh, self._progress = self._fresh - live, {}
        self._traffic = defaultdict(lambda: [0, 0])
        return news


@dataclass(frozen=True)
class News:
    """Signs of life, progress and traffic that are not in the store yet."""

    seen: dict[str, float]
    progress: dict[tuple[str, str], Progress]
    traffic: Mapping[tuple[str, str], list[int]]

    def __bool__(self) -> bool:
        return bool(self.seen or self.progress or self.traffic)


def record(c: Connection, news: News) -> None:
    """Write news to the store, as one transaction."""
    record_contacts(c, news.seen)
    for (study, site), now in news.progress.items():
        where = (progress.c.study == study) & (progress.c.site == site)
        c.execute(delete(progress).where(where))
        values = vars(now) | {"study": study, "site": site, "at": time.time()}
        c.execute(insert(progress).values(**values))
    for (study, site), (received, sent) in news.traffic.items():
        _add_traffic(c, study, site, received, sent)


def _add_traffic(c: Connection, study: str, site: str, received: int, sent: int) -> None:
    where = (traffic.c.study == study) & (traffic.c.site == site)
    if c.execute(select(traffic.c.site).where(where)).first() is None:
        c.execute(insert(traffic).values(study=study, site=site, received=received, sent=sent))
        return
    more = {"received": traffic.c.received + received, "sent": traffic.c.sent + sent}
    c.execute(update(traffic).where(where).values(**more))
