"""`concilium coordinator …`: what a person at the study centre types."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from concilium.show import age
from concilium.status import coordinator_page, coordinator_values, show
from coordinator import admin, server
from coordinator import backup as copies
from coordinator.admin import AdminError
from coordinator.authority import AuthorityError
from coordinator.backup import BackupError
from coordinator.config import ConfigError
from coordinator.records import NoSuchStudy
from coordinator.registry import RegistryError
from coordinator.server import ServerError
from coordinator.store import StoreError
from secagg.errors import InvalidParameters
from study.problems import PlanError

P = ParamSpec("P")
R = TypeVar("R")

home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="CONCILIUM_COORDINATOR_HOME",
    default=Path("~/.concilium/coordinator"),
    show_default=True,
    callback=lambda _ctx, _param, value: value.expanduser(),
    help="The coordinator's folder (or set CONCILIUM_COORDINATOR_HOME).",
)

_MENDABLE = (
    AdminError,
    AuthorityError,
    BackupError,
    ConfigError,
    InvalidParameters,
    NoSuchStudy,
    PlanError,
    RegistryError,
    ServerError,
    StoreError,
)


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Errors that a person can mend are shown as one sentence, not as a traceback."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except _MENDABLE as error:
            raise click.ClickException(str(error)) from error

    return call


@click.group("coordinator")
def command() -> None:
    """The service of a study centre.

    First evening: init, serve; then invite and approve each site, and `concilium study start`.
    """


@command.command()
@click.option("--address", required=True, metavar="HOST:PORT", help="What the silos dial.")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen, if not at that address.")
@home_option
@plainly
def init(address: str, listen: str | None, home: Path) -> None:
    """Make the certificate authority, the store and coordinator.toml."""
    fingerprint = admin.init(home, address, listen)
    click.echo(f"made {home}; fingerprint of its authority:\n  {fingerprint}")
    click.echo(f"next: concilium coordinator serve --home {home}")


@command.command()
@click.option("--listen", metavar="HOST:PORT", help="Where to listen, in place of `listen`.")
@home_option
@plainly
def serve(listen: str | None, home: Path) -> None:
    """Run the coordinator until SIGTERM.

    While another one runs on the same store, this one waits, and takes over when that one ends.
    """
    asyncio.run(server.serve(home, listen))


@command.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@home_option
@plainly
def backup(file: Path, home: Path) -> None:
    """Write all of the coordinator, its keys too, to FILE; the service may be running.

    Keep the file as safe as the coordinator itself.
    """
    size = copies.backup(home, file)
    click.echo(f"{file}: {size / 1e6:.1f} MB")


@command.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--database", metavar="URL", help="The store's database, if it is to be another.")
@home_option
@plainly
def restore(file: Path, database: str | None, home: Path) -> None:
    """Make the coordinator in FILE anew, where there is none. The old one may not run any more."""
    unfinished = copies.restore(file, home, database)
    click.echo(f"restored to {home}; start it with: concilium coordinator serve --home {home}")
    for study in unfinished:
        click.echo(
            f"{study}: goes on if no sum of it has ended since the backup; else `coordinator "
            "status` will say which silo knows of a later one"
        )


@command.command()
@click.argument("name")
@click.option("--valid-hours", type=float, default=72.0, show_default=True)
@home_option
@plainly
def invite(name: str, valid_hours: float, home: Path) -> None:
    """Print a one-time token for the institution NAME; pass it on by a way you trust."""
    click.echo(admin.invite(home, name, valid_hours))


@command.command()
@home_option
@plainly
def sites(home: Path) -> None:
    """List the sites: who is invited, waits for approval, is approved or revoked."""
    found = admin.sites(home)
    for site in found:
        seen = _contact(site.last_contact)
        click.echo(f"{site.name:24} {site.status:10} last contact {seen}")
        if site.status == "pending":
            click.echo(f"{'':24} fingerprint {site.fingerprint}")
    if not found:
        click.echo("no site yet: concilium coordinator invite NAME")


@command.command()
@click.argument("name")
@home_option
@plainly
def approve(name: str, home: Path) -> None:
    """Let NAME in, after its fingerprint was compared by phone (`sites` shows it)."""
    site = admin.approve(home, name)
    click.echo(f"approved: {site.name}")


@command.command()
@click.argument("name")
@home_option
@plainly
def revoke(name: str, home: Path) -> None:
    """Shut NAME out at once, open calls included."""
    click.echo(f"revoked: {admin.revoke(home, name).name}")


@command.command()
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@home_option
@plainly
def status(watch: bool, as_json: bool, home: Path) -> None:
    """Sites and studies: round, phase, who is awaited, survivors, loss and FID so far."""
    show(
        lambda: admin.status(home),
        coordinator_page,
        coordinator_values,
        watch=watch,
        as_json=as_json,
    )


@command.command()
@home_option
@plainly
def health(home: Path) -> None:
    """Ask the running service whether it serves (grpc.health.v1); status 1 where it does not."""
    click.echo(asyncio.run(server.health_of(home)))


def _contact(when: float | None) -> str:
    return "never" if when is None else f"{age(time.time() - when)} ago"
