"""Everything that only a GPU can prove or time, in one go, wherever there is one.

    python -m benchmarks.gpu_session [--results FOLDER] [--quick]

Proofs: the normals and the masks have the bits of the CPU; more than 2^31 elements; a second
stream; N replays of a captured graph make N noises; blocks, warps and batches of any size leave the
bits alone; every norm's result is that of the CPU; compute-sanitizer over the kernels where it is
installed. Then the tables of `benchmarks.kernels` and `benchmarks.train_step`.

Every part is a process of its own with a time limit, 23 minutes in all, and the results are written
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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from benchmarks.measure import Report, Target
from benchmarks.worker import ROOT
from kernels.noise import _normal_kernel

RESULTS = ROOT / "benchmarks" / "results"


def _stream(batch: int, device: str, step: int = 3) -> dict[str, Tensor]:
    values = {"key": torch.tensor(kernels.derive_key(1, "gpu session")), "step": torch.tensor(step)}
    values["sample_id"] = torch.arange(batch) * (2**33 + 12_345) - 3
    return {name: value.to(device) for name, value in values.items()}


def _normal(shape: tuple[int, ...], stream: dict[str, Tensor], out: torch.dtype) -> Tensor:
    return kernels.normal(shape, **stream, dtype=out)


def normals_have_the_bits_of_the_cpu() -> str:
    total = 0
    for shape in ((64, 3, 32, 32), (3, 12_345), (1, 1 << 22)):
        on_gpu = _normal(shape, _stream(shape[0], "cuda"), torch.float32).cpu()
        on_cpu = _normal(shape, _stream(shape[0], "cpu"), torch.float32)
        assert torch.equal(on_gpu.view(torch.int32), on_cpu.view(torch.int32)), shape
        total += on_cpu.numel()
    return f"{total} normals"


def masks_have_the_bits_of_the_cpu() -> str:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 256, (5, 32), dtype=torch.uint8, generator=generator)
    signs, n = torch.tensor([1, -1, 1, -1, -1]), 300_001
    delta, residual = torch.randn(2, n, generator=generator) * 0.01
    for ring in (8, 16, 32):
        results = []
        for device in ("cpu", "cuda"):
            quantiser = kernels.Quantiser.of(
                ring=ring, sizes=[n - 7, 7], clips=[2.0**-6, 2.0**-4], count=3, total_count=7,
                scale=2 ** (ring - 1) - 9, device=device,
            )  # fmt: skip
            made = kernels.mask_add(
                delta.to(device), residual.to(device), quantiser, signs=signs.to(device),
                rounding_key=keys[0].to(device), keys=keys.to(device),
            )  # fmt: skip
            results.append([part.cpu() for part in made])
        words, carried, counts = (torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert words, f"words of {ring} bits differ"
        assert carried, f"residuals of {ring} bits differ"
        assert counts, f"counts of {ring} bits differ"
    return f"{n} elements, 5 keys, rings of 8, 16 and 32 bits"


def more_than_2_to_the_31_elements() -> str:
    elements = (1 << 31) + (1 << 20) + 5
    large = _normal((1, elements), _stream(1, "cuda"), torch.bfloat16)[0]
    # the counter is element // 4 alone, so the end of a sample can be checked with its beginning
    head = _normal((1, 4096), _stream(1, "cuda"), torch.bfloat16)[0]
    assert torch.equal(large[:4096], head)
    assert not torch.equal(large[-4096:], large[-4096 - (1 << 31) :][:4096])
    tail = large[1 << 31 :].float()
    assert abs(float(tail.mean())) < 0.01
    assert abs(float(tail.std()) - 1.0) < 0.01
    return f"{elements} elements in one sample"


def a_second_stream() -> str:
    expected = _normal((64, 3, 32, 32), _stream(64, "cuda"), torch.float32)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = _normal((64, 3, 32, 32), _stream(64, "cuda"), torch.float32)
    side.synchronize()
    assert torch.equal(got, expected)
    return "the same bits"


def n_replays_make_n_noises() -> str:
    stream, shape, replays = _stream(8, "cuda"), (8, 3, 32, 32), 16
    step = stream["step"]
    _normal(shape, stream, torch.float32)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    step.fill_(0)
    with torch.cuda.graph(graph):
        out = _normal(shape, stream, torch.float32)
        step.add_(1)
    step.fill_(0)
    for i in range(replays):
        graph.replay()
        want = _normal(shape, _stream(8, "cuda", step=i), torch.float32)
        assert torch.equal(out, want), i
    return f"{replays} replays, each the noise of its step"


def blocks_and_warps_leave_the_bits_alone() -> str:
    stream, elements = _stream(3, "cuda"), 5000
    want = _normal((3, elements), stream, torch.float32)
    for block in (64, 512, 2048):
        for warps in (1, 2, 4, 8):
            out, blocks = torch.full_like(want, float("nan")), -(-elements // block)
            _normal_kernel[(3 * blocks,)](
                out, stream["key"], stream["sample_id"], stream["step"], elements, blocks,
                BLOCK=block, WIDE=False, enable_fp_fusion=False, num_warps=warps,
            )  # fmt: skip
            assert torch.equal(out, want), (block, warps)
    return "blocks of 64, 512, 2048 elements, 1 to 8 warps"


def a_batch_past_the_limits_of_a_grid() -> str:
    batch = 70_001  # the second and third dimension of a grid end at 65,535
    stream = _stream(batch, "cuda")
    x_0 = torch.randint(0, 256, (batch, 1, 2, 3), dtype=torch.uint8, device="cuda")
    t, table = torch.arange(batch, device="cuda") % 1000, torch.linspace(0.999, 0.001, 1000)
    table, weight = table.cuda(), torch.ones(1, device="cuda")
    pred = torch.randn(x_0.shape, device="cuda")
    jobs = {
        "q_sample": lambda x_0, pred, t, ids: kernels.q_sample(x_0, t, table, **ids),
        "loss": lambda x_0, pred, t, ids: kernels.ddpm_loss(pred, x_0, t, table, **ids),
        "step": lambda x_0, pred, t, ids: kernels.sampler_step(pred, pred, t, t - 1, table, **ids),
        "norm": lambda x_0, pred, t, ids: kernels.group_norm_silu(pred, 1, weight, weight),
    }
    end = slice(batch - 3, batch)
    ids = stream | {"sample_id": stream["sample_id"][end]}
    for name, job in jobs.items():
        whole = job(x_0, pred, t, stream)
        assert torch.equal(whole[end], job(x_0[end], pred[end], t[end], ids)), name
    return f"{batch} samples"


def norms_are_those_of_the_cpu() -> str:
    shape, generator = (3, 96, 17, 9), torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            results = []
            x, upstream = torch.randn(2, *shape, generator=generator).to(dtype)
            scale, shift = torch.randn(2, *shape[:2], generator=generator)
            weight, bias = torch.randn(2, shape[1], generator=generator)
            for device in ("cpu", "cuda"):
                given = [x.contiguous(memory_format=layout), weight, bias, scale, shift]
                leaves = [v.to(device).requires_grad_() for v in given]
                y = kernels.group_norm_silu(
                    leaves[0], 32, *leaves[1:3], scale=leaves[3], shift=leaves[4]
                )
                y.backward(upstream.to(device))  # type: ignore[no-untyped-call]
                results.append([y, *(leaf.grad for leaf in leaves)])
            for ours, theirs in zip(*results, strict=True):
                largest = ours.abs().max().item()
                torch.testing.assert_close(
                    theirs.cpu(), ours, rtol=tolerance, atol=tolerance * largest
                )
    return "forward and backward, float32 and bfloat16, NCHW and channels_last, scale and shift"


def compute_sanitizer_finds_nothing() -> str | None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_session"]
    done = subprocess.run(
        [*command, "--one", "masks_have_the_bits_of_the_cpu", "normals_have_the_bits_of_the_cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS - 20,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return "memcheck over noise and masks"


PROOFS: tuple[Callable[[], str | None], ...] = (
    normals_have_the_bits_of_the_cpu,
    masks_have_the_bits_of_the_cpu,
    blocks_and_warps_leave_the_bits_alone,
    a_batch_past_the_limits_of_a_grid,
    norms_are_those_of_the_cpu,
    more_than_2_to_the_31_elements,
    a_second_stream,
    n_replays_make_n_noises,
    compute_sanitizer_finds_nothing,
)
PROOF_SECONDS, SANITIZER_SECONDS, TABLE_SECONDS = 60, 240, {"kernels": 480, "train_step": 180}


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
        raise RuntimeError((done.stderr or done.stdout).strip()[-500:])
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
    commands = {"kernels": [f"--rounds={5 if quick else 25}"], "train_step": ["--rounds=9"]}
    commands["train_step"] += ["--without-lucidrains", "--threads=4"]
    if quick:
        commands["kernels"].append("--no-compile")
    for name, options in commands.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [f"benchmarks.{name}", f"--device={device}", *options, "--json", file.name]
            try:
                _part(command, TABLE_SECONDS[name])
            except RuntimeError as failure:
                report.row(table=name, result=f"FAILED: {failure}")
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
