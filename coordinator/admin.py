"""What the command line does at the study centre. All of it goes to the store; a service that is
running sees it within a second, and none has to be."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sqlalchemy import Connection, select

from coordinator import audit, records, registry, results, schema
from coordinator.authority import SITE_NAME, Authority
from coordinator.config import Home, config_text, new_config
from coordinator.records import StudyRow
from coordinator.registry import Site
from coordinator.store import Store, note
from diffusion.features.file import FeatureFileError, read_network
from secagg.roster import Member, Roster
from study.audit_log import Head, Verified, write_entries
from study.plan import Plan, load_plan

_POLICY = "declined by site policy"  # as `silo.policy` words it


class AdminError(Exception):
    """What was asked cannot be done; the text says why, and what to do."""


@dataclass(frozen=True)
class SiloStatus:
    """One site of a study, as far as the study centre can see it."""

    name: str
    answer: str
    """accepted, declined by site policy, declined (by a person), waiting or left."""
    why: str
    """The site's reason: the rule of its policy that forbids the study, or what a person wrote."""
    last_contact: float | None
    activity: str
    step: int
    steps: int
    awaited: bool


@dataclass(frozen=True)
class StudyStatus:
    """One study at a glance."""

    id: str
    title: str
    state: str
    wanted: str
    stage: str
    error: str | None
    round: int
    """Rounds that are done."""
    rounds: int
    quantity: str
    """What the session under way sums, or ""."""
    phase: str
    """Its step."""
    opened: float | None
    """When the session under way was opened."""
    awaited: tuple[str, ...]
    """Silos that the step waits for, or sites that have not answered the offer."""
    present: int
    """Silos that have answered this step."""
    epoch: int
    threshold: int
    deadline: float | None
    """When the step, or the offer, is closed."""
    round_seconds: float | None
    """How long a round took, the median of the last ten."""
    survivors: tuple[str, ...]
    """Those in the last round's sum."""
    loss: float | None
    fid: float | None
    """Of the latest of the rounds that are done and were evaluated."""
    corrections: int
    silos: tuple[SiloStatus, ...]
    folder: Path


@dataclass(frozen=True)
class Status:
    """All that a status page shows."""

    address: str
    folder: Path
    sites: tuple[Site, ...]
    studies: tuple[StudyStatus, ...]
    log_entries: int


