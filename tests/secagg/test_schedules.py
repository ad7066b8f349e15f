"""Random schedules: whatever happens, the exact sum of the confirmed silos, or an abort.

`--hypothesis-show-statistics` tells how the sessions ended and how many silos they lost;
`python -m tests.secagg.soak` runs many more of them and keeps count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, TypeVar

import numpy as np
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from secagg import coordinator, primitives
from secagg.context import Quantity
from secagg.errors import SecAggError
from secagg.events import (
    Adverts,
    Confirmations,
    Deadline,
    Headers,
    Open,
    Received,
    Send,
    SiloEvent,
    Survivors,
)
from secagg.messages import Header, Signed
from tests.secagg.world import World, make_world

T = TypeVar("T")
# Pure functions, called a dozen times with the same arguments where a dozen silos live in one
# process: half of the time of a schedule went there.
_verify, _decode = primitives.verify, Header.decode
_verify_once, _decode_once = lru_cache(4096)(_verify), lru_cache(4096)(_decode)


class Schedules(RuleBasedStateMachine):
    """Silos vanish, return, restart; requests are delayed, repeated and replayed from old
    sessions; single silos are shown another world; deadlines strike at any moment."""

    world: World
    seen: ClassVar[Counter[str]] = Counter()
    """What happened in all schedules of this process."""

    def __init__(self) -> None:
        super().__init__()
        primitives.verify, Header.decode = _verify_once, _decode_once

    @initialize(n=st.integers(3, 12), ring=st.sampled_from([8, 16, 32]), seed=st.integers(0, 99))
    def start(self, n: int, ring: int, seed: int) -> None:
        self.world = make_world(n, seed=seed, ring=ring, length=50)
        self.sessions = 1
        self.delayed: list[tuple[int, SiloEvent]] = []
        self.outbox: dict[Signed, Send] = {}

    def _index(self, pick: int) -> int:
        return 1 + pick % self.world.roster.size

    def _deliver(self, index: int, request: SiloEvent) -> None:
        site = self.world.silos[index]
        if not site.alive:
            return
        with suppress(SecAggError):
            self.outbox |= {sent.message: sent for sent in site.deliver(request)}

    def _submit(self, sent: Send) -> None:
        with suppress(SecAggError):
            self.world.feed(Received(sent.message, sent.parcels))

    def _strike(self) -> None:
        with suppress(SecAggError):
            self.world.feed(Deadline())

    def _step(self, without: Collection[int] = ()) -> None:
        for index in self.world.silos:
            if index not in without:
                self.ask_one(index - 1)
        self.submit_all()

    @rule(pick=st.integers(0, 11))
    def ask_one(self, pick: int) -> None:
        index = self._index(pick)
        request = self.world.session.request_for(index)
        if request is not None:
            self.delayed.append((index, request))
            self._deliver(index, request)

    @rule(steps=st.integers(1, 5))
    def go_on(self, steps: int) -> None:
        """Everybody who is there does one or more whole steps."""
        for _ in range(steps):
            self._step()

    @rule(steps=st.integers(0, 3), picks=st.sets(st.integers(0, 11), min_size=1, max_size=3))
    def drop_out(self, steps: int, picks: set[int]) -> None:
        """Whole steps, then one that as many miss as the threshold allows; they come back later."""
        for _ in range(steps):
            self._step()
        spare = self.world.roster.size - self.world.roster.threshold
        gone = [self._index(pick) for pick in sorted(picks)][:spare]
        self._step(without=gone)
        self.world.kill(*gone)
        self._strike()
        self._step()

    @rule(pick=st.integers(0, 11), cut=st.integers(0, 11))
    def split_view(self, pick: int, cut: int) -> None:
        """One silo is shown another world than the rest: a model, or a set without one silo."""
        index = self._index(pick)
        request = self.world.session.request_for(index)
        match request:
            case Open(context):
                self._deliver(index, Open(replace(context, model=b"other" + bytes(27))))
            case Adverts(messages):
                self._deliver(index, Adverts(_without(messages, cut)))
            case Headers(messages, parcels):
                self._deliver(index, Headers(_without(messages, cut), parcels))
            case Survivors(survivors):
                self._deliver(index, Survivors(_without(survivors, cut)))
            case Confirmations(messages):
                self._deliver(index, Confirmations(_without(messages, cut)))
            case _:
                return
        self._note(f"split view of {type(request).__name__}")

    @rule(pick=st.integers(0, 1000))
    def submit_any(self, pick: int) -> None:
        if self.outbox:
            sent = list(self.outbox.values())[pick % len(self.outbox)]
            self._submit(sent)  # kept: it may arrive again

    @rule()
    def submit_all(self) -> None:
        for sent in list(self.outbox.values()):
            self._submit(sent)

    @rule(pick=st.integers(0, 1000), to=st.integers(0, 11))
    def replay(self, pick: int, to: int) -> None:
        """A request again, also one of an older session."""
        if self.delayed:
            index, request = self.delayed[pick % len(self.delayed)]
            # Mostly to its own silo, at times to a wrong one.
            self._deliver(index if pick % 4 else self._index(to), request)

    @rule(pick=st.integers(0, 40))
    def vanish(self, pick: int) -> None:
        if pick < self.world.roster.size:
            self.world.kill(1 + pick)

    @rule(pick=st.integers(0, 11))
    def come_back(self, pick: int) -> None:
        self.world.silos[self._index(pick)].alive = True

    @rule(pick=st.integers(0, 40))
    def restart(self, pick: int) -> None:
        if pick < self.world.roster.size:
            self.world.silos[1 + pick].restart()

    @rule(pick=st.integers(0, 5))
    def deadline(self, pick: int) -> None:
        if pick == 0:  # seldom: a deadline too early ends most sessions without a sum
            self._strike()

    @precondition(lambda self: self.world.session.over)
    @rule()
    def next_session(self) -> None:
        self._count()
        for site in self.world.silos.values():
            site.alive = True
        # A silo whose view was split confirmed another set: it refuses the certificate and stays
        # in doubt, and out of the study, until its operators have looked.
        for index in self.world.silos:
            with suppress(SecAggError):
                self.world.settle(index)
        context = self.world.session.context
        quantity = context.quantity
        if isinstance(self.world.session, coordinator.Summed):
            quantity = Quantity("round", quantity.round + 1)
        self.sessions += 1
        self.outbox = dict(list(self.outbox.items())[-50:])
        self.world.reopen(
            session=self.sessions,
            quantity=quantity,
            model=bytes([quantity.round % 256]) * 32,
            ring=context.ring,
            length=context.length,
        )

    def _count(self) -> None:
        session = self.world.session
        dropped = ""
        if isinstance(session, coordinator.Summed):
            lost = self.world.roster.size - len(session.certificate.survivors)
            dropped = f" without {lost} silos" if self.world.sum is not None else " in vain"
        self._note(f"ended {session.phase}{dropped}")

    def _note(self, what: str) -> None:
        self.seen[what] += 1
        event(what)

    @invariant()
    def never_a_wrong_sum(self) -> None:
        if not hasattr(self, "world") or self.world.sum is None:
            return
        session = self.world.session
        assert isinstance(session, coordinator.Summed)
        expected = self.world.expected(session.certificate.survivors)
        np.testing.assert_array_equal(self.world.sum, expected)

    def teardown(self) -> None:
        """Never a wait without end: once all are back, the session reaches an end."""
        try:
            if hasattr(self, "world"):
                self._to_the_end()
        finally:
            primitives.verify, Header.decode = _verify, _decode

    def _to_the_end(self) -> None:
        for site in self.world.silos.values():
            site.alive = True
        for _ in range(8):
            self.submit_all()
            self._step()
            if self.world.session.over:
                break
            self._strike()
        assert self.world.session.over
        self.never_a_wrong_sum()
        self._count()
        used = Counter(key for site in self.world.silos.values() for key in site.mask_keys)
        assert max(used.values(), default=0) <= 2  # a pair's key at either end, and never again
        self.seen["schedules"] += 1


def _without(values: tuple[T, ...], cut: int) -> tuple[T, ...]:
    at = cut % len(values)
    return values[:at] + values[at + 1 :]


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=int(os.environ.get("CONCILIUM_SCHEDULES", "150")),
    stateful_step_count=30,
    deadline=None,
)
