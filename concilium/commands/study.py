"""`concilium study …`: plans and the studies that follow them."""

from __future__ import annotations

from pathlib import Path

import click

from concilium.commands.coordinator import home_option, plainly
from coordinator import admin
from diffusion.features.pinned import FEATURE_NETWORKS
from study.plan import Plan, load_plan
from study.sections import WarmUp
from study.strategies import FedDDPMPlus

_plan = click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@click.group("study")
def command() -> None:
    """Check, start, pause, stop and list studies."""


@command.command()
@_plan
@click.option("--silos", type=click.IntRange(3, 255), default=4, show_default=True)
@plainly
def check(plan: Path, silos: int) -> None:
    """Read a PLAN and say what it means, without starting anything."""
    click.echo(_described(load_plan(plan), silos))


@command.command()
@_plan
@click.option("--site", "sites", multiple=True, help="Only these sites; default: all approved.")
@home_option
@plainly
def start(plan: Path, sites: tuple[str, ...], home: Path) -> None:
    """Offer the study in PLAN to the approved sites; it runs when all have answered."""
    name = admin.start_study(home, plan, list(sites) or None)
    click.echo(f"offered {name}; each site accepts with: concilium silo approve {name}")


@command.command()
@click.argument("study")
@click.option("--add", multiple=True, metavar="SITE", help="An approved site that joins.")
@click.option("--remove", multiple=True, metavar="SITE", help="A site that is taken out.")
@home_option
@plainly
def roster(study: str, add: tuple[str, ...], remove: tuple[str, ...], home: Path) -> None:
    """Go on with STUDY under another roster: a new epoch.

    Sites that left or were revoked are taken out by themselves. The session under way ends first;
    then every site compares the new fingerprint and accepts, images are counted again, and the
    rounds go on from the model as it is.
    """
    made = admin.change_roster(home, study, add, remove)
    names = ", ".join(member.name for member in made.members)
    click.echo(f"roster {made.epoch} of {study}: {names}; threshold {made.threshold}")
    click.echo(f"each site accepts with: concilium silo approve {study}")


@command.command()
@click.argument("study")
@home_option
@plainly
def close(study: str, home: Path) -> None:
    """Wait no longer for sites that have not answered the offer of STUDY."""
    waiting = ", ".join(admin.close_offer(home, study)) or "nobody: all have answered"
    click.echo(f"goes without {waiting}")


@command.command()
@click.argument("study")
@home_option
@plainly
def pause(study: str, home: Path) -> None:
    """Open no further session; the one under way ends first."""
    admin.pause_study(home, study)
    click.echo(f"pausing {study}; go on with: concilium study resume {study}")


@command.command()
@click.argument("study")
@home_option
@plainly
def resume(study: str, home: Path) -> None:
    """Go on with a paused study."""
    admin.resume_study(home, study)
    click.echo(f"resumed {study}")


@command.command()
@click.argument("study")
@click.option(
    "--abandon",
    is_flag=True,
    help="Also with a session of which nothing will prove how it ended.",
)
@home_option
@plainly
def stop(study: str, abandon: bool, home: Path) -> None:
    """End a study for good."""
    admin.stop_study(home, study, abandon)
    click.echo(f"stopping {study}")


@command.command("list")
@home_option
@plainly
def list_(home: Path) -> None:
    """All studies, oldest first."""
    rows = admin.list_studies(home)
    for row in rows:
        click.echo(f"{row.id:40} {row.state:10} {row.stage}")
    if not rows:
        click.echo("no study yet: concilium study start PLAN")


def _described(plan: Plan, silos: int) -> str:
    quorum = plan.validate_roster(silos)
    model, ring = plan.model, plan.secure_sum.ring
    widths = "-".join(str(width) for width in model.block_out_channels)
    lines = [
        f"{plan.study.name}: {plan.study.title}",
        f"  images      {plan.data.channels}×{plan.data.image_size}×{plan.data.image_size}, uint8",
        f"  model       {model.architecture} {widths}, predicts {plan.objective.prediction}"
        f"{_classes(plan)}",
        f"  secure sum  {ring} bits a parameter; with {silos} silos threshold "
        f"{quorum.threshold}, {quorum.colluders} colluders tolerated",
        f"  rounds      {plan.rounds.count} of {plan.rounds.local_steps} local steps, "
        f"strategy {plan.strategy.kind}",
    ]
    if plan.auxiliary and plan.warm_up:
        lines.append(
            f"  auxiliary   {plan.auxiliary.images} synthetic images leave the sites in an "
            f"anonymous union, {_warmed(plan.warm_up)}"
        )
        if share := plan.strategy.local_rules().auxiliary_share:
            lines.append(
                "              and all sites are sent the union, to draw "
                f"{share:.0%} of each batch from it{_until(plan)}"
            )
    if plan.evaluation:
        lines.append(
            f"  evaluation  FID of {plan.evaluation.samples} samples with "
            f"{plan.evaluation.feature_network}, {_every(plan.evaluation.every)}"
        )
        if plan.evaluation.feature_network not in FEATURE_NETWORKS:
            lines.append(
                f"              which does not ship: {plan.evaluation.feature_network}.safetensors "
                "has to be here,\n              and at every site (feature_files)"
            )
        if plan.evaluation.at_silos:
            lines.append(
                "              and at the silos, whose policy has to allow it: KID, coverage, "
                "near-copies, loss by timestep"
            )
    lines.append(f"  digest      {plan.digest().hex()}")
    return "\n".join(lines)


def _classes(plan: Plan) -> str:
    """What the images have labels for; synthetic ones leave with theirs."""
    if plan.model.classes is None:
        return ""
    names = f" ({', '.join(plan.data.class_names)})" if plan.data.class_names else ""
    return f", {plan.model.classes} classes{names}, guidance {plan.sampler.guidance:g}"


def _warmed(rules: WarmUp) -> str:
    if rules.patience is None:
        return (
            f"after {rules.steps} local steps,\n              converged or not: for a criterion, "
            "write patience = 2 in [warm_up]"
        )
    return (
        f"after at most {rules.steps} local steps,\n              until {rules.patience} checks in "
        f"a row improve by less than {100 * rules.improvement:g}%"
    )


def _until(plan: Plan) -> str:
    strategy = plan.strategy
    if plan.evaluation is None or not (isinstance(strategy, FedDDPMPlus) and strategy.share_until):
        return ""
    return (
        f",\n              until the model's FID is at most {strategy.share_until:g} times its own"
    )


def _every(rounds: int) -> str:
    return "every round" if rounds == 1 else f"every {rounds} rounds"
