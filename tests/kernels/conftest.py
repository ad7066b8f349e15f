"""What the kernel tests share.

The suite in ``interpreter/`` runs the Triton code itself on CPU tensors, which needs
TRITON_INTERPRET=1 before ``kernels`` is imported. Where this process has it (``tests/conftest.py``
sets it unless there is a GPU) the suite is collected here, elsewhere ``test_interpreter.py`` gives
it its own process.
"""

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from benchmarks.op_cases import in_layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*/interpreter/*"]


class AsOnAGpu(TorchDispatchMode):
    """Our ops do, whatever device there is, what is registered for a GPU."""

    _GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "concilium":
            return func.redispatch(self._GPU, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Stream:
    """Where the noise of a batch comes from."""

    key: torch.Tensor
    sample_id: torch.Tensor
    step: torch.Tensor

    @property
    def named(self) -> dict[str, torch.Tensor]:
        return {"key": self.key, "sample_id": self.sample_id, "step": self.step}

    @property
    def triple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.key, self.sample_id, self.step


def make_stream(batch: int, *, seed: int = 1, step: int = 7) -> Stream:
    ids = torch.arange(batch) * (2**33 + 12_345) - 3  # both words of an id matter, and its sign
    return Stream(torch.tensor(kernels.derive_key(seed, "tests")), ids, torch.tensor(step))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """What torch.empty gives is NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def stream():
    return make_stream


@pytest.fixture(scope="session")
def alpha_bar():
    """The linear schedule of DDPM."""
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)


LAYOUTS = ("nchw", "channels_last", "sliced", "permuted")


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return lambda x: in_layout(x, request.param)


@pytest.fixture(params=[*LAYOUTS, "expanded"])
def any_layout(request):
    """Where the reference is computed from what it gives."""
    return lambda x: in_layout(x, request.param)


def images(batch: int, dtype: torch.dtype = torch.float32, size: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (batch, 3, size, size + 2)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels if dtype == torch.uint8 else (pixels.double() * 2 / 255 - 1).to(dtype)


@pytest.fixture
def make_images():
    return images
