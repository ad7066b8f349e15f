"""Runs ``interpreter/`` in its own process where this one has a GPU and compiles its kernels."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the suite runs in this process"
)
def test_the_triton_kernels_under_the_interpreter():
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib",
         "-p", "no:cacheprovider", str(here / "interpreter")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1], capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
