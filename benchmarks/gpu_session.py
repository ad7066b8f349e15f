"""Everything that only a GPU can prove or time, in one go, wherever there is one.

    python -m benchmarks.gpu_session [--results FOLDER] [--quick]

Proofs: the normals and the masks have the bits of the CPU; more than 2^31 elements; a second
stream; N replays of a captured graph make N noises; compute-sanitizer over the kernels where it is
installed. Then the tables of `benchmarks.kernels` and `benchmarks.train_step`. Everything goes to
benchmarks/results/<device>.json. Without a GPU every section says 'not measured', and nothing is
written unless a folder is named.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from benchmarks import kernels as kernel_benchmark
from benchmarks import train_step
from benchmarks.measure import Report
from benchmarks.worker import ROOT

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


def compute_sanitizer_finds_nothing() -> str | None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_session"]
    done = subprocess.run(
        [*command, "--one", "masks_have_the_bits_of_the_cpu", "normals_have_the_bits_of_the_cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return "memcheck over noise and masks"


PROOFS: tuple[Callable[[], str | None], ...] = (
    normals_have_the_bits_of_the_cpu,
    masks_have_the_bits_of_the_cpu,
    more_than_2_to_the_31_elements,
    a_second_stream,
    n_replays_make_n_noises,
    compute_sanitizer_finds_nothing,
)


def prove(report: Report) -> bool:
    """A row for every proof; False where one failed."""
    passed = True
    for proof in PROOFS:
        name = proof.__name__.replace("_", " ")
        if not torch.cuda.is_available():
            report.row(proof=name, result=None)
            continue
        try:
            report.row(proof=name, result=proof())
        except (AssertionError, RuntimeError) as failure:
            passed = False
            report.row(proof=name, result=f"FAILED: {failure}")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description="prove and measure on a GPU, in one go")
    parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="no torch.compile, no lucidrains")
    parser.add_argument("--one", nargs="+", metavar="PROOF", help="these proofs only, no tables")
    given = parser.parse_args()
    if given.one:
        for proof in PROOFS:
            if proof.__name__ in given.one:
                print(proof.__name__, proof())
        return
    report = Report("GPU session")
    passed = prove(report)
    kernel_benchmark.measure(report, "cuda", rounds=25, compiled=not given.quick)
    train_step.measure(report, "cuda", threads=4, rounds=15, peer=not given.quick)
    folder = given.results
    if folder is None and torch.cuda.is_available():
        folder = RESULTS
    report.finish(folder / f"{_device_name()}.json" if folder else None)
    if not passed:
        sys.exit("a proof failed")


def _device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
