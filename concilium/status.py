"""The status pages of a coordinator and of a silo: tables for people, JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from concilium.show import age

if TYPE_CHECKING:  # a silo's installation has no coordinator, and needs none
    from coordinator.admin import SiloStatus, Status, StudyStatus

T = TypeVar("T")
_COLORS = {
    "running": "green",
    "finished": "green",
    "approved": "green",
    "accepted": "green",
    "offered": "yellow",
    "pending": "yellow",
    "waiting": "yellow",
    "waits for approval": "yellow",
    "failed": "red",
    "revoked": "red",
    "declined": "red",
    "declined by site policy": "red",
    "left": "red",
}
_SOON = 5 * 86_400.0
_QUIET = 60.0
# A phase of the secure sum, as somebody reads it who has not read the protocol.
_PHASES = {
    "advertising": "the silos prepare their vectors",
    "sharing": "keys are shared",
    "collecting": "masked vectors are uploaded",
    "confirming": "the silos confirm who is in the sum",
    "unmasking": "the masks are removed",
    "aborting": "given up, the silos sign that nothing was revealed",
}


def show(
    read: Callable[[], T],
    page: Callable[[T, float], RenderableType],
    values: Callable[[T], object],
    *,
    watch: bool,
    as_json: bool,
) -> None:
    """Print what `read` returns, once or, with `watch`, every second until Ctrl-C."""
    console = Console(highlight=False)
    if as_json or not console.is_terminal or not watch:
        while True:
            now = read()
            if as_json:
                click.echo(json.dumps(values(now), indent=None if watch else 2))
            else:
                console.print(page(now, time.time()))
            if not watch:
                return
            time.sleep(1)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(page(read(), time.time()), refresh=True)
            time.sleep(1)


# --- the study centre


def coordinator_page(now: Status, at: float) -> Group:
    """Sites, then every study; those that are over in one line each."""
    head = Text.assemble((f"coordinator {now.address}", "bold"), f"   {_clock(at)}")
    parts: list[RenderableType] = [head, Text()]
    if now.sites:
        parts += [_sites(now, at), *_pending(now), Text()]
    else:
        parts.append(Text("no site yet: concilium coordinator invite NAME", "dim"))
    for study in now.studies:
        parts += [*_study(study, at), Text()]
    if not now.studies:
        parts.append(Text("no study yet: concilium study start PLAN", "dim"))
    return Group(*parts)


def coordinator_values(now: Status) -> dict[str, Any]:
    """The status as JSON takes it."""
    sites = [{**vars(site), "identity": (site.identity or b"").hex()} for site in now.sites]
    studies = [
        {**vars(study), "folder": str(study.folder), "silos": [vars(silo) for silo in study.silos]}
        for study in now.studies
    ]
    head = {"address": now.address, "folder": str(now.folder), "log_entries": now.log_entries}
    return {**head, "sites": sites, "studies": studies}


def _sites(now: Status, at: float) -> Table:
    table = _table("site", "status", "last contact", "certificate", "version", "signed log to")
    for site in now.sites:
        table.add_row(
            site.name,
            _state(site.status),
            _ago(site.last_contact, at),
            _left(site.certificate_expires, at) if site.status == "approved" else "",
            site.agent_version or "",
            str(site.countersigned or ""),
        )
    return table


def _pending(now: Status) -> Iterator[Text]:
    for site in now.sites:
        if site.status == "pending":
            yield Text(f"{site.name} waits for approval; fingerprint {site.fingerprint}", "yellow")


def _study(study: StudyStatus, at: float) -> Iterator[RenderableType]:
    state = study.state
    if state in ("offered", "running") and study.wanted != "run":
        state = "paused" if study.wanted == "pause" else "stopping"
    yield Text.assemble((study.id, "bold"), f"  {study.title}  ", _state(state))
    over = study.state in ("finished", "stopped", "failed")
    yield _indented(_rounds(study, over))
    if not over:
        yield _indented(Text(_now(study, at)))
    if study.error:
        yield _indented(Text(f"! {study.error}", "yellow"))
    if study.survivors:
        share = f"{len(study.survivors)} of {len(study.silos)}, needs {study.threshold}"
        yield _indented(Text(f"last sum   {', '.join(study.survivors)} ({share})"))
    figures = list(_figures(study))
    if figures:
        yield _indented(Text("so far     " + "   ".join(figures)))
    if not over:
        yield Padding(_silos(study, at), (0, 0, 0, 2))


def _rounds(study: StudyStatus, over: bool) -> Table:
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=study.rounds, completed=study.round, width=20)
    left = ""
    if not over and study.round_seconds is not None:
        seconds = study.round_seconds * (study.rounds - study.round)
        left = f"about {age(seconds)} left, {age(study.round_seconds)} a round"
    row.add_row(f"round      {study.round} of {study.rounds}", bar, left)
    return row


def _now(study: StudyStatus, at: float) -> str:
    """What is going on, whom it waits for, and how long at most."""
    until = f"; closed in {age(study.deadline - at)}" if study.deadline else ""
    if study.state == "offered":
        names = ", ".join(study.awaited) or "nobody"
        return f"now        roster {study.epoch} waits for the answers of {names}{until}"
    if not study.quantity:
        return f"now        {study.stage}"
    awaited = f"; waits for {', '.join(study.awaited)}" if study.awaited else ""
    overdue = study.deadline is not None and study.deadline < at
    return (
        f"now        sum of {study.quantity}: {_PHASES.get(study.phase, study.phase)}, "
        f"{study.present} of {len(study.silos)} did (needs {study.threshold}){awaited}"
        + ("; overdue" if overdue else until)
    )


def _figures(study: StudyStatus) -> Iterator[str]:
    if study.loss is not None:
        yield f"loss {study.loss:.4g}"
    if study.fid is not None:
        yield f"FID {study.fid:.4g}"
    if study.corrections:
        yield f"corrections {study.corrections}"


def _silos(study: StudyStatus, at: float) -> Table:
    table = _table("silo", "answer", "last contact", "doing", "")
    for silo in study.silos:
        table.add_row(
            silo.name,
            _state(silo.answer),
            _ago(silo.last_contact, at),
            _doing(silo),
            ProgressBar(total=silo.steps, completed=silo.step, width=16) if silo.steps else "",
        )
    return table


def _doing(silo: SiloStatus) -> str:
    if silo.steps:
        return f"{silo.activity} {silo.step}/{silo.steps}"
    return silo.activity or ("awaited" if silo.awaited else silo.why)


# --- the institution


def silo_page(now: dict[str, Any], at: float) -> RenderableType:
    """What the agent last wrote about itself."""
    if "site" not in now:
        return Text("the agent has not run yet: concilium silo run", "dim")
    quiet = now["quiet_seconds"]
    runs = now["running"] and quiet < _QUIET
    agent = Text("runs", "green") if runs else Text(f"does not run, silent for {age(quiet)}", "red")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("site", Text(now["site"], "bold"))
    facts.add_row("agent", Text.assemble(agent, f", version {now['version']}"))
    facts.add_row(
        "coordinator", f"{now['coordinator']}, last contact {_ago(now['last_contact'], at)}"
    )
    facts.add_row("certificate", _left(now["certificate_expires"], at))
    if now["trouble"]:
        facts.add_row("trouble", Text(now["trouble"], "yellow"))
    parts: list[RenderableType] = [facts]
    for name, study in now["studies"].items():
        parts += [Text(), *_silo_study(name, study)]
    if not now["studies"]:
        parts += [Text(), Text("no study was offered to this site yet", "dim")]
    return Group(*parts)


def _silo_study(name: str, study: dict[str, Any]) -> Iterator[RenderableType]:
    state = str(study.get("state", ""))
    yield Text.assemble((name, "bold"), f"  {study.get('title', '')}  ", _state(state))
    if state == "waits for approval":
        yield _indented(Text(f"concilium silo roster {name}, then approve or decline", "yellow"))
    if study.get("quantity") and study.get("phase"):
        phase = {"open": "this site prepares its vector"}.get(study["phase"], study["phase"])
        yield _indented(Text(f"session {study['session']}, {study['quantity']}: {phase}"))
    if study.get("steps"):
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=study["steps"], completed=study["step"], width=30)
        row.add_row(f"{study['activity']} {study['step']}/{study['steps']}", bar)
        yield _indented(row)
    elif study.get("activity"):
        yield _indented(Text(study["activity"]))
    if study.get("trouble"):
        yield _indented(Text(f"! {study['trouble']}", "yellow"))


# --- both


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "doing", overflow="ellipsis")
    return table


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, 2))


def _state(state: str) -> Text:
    return Text(state, _COLORS.get(state, ""))


def _ago(when: float | None, at: float) -> str:
    return "never" if when is None else f"{age(at - when)} ago"


def _left(until: float | None, at: float) -> Text:
    if until is None:
        return Text("none yet")
    left = until - at
    if left < 0:
        return Text("expired", "red")
    return Text(f"{age(left)} left", "yellow" if left < _SOON else "")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
