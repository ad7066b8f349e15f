"""Showing a running study: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.admin import StudyStatus

Show = Callable[[StudyStatus], None]


@contextmanager
def watching(console: Console) -> Iterator[Show]:
    """`show(status)` for as long as the study runs."""
    if not console.is_terminal:
        yield _plain(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        began = time.monotonic()
        yield lambda study: live.update(_page(study, time.monotonic() - began))


def _plain(console: Console) -> Show:
    """One line whenever the study has moved on."""
    seen: set[str] = set()
    began = time.monotonic()

    def show(study: StudyStatus) -> None:
        for line in _lines(study):
            if line not in seen:
                seen.add(line)
                console.print(f"{time.monotonic() - began:6.1f} s  {line}")

    return show


def _lines(study: StudyStatus) -> Iterator[str]:
    if study.error:
        yield f"! {study.error}"
    yield study.stage
    if study.round:
        yield (
            f"round {study.round} of {study.rounds} done{_figures(study)}; "
            f"summed: {', '.join(study.survivors)}"
        )


def _figures(study: StudyStatus) -> str:
    figures = [("loss", study.loss, ".4f"), ("FID", study.fid, ".2f")]
    text = "".join(f", {name} {value:{form}}" for name, value, form in figures if value is not None)
    return f"{text}, corrections {study.corrections}" if study.corrections else text


def _page(study: StudyStatus, seconds: float) -> Group:
    head = Text.assemble(
        (study.title, "bold"),
        f"   {study.stage}\n",
        f"round {study.round} of {study.rounds}{_figures(study)}   {seconds:.0f} s",
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for silo in study.silos:
        share = silo.step / silo.steps if silo.steps else 0.0
        table.add_row(
            silo.name,
            "awaited" if silo.awaited else "",
            silo.activity or "waits",
            ProgressBar(total=1.0, completed=share, width=30) if silo.steps else "",
        )
    parts: list[RenderableType] = [head, table]
    if study.quantity:
        parts.append(
            Text(
                f"secure sum of {study.quantity}: {study.phase}, {study.present} answered, "
                f"threshold {study.threshold}",
                style="dim",
            )
        )
    if study.error:
        parts.append(Text(study.error, style="yellow"))
    return Group(*parts)
