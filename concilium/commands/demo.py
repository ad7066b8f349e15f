"""`concilium demo`: a whole federation on this machine, from the authority to the model."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from importlib.resources import files
from pathlib import Path

import click
from rich.console import Console

from concilium.datasets import DATASETS, DataMissing, LabelledImages
from concilium.demo.federation import NAMES, Federation, ProcessDied
from concilium.demo.watch import watching
from concilium.partition import dirichlet, histogram
from coordinator import admin
from coordinator.admin import StudyStatus
from silo.errors import SiloError
from study.plan import Plan, load_plan

_MARK = ".concilium-demo"


@click.command("demo")
@click.option(
    "--data",
    type=click.Choice(list(DATASETS)),
    default="digits",
    show_default=True,
    help="digits: scikit-learn's; fashion-mnist: Debian's dataset-fashion-mnist.",
)
@click.option(
    "--silos", type=click.IntRange(3, len(NAMES)), default=4, show_default=True, help="How many."
)
@click.option("--rounds", type=click.IntRange(1, 1000), help="Instead of the plan's number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("concilium-demo"),
    show_default=True,
    help="Folder of everything that is made.",
)
@click.option("--alpha", type=float, default=0.3, show_default=True, help="Dirichlet's α.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of the partition.")
def command(data: str, silos: int, rounds: int | None, out: Path, alpha: float, seed: int) -> None:
    """A coordinator and several silos as separate processes, a study, and a model at the end.

    Takes about three minutes on two cores. What needs a person elsewhere (approving a site after
    comparing its fingerprint, accepting a study) is done by this program here.
    """
    console = Console(soft_wrap=True, emoji=False, markup=False, highlight=False)
    # Asked to end, this program still has to end the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    out = out.resolve()
    try:
        labelled = DATASETS[data]()
        _clear(out)
        began = time.monotonic()
        with Federation(out, NAMES[:silos]) as federation:
            _found(console, federation, labelled, alpha, seed)
            study = _start(console, federation, data, rounds)
            status = _follow(console, federation, study)
        _finish(console, out, status, time.monotonic() - began)
    except (DataMissing, ProcessDied, SiloError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _clear(out: Path) -> None:
    """Make an empty folder; only one that an earlier demonstration made is replaced."""
    if out.exists():
        if any(out.iterdir()) and not (out / _MARK).exists():
            raise click.ClickException(
                f"{out} is not empty and was not made by a demonstration: choose another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _found(
    console: Console, federation: Federation, labelled: LabelledImages, alpha: float, seed: int
) -> None:
    parts = dirichlet(labelled.labels, len(federation.names), alpha, seed)
    table = histogram(labelled.labels, parts)
    console.print(f"{len(labelled.images)} images, split by class (Dirichlet {alpha}):")
    for name, part, row in zip(federation.names, parts, table, strict=True):
        console.print(f"  {name:10} {len(part):6}  " + " ".join(f"{n:5}" for n in row))
        federation.found_silo(name, labelled.images[part])
    fingerprint = federation.found_coordinator()
    console.print(f"coordinator up; fingerprint of its authority {fingerprint}")
    console.print("approvals are given automatically here; elsewhere a person gives them")
    for name, compared in federation.enrol().items():
        console.print(f"  {name:10} joined, fingerprint {compared}")
    for name in federation.names:
        federation.start(name)


def _start(console: Console, federation: Federation, data: str, rounds: int | None) -> str:
    plan = demo_plan(data, rounds)
    path = federation.out / "plan.toml"
    path.write_text(plan.toml(), "utf-8")
    study = admin.start_study(federation.coordinator_home, path)
    console.print(f"study {study} offered to {len(federation.names)} sites")
    return study


def demo_plan(data: str, rounds: int | None) -> Plan:
    """The plan that ships for a data set, with another number of rounds where one is given."""
    source = files("concilium.demo").joinpath(f"{data}.toml").read_text("utf-8")
    plan = load_plan(source)
    if rounds is None:
        return plan
    return plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"count": rounds})})


def _follow(console: Console, federation: Federation, study: str) -> StudyStatus:
    with watching(console) as show:
        while True:
            federation.check()
            now = admin.status(federation.coordinator_home)
            status = next(found for found in now.studies if found.id == study)
            show(status)
            if status.state in ("finished", "stopped", "failed"):
                break
            time.sleep(0.3)
    _wait_for_models(federation, study)
    return status


def _wait_for_models(federation: Federation, study: str, seconds: float = 20.0) -> None:
    """Give the silos the time to fetch the final model; they would do it after a restart too."""
    deadline = time.monotonic() + seconds
    ended = [federation.silo_home(n) / "studies" / study / "ended.json" for n in federation.names]
    while time.monotonic() < deadline and not all(path.exists() for path in ended):
        time.sleep(0.2)


def _finish(console: Console, out: Path, status: StudyStatus, seconds: float) -> None:
    shutil.copytree(status.folder, out, dirs_exist_ok=True)
    if status.state != "finished":
        raise click.ClickException(f"the study {status.state}: {status.error or 'see the logs'}")
    console.print(f"\nfinished in {seconds:.0f} s; open {out / 'index.html'}")
    for name, what in (
        ("model", "for diffusers.DDPMPipeline.from_pretrained"),
        ("samples.png", "images drawn by the federated model"),
        ("grids", "the same after every round"),
        ("report.json", "rounds, survivors, loss, FID, trigger decisions, bytes, seconds"),
        ("metrics.jsonl", "one line per event"),
        ("silos", "what each institution keeps, its audit report among it"),
        ("logs", "of each process"),
    ):
        console.print(f"  {name:14} {what}")
