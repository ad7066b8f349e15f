"""The `concilium` command.

Each group is imported when it is used, so `--help` answers at once and a site without the
coordinator's packages (or the other way round) still has its own commands.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

try:
    import click
except ImportError:  # pragma: no cover - only in an installation without any service
    sys.exit(
        "concilium: this installation has the kernels only; for the services install "
        "concilium[silo], concilium[coordinator] or concilium[demo]"
    )

_GROUPS = {
    "coordinator": ("concilium.commands.coordinator", "The service of a study centre."),
    "silo": ("concilium.commands.silo", "The agent of an institution."),
    "study": ("concilium.commands.study", "Check, start, pause, stop and list studies."),
    "audit": ("concilium.commands.audit", "Verify or export the study centre's audit log."),
    "sample": ("concilium.commands.sample", "Draw images from a model folder."),
    "simulate": ("concilium.commands.simulate", "Many silos in one process, for sweeps."),
    "feature-network": ("concilium.commands.feature_network", "Train what FID is measured by."),
    "demo": ("concilium.commands.demo", "A whole federation on this machine."),
}
_EXTRA = {
    "coordinator": "coordinator",
    "silo": "silo",
    "study": "coordinator",
    "simulate": "demo",
    "audit": "coordinator",
    "demo": "demo",
}


class _Lazy(click.Group):
    """A group that knows the names and the help of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _GROUPS:
            return None
        module, _ = _GROUPS[cmd_name]
        try:
            command: click.Command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            _missing(cmd_name, error)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _GROUPS.items()])


def _missing(command: str, error: ModuleNotFoundError) -> NoReturn:
    extra = _EXTRA.get(command, "silo")
    raise click.ClickException(
        f"`concilium {command}` needs {error.name}, which is not installed here: "
        f"install concilium[{extra}]"
    )


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="concilium")
def main() -> None:
    """Train one image diffusion model over many institutions; no image, model or count leaves any
    of them readable.

    Start with `concilium demo`. Institutions go on with `concilium silo --help`, a study centre
    with `concilium coordinator --help`.
    """
