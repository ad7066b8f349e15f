"""Compile every kernel in its real configurations without a GPU, and report what the compiler made
of it.

Run as a script, in a process without TRITON_INTERPRET: prints one JSON object, case -> architecture
-> facts. ``python tests/kernels/aot.py --write`` renews the committed table ``aot_table.json``.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = pathlib.Path(__file__).with_name("aot_table.json")
ARCHITECTURES: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "gfx942": "gfx942"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: argument types by name ('*bf16', 'i32', 'fp32'), compile-time constants,
    what is known to be divisible by 16, and whether all its stores must be 128 bits wide.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    wide: bool
    num_warps: int = 4
    fp_fusion: bool = False


def cases() -> dict[str, Case]:
    from kernels.adamw_ema import _adamw_ema_kernel
    from kernels.ddpm_loss import _finish_kernel, _residual_kernel
    from kernels.group_norm_silu import _backward_kernel, _forward_kernel
    from kernels.mask_add import _mask_add_kernel
    from kernels.noise import _normal_kernel
    from kernels.q_sample import _q_sample_kernel
    from kernels.sampler_step import _sampler_step_kernel

    stream = {"key": "*i64", "sample_id": "*i64", "step": "*i64"}
    schedule = {"t": "*i64", "alpha_bar": "*fp32", "n_steps": "i32"}
    sizes = {"elements": "i32", "channels": "i32", "spatial": "i32"}
    image = {**stream, **schedule, **sizes}
    pointers = ("x_0", "x_t", "x_s", "pred", "residual", "given_eps", "out")
    found: dict[str, Case] = {}

    def add(name: str, kernel: Any, types: dict[str, str], wide: bool, **constants: Any) -> None:
        divisible = (*pointers, "elements") if wide else pointers
        found[name] = Case(kernel, types, constants, divisible, wide)

    normal = {"out": "*fp32", **stream, "elements": "i32", "n_blocks": "i32"}
    add("normal/fp32", _normal_kernel, normal, True, BLOCK=2048, WIDE=False)
    add("normal/ragged", _normal_kernel, normal, False, BLOCK=1024, WIDE=False)
    beyond = {**normal, "elements": "i64"}
    add("normal/beyond 2^31", _normal_kernel, beyond, True, BLOCK=2048, WIDE=True)

    for source, target, layout, wide in (
        ("u8", "fp32", "nchw", True),
        ("u8", "bf16", "nchw", True),
        ("fp32", "fp32", "nchw", True),
        ("u8", "fp32", "nhwc", False),
        ("u8", "bf16", "nhwc", False),
    ):
        types = {"x_0": f"*{source}", "x_t": f"*{target}", **image, "n_blocks": "i32"}
        fixed = dict(
            CHANNELS_LAST=layout == "nhwc", FROM_UINT8=source == "u8", BLOCK=2048, WIDE=False
        )
        name = f"{source} to {target}/{layout}"
        made = {**fixed, "given_eps": None, "GIVEN_NOISE": False}
        add(f"q_sample/{name}", _q_sample_kernel, types, wide, **made)
        given = {
            **fixed, "key": None, "sample_id": None, "step": None, "GIVEN_NOISE": True
        }  # fmt: skip
        types = {k: v for k, v in types.items() if k not in stream} | {"given_eps": "*fp32"}
        if name == "fp32 to fp32/nchw":
            add(f"add_noise/{name}", _q_sample_kernel, types, wide, **given)

    for objective, dtype, layout, keep in (
        ("eps", "fp32", "nchw", True),
        ("eps", "bf16", "nchw", True),
        ("x0", "bf16", "nchw", True),
        ("v", "bf16", "nchw", True),
        ("v", "bf16", "nhwc", True),
    ):
        types = {"pred": f"*{dtype}", "x_0": "*u8", "residual": f"*{dtype}", "partial": "*fp32"}
        types |= {**image, "n_chunks": "i32"}
        last = layout == "nhwc"
        fixed = dict(
            OBJECTIVE=objective, PRED_CHANNELS_LAST=last, X_0_CHANNELS_LAST=last, FROM_UINT8=True,
            WITH_RESIDUAL=keep, BLOCKS=4, BLOCK=2048, WIDE=False,
        )  # fmt: skip
        if not keep:
            types.pop("residual")
            fixed["residual"] = None
        name = f"ddpm_loss/{objective} {dtype}/{layout}" + ("" if keep else "/no grad")
        add(name, _residual_kernel, types, layout == "nchw", **fixed)
    for objective, weighted in (("eps", False), ("v", True)):
        types = {"partial": "*fp32", "loss": "*fp32", "scale": "*fp32", "elements": "fp32"}
        types |= {**schedule, "gamma": "fp32", "n_chunks": "i32"}
        name = f"ddpm_loss/finish {objective}" + (" weighted" if weighted else "")
        fixed = dict(OBJECTIVE=objective, WEIGHTED=weighted, BLOCK=32)
        add(name, _finish_kernel, types, False, **fixed)

    for name, ddim, objective in (("ddpm eps", False, "eps"), ("ddim v", True, "v")):
        types = {"x_t": "*fp32", "pred": "*bf16", "x_s": "*fp32", "s": "*i64", **image}
        types |= {"eta": "fp32", "clip": "fp32", "n_blocks": "i32"}
        fixed = {
            "DDIM": ddim,
            "NOISY": True,
            "CLIPPED": True,
            "OBJECTIVE": objective,
            "CHANNELS_LAST": False,
            "BLOCK": 2048,
            "WIDE": False,
        }
        add(f"sampler_step/{name}", _sampler_step_kernel, types, True, **fixed)

    state = ("param", "exp_avg", "exp_avg_sq", "ema", "anchor", "control")
    scalars = {"lr": "*fp32", "step": "*i64", "ema_decay": "*fp32", "elements": "i64"}
    rates = dict.fromkeys(("rate_1", "rate_2", "eps", "weight_decay", "mu"), "fp32")
    types = {**dict.fromkeys(state, "*fp32"), "grad": "*bf16", **scalars, **rates}
    full = {"HAS_EMA": True, "HAS_ANCHOR": True, "HAS_CONTROL": True, "BLOCK": 1024}
    found["adamw_ema/all terms"] = Case(
        _adamw_ema_kernel, types, full, (*state, "grad", "elements"), wide=True, fp_fusion=True
    )
    plain = {"HAS_EMA": True, "HAS_ANCHOR": False, "HAS_CONTROL": False, "BLOCK": 1024}
    types = {k: v for k, v in types.items() if k not in ("anchor", "control")} | {"grad": "*fp32"}
    hints = ("param", "exp_avg", "exp_avg_sq", "ema", "grad", "elements")
    found["adamw_ema/average only"] = Case(
        _adamw_ema_kernel, types, plain | {"anchor": None, "control": None}, hints, wide=True,
        fp_fusion=True,
    )  # fmt: skip
    for dtype, last, size, silu in (
        ("bf16", True, 8, True),
        ("fp32", False, 8, True),
        ("bf16", True, 4, True),  # 128 channels in 32 groups
        ("bf16", True, 8, False),  # before attention
    ):
        types = {"weight": "*fp32", "bias": "*fp32", "mean": "*fp32", "rstd": "*fp32"}
        types |= dict.fromkeys(("pixels", "weight_stride", "n_blocks"), "i32")
        types |= {"channels": "i32", "x": f"*{dtype}"}
        rows, block = (64, 64) if last else (512, 8)
        fixed = {"SILU": silu, "CHANNELS_LAST": last, "ROWS": rows, "BLOCK": block}
        fixed |= {"GROUP_SIZE": size}
        name = f"group_norm_silu/{{}} {dtype}/{'nhwc' if last else 'nchw'}"
        name += "" if size == 8 else f"/groups of {size}"
        name += "" if silu else "/no SiLU"
        hints = ("x", "y", "grad", "grad_x", "channels", "pixels", "weight_stride")
        forward = {**types, "y": f"*{dtype}", "eps": "fp32"}
        backward = {**types, "grad": f"*{dtype}", "grad_x": f"*{dtype}"}
        backward |= {"grad_weight": "*fp32", "grad_bias": "*fp32"}
        for kernel, of, title in (
            (_forward_kernel, forward, "forward"),
            (_backward_kernel, backward, "backward"),
        ):
            of = {k: v for k, v in of.items() if k not in fixed}
            found[name.format(title)] = Case(kernel, of, fixed, hints, wide=True, fp_fusion=True)
    found |= _mask_add_cases(_mask_add_kernel)
    return found


def _mask_add_cases(kernel: Any) -> dict[str, Case]:
    found = {}
    for ring, quantise in ((8, True), (16, True), (32, True), (16, False)):
        real = "*fp64" if ring == 32 else "*fp32"
        types = {"words": f"*i{ring}", "keys": "*i32", "signs": "*i64", "n_keys": "i32"}
        types |= {"size": "i32", "first_block": "i32", "skip": "i32"}
        fixed: dict[str, Any] = {"QUANTISE": quantise, "RING": ring, "SEARCH": 8}
        fixed["LANES"] = 64 if quantise and ring == 8 else 128
        given = {"delta": "*fp32", "residual": "*fp32", "carried": "*fp32", "ends": "*i64"}
        given |= {"up": real, "down": real, "bounds": real, "partial": "*i32"}
        given |= {"rounding_key": "*i32", "n_tensors": "i32"}
        if quantise:
            types |= given
        else:
            fixed |= dict.fromkeys(given)
        hints = ("words", "delta", "residual", "carried", "size", "skip")
        name = f"mask_add/{'quantise and ' if quantise else ''}mask {ring}"
        found[name] = Case(kernel, types, fixed, hints, wide=True)
    return found


def compile_case(case: Case, architecture: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    known = {name: case.types.get(name, "constexpr") for name in names}
    hints = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in case.divisible
        if known.get(name, "constexpr") != "constexpr"
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=known, constexprs=constants, attrs=hints)
    chip = ARCHITECTURES[architecture]
    target = GPUTarget("hip", chip, 64) if isinstance(chip, str) else GPUTarget("cuda", chip, 32)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": case.fp_fusion}
    return triton.compile(source, target=target, options=options)


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
        "loads_128": sum(n for o, n in memory.items() if o.startswith("LDG") and "128" in o),
        "stores": sum(n for o, n in memory.items() if o.startswith("STG")),
        "stores_128": sum(n for o, n in memory.items() if o.startswith("STG") and "128" in o),
        "fused": len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])),
    }


def amd_facts(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    memory = re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text)
    stores = [o for o in memory if "_store_" in o]
    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "instructions": len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds)_\w+", text, re.M)),
        "loads_128": sum("_load_dwordx4" in o for o in memory),
        "stores": len(stores),
        "stores_128": sum("dwordx4" in o for o in stores),
    }


def survey() -> dict[str, dict[str, dict[str, Any]]]:
    facts: dict[str, dict[str, dict[str, Any]]] = {}
    for name, case in cases().items():
        for architecture in ARCHITECTURES:
            compiled = compile_case(case, architecture)
            read = nvidia_facts if "cubin" in compiled.asm else amd_facts
            facts.setdefault(name, {})[architecture] = read(compiled) | {
                "wide": case.wide,
                "exact": not case.fp_fusion,
            }
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
