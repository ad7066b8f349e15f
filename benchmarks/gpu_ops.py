"""What only a GPU can prove of the ops as torch sees them: strides, `opcheck`, `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_proofs import assert_close
from benchmarks.op_cases import WITHOUT_LAYOUT, Case, cases, in_layout, outputs_and_gradients, same

LAYOUTS = ("channels_last", "sliced", "permuted", "expanded")
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def strided_inputs_are_taken_as_they_are_meant(device: str = "cuda") -> str:
    """Images and upstream gradients in every layout, against the CPU's results of the same."""
    here, there = cases("cpu"), cases(device)
    names = [name for name in here if name not in WITHOUT_LAYOUT]
    for name in names:
        for layout in LAYOUTS:
            results = [_strided(found[name], layout) for found in (here, there)]
            assert_close(*results, 1e-4, f"{name}, {layout}")
    return f"{', '.join(LAYOUTS)}; {len(names)} ops"


def _strided(case: Case, layout: str) -> list[Tensor]:
    upstream = "expanded" if layout == "expanded" else "sliced"
    return outputs_and_gradients(
        case.run, case.given(4, layout), upstream_like=lambda g: in_layout(g, upstream)
    )


class _Calls(TorchDispatchMode):
    """Keeps what the ops of `kernels` are called with, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "concilium":
            self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def every_op_passes_opcheck(device: str = "cuda", names: Collection[str] = ()) -> str:
    """Schema, fake kernel, autograd and dynamic shapes, of tensors in NCHW and channels_last."""
    found, checked = cases(device), set()
    for name in names or found:
        for layout in ("nchw", "channels_last"):
            if layout == "nchw" or name not in WITHOUT_LAYOUT:
                checked |= _opcheck(found[name], layout)
    return f"{len(checked)} ops: {', '.join(sorted(checked))}"


def _opcheck(case: Case, layout: str) -> set[str]:
    with _Calls() as calls:
        outputs_and_gradients(case.run, case.given(4, layout))
    assert calls.made, "no op of ours was called"
    for op, arguments, named in calls.made:
        if "backward" in op.name():  # which has no derivative of its own
            arguments = tuple(v.detach() if isinstance(v, Tensor) else v for v in arguments)
        torch.library.opcheck(op, arguments, named)
    return {op.name().partition("::")[2] for op, _, _ in calls.made}


def every_op_compiles_into_one_graph(
    device: str = "cuda", backend: str = "inductor", names: Collection[str] = ()
) -> str:
    """And gives the same bits there as eager, gradients too."""
    found = cases(device)
    for name in names or found:
        case = found[name]
        torch.compiler.reset()
        compiled = torch.compile(case.run, fullgraph=True, backend=backend)
        got = outputs_and_gradients(compiled, case.given(4, "nchw"))
        assert same(got, outputs_and_gradients(case.run, case.given(4, "nchw"))), name
    return f"{len(names or found)} ops, {backend}, the bits of eager"


PROOFS: tuple[Callable[[], str], ...] = (
    strided_inputs_are_taken_as_they_are_meant,
    every_op_passes_opcheck,
)
SLOW: tuple[Callable[[], str], ...] = (every_op_compiles_into_one_graph,)  # waits for a compiler
