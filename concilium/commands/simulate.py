"""`concilium simulate`: many silos in one process, for sweeps over strategies and heterogeneity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from concilium.commands.coordinator import plainly
from concilium.datasets import DataMissing
from concilium.simulate.spec import Point, load_sweep
from concilium.simulate.sweep import run_sweep
from silo.errors import SiloError


@click.command("simulate")
@click.argument("study", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("concilium-simulation"),
    show_default=True,
    help="Folder of results; what is there already is not computed again.",
)
@click.option("--secure-sum", is_flag=True, help="Rounds through the secure sum, not float means.")
@click.option("--ray", metavar="ADDRESS", help="Spread the work over this Ray cluster, or: local.")
@plainly
def command(study: Path, out: Path, secure_sum: bool, ray: str | None) -> None:
    """Simulate a STUDY.toml: a plan with a [simulation] table.

    The trainer, the strategies and what is made of the sums are the service's. The same file and
    seeds give the same numbers; a run that was interrupted goes on where it was.
    """
    console = Console(soft_wrap=True, emoji=False, markup=False, highlight=False)
    sweep = load_sweep(study)
    if secure_sum:
        forced = sweep.simulation.model_copy(update={"secure_sum": True})
        sweep = type(sweep)(forced, sweep.plan)

    def show(point: Point, event: dict[str, Any]) -> None:
        if text := _told(event):
            console.print(f"{point.label:32} {text}")

    try:
        for result in run_sweep(sweep, out, show, ray):
            last = result["last"]
            fid = f"FID {last['fid']:.4f}" if last else "no [evaluation]"
            console.print(f"{result['run']}-{result['seed']}: {fid}, in {out}")
    except (DataMissing, SiloError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _told(event: dict[str, Any]) -> str:
    match event["event"]:
        case "auxiliary":
            return f"auxiliary set of {event['images']} images"
        case "decision" if event["correct"]:
            return f"round {event['round']}: corrects: {event['reason']}"
        case "evaluation":
            return (
                f"round {event['round']}: FID {event['fid']:.4f}, KID {event['kid']:.4f}, "
                f"coverage {event['coverage']:.3f}"
            )
    return ""
