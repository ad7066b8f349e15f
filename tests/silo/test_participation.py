"""One study's loop against a coordinator that misbehaves: refusals, stale work, wrong outcomes."""

from __future__ import annotations

import asyncio
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from concilium.cli import main
from concilium.status import silo_page
from protos.v1 import coordination_pb2 as pb
from secagg.context import SessionContext
from secagg.ledger import Masked, Opened, Settled
from secagg.messages import Signed, Step
from secagg.primitives import Secret
from secagg.roster import Roster
from secagg.silo import SiloParty
from silo import admin, participation
from silo.config import Data, Policy, SiloConfig, Site
from silo.errors import DataError, ProposalRefused
from silo.files import read_json, write_json
from silo.heads import Heads
from silo.home import SiloHome
from silo.ledger import LedgerFile
from silo.model_size import parameter_count
from silo.offers import Terms, keep_offer, pin
from silo.participation import Participation, Tools
from silo.status import Status
from study.plan import Plan
from study.quantity import (
    CensusWork,
    RoundWork,
    TagsWork,
    count_encoding,
    encode_work,
    session_context,
)
from tests.silo.studies import make_plan, make_roster

PLAN = make_plan()
ROSTER, KEYS = make_roster(PLAN)


class ScriptedClient:
    """Gives out tasks in order, then idles; remembers what it was told."""

    def __init__(self, *tasks: pb.Task) -> None:
        self.tasks = list(tasks)
        self.standing: pb.Task | None = None
        self.submitted: list[pb.SubmitRequest] = []
        self.refusals: list[tuple[int, str]] = []
        self.left: list[str] = []
        self.lie = ""
        self.dripping = False
        self.idle = asyncio.Event()

    async def next_task(self, study: str, settled: int, wait: int, epoch: int) -> pb.Task:
        if wait == 0 and self.standing is not None:
            return self.standing
        if self.tasks:
            return self.tasks.pop(0)
        self.idle.set()
        await asyncio.sleep(0.02)
        return pb.Task(study=study, idle=pb.Idle())

    async def leave_study(self, study: str, reason: str) -> None:
        self.left.append(reason)

    async def download(self, *_: object, at_most: int) -> None:
        """Drips for ever, or turns out to be `lie`."""
        if self.lie:
            raise ProposalRefused(self.lie)
        self.dripping = True
        await asyncio.sleep(60)

    async def submit(self, request: pb.SubmitRequest) -> None:
        self.submitted.append(request)

    async def report_refusal(self, study: str, session: int, reason: str) -> None:
        self.refusals.append((session, reason))

    async def report_progress(self, request: object) -> None:
        pass


