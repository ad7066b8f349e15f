"""One training order by several processes of this machine, each with its share of every batch.

They are started as `torchrun --nproc-per-node N` would start them (RANK, LOCAL_RANK, WORLD_SIZE),
with gloo on CPUs and NCCL on GPUs, process k on GPU k. They meet through a file in the study's
folder and talk over the loopback device: torchrun itself listens on every interface of the machine
for anybody who asks, which has no place in a hospital's network.

Every process trains; only the first reports, saves checkpoints and leaves the result.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import distributed

from silo.errors import Paused, SiloError, WorkFailed
from silo.orders import Order, TrainLocal, TrainRound
from silo.process import begin, pause_requested
from silo.worker import ProgressFile

R = TypeVar("R")
_LOOK_SECONDS = 0.2


def run_together(order: Order[R], progress: ProgressFile, processes: int, folder: Path) -> R:
    """The answer of the first process. Raises what that raises, WorkFailed where one died."""
    with TemporaryDirectory(prefix="together-", dir=folder) as place:
        here = Path(place)
        (here / "order").write_bytes(pickle.dumps((order, progress)))
        started = [_start(here, rank, processes) for rank in range(processes)]
        try:
            _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if not (here / "answer").exists():
            codes = ", ".join(str(process.returncode) for process in started)
            raise WorkFailed(
                f"one of {processes} training processes died (exit codes {codes}): see above; most "
                "often memory, or [resources] processes is more than there are GPUs"
            )
        answer = pickle.loads((here / "answer").read_bytes())  # noqa: S301 - our own process's
    if isinstance(answer, SiloError):
        raise answer
    result: R = answer
    return result


def _start(place: Path, rank: int, processes: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen([sys.executable, "-m", __name__, str(place)], env=environment)


def _wait(started: list[subprocess.Popen[bytes]]) -> None:
    """Until the first is done, or any has failed: the others would wait for it for ever."""
    told = False
    while started[0].poll() is None:
        if any(process.poll() for process in started):
            return
        if pause_requested() and not told:
            started[0].send_signal(signal.SIGUSR1)
            told = True
        time.sleep(_LOOK_SECONDS)


def leads() -> bool:
    """Whether this process leaves the result: the first of several, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def go_on_alone() -> None:
    """What this process trains from here on it trains by itself; the others are done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device of this process: of several on GPUs, its own."""
    if not distributed.is_initialized() or device == "cpu" or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _one_of_several(place: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parent = os.getppid()
    begin(0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    order, progress = pickle.loads((place / "order").read_bytes())  # noqa: S301 - our own process's
    if not isinstance(order, TrainRound | TrainLocal):
        raise TypeError(f"{type(order).__name__} is no training")
    on_gpus = order.machine.device != "cpu" and torch.cuda.is_available()
    meet = f"file://{place / 'meet'}"
    backend = "nccl" if on_gpus else "gloo"
    distributed.init_process_group(backend, init_method=meet, rank=rank, world_size=processes)
    from silo.jobs import execute

    answer: object
    try:
        answer = execute(order, progress)
    except SiloError as error:
        answer = error
    if rank == 0:
        (place / "answer.new").write_bytes(pickle.dumps(answer))
        os.replace(place / "answer.new", place / "answer")
    if not isinstance(answer, Paused):
        go_on_alone()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _one_of_several(Path(sys.argv[1]))
