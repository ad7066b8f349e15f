"""What the compiler makes of every kernel, ahead of time and without a GPU.

The gates hold for any Triton: no stack, no spills, 128-bit accesses in the aligned configurations,
no fused multiply-add and no flush to zero where bits are promised. Registers and instruction counts
are compared with the committed table for the Triton it was made with; renew it with ``python
tests/kernels/aot.py --write``.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


pytestmark = pytest.mark.timeout(900)  # a minute of compiling on a quiet core, the first time


@pytest.fixture(scope="module")
def survey(request, tmp_path_factory):
    """Compiled code is kept in pytest's cache, where it is found by the kernel's source."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kept = getattr(request.config, "cache", None)
    folder = kept.mkdir("aot") if kept else tmp_path_factory.mktemp("triton")
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py")],
        env=environment, capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def _each(survey):
    for case, by_architecture in survey["cases"].items():
        for architecture, facts in by_architecture.items():
            yield f"{case} on {architecture}", architecture, facts


def test_nothing_lives_in_local_memory(survey):
    for name, _, facts in _each(survey):
        assert facts["stack"] + facts["spills"] == 0, (name, facts)


# What a kernel reads one number at a time, on NVIDIA and on AMD (which reads most of it by scalar
# instructions): timestep and schedule, key, sample and step; weights and statistics of a group; the
# eight words of a key; ends and scales of the tensors that a program meets.
NARROW_LOADS = {
    "normal": (3, 0),
    "q_sample": (5, 1),  # on AMD the images, 8 bytes to a thread
    "residual": (5, 4),
    "sampler_step": (7, 0),
    "adamw_ema": (3, 2),
    "forward": (8, 4),
    "backward": (16, 6),
    "quantise": (62, 4),
    "mask": (9, 0),
}
BYTES = ("q_sample/u8", "q_sample/digits", "q_sample/beyond")  # all that these read are bytes


def test_aligned_configurations_move_128_bits_at_a_time(survey):
    table = json.loads((HERE / "aot_table.json").read_text())
    for name, architecture, facts in _each(survey):
        if not facts["wide"]:
            continue
        kernel = name.partition(": ")[2].partition("_kernel")[0]
        narrow_loads = facts["loads"] - facts["loads_128"]
        if survey["triton"] == table["triton"]:  # others take other things out of a loop
            assert narrow_loads <= NARROW_LOADS[kernel][architecture == "gfx942"], (name, facts)
        narrow_stores = facts["stores"] - facts["stores_128"]
        assert narrow_stores <= 2, (name, facts)  # a partial sum, the statistics of a group
        assert facts["stores_128"] + facts["loads_128"] > 0, (name, facts)
        half = architecture == "gfx942" and name.startswith(BYTES)  # 64 bits at a time
        if not name.startswith("normal") and not half:
            assert facts["loads_128"] > 0, (name, facts)


def test_nothing_is_fused_where_bits_are_promised(survey):
    for name, _, facts in _each(survey):
        if facts["exact"]:
            assert facts["fused"] == 0, (name, facts)


def test_no_subnormal_is_taken_for_zero_where_bits_are_promised(survey):
    for name, _, facts in _each(survey):
        if facts["exact"]:
            assert facts["flushing"] == 0, (name, facts)


def test_no_machine_fuses_what_masks_a_vector(survey):
    """Down to the instructions: no root or division there, which are made of fused ones."""
    masks = [(name, facts) for name, _, facts in _each(survey) if name.startswith("mask_add")]
    assert masks
    for name, facts in masks:
        assert facts["exact"], name
        assert facts["fused_machine"] == 0, (name, facts)


def test_registers_and_instructions_are_those_of_the_table(survey):
    table = json.loads((HERE / "aot_table.json").read_text())
    if table["triton"] != survey["triton"]:
        pytest.skip(f"the table is of triton {table['triton']}, this is {survey['triton']}")
    changed = {
        name: (table["cases"].get(name), facts)
        for name, facts in survey["cases"].items()
        if table["cases"].get(name) != facts
    }
    assert not changed, "renew with `python tests/kernels/aot.py --write` if this is meant"
    assert table["cases"].keys() == survey["cases"].keys()
