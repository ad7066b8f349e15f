"""The driver against the real coordinator core: durable first, restarts anywhere, exact sums."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from secagg import coordinator
from secagg.context import SessionContext
from secagg.errors import Refused
from secagg.events import Deadline, GiveUp, Headers, Open, Received, Send, Settle, Unveil
from secagg.ledger import Aborted, Confirmed, Masked, Opened
from secagg.masking import DTYPES, apply_masks
from secagg.messages import Complaint, Header, Parcel, Step
from secagg.primitives import Secret, derive, unlock
from secagg.silo import SiloParty
from silo.files import write_file
from silo.ledger import LedgerFile
from silo.protocol import Protocol
from tests.secagg.world import make_context, make_roster


@dataclass
class Site:
    """One silo on a disk of its own."""

    party: SiloParty
    folder: Path
    vector: np.ndarray
    protocol: Protocol = field(init=False)
    ledger: LedgerFile = field(init=False)

    def start(self) -> None:
        self.ledger = LedgerFile(self.folder / "ledger", "trial")
        self.protocol = Protocol(self.party, self.ledger, self.folder, self.folder / "shares.key")

    def restart(self) -> None:
        self.ledger.close()
        self.start()


class Trial:
    """Silos with their drivers, and the coordinator's core."""

    def __init__(self, folder: Path, n: int = 4, **changes: object) -> None:
        self.roster, keys = make_roster(n)
        self.sites: dict[int, Site] = {}
        self.session: coordinator.CoordinatorState
        self.sum: np.ndarray | None = None
        rng = np.random.default_rng(0)
        for index, key in enumerate(keys, start=1):
            home = folder / str(index)
            home.mkdir()
            vector = rng.integers(0, 2**16, 1000, dtype="<u2")
            vector.tofile(home / "vector")
            party = SiloParty(self.roster, index, key, Secret(os.urandom(32)), os.urandom)
            self.sites[index] = Site(party, home, vector)
            self.sites[index].start()
        self.open(**changes)

    def open(self, **changes: object) -> None:
        self.context = make_context(self.roster, **changes)
        self.session = coordinator.open_session(self.roster, self.context)
        self.sum = None

    def deliver(self, index: int) -> list[Send]:
        """What the silo answers to what it is asked now."""
        site, request = self.sites[index], self.session.request_for(index)
        if request is None or isinstance(request, Settle):
            return []
        if isinstance(request, Open):
            return site.protocol.open(request.context, site.folder / "vector")
        return site.protocol.handle(request)

    def feed(self, sends: list[Send]) -> None:
        for send in sends:
            self.session, effects = self.session.handle(Received(send.message, send.parcels))
            for effect in effects:
                if isinstance(effect, Unveil):
                    self._unveil(effect)

    def _unveil(self, effect: Unveil) -> None:
        total = np.zeros(self.context.length, DTYPES[self.context.ring])
        for i in effect.survivors:
            total += np.fromfile(self.sites[i].protocol.masked_vector(self.context), total.dtype)
        apply_masks(total, effect.keys)
        self.sum = total

    def step(self, *without: int) -> None:
        """Everybody but `without` answers the current step once."""
        for index in self.sites:
            if index not in without:
                self.feed(self.deliver(index))

    def expected(self, *indices: int) -> np.ndarray:
        total = np.zeros(1000, "<u2")
        for i in indices:
            total += self.sites[i].vector
        return total


