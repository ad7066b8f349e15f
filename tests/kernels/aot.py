"""Compile every kernel in its real configurations without a GPU, and report what the compiler made
of it.

The launches are those of the project itself (`launches.py`), so that types, constants, what is
divisible by 16 and what is 1 are what Triton finds on a GPU. Run as a script, in a process without
TRITON_INTERPRET: prints one JSON object, launch and kernel -> architecture -> facts. ``python
tests/kernels/aot.py --write`` renews the committed table ``aot_table.json``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = pathlib.Path(__file__).with_name("aot_table.json")
ARCHITECTURES: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "gfx942": "gfx942"}


class _Nowhere:
    """Stands for Triton's driver of a GPU that is not there: enough of one to compile for it."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        chip = ARCHITECTURES[architecture]
        self._target = GPUTarget(
            "hip" if isinstance(chip, str) else "cuda", chip, 64 if isinstance(chip, str) else 32
        )
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend} {self._target.arch}"  # kernels are kept by device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 64 * 1024}  # of the smallest of them, gfx942


@contextlib.contextmanager
def _compiling_only(architecture: str) -> Iterator[list[tuple[str, Any, tuple[int, ...]]]]:
    """Launches compile, specialised for their arguments as on a GPU, and run nothing. Gives the
    list of (kernel, what was compiled, grid) that they fill.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    seen: list[tuple[str, Any, tuple[int, ...]]] = []

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            seen.append((kernel.fn.__name__, compiled, grid))

        return compile_only

    driver.set_active(_Nowhere(architecture))
    with mock.patch.object(JITFunction, "__getitem__", launch), NothingWaits():
        yield seen


class NothingWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or copy from it: neither may stand in a CUDA
    graph, and both would cost every step its head start.
    """

    _REFUSED = (
        "_local_scalar_dense",
        "lift_fresh",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
    )

    def __init__(self, *allowed: str) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name in self._allowed or name not in self._REFUSED, f"{name} waits for the GPU"
        return func(*args, **(kwargs or {}))


def _nvidia_tool(name: str, *arguments: str) -> str:
    import triton

    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


_SASS = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:\{\s*)?(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)\b", re.M
)


@functools.cache  # several launches are of the same kernel
def nvidia_facts(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        operations = _SASS.findall(_nvidia_tool("nvdisasm", "-c", file.name))
    resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    memory = collections.Counter(o for o in operations if re.match(r"(LDG|STG|LDL|STL)\b", o))
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"] + resources["LOCAL"],
        "spills": sum(n for o, n in memory.items() if o.startswith(("LDL", "STL"))),
        "instructions": len(operations),
        "loads": sum(n for o, n in memory.items() if o.startswith("LDG")),
        "loads_128": sum(n for o, n in memory.items() if o.startswith("LDG") and "128" in o),
        "stores": sum(n for o, n in memory.items() if o.startswith("STG")),
        "stores_128": sum(n for o, n in memory.items() if o.startswith("STG") and "128" in o),
        "fused": len(re.findall(r"\bfma\.rn\.f(?:32|64)", compiled.asm["ptx"])),
        "flushing": len(re.findall(r"\b[a-z][\w.]*\.ftz\b", compiled.asm["ptx"])),
        "fused_machine": sum(bool(re.match(r"[FD]FMA\b", o)) for o in operations),
    }


# Fused operations that a correctly rounded root is made of (by its first approximation, which is
# another one in each LLVM), and a division.
AMD_FUSED = {"v_sqrt_f32": 2, "v_rsq_f32": 5, "v_div_fmas_f32": 5}


@functools.cache
def amd_facts(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    memory = re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text)
    loads = [o for o in memory if "_load_" in o]
    stores = [o for o in memory if "_store_" in o]
    names = re.findall(r"\bv_((?:pk_)?(?:fma|mad|mac)\w*_f(?:16|32|64))(?:_e32|_e64)?\b", text)
    fused = sum(2 if name.startswith("pk_") else 1 for name in names)
    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "instructions": len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds)_\w+", text, re.M)),
        "loads": len(loads),
        "loads_128": sum("dwordx4" in o for o in loads),
        "stores": len(stores),
        "stores_128": sum("dwordx4" in o for o in stores),
        "fused": fused - sum(n * text.count(of) for of, n in AMD_FUSED.items()),
        "flushing": len(re.findall(r"float_denorm_mode_(?:32|16_64) [012]\b", text)),
        "fused_machine": fused,
    }


def _facts(compiled: Any, wide: bool) -> dict[str, Any]:
    facts = nvidia_facts(compiled) if "cubin" in compiled.asm else amd_facts(compiled)
    return facts | {"wide": wide, "exact": not compiled.metadata.enable_fp_fusion}


def survey() -> dict[str, dict[str, dict[str, Any]]]:
    from launches import launches

    facts: dict[str, dict[str, dict[str, Any]]] = {}
    for launch in launches():
        for architecture in ARCHITECTURES:
            with _compiling_only(architecture) as seen:
                launch.run()
            for kernel, compiled, grid in seen:
                assert len(grid) == 1, launch.name  # the other two dimensions end at 65,535
                # Narrow: what writes two numbers, and one program for the rest of a vector.
                wide = launch.wide and kernel != "_finish_kernel" and grid != (1,)
                name = f"{launch.name}: {kernel.strip('_')}"
                while architecture in facts.get(name, {}):
                    name += " again"
                facts.setdefault(name, {})[architecture] = _facts(compiled, wide)
    return facts


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("aot.py: run it without TRITON_INTERPRET, which replaces the compiler")
    sys.path.insert(0, str(ROOT))
    import triton

    result = {"triton": triton.__version__, "cases": survey()}
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    else:
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
