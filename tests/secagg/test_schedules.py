"""Random schedules: whatever happens, the exact sum of the confirmed silos, or an abort."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from secagg import coordinator, silo
from secagg.context import Quantity
from secagg.errors import SecAggError
from secagg.events import Deadline, Open, Received, Send, SiloEvent
from tests.secagg.world import World, make_world


class Schedules(RuleBasedStateMachine):
    """Silos vanish, return, restart; requests are delayed, repeated and replayed from old
    sessions; deadlines strike at any moment."""

    world: World

    @initialize(n=st.integers(3, 12), ring=st.sampled_from([8, 16, 32]), seed=st.integers(0, 99))
    def start(self, n: int, ring: int, seed: int) -> None:
        self.world = make_world(n, seed=seed, ring=ring, length=50)
        self.sessions = 1
        self.delayed: list[tuple[int, SiloEvent]] = []
        self.outbox: list[Send] = []

    def _deliver(self, index: int, event: SiloEvent) -> None:
        site = self.world.silos[index]
        if not site.alive:
            return
        with suppress(SecAggError):
            self.outbox += site.deliver(event)

    def _submit(self, sent: Send) -> None:
        with suppress(SecAggError):
            self.world.feed(Received(sent.message, sent.parcels))

    @rule(pick=st.integers(0, 11))
    def ask_one(self, pick: int) -> None:
        index = 1 + pick % self.world.roster.size
        event = self.world.session.request_for(index)
        if event is not None:
            self.delayed.append((index, event))
            self._deliver(index, event)

    @rule(steps=st.integers(1, 5))
    def go_on(self, steps: int) -> None:
        """Everybody who is there does one or more whole steps."""
        for _ in range(steps):
            for index in self.world.silos:
                self.ask_one(index - 1)
            self.submit_all()

    @rule(pick=st.integers(0, 1000))
    def submit_any(self, pick: int) -> None:
        if self.outbox:
            self._submit(self.outbox[pick % len(self.outbox)])  # kept: it may arrive again

    @rule()
    def submit_all(self) -> None:
        for sent in list(self.outbox):
            self._submit(sent)

    @rule(pick=st.integers(0, 1000), to=st.integers(0, 11))
    def replay(self, pick: int, to: int) -> None:
        if self.delayed:
            index, event = self.delayed[pick % len(self.delayed)]
            # Mostly to its own silo, at times to a wrong one.
            target = index if pick % 4 else 1 + to % self.world.roster.size
            self._deliver(target, event)

    @rule(pick=st.integers(0, 40))
    def vanish(self, pick: int) -> None:
        if pick < self.world.roster.size:
            self.world.kill(1 + pick)

    @rule(pick=st.integers(0, 11))
    def come_back(self, pick: int) -> None:
        self.world.silos[1 + pick % self.world.roster.size].alive = True

    @rule(pick=st.integers(0, 40))
    def restart(self, pick: int) -> None:
        if pick < self.world.roster.size:
            self.world.silos[1 + pick].restart()

    @rule(pick=st.integers(0, 5))
    def deadline(self, pick: int) -> None:
        if pick == 0:  # seldom: a deadline too early ends most sessions without a sum
            self._strike()

    def _strike(self) -> None:
        with suppress(SecAggError):
            self.world.feed(Deadline())

    @precondition(lambda self: self.world.session.over)
    @rule()
    def next_session(self) -> None:
        summed = isinstance(self.world.session, coordinator.Summed)
        self.world.settle()
        self.sessions += 1
        quantity = self.world.session.context.quantity
        if summed:
            quantity = Quantity("round", quantity.round + 1)
        context = self.world.session.context
        self.world.reopen(
            session=self.sessions,
            quantity=quantity,
            model=bytes([quantity.round % 256]) * 32,
            ring=context.ring,
            length=context.length,
        )

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
        if not hasattr(self, "world"):
            return
        for site in self.world.silos.values():
            site.alive = True
        for _ in range(8):
            for sent in self.outbox:
                self._submit(sent)
            for index in self.world.silos:
                event = self.world.session.request_for(index)
                lost = isinstance(self.world.silos[index].state, silo.Lost)
                if event is not None and not (lost and isinstance(event, Open)):
                    self._deliver(index, event)
            for sent in self.outbox:
                self._submit(sent)
            if self.world.session.over:
                break
            self._strike()
        assert self.world.session.over
        self.never_a_wrong_sum()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=int(os.environ.get("CONCILIUM_SCHEDULES", "200")),
    stateful_step_count=40,
    deadline=None,
)
