"""Proofs once more under compute-sanitizer, where it is installed and may watch the device."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from benchmarks import gpu_proofs
from benchmarks.measure import NOT_MEASURED
from benchmarks.worker import ROOT, environment

SANITIZER_SECONDS = 150
_FOUND = 9  # exit status where memcheck has found something
SANITIZED = (
    gpu_proofs.masks_have_the_bits_of_the_cpu, gpu_proofs.normals_have_the_bits_of_the_cpu,
    gpu_proofs.a_batch_past_the_limits_of_a_grid, gpu_proofs.norms_are_those_of_the_cpu,
    gpu_proofs.elementwise_ops_are_those_of_the_cpu,
)  # fmt: skip
_REFUSALS = (  # of compute-sanitizer, where a sandbox or a driver keeps it from the device
    "Device not supported",
    "Internal Sanitizer Error",
    "No attachable process",
    "before first instrumented API call",
)


def compute_sanitizer_finds_nothing() -> str | None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    # What memory is touched, and not what torch asks of the driver to see whether it is there.
    command = [tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu_session", "--one"]
    command += (proof.__name__ for proof in SANITIZED)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            # every tensor an allocation of its own, so that what lies beside it is out of bounds
            env=environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, timeout=SANITIZER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{NOT_MEASURED}: not finished after {SANITIZER_SECONDS} s"
    return sanitizer_verdict(done.returncode, done.stdout, done.stderr)


def sanitizer_verdict(status: int, said: str, errors: str) -> str:
    """What memcheck has shown. Raises AssertionError where it found something, and where the
    program that it watched failed by itself; it may also have been kept from watching.
    """
    own = [line.strip("= ") for line in said.splitlines() if line.startswith("=========")]
    refused = [line for line in own if any(known in line for known in _REFUSALS)]
    if refused:
        return f"{NOT_MEASURED}: {refused[0][:200]}"
    counted = re.search(r"ERROR SUMMARY: (\d+) error", said)
    if counted is None:
        words = (errors or said).strip().splitlines() or [f"exit status {status}"]
        return f"{NOT_MEASURED}: no summary of compute-sanitizer; {words[-1][:200]}"
    assert counted[1] == "0", f"found {counted[1]} error(s): {' '.join(own)[:1500]}"
    words = [line for line in said.splitlines() if " FAILED: " in line]
    words += errors.strip().splitlines()[-5:]
    assert status == 0, f"the program failed, nothing found: {' | '.join(words)[-1500:]}"
    missing = [proof.__name__ for proof in SANITIZED if f"{proof.__name__} " not in said]
    assert not missing, f"the program failed, it did not come to {', '.join(missing)}"
    return "memcheck over noise, masks, loss, sampler, norms and optimiser"