def test_five_steps_on_disk_give_the_exact_sum_and_a_settled_ledger(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    for _ in range(5):
        trial.step()
    assert trial.sum is not None
    assert np.array_equal(trial.sum, trial.expected(1, 2, 3, 4))
    request = trial.session.request_for(1)
    assert isinstance(request, Settle)
    record = trial.sites[1].protocol.settle(request)
    assert record is not None
    assert record.settled is not None
    assert record.settled.included
    assert not trial.sites[1].protocol.masked_vector(trial.context).exists()


def test_a_task_that_comes_twice_gets_the_same_messages(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    for _ in range(5):
        first, again = trial.deliver(1), trial.deliver(1)
        assert first
        assert [s.message for s in first] == [s.message for s in again]
        assert [dict(s.parcels) for s in first] == [dict(s.parcels) for s in again]
        entries = len(trial.sites[1].ledger.entries())
        trial.deliver(1)
        assert len(trial.sites[1].ledger.entries()) == entries
        trial.step()


@pytest.mark.parametrize("step", range(5))
def test_a_silo_restarted_before_a_step_is_dropped_or_summed_and_never_masks_twice(
    tmp_path: Path, step: int
) -> None:
    trial = Trial(tmp_path)
    for _ in range(step):
        trial.step()
    trial.sites[2].restart()
    for _ in range(step, 5):
        if step in (1, 2, 3) and 2 in trial.session.awaited:
            with pytest.raises(Refused, match="keys of the session are gone"):
                trial.deliver(2)
            trial.step(2)
            trial.session, _ = trial.session.handle(Deadline())
        else:
            trial.step()
    assert trial.sum is not None
    # Nothing was promised before step 0, and a confirmation is in the ledger with all it needs.
    summed = {0: (1, 2, 3, 4), 1: (1, 3, 4), 2: (1, 3, 4), 3: (1, 2, 3, 4), 4: (1, 2, 3, 4)}
    assert np.array_equal(trial.sum, trial.expected(*summed[step]))
    masked = [e for e in trial.sites[2].ledger.entries() if isinstance(e, Masked)]
    assert len(masked) == (2 in summed[step])


def test_the_ledger_entry_is_there_before_the_message_is(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    site = trial.sites[1]
    site.ledger.close()
    with pytest.raises(Exception, match="open it again"):
        trial.deliver(1)
    site.start()
    assert site.ledger.entries() == ()
    assert trial.deliver(1)
    assert [type(e) for e in site.ledger.entries()] == [Opened]


def test_after_a_disk_failure_while_masking_is_recorded_nothing_is_masked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transition has wiped the mask keys; masking again would add keystreams of zero keys."""
    trial = Trial(tmp_path)
    trial.step()
    trial.step()
    site = trial.sites[1]

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(site.ledger, "append", fail)
        with pytest.raises(OSError, match="No space"):
            trial.deliver(1)
    with pytest.raises(Refused, match="keys of the session are gone"):
        trial.deliver(1)


def test_a_disk_that_is_full_while_the_vector_is_written_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path)
    trial.step()
    trial.step()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("silo.protocol.replacing", fail)
        with pytest.raises(OSError, match="No space"):
            trial.deliver(1)
    for _ in range(3):
        trial.step()
    assert trial.sum is not None
    assert np.array_equal(trial.sum, trial.expected(1, 2, 3, 4))


def test_the_masked_vector_is_not_the_vector_and_is_what_was_promised(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.step()
    trial.step()
    trial.deliver(1)
    site = trial.sites[1]
    masked = np.fromfile(site.protocol.masked_vector(trial.context), "<u2")
    assert np.count_nonzero(masked == site.vector) < 10
    assert np.array_equal(np.fromfile(site.folder / "vector", "<u2"), site.vector)


def test_a_dealer_that_contradicts_its_header_is_complained_about(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.step()
    trial.step()
    request = trial.session.request_for(1)
    assert isinstance(request, Headers)
    header = Header.decode(request.messages[2].body)
    lie = replace(header, dealt=(header.dealt[0]._replace(share_b=bytes(32)), *header.dealt[1:]))
    signed = trial.sites[3].party.sign(Step.SHARE, trial.context.digest, lie.encode())
    messages = (*request.messages[:2], signed, request.messages[3])
    (send,) = trial.sites[1].protocol.handle(Headers(messages, request.parcels))
    assert send.message.step is Step.COMPLAIN
    assert Complaint.decode(send.message.body).accused == 3


def test_what_only_the_coordinator_can_have_done_accuses_nobody(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.step()
    trial.step()
    request = trial.session.request_for(1)
    assert isinstance(request, Headers)
    m = request.messages
    forged = replace(m[2], signature=bytes(64))
    for lie in (
        Headers(m, {**request.parcels, 3: Parcel(bytes(64), b"")}),
        Headers((*m[:2], forged, m[3]), request.parcels),
    ):
        with pytest.raises(Refused):
            trial.sites[1].protocol.handle(lie)


def test_what_is_masked_is_the_vector_that_the_session_was_opened_with(tmp_path: Path) -> None:
    """Between, a coordinator proposes another session, and lets it be: its vector, from a model of
    the coordinator's choice, is computed under the same name."""
    trial = Trial(tmp_path)
    trial.step()
    write_file(tmp_path / "1" / "vector", np.full(1000, 7, "<u2").tobytes())
    for _ in range(4):
        trial.step()
    assert trial.sum is not None
    assert np.array_equal(trial.sum, trial.expected(1, 2, 3, 4))


def test_a_vector_of_another_length_opens_nothing(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    (tmp_path / "1" / "vector").write_bytes(bytes(10))
    with pytest.raises(Exception, match="has 10 bytes, the session's has 2000"):
        trial.deliver(1)
    assert trial.sites[1].ledger.entries() == ()


def test_after_an_abort_certificate_the_same_quantity_may_be_opened_again(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    for _ in range(2):
        trial.step()
    trial.step(3, 4)
    trial.session, _ = trial.session.handle(Deadline())
    trial.step()
    certificate = trial.session.request_for(1)
    assert isinstance(certificate, Settle)
    again = make_context(trial.roster, session=2, previous=certificate.certificate.digest)
    refused: SessionContext | None = None
    try:
        trial.sites[1].protocol.open(again, tmp_path / "1" / "vector")
    except Refused:
        refused = again
    assert refused == again, "in doubt until the certificate is there"
    trial.sites[1].protocol.settle(certificate)
    assert trial.sites[1].protocol.open(again, tmp_path / "1" / "vector")


def opened_by_what_is_on_disk(site: Site) -> bool:
    """Whether a thief of everything at this site can read the shares in its ledger."""
    record = next(e for e in site.ledger.entries() if isinstance(e, Confirmed))
    salt = (site.folder / "shares.key").read_bytes()
    key = derive(site.party.ledger_key, salt, b"shares of a session")
    try:
        unlock(key, record.locked_shares, record.ctx)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("end", ["aborted", "summed"])
def test_shares_cannot_be_opened_any_more_once_their_session_has_ended(
    tmp_path: Path, end: str
) -> None:
    trial = Trial(tmp_path)
    for _ in range(4):
        trial.step()
    site = trial.sites[1]
    assert opened_by_what_is_on_disk(site)
    site.protocol.handle(GiveUp(bytes(32)))  # another session: this one still needs them
    site.restart()
    assert opened_by_what_is_on_disk(site)
    if end == "aborted":
        site.protocol.handle(GiveUp(trial.context.digest))
    else:
        trial.step()
        certificate = trial.session.request_for(1)
        assert isinstance(certificate, Settle)
        site.protocol.settle(certificate)
    assert not opened_by_what_is_on_disk(site)


def test_a_crash_between_abort_and_the_end_of_its_shares_ends_them_at_the_next_start(
    tmp_path: Path,
) -> None:
    trial = Trial(tmp_path)
    for _ in range(4):
        trial.step()
    site = trial.sites[1]
    site.ledger.append(Aborted(trial.context.digest))
    assert opened_by_what_is_on_disk(site)
    site.restart()
    assert not opened_by_what_is_on_disk(site)
