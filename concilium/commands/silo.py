"""`concilium silo …`: what a person at an institution types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar, get_args

import click
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from concilium.status import show, silo_page
from silo import admin, agent
from silo import doctor as doctor_
from silo.config import Format
from silo.errors import SiloError
from silo.log import LogStyle

P = ParamSpec("P")
R = TypeVar("R")
_MARKS = {"ok": "✓ ", "warning": "! ", "problem": "✗ "}
_LINES = 20  # of a table: more are added up

_home = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="CONCILIUM_SILO_HOME",
    default=Path("~/.concilium/silo"),
    show_default=True,
    callback=lambda _ctx, _param, value: value.expanduser(),
    help="The agent's folder (or set CONCILIUM_SILO_HOME).",
)


def _plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Errors that a person can mend are shown as one sentence, not as a traceback."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except SiloError as error:
            raise click.ClickException(str(error)) from error

    return call


@click.group("silo")
def command() -> None:
    """The agent of an institution.

    First evening: init, check, join, run; then `roster` and `approve` when a study is offered.
    """


@command.command()
@click.argument("name")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="File or folder.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(get_args(Format))),
    default="auto",
    show_default=True,
    help="What the data is.",
)
@_home
@_plainly
def init(name: str, data: Path, kind: str, home: Path) -> None:
    """Make the agent's folder, its keys and a site.toml that explains itself.

    NAME is the institution's short name, as it was invited.
    """
    admin.init(home, name=name, data=data, format=kind)
    click.echo(f"made {home / 'site.toml'}: read it, it says what a study may ask of this site")
    click.echo(f"next: concilium silo check --home {home}")


@command.command()
@click.option("--image-size", type=click.IntRange(4, 1024), help="Height and width in pixels.")
@click.option("--channels", type=click.IntRange(1, 16), help="1 = greyscale, 3 = RGB.")
@_home
@_plainly
def check(image_size: int | None, channels: int | None, home: Path) -> None:
    """Read all images once: how many, of what shape, what was skipped and why."""
    columns = (TextColumn("reading"), TextColumn("{task.completed:,.0f} images"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as shown:
        task = shown.add_task("", total=None)
        found = admin.check(
            home, image_size, channels, lambda count: shown.update(task, completed=count)
        )
    click.echo("\n".join(_checked(found)))


@command.command()
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Estimate what this plan would cost.",
)
@click.option("--study", default="", help="The same for the plan of a study offered here.")
@click.option("--silos", type=click.IntRange(3, 255), help="How many take part in --plan.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_home
@_plainly
def doctor(
    plan_file: Path | None, study: str, silos: int | None, as_json: bool, home: Path
) -> None:
    """Look for what would stop this site: the way, certificates, clock, disk, memory, device, data.

    Ends with 1 where there is a problem. With a plan it also measures a few training steps here and
    tells hours, bytes and room.
    """
    found = []
    for finding in doctor_.examine(home, plan_file=plan_file, study=study, silos=silos):
        found.append(finding)
        if not as_json:
            click.echo(f"{_MARKS[finding.level]} {finding.check:<12} {finding.text}")
            if finding.mend:
                click.echo(f"{'':15}mend: {finding.mend}")
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in found], indent=2, ensure_ascii=False))
    if any(finding.level == "problem" for finding in found):
        raise SystemExit(1)


@command.command()
@click.argument("token", required=False)
@click.option("--token-file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_home
@_plainly
def join(token: str | None, token_file: Path | None, home: Path) -> None:
    """Hand in this site's keys with the invitation's TOKEN, and wait for the approval."""
    if token_file is not None:
        token = token_file.read_text("utf-8")
    if not token:
        raise click.UsageError("give the token, or --token-file with a file that holds it")
    enrolment = asyncio.run(admin.join(home, token.strip(), click.echo))
    click.echo(f"joined {enrolment.address} as {enrolment.site}")
    click.echo(f"next: concilium silo run --home {home}")


@command.command()
@_home
@_plainly
def renew(home: Path) -> None:
    """Fetch a fresh certificate now. The agent does it by itself, after two thirds of its life."""
    enrolment = asyncio.run(admin.renew(home))
    click.echo(f"renewed: good until {enrolment.expires:%Y-%m-%d %H:%M} UTC")


@command.command()
@click.argument("study", required=False)
@_home
@_plainly
def roster(study: str | None, home: Path) -> None:
    """Who takes part in the studies offered here, and the fingerprint to compare by phone."""
    click.echo(admin.roster(home, study))


@command.command()
@click.argument("study")
@_home
@_plainly
def approve(study: str, home: Path) -> None:
    """Accept plan and roster of STUDY as last offered."""
    terms = admin.approve(home, study)
    click.echo(f"accepted: {terms.plan.study.title}; fingerprint {terms.roster.fingerprint}")


@command.command()
@click.argument("study")
@click.argument("why")
@_home
@_plainly
def decline(study: str, why: str, home: Path) -> None:
    """Do not take part in STUDY; the study centre reads WHY."""
    admin.decline(home, study, why)
    click.echo(f"declined: {study}")


@command.command()
@click.argument("study")
@click.option("--reason", default="", help="For a person at the study centre.")
@_home
@_plainly
def leave(study: str, reason: str, home: Path) -> None:
    """Take no further part in STUDY. The session under way is settled first; the others go on."""
    admin.leave(home, study, reason)
    click.echo(f"leaving {study}: the agent tells the study centre when its session is settled")


@command.command()
@_home
@_plainly
def heads(home: Path) -> None:
    """Print what this site signed of the study centre's audit log, for whoever verifies it."""
    click.echo(admin.heads(home), nl=False)


