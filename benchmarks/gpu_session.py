"""Everything that only a GPU can prove or time, in one go, wherever there is one.

    python -m benchmarks.gpu_session [--results FOLDER] [--quick]

Proofs (`benchmarks.gpu_proofs`): the normals and the masks have the bits of the CPU; more than 2^31
elements; a second stream and a second GPU; N replays of a captured graph make N noises, and those
of a whole training step its steps; blocks, warps and batches of any size leave the bits alone;
every op's result is that of the CPU; compute-sanitizer where it is installed. Then the tables of
`benchmarks.kernels` and `benchmarks.train_step`.

Every part is a process of its own with a time limit, 30 minutes in all, and the results are written
after each, so that a part that fails, hangs or breaks the device costs no other its result. Nothing
needs a network. Everything goes to benchmarks/results/<device>.json. Without a GPU every part says
'not measured', and nothing is written unless a folder is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch

from benchmarks.gpu_proofs import PROOFS, SANITIZER_SECONDS
from benchmarks.measure import NOT_MEASURED, Report, Target
from benchmarks.worker import ROOT

RESULTS = ROOT / "benchmarks" / "results"


PROOF_SECONDS, TABLE_SECONDS = 60, {"kernels": 420, "train_step": 360}


def _part(arguments: list[str], seconds: int) -> str:
    """What a part that runs in a process of its own says; raises RuntimeError where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment,
            capture_output=True, text=True, check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not finished after {seconds} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().rpartition("\n")[2][-500:])
    return done.stdout.strip()


def prove(report: Report, save: Callable[[], None]) -> None:
    """A row for every proof."""
    for proof in PROOFS:
        result: str | None = None
        if torch.cuda.is_available():
            limit = SANITIZER_SECONDS if "sanitizer" in proof.__name__ else PROOF_SECONDS
            try:
                said = _part(["benchmarks.gpu_session", "--one", proof.__name__], limit)
                result = said.partition(" ")[2]
            except RuntimeError as failure:
                result = f"FAILED: {failure}"
        shown = None if result == str(None) else result
        report.row(proof=proof.__name__.replace("_", " "), result=shown)
        save()


def tabulate(report: Report, device: str, quick: bool, save: Callable[[], None]) -> None:
    """The rows and targets of both tables, or a row that says why there are none."""
    commands = {"kernels": [f"--rounds={5 if quick else 25}"]}
    commands["train_step"] = [f"--rounds={3 if quick else 9}", "--without-lucidrains"]
    if quick:
        for options in commands.values():
            options.append("--no-compile")
    for name, options in commands.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [f"benchmarks.{name}", f"--device={device}", *options, "--json", file.name]
            try:
                _part(command, TABLE_SECONDS[name])
            except RuntimeError as failure:
                missing = "ModuleNotFoundError" in str(failure)
                report.row(table=name, result=f"{NOT_MEASURED if missing else 'FAILED'}: {failure}")
            written = pathlib.Path(file.name).read_text()
        found = json.loads(written) if written else {"rows": [], "targets": []}
        report.rows += found["rows"]
        for target in found["targets"]:
            report.targets.append(Target(*(target[k.name] for k in dataclasses.fields(Target))))
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description="prove and measure on a GPU, in one go")
    parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few rounds, no torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                        help="cpu: a rehearsal of the tables; proofs need the GPU")  # fmt: skip
    parser.add_argument("--one", nargs="+", metavar="PROOF", help="these proofs only, no tables")
    given = parser.parse_args()
    if given.one:
        for proof in PROOFS:
            if proof.__name__ in given.one:
                print(proof.__name__, proof())
        return
    report, folder = Report("GPU session"), given.results
    if folder is None and torch.cuda.is_available():
        folder = RESULTS
    path = folder / f"{_device_name()}.json" if folder else None
    save = functools.partial(report.write, path) if path else lambda: None
    prove(report, save)
    tabulate(report, given.device, given.quick, save)
    report.finish(path)
    failed = [row for row in report.rows if str(row.get("result")).startswith("FAILED")]
    if failed:
        sys.exit(f"{len(failed)} part(s) failed")


def _device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
