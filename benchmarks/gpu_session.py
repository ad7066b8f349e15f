"""Everything that only a GPU can prove or time, in one go or in several, wherever there is one.

    python -m benchmarks.gpu_session [--seconds 800] [--only PART] [--results FOLDER] [--quick]

In this order: proofs that take seconds (`benchmarks.gpu_proofs`: bits, streams, graphs, grids;
`gpu_networks`; `gpu_ops`: strides, opcheck); the tables of `benchmarks.train_step` and, group by
group, of `benchmarks.kernels`; proofs with more than 2^31 elements (`gpu_large`); compute-sanitizer
where it is installed and may watch the device; what waits for torch.compile (`gpu_ops`). `--only
proofs`, `kernels` or `train_step`, which may be given several times, leaves the others out. First
of all it says which packages are missing, and what will not be measured for want of them; those
that were carried along (`pip install --target FOLDER`) are found where PYTHONPATH names the folder.

No part starts once `--seconds` are spent, and each has a limit of its own, cut to what is left.
Tables are processes of their own; proofs share one, and those after one that failed or hung go on
in another. Results go to benchmarks/results/<device>.json after each part and join what is there of
the same GPU, torch and triton: parts that were left out keep theirs. A file of other versions is
left alone, and theirs get a name with the versions. Nothing needs a network. Without a GPU every
part says 'not measured', and nothing is written unless a folder is named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import pathlib
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from benchmarks import gpu_large, gpu_networks, gpu_ops, gpu_proofs, kernels, train_step
from benchmarks.gpu_sanitizer import SANITIZER_SECONDS, compute_sanitizer_finds_nothing
from benchmarks.kernel_cases import GROUPS
from benchmarks.measure import NOT_MEASURED, Report, Target, machine
from benchmarks.worker import ROOT, Child, environment

Row = dict[str, Any]
Proof = Callable[[], str | None]
RESULTS = ROOT / "benchmarks" / "results"
QUICK: tuple[Proof, ...] = (*gpu_proofs.PROOFS, *gpu_networks.PROOFS, *gpu_ops.PROOFS)
SLOW: tuple[Proof, ...] = (*gpu_large.PROOFS, compute_sanitizer_finds_nothing, *gpu_ops.SLOW)
PROOFS = (*QUICK, *SLOW)
TITLE = "GPU session"
PARTS = ("proofs", "kernels", "train_step")
PROOF_SECONDS = {  # of others 90
    compute_sanitizer_finds_nothing.__name__: SANITIZER_SECONDS + 20,
    gpu_ops.every_op_compiles_into_one_graph.__name__: 120,
}
TABLE_SECONDS = {"masks": 60, "norms": 120, "optimiser": 80, "elementwise": 240, "train_step": 300}
_ORDER = ("proofs", "train_step", *(f"kernels: {group}" for group in GROUPS))
# Of `concilium[silo]`, what a network and its training take. The last imports all of it.
_NEEDED = ("pydantic", "safetensors.torch", "diffusers.models.unets.unet_2d", "diffusion.training")
_SPENT = f"{NOT_MEASURED}: the session's seconds were spent"
_LEAST_SECONDS = 15.0  # no process starts with less: it would end among its imports
_VERSIONS = ("gpu", "torch", "triton")


def _of(row: Row) -> tuple[Any, ...]:
    """What a row is about: one of the same part and thing takes its place."""
    return row["part"], *(row.get(name) for name in ("proof", "table", "op", "step"))


class Session:
    """The results so far, in memory and in the file, and the time that is left."""

    def __init__(self, path: pathlib.Path | None, seconds: float, command: str) -> None:
        self._end = time.monotonic() + seconds
        self.report, self.path = Report(TITLE, commands=[command]), path
        self.failed = 0
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            self.report.rows = kept["rows"]
            self.report.targets = _targets(kept)
            self.report.commands = list(dict.fromkeys([*kept.get("commands", ()), command]))

    def left(self) -> float:
        return self._end - time.monotonic()

    def put(self, part: str, rows: Sequence[Row], targets: Sequence[Target] = ()) -> None:
        """They take the places of what they measure anew."""
        new, names = [row | {"part": part} for row in rows], {target.name for target in targets}
        about = {_of(row) for row in new}
        self.failed += sum(str(row.get("result")).startswith("FAILED") for row in new)
        rest = [row for row in self.report.rows if _of(row) not in about]
        self.report.rows = sorted([*rest, *new], key=lambda row: _ORDER.index(row["part"]))
        kept = [target for target in self.report.targets if target.name not in names]
        self.report.targets = [*kept, *targets]
        self.save()

    def put_unless_known(self, part: str, row: Row, result: str = _SPENT) -> None:
        """An earlier session may have measured it."""
        new = row | {"part": part, "result": result}
        of_part = [old for old in self.report.rows if old["part"] == part]
        known = of_part if "table" in row else [old for old in of_part if _of(old) == _of(new)]
        if not known:
            self.put(part, [new])

    def drop(self, part: str, key: str) -> None:
        """What said that a table had failed."""
        self.report.rows = [r for r in self.report.rows if r["part"] != part or key not in r]

    def save(self) -> None:
        if self.path is not None:
            self.report.write(self.path)


def _targets(result: dict[str, Any]) -> list[Target]:
    fields = [field.name for field in dataclasses.fields(Target)]
    return [Target(*(target[name] for name in fields)) for target in result["targets"]]


@contextlib.contextmanager
def _child(arguments: Sequence[str]) -> Iterator[Child]:
    child = Child([sys.executable, "-m", *arguments], environment(), leader=True)
    try:
        yield child
    finally:
        child.end(patience=0)


def prove(session: Session, proofs: Sequence[Proof]) -> None:
    """A row for every proof, from as few processes as there are failures, and one."""
    names = [proof.__name__ for proof in proofs]
    while names:
        if not torch.cuda.is_available():
            session.put("proofs", [{"proof": _title(name), "result": None} for name in names])
            return
        if session.left() < _LEAST_SECONDS:
            for name in names:
                session.put_unless_known("proofs", {"proof": _title(name)})
            return
        with _child(["benchmarks.gpu_session", "--one", *names]) as child:
            failed = False
            while names and not failed:
                result = _answer(session, child, names[0])
                failed = str(result).startswith("FAILED")
                if result == _SPENT:
                    break
                session.put("proofs", [{"proof": _title(names.pop(0)), "result": result}])


def _title(proof: str) -> str:
    return proof.replace("_", " ")


def _answer(session: Session, child: Child, proof: str) -> str | None:
    """What the child says of the proof; None where it could not be tried."""
    limit = min(PROOF_SECONDS.get(proof, 90), max(0.0, session.left()))
    try:
        while (line := child.line(limit)) is not None:
            name, _, result = line.partition(" ")
            if name == proof:
                return None if result == str(None) else result
    except TimeoutError as late:
        return _SPENT if session.left() <= 0 else f"FAILED: {late}"
    return f"FAILED: {child.last_words()}"


def tabulate(session: Session, part: str, limit: float, module: str, options: list[str]) -> None:
    """The rows and targets of a table, as far as it came, and a row that says why no further."""
    if session.left() < _LEAST_SECONDS:
        session.put_unless_known(part, {"table": module})
        return
    limit = min(limit, session.left())
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "table.json"
        failure = _run([f"benchmarks.{module}", *options, "--json", str(path)], limit)
        found = json.loads(path.read_text()) if path.exists() else {"rows": [], "targets": []}
    session.drop(part, "table")
    if failure is not None:
        missing = "ModuleNotFoundError" in failure
        result = f"{NOT_MEASURED if missing else 'FAILED'}: {failure}"
        found["rows"].append({"table": module, "result": result})
    session.put(part, found["rows"], _targets(found))


def _run(arguments: list[str], seconds: float) -> str | None:
    """Why it failed, or None."""
    end = time.monotonic() + seconds
    with _child(arguments) as child:
        try:
            while child.line(max(0.0, end - time.monotonic())) is not None:
                pass
        except TimeoutError:
            return f"not finished after {seconds:.0f} s"
        return child.last_words() if child.end() else None


def lacking() -> list[str]:
    """The packages without which no network can be trained here."""
    missing: dict[str, None] = {}
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as failure:  # also what is there and does not fit the rest
            absent = failure.name if isinstance(failure, ModuleNotFoundError) else None
            missing[(absent or name).partition(".")[0]] = None
    return list(missing)


def unmeasured(session: Session, only: Sequence[str] = PARTS) -> None:
    """Every row and aim as it is without a GPU."""
    if "proofs" in only:
        rows = [{"proof": _title(proof.__name__), "result": None} for proof in PROOFS]
        session.put("proofs", rows)
    if "train_step" in only:
        steps = Report("train_step")
        train_step.list_aims(steps, chain(*train_step.ON_CUDA))
        session.put("train_step", steps.rows, steps.targets)
    if "kernels" in only:
        for group in GROUPS:
            ops = Report(group)
            kernels.list_aims(ops, group)
            session.put(f"kernels: {group}", ops.rows, ops.targets)


def run(session: Session, only: Sequence[str], device: str, quick: bool) -> None:
    wanted = only or PARTS
    if device == "cuda" and not torch.cuda.is_available():
        unmeasured(session, wanted)
        return
    missing = lacking()
    if missing and set(wanted) & {"train_step", "proofs"}:
        print(f"{NOT_MEASURED}: the training step and what is proven of networks, for want of "
              f"{', '.join(missing)}", flush=True)  # fmt: skip
    if "proofs" in wanted:
        prove(session, QUICK)
    options = [f"--device={device}", *(["--no-compile"] if quick else [])]
    if "train_step" in wanted and missing:
        result = f"{NOT_MEASURED}: no {', '.join(missing)}"
        session.put_unless_known("train_step", {"table": "train_step"}, result)
    elif "train_step" in wanted:
        # Weights are drawn on the CPU before a contender's first step; a GPU's host has many cores.
        threads = f"--threads={1 if device == 'cpu' else 4}"
        arguments = [*options, threads, f"--rounds={3 if quick else 9}", "--without-lucidrains"]
        tabulate(session, "train_step", TABLE_SECONDS["train_step"], "train_step", arguments)
    if "kernels" in wanted:
        rounds = f"--rounds={5 if quick else 25}"
        for group in GROUPS:
            arguments = [*options, rounds, f"--only={group}"]
            tabulate(session, f"kernels: {group}", TABLE_SECONDS[group], "kernels", arguments)
    if "proofs" in wanted:
        prove(session, SLOW)


def results_of(folder: pathlib.Path) -> pathlib.Path:
    """The file of this device: one that holds results of other versions stays as it is."""
    here = machine()
    name = re.sub(r"[^a-z0-9]+", "-", str(here["gpu"] or "no-gpu").lower()).strip("-")
    path = folder / f"{name}.json"
    if path.exists():
        there = json.loads(path.read_text())["machine"]
        if any(there.get(key) != here.get(key) for key in _VERSIONS):
            return folder / f"{name}-torch-{here['torch']}-triton-{here['triton']}.json"
    return path


def say(names: Sequence[str]) -> None:
    """A line for each proof; the first that fails is the last."""
    for proof in PROOFS:
        if proof.__name__ not in names:
            continue
        try:
            print(proof.__name__, proof(), flush=True)
        except ModuleNotFoundError as missing:
            print(f"{proof.__name__} {NOT_MEASURED}: {missing}", flush=True)
        except Exception as failure:
            words = "; ".join(str(failure).split("\n"))[:1500]
            print(f"{proof.__name__} FAILED: {type(failure).__name__}: {words}", flush=True)
            traceback.print_exc()
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="prove and measure on a GPU, in one go")
    parser.add_argument("--seconds", type=float, default=800, help="start nothing after these")
    parser.add_argument("--only", choices=PARTS, action="append", default=[],
                        help="this part; may be given several times")  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few rounds, no torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                        help="cpu: a rehearsal of the tables; proofs need the GPU")  # fmt: skip
    parser.add_argument("--one", nargs="+", metavar="PROOF", help="these proofs, in this process")
    given = parser.parse_args()
    if given.one:
        say(given.one)
        return
    folder = given.results or (RESULTS if torch.cuda.is_available() else None)
    command = ["python -m benchmarks.gpu_session", *(f"--only {part}" for part in given.only)]
    command += ["--quick"] if given.quick else []
    path = results_of(folder) if folder else None
    session = Session(path, given.seconds, " ".join(command))
    run(session, given.only, given.device, given.quick)
    session.report.finish(session.path)
    if session.path and session.path.parent == RESULTS:
        print(f"{session.path.name} is on the page after `python -m benchmarks.page`")
    if session.failed:
        sys.exit(f"{session.failed} part(s) failed")


if __name__ == "__main__":
    main()