@command.command()
@click.argument("log", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_home
@_plainly
def audit(log: Path, home: Path) -> None:
    """Check LOG, an audit log that the study centre exported, against what this site signed."""
    found = admin.audit(home, log)
    click.echo(f"{found.entries} entries, unchanged up to entry {found.countersigned} for certain")


@command.command()
@click.argument("study")
@click.confirmation_option(
    prompt="Have the sites agreed that the sessions in doubt stay closed? Their quantities are "
    "never summed again"
)
@_home
@_plainly
def settle(study: str, home: Path) -> None:
    """Close by hand the sessions of STUDY of which nothing proves how they ended.

    Stop the agent first. Needed only when a session could reach neither a sum nor an abort, because
    too many sites are gone for good.
    """
    closed = admin.settle_doubt(home, study)
    click.echo("\n".join(f"closed {session}" for session in closed) or "nothing is in doubt")


@command.command()
@click.option(
    "--log",
    "style",
    type=click.Choice(["auto", "console", "json"]),
    default="auto",
    show_default=True,
    help="Lines for people or as JSON; auto: for people on a terminal.",
)
@_home
@_plainly
def run(style: LogStyle, home: Path) -> None:
    """Run the agent until SIGTERM. It only dials out."""
    agent.main(home, style)


@command.command()
@click.option("--watch", is_flag=True, help="Show it again every second.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_home
@_plainly
def status(watch: bool, as_json: bool, home: Path) -> None:
    """What the agent is doing."""
    show(lambda: admin.status(home), silo_page, dict, watch=watch, as_json=as_json)


def _checked(found: admin.Checked) -> Iterator[str]:
    data, (channels, height, width) = found.data, found.shape
    series = f" in {data.series} series or volumes" if data.series else ""
    yield f"{data.count} images{series}, cached as {channels}×{height}×{width} (uint8)"
    yield from _table("in the source", data.shapes)
    yield from _table("classes", found.classes)
    yield from _table("skipped", data.skipped, data.examples)
    yield f"contact sheet: {found.sheet}"


def _table(
    title: str, counts: dict[str, int], examples: dict[str, list[str]] | None = None
) -> Iterator[str]:
    """The most frequent first, with the first names of each."""
    if counts:
        yield f"{title}:"
    most = sorted(counts.items(), key=lambda item: -item[1])
    for name, count in most[:_LINES]:
        yield f"  {count:>9,}  {name}"
        if examples is not None:
            yield f"             {', '.join(examples[name][:3])}{', …' if count > 3 else ''}"
    if len(most) > _LINES:
        yield f"  {sum(count for _, count in most[_LINES:]):>9,}  others ({len(most) - _LINES})"