class Vectors:
    """Prepares a census at once, or fails, or takes for ever."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "vector"
        self.path.write_bytes(count_encoding(4).encode({"count": 30}).tobytes())
        self.error: Exception | None = None
        self.slow = self.ended = False

    async def prepare(self, *_: Any) -> Path:
        if self.error:
            raise self.error
        if self.slow:
            await asyncio.sleep(60)
        return self.path

    def settle(self, record: object) -> None:
        pass

    def forget_artifacts(self, wanted: object) -> None:
        pass

    def end(self) -> None:
        self.ended = True


def opened(session: int = 1, **changes: Any) -> pb.Task:
    context = session_context(ROSTER, PLAN.digest(), 16, CensusWork(), session=session, round=1)
    values = {**vars(context), **changes}
    values = {k: v for k, v in values.items() if k in SessionContext.__dataclass_fields__}
    message = pb.Open(context=SessionContext(**values).encode(), work=encode_work(CensusWork()))
    return pb.Task(study="trial", session=session, open=message)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participation, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(participation, "_LOOK_SECONDS", 0.05)


async def take_part(
    tmp_path: Path,
    client: ScriptedClient,
    vectors: Vectors,
    plan: Plan = PLAN,
    policy: Policy | None = None,
) -> dict[str, Any]:
    """Run until the script is through; what the status shows then."""
    home = SiloHome(tmp_path)
    study = home.study("trial")
    terms = Terms(plan, ROSTER)
    pin(study, terms)
    config = SiloConfig(site=Site(name="site-1"), data=Data(path="x"), policy=policy or Policy())
    status = Status(tmp_path / "status.json", "site-1", "nowhere")
    party = SiloParty(ROSTER, 1, KEYS[0], Secret(os.urandom(32)), os.urandom)
    anything: Any = client
    heads = Heads(tmp_path / "heads.jsonl", KEYS[0], "site-1")
    tools = Tools(anything, anything, status, config, heads)
    part = Participation(tools, study, terms, party, vectors)  # type: ignore[arg-type]
    running = asyncio.create_task(part.run())
    idle = asyncio.create_task(client.idle.wait())
    done, _ = await asyncio.wait({running, idle}, timeout=60, return_when="FIRST_COMPLETED")
    assert done
    running.cancel()
    idle.cancel()
    await asyncio.gather(running, idle, return_exceptions=True)
    shown: dict[str, Any] = status._values["studies"]["trial"]
    return shown


async def test_a_session_as_agreed_is_advertised_once_and_again_when_asked(tmp_path: Path) -> None:
    client = ScriptedClient(opened(), opened())
    await take_part(tmp_path, client, Vectors(tmp_path))
    first, second = client.submitted
    assert first == second
    message = Signed.decode(first.signed)
    assert (message.step, message.sender) == (Step.ADVERTISE, 1)
    assert client.refusals == []


async def test_a_context_that_is_not_ours_is_refused_once_and_told(tmp_path: Path) -> None:
    altered = opened(plan=bytes(32))
    client = ScriptedClient(altered, altered, altered)
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert client.submitted == []
    ((session, reason),) = client.refusals
    assert session == 1
    assert "plan is 0000" in reason


async def test_what_is_wrong_with_the_data_stays_at_the_site(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path)
    vectors.error = DataError("/srv/radiology/2024 holds no image; 7 files were skipped")
    client = ScriptedClient(opened())
    shown = await take_part(tmp_path, client, vectors)
    assert client.refusals == [(1, "this site could not compute its contribution")]
    assert client.submitted == []
    assert "radiology" in shown["trouble"]


async def test_work_for_a_session_that_is_over_is_dropped(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path)
    vectors.slow = True
    client = ScriptedClient(opened())
    client.standing = pb.Task(study="trial", idle=pb.Idle())
    await take_part(tmp_path, client, vectors)
    assert client.submitted == []
    assert client.refusals == []


def count_in(tmp_path: Path, plan: Plan) -> None:
    """Session 1 was the census, with this site in its sum."""
    ledger = LedgerFile(SiloHome(tmp_path).study("trial").ledger, "trial")
    census = session_context(ROSTER, plan.digest(), 16, CensusWork(), session=1, round=1)
    for entry in (
        Opened(census),
        Masked(census.digest, bytes(32)),
        Settled(census.digest, bytes(32), summed=True, included=True),
    ):
        ledger.append(entry)
    ledger.close()


@pytest.mark.parametrize("lies", [False, True])
async def test_a_download_ends_with_its_session_and_a_false_one_is_told(
    tmp_path: Path, lies: bool
) -> None:
    count_in(tmp_path, PLAN)
    sizes, model = (parameter_count(PLAN.model),), b"m" * 32
    work = RoundWork(total_count=100, sizes=sizes, clips=PLAN.first_clips(1))
    context = session_context(ROSTER, PLAN.digest(), 16, work, session=2, round=1, model=model)
    message = pb.Open(context=context.encode(), work=encode_work(work), artifacts=[model])
    client = ScriptedClient(pb.Task(study="trial", session=2, open=message))
    client.standing = pb.Task(study="trial", idle=pb.Idle())
    client.lie = "artifact 6d6d arrived with another hash" if lies else ""
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert client.submitted == []
    assert client.refusals == ([(2, client.lie)] if lies else [])
    assert client.dripping is not lies, "it was given up, not waited for"


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_site_that_no_longer_lets_the_others_have_its_images_offers_none(
    tmp_path: Path, allowed: bool
) -> None:
    """Its policy was changed after it had accepted the study."""
    plan = make_plan('kind = "fedddpm"', 'kind = "fedddpm"\nauxiliary_share = 0.5')
    count_in(tmp_path, plan)
    work = TagsWork(total_count=100, images=24, slots=192)
    context = session_context(ROSTER, plan.digest(), 16, work, session=2, round=1)
    message = pb.Open(context=context.encode(), work=encode_work(work))
    client = ScriptedClient(pb.Task(study="trial", session=2, open=message))
    vectors = Vectors(tmp_path)
    vectors.path.write_bytes(bytes(4 * 192))
    policy = Policy(auxiliary_among_sites=allowed)
    await take_part(tmp_path, client, vectors, plan, policy)
    assert len(client.submitted) == allowed
    refusal = (2, "session 2: tags: the site policy does not let this be summed")
    assert client.refusals == ([] if allowed else [refusal])


async def test_a_site_that_leaves_waits_neither_for_training_nor_for_a_download(
    tmp_path: Path,
) -> None:
    vectors = Vectors(tmp_path)
    vectors.slow = True
    client = ScriptedClient(opened())
    client.standing = opened()
    leave = SiloHome(tmp_path).study("trial").leave
    asyncio.get_running_loop().call_later(0.2, write_json, leave, {"reason": "moved"})
    await take_part(tmp_path, client, vectors)
    assert client.left == ["moved"]
    assert client.submitted == []
    assert vectors.ended


async def test_a_session_number_that_was_used_is_refused_after_a_restart(tmp_path: Path) -> None:
    await take_part(tmp_path, ScriptedClient(opened(3)), Vectors(tmp_path))
    client = ScriptedClient(opened(3), opened(2))
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert client.submitted == []
    assert [session for session, _ in client.refusals] == [3, 2]
    assert "not higher than one already used" in client.refusals[0][1]


async def test_sessions_without_number_do_not_fill_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(participation, "_MOST_SESSIONS", 2)
    client = ScriptedClient(*(opened(number) for number in (1, 2, 3)))
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert [request.session for request in client.submitted] == [1, 2]
    assert client.refusals == [(3, "this site has opened 2 sessions of the study")]


async def test_a_forged_certificate_settles_nothing(tmp_path: Path) -> None:
    from secagg.certificate import Certificate

    message = Signed(Step.ABORT, 2, b"", bytes(64))
    forged = Certificate(Step.ABORT, bytes(32), (message,)).encode()
    task = pb.Task(study="trial", session=1, outcome=pb.Outcome(certificate=forged))
    client = ScriptedClient(task)
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert list((tmp_path / "studies" / "trial" / "outcomes" / "1").iterdir()) == []
    assert "a certificate does not verify" in client.refusals[0][1]


async def test_nothing_is_begun_under_the_old_roster_once_a_new_one_was_offered(
    tmp_path: Path,
) -> None:
    later = Roster("trial", 2, ROSTER.threshold, ROSTER.colluders, ROSTER.members)
    offer = pb.Offer(plan=PLAN.toml(), roster=later.encode())
    client = ScriptedClient(opened())
    study = SiloHome(tmp_path).study("trial")
    keep_offer(study, offer)
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert client.submitted == []
    ((session, reason),) = client.refusals
    assert session == 1
    assert "roster 2 was offered, roster 1 is pinned" in reason
    # One that was pinned already, or an older one, stops nothing.
    keep_offer(study, pb.Offer(plan=PLAN.toml(), roster=ROSTER.encode()))
    client = ScriptedClient(opened())
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert len(client.submitted) == 1


async def test_who_leaves_begins_nothing_and_tells_the_study_centre_when_nothing_is_in_doubt(
    tmp_path: Path,
) -> None:
    study = SiloHome(tmp_path).study("trial")
    pin(study, Terms(PLAN, ROSTER))
    write_json(study.leave, {"reason": "the ward is being rebuilt"})
    client = ScriptedClient(opened())
    await take_part(tmp_path, client, Vectors(tmp_path))
    assert client.submitted == []
    assert client.left == ["the ward is being rebuilt"]
    assert read_json(study.ended) == {"reason": "left", "model": ""}
    # Accepting a later roster brings the site back in.
    later = Roster("trial", 2, ROSTER.threshold, ROSTER.colluders, ROSTER.members)
    pin(study, Terms(PLAN, later))
    assert not study.ended.exists()
    assert not study.leave.exists()


async def test_a_study_that_ends_with_a_session_in_doubt_says_which_and_can_be_settled_by_hand(
    tmp_path: Path,
) -> None:
    """What the study centre does when nothing can prove the end: `study stop --abandon`."""
    study = SiloHome(tmp_path).study("trial")
    context = SessionContext.decode(opened(7).open.context)
    ledger = LedgerFile(study.ledger, "trial")
    ledger.append(Opened(context))
    ledger.append(Masked(context.digest, bytes(32)))
    ledger.close()
    ended = pb.StudyEnded(reason=pb.StudyEnded.STOPPED)
    client = ScriptedClient(pb.Task(study="trial", ended=ended))
    shown = await take_part(tmp_path, client, Vectors(tmp_path))
    assert (shown["state"], shown["activity"]) == ("ended", "nothing proved how session 7 ended")
    values = {**admin.status(tmp_path), "studies": {"trial": shown}}
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(silo_page(values, time.time()))
    assert "nothing proved how session 7 ended" in console.export_text()
    command = ["silo", "settle", "trial", "--yes", "--home", str(tmp_path)]
    assert CliRunner().invoke(main, command).output == "closed session 7 (census 1)\n"
    assert admin.settle_doubt(tmp_path, "trial") == []


def test_a_command_that_looks_at_a_folder_without_studies_leaves_none(tmp_path: Path) -> None:
    assert list(SiloHome(tmp_path / "mistyped").studies()) == []
    assert not (tmp_path / "mistyped").exists()