def init(home: Path, address: str, listen: str | None = None) -> str:
    """Make the authority, the store and coordinator.toml; the authority's fingerprint.

    `address` is the host:port that silos dial. Raises ConfigError, AuthorityError.
    """
    place = Home(home)
    config = new_config(address, listen)
    if place.config_file.exists():
        raise AdminError(f"{home} is a coordinator's folder already: keep it, or name another")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = Authority.create(place.authority)
    descriptor = os.open(place.config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(config_text(config))
    store = Store(place.database(config))
    store.run(note, "coordinator.made", address=address, authority=authority.fingerprint)
    store.close()
    return authority.fingerprint


def invite(home: Path, name: str, valid_hours: float = 72.0) -> str:
    """A one-time token for a site. Raises RegistryError where it is enrolled already."""
    if not re.fullmatch(SITE_NAME, name):
        raise AdminError(
            f"'{name}' is no site name: use lower-case letters, digits and hyphens, 63 at most"
        )
    if not 0 < valid_hours <= 24 * 90:
        raise AdminError(f"valid_hours = {valid_hours}: use more than 0 and at most 90 days")
    place = Home(home)
    authority = Authority.load(place.authority)
    token = secrets.token_hex(16)
    made = authority.invitation(name, token, place.config().address, valid_hours)
    with _store(place) as store:
        store.run(registry.invite, name, token, made.expires.timestamp())
    return made.encode()


def pending(home: Path) -> list[Site]:
    """The sites that wait for approval, with the fingerprints to compare."""
    return [site for site in sites(home) if site.status == "pending"]


def approve(home: Path, name: str) -> Site:
    """Let a site in, after its fingerprint was compared. Raises RegistryError."""
    with _store(Home(home)) as store:
        return store.run(registry.approve, name)


def revoke(home: Path, name: str) -> Site:
    """Shut a site out at once. Raises RegistryError."""
    with _store(Home(home)) as store:
        return store.run(registry.revoke, name)


def sites(home: Path) -> list[Site]:
    """All sites, by name."""
    with _store(Home(home)) as store:
        return store.run(registry.all_sites)


def start_study(home: Path, plan: Path, sites: Sequence[str] | None = None) -> str:
    """Offer a study to the named sites, or to all that are approved; its id.

    Raises PlanError, RegistryError, InvalidParameters, and AdminError where the feature network is
    not here.
    """
    agreed = load_plan(plan)
    _check_network(Home(home), agreed)
    study = f"{agreed.study.name}-{secrets.token_hex(4)}"
    with _store(Home(home)) as store:
        chosen = store.run(registry.approved, sites)
        quorum = agreed.validate_roster(len(chosen))
        members = tuple(Member(site.name, site.identity or b"") for site in chosen)
        roster = Roster(study, 1, quorum.threshold, quorum.colluders, members)
        store.run(records.create_study, study, agreed.toml(), roster)
    return study


def _check_network(place: Home, plan: Plan) -> None:
    """Before a site is asked for anything."""
    if plan.evaluation is None:
        return
    name, sha256, where = plan.evaluation.feature_network, plan.evaluation.sha256, place.config_file
    try:
        read_network(name, sha256, place.feature_files(), where=f"feature_files of {where}")
    except FeatureFileError as error:
        raise AdminError(str(error)) from error


def change_roster(
    home: Path, study: str, add: Sequence[str] = (), remove: Sequence[str] = ()
) -> Roster:
    """Begin a new roster epoch of a study: its roster with the sites of `add`, without those of
    `remove`, and without whoever left or was revoked. The session under way ends first, then every
    site has to accept the new roster, and the rounds go on from the model as it is.

    Raises NoSuchStudy, RegistryError, PlanError, AdminError.
    """
    with _store(Home(home)) as store:
        return store.run(_change_roster, study, set(add), set(remove))


def _change_roster(c: Connection, study: str, add: set[str], remove: set[str]) -> Roster:
    row = records.study(c, study)
    if row.over:
        raise AdminError(f"study '{study}' is {row.state}: its roster cannot be changed any more")
    now = Roster.decode(row.roster)
    names = {member.name for member in now.members}
    for name in sorted(remove - names):
        raise AdminError(f"site '{name}' is not in the roster of '{study}': nothing to remove")
    answers = records.answers_of(c, study, now.epoch)
    left = {name for name, answer in answers.items() if answer.left}
    approved = {site.name for site in registry.approved(c, None)}
    wanted = ((names & approved) - left - remove) | add
    chosen = registry.approved(c, sorted(wanted))
    members = tuple(Member(site.name, site.identity or b"") for site in chosen)
    if members == now.members and not left & add:
        raise AdminError(f"that is the roster that '{study}' has: name a site to --add or --remove")
    quorum = load_plan(row.plan).validate_roster(len(members))
    last = now if row.next_roster is None else Roster.decode(row.next_roster)
    roster = Roster(study, last.epoch + 1, quorum.threshold, quorum.colluders, members)
    records.propose_roster(c, study, roster)
    return roster


def close_offer(home: Path, study: str) -> list[str]:
    """Wait no longer for sites that have not answered the offer of a study; which those were."""
    with _store(Home(home)) as store:
        return store.run(_close_offer, study)


def _close_offer(c: Connection, study: str) -> list[str]:
    row = records.study(c, study)
    if row.state != "offered":
        raise AdminError(f"study '{study}' is {row.state}: it waits for no answer")
    roster = Roster.decode(row.roster)
    answers = records.answers_of(c, study, roster.epoch)
    waiting = [member.name for member in roster.members if member.name not in answers]
    for name in waiting:
        records.answer(c, study, roster.epoch, name, False, "the study centre closed the offer")
    return waiting


def pause_study(home: Path, study: str) -> None:
    """Open no further session; the one under way ends first. Raises NoSuchStudy."""
    _want(home, study, "pause")


def resume_study(home: Path, study: str) -> None:
    """Go on with a paused study. Raises NoSuchStudy."""
    _want(home, study, "run")


def stop_study(home: Path, study: str, abandon: bool = False) -> None:
    """End a study for good; the session under way is given up. Raises NoSuchStudy.

    With `abandon` also one that neither a sum nor an abort can end, since too few silos are left to
    sign: once it is overdue nobody waits for it any more, and it stays in doubt at its silos.
    """
    _want(home, study, "abandon" if abandon else "stop")


def _want(home: Path, study: str, wanted: str) -> None:
    with _store(Home(home)) as store:
        row = store.run(records.study, study)
        if row.over:
            raise AdminError(f"study '{study}' is {row.state}: it cannot be changed any more")
        if row.stopping and wanted != "abandon":
            raise AdminError(f"study '{study}' is being stopped: start it anew from its plan")
        store.run(records.want, study, wanted)


def verify_audit(home: Path, heads: Sequence[Head] = ()) -> Verified:
    """Check the store's audit log, and what sites hand in of it. Raises StoreError."""
    with _store(Home(home)) as store:
        return store.run(audit.verified, heads)


def export_audit(home: Path, out: Path) -> int:
    """Write the audit log to a file, one line of JSON each; how many."""
    with _store(Home(home)) as store:
        found = store.run(lambda c: list(audit.entries(c)))
    out.write_text("".join(write_entries(found)), "utf-8")
    return len(found)


def list_studies(home: Path) -> list[StudyRow]:
    """All studies, oldest first."""
    with _store(Home(home)) as store:
        return store.run(records.all_studies)


def status(home: Path) -> Status:
    """What is going on, as of the last second."""
    place = Home(home)
    with _store(place) as store:
        return store.run(_status, place)


def _status(c: Connection, place: Home) -> Status:
    known = registry.all_sites(c)
    by_name = {site.name: site for site in known}
    studies = tuple(_study(c, place, row, by_name) for row in records.all_studies(c))
    head = c.execute(select(schema.chain_head)).one()
    return Status(place.config().address, place.root, tuple(known), studies, head.place)


def _study(c: Connection, place: Home, row: StudyRow, known: dict[str, Site]) -> StudyStatus:
    plan, roster = load_plan(row.plan), Roster.decode(row.roster)
    session = records.live_session(c, row.id)
    awaited = tuple(json.loads(session.awaited)) if session else ()
    if row.state == "offered":
        answers = records.answers_of(c, row.id, roster.epoch)
        awaited = tuple(m.name for m in roster.members if m.name not in answers)
    done = results.count(c, row.id, "tidy")
    last = results.result(c, row.id, f"round {done:05} model") or {}
    summed = results.result(c, row.id, f"round {done:05} sum") or {}
    evaluated = results.last(c, row.id, "evaluation", until=done) or {}
    return StudyStatus(
        id=row.id,
        title=plan.study.title,
        state=row.state,
        wanted=row.wanted,
        stage=row.stage,
        error=row.error,
        round=done,
        rounds=plan.rounds.count,
        quantity=session.quantity if session else "",
        phase=session.phase if session else "",
        opened=session.opened if session else None,
        awaited=awaited,
        present=session.present if session else 0,
        epoch=roster.epoch,
        threshold=roster.threshold,
        deadline=_deadline(c, row, roster, plan, session),
        round_seconds=_round_seconds(c, row.id, done),
        survivors=tuple(summed.get("silos", ())),
        loss=last.get("loss"),
        fid=evaluated.get("fid"),
        corrections=results.count(c, row.id, "corrected", until=done),
        silos=_silos(c, row.id, roster, known, awaited),
        folder=place.study(row.id),
    )


def _deadline(
    c: Connection,
    row: StudyRow,
    roster: Roster,
    plan: Plan,
    session: records.SessionRow | None,
) -> float | None:
    if row.state == "offered":
        return records.epoch_entered(c, row.id, roster.epoch) + plan.deadlines.offer
    return session.deadline if session else None


def _round_seconds(c: Connection, study: str, done: int) -> float | None:
    """What came under one round's keys took, in the middle of the last ten rounds."""
    of_round: dict[str, float] = {}
    for key, value in results.of_rounds(c, study, max(1, done - 9), done).items():
        number = key.split()[1]
        of_round[number] = of_round.get(number, 0.0) + value["seconds"]
    return median(of_round.values()) if of_round else None


def _silos(
    c: Connection, study: str, roster: Roster, known: dict[str, Site], awaited: Sequence[str]
) -> tuple[SiloStatus, ...]:
    answers = records.answers_of(c, study, roster.epoch)
    query = select(schema.progress).where(schema.progress.c.study == study)
    progress = {row.site: row for row in c.execute(query)}
    found = []
    for name in (member.name for member in roster.members):
        said = answers.get(name)
        now, site = progress.get(name), known.get(name)
        fresh = now is not None and time.time() - now.at < 60
        found.append(
            SiloStatus(
                name=name,
                answer=_said(said),
                why="" if said is None else _why(said),
                last_contact=site.last_contact if site else None,
                activity=now.activity if now is not None and fresh else "",
                step=now.step if now is not None and fresh else 0,
                steps=now.steps if now is not None and fresh else 0,
                awaited=name in awaited,
            )
        )
    return tuple(found)


def _said(answer: records.Answer | None) -> str:
    if answer is None:
        return "waiting"
    if answer.left or answer.accepted:
        return "left" if answer.left else "accepted"
    return _POLICY if answer.rule.startswith(_POLICY) else "declined"


def _why(answer: records.Answer) -> str:
    for head in (f"{_POLICY}: ", "declined by a person: "):
        if answer.rule.startswith(head):
            return answer.rule.removeprefix(head)
    return answer.rule


@contextmanager
def _store(place: Home) -> Iterator[Store]:
    store = Store(place.database(place.config()))
    try:
        yield store
    finally:
        store.close()
