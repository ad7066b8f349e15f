"""`python -m tests.fuzz TARGET|all [SECONDS]`: coverage-guided fuzzing with atheris (`make fuzz`).

Inputs that matter are kept in build/fuzz/TARGET, a finding as build/fuzz/TARGET-crash-…. What was
run is added up in benchmarks/results/fuzz.json, under the versions that it was run with.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = Path("build/fuzz")
RESULTS = Path("benchmarks/results/fuzz.json")
_DONE = re.compile(r"^Done (\d+) (?:runs )?in (\d+) second", re.MULTILINE)


def main(target: str, seconds: str = "20") -> int:
    """Each target in a process of its own, which libFuzzer ends as it likes."""
    if find_spec("atheris") is None:
        print(
            "atheris is not installed for this Python (it has wheels for Linux and CPython 3.11 "
            "to 3.13 only); tests/fuzz/test_parsers.py goes through the same targets with "
            "hypothesis"
        )
        return 1
    from tests.fuzz.parsers import TARGETS

    failed = 0
    for name in TARGETS if target == "all" else [target]:
        print(f"==> {name}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", "--here", name, seconds]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        runs = _DONE.search(done.stderr)
        if done.returncode or runs is None:
            print(done.stderr, file=sys.stderr)
            failed = 1
        executions, taken = (int(runs[1]), int(runs[2])) if runs else (0, 0)
        print(f"    {executions} executions in {taken} s, exit {done.returncode}", flush=True)
        add(name, executions, taken, findings=int(done.returncode != 0))
    return failed


def here(target: str, seconds: str) -> None:
    import atheris

    with atheris.instrument_imports(
        include=["secagg", "study", "silo", "coordinator", "diffusion"]
    ):
        from tests.fuzz.parsers import TARGETS, seeds
    corpus = FOLDER / target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds(target):
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    prefix = f"-artifact_prefix={FOLDER}/{target}-"
    options = [f"-max_total_time={seconds}", "-max_len=16384", "-print_final_stats=1", prefix]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


def add(target: str, executions: int, seconds: int, findings: int) -> None:
    these = {"python": platform.python_version(), "atheris": version("atheris")}
    runs: list[dict[str, Any]] = []
    if RESULTS.exists():
        runs = json.loads(RESULTS.read_text("utf-8"))["runs"]
    run = next((run for run in runs if run["conditions"] == these), None)
    if run is None:
        run = {"conditions": these, "targets": {}}
        runs.append(run)
    so_far = run["targets"].get(target, {"executions": 0, "seconds": 0, "findings": 0})
    new = {"executions": executions, "seconds": seconds, "findings": findings}
    run["targets"][target] = {key: so_far[key] + new[key] for key in so_far}
    RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        here(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
