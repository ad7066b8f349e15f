"""`python -m tests.fuzz TARGET|all [SECONDS]`: coverage-guided fuzzing with atheris (`make fuzz`).

Inputs that matter are kept in build/fuzz/TARGET, a finding as build/fuzz/crash-….
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path("build/fuzz")


def main(target: str, seconds: str = "20") -> int:
    try:
        import atheris
    except ImportError:
        print(
            "atheris is not installed for this Python (it has wheels for Linux and CPython 3.11 "
            "to 3.13 only); tests/fuzz/test_parsers.py goes through the same targets with "
            "hypothesis"
        )
        return 1
    with atheris.instrument_imports(include=["secagg", "study"]):
        from tests.fuzz.parsers import TARGETS, seeds
    if target == "all":
        command = [sys.executable, "-m", "tests.fuzz"]
        return max(subprocess.call([*command, name, seconds]) for name in TARGETS)
    corpus = FOLDER / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-max_len=8192", f"-artifact_prefix={FOLDER}/"]
    print(f"==> {target}", flush=True)
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], TARGETS[target])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
