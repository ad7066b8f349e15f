"""`concilium audit …`: the study centre's log of what happened, and whether it was changed."""

from __future__ import annotations

from pathlib import Path

import click

from concilium.commands.coordinator import home_option, plainly
from coordinator import admin
from study.audit_log import AuditError, read_entries, read_heads, verify

_file = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("audit")
def command() -> None:
    """Verify or export the audit log: who was let in, what was started, summed, refused."""


@command.command("verify")
@click.option("--log", type=_file, help="An exported log, instead of the coordinator's own.")
@click.option(
    "--heads",
    type=_file,
    multiple=True,
    help="What a site signed, as `concilium silo heads` prints it; may be given several times.",
)
@home_option
@plainly
def verify_(log: Path | None, heads: tuple[Path, ...], home: Path) -> None:
    """Find any edit, deletion or reordering.

    Without --heads a log whose end was cut off shows only in a last signed entry that is too low.
    """
    try:
        signed = [head for file in heads for head in read_heads(file.read_text("utf-8"))]
        if log is None:
            found = admin.verify_audit(home, signed)
        else:
            found = verify(read_entries(log.read_text("utf-8")), signed)
    except AuditError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{found.entries} entries, none changed")
    for site, place in sorted(found.heads.items()):
        click.echo(f"  {site:24} signed up to entry {place}")
    click.echo(f"certain up to entry {found.countersigned}; later entries by the chain alone")


@command.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@home_option
@plainly
def export(out: Path, home: Path) -> None:
    """Write the log to a file, one line of JSON each, for the sites to check."""
    click.echo(f"{admin.export_audit(home, out)} entries in {out}")
