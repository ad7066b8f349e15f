"""Between two answers: the agent is restarted, or there are two of it."""

from __future__ import annotations

import pytest

from secagg import coordinator
from secagg.errors import Reason
from secagg.events import Adverts, Confirmations, Headers, Open, Survivors
from secagg.ledger import Masked
from secagg.messages import Step
from silo import agent
from silo.files import InUse
from study.quantity import CensusWork
from tests.attacks.stage import OTHERS, Stage


async def test_a_restart_before_the_input_leaves_no_keys_and_no_second_try(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    adverts = fresh.request(Adverts)
    await fresh.restart()
    await fresh.refuses(adverts, Reason.KEYS_LOST)
    await fresh.refuses(Open(fresh.session.context), Reason.SESSION_NOT_NEW)


async def test_a_restart_after_sharing_masks_nothing(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    event = fresh.request(Headers)
    await fresh.restart()
    await fresh.refuses(event, Reason.KEYS_LOST)
    assert not any(isinstance(entry, Masked) for entry in fresh.entries())


async def test_an_input_is_never_masked_twice(fresh: Stage) -> None:
    """After a restart the others can still unmask what was delivered; nothing else comes."""
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    headers = fresh.request(Headers)
    await fresh.until(coordinator.Confirming)
    survivors = fresh.request(Survivors)
    await fresh.restart()
    await fresh.refuses(headers, f"{Reason.KEYS_LOST.value}: session {fresh.number}")
    await fresh.refuses(survivors, Reason.KEYS_LOST, again=True)
    assert sum(isinstance(entry, Masked) for entry in fresh.entries()) == 1


async def test_answers_after_a_restart_are_the_same_bytes(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Confirming)
    survivors = fresh.request(Survivors)
    first = await fresh.ask(survivors)
    await fresh.restart()
    again = await fresh.ask(survivors)
    assert again.submitted == first.submitted
    confirmed = []
    for i in OTHERS:
        confirmed += [sent.message for sent in fresh.peers[i].deliver(survivors)]
    event = Confirmations((*confirmed[:2], *first.messages, *confirmed[2:]))
    unmasked = await fresh.ask(event)
    assert unmasked.steps == [Step.UNMASK]
    await fresh.restart()
    assert (await fresh.ask(event)).submitted == unmasked.submitted
    # Other confirmations of the same set change nothing about whose shares are given.
    fewer = await fresh.ask(Confirmations(event.messages[:4]))
    assert fewer.submitted == unmasked.submitted


async def test_a_second_agent_of_the_same_home_does_not_start(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    with pytest.raises(InUse, match="held by another agent on this machine"):
        await agent.run(fresh.victim.home)
    await fresh.harmless(fresh.request(Adverts))
