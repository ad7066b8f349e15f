"""The file of a feature network, read without trusting it. No torch here.

What ships with the project is pinned in `pinned.py`. Any other network is a safetensors file of the
same architecture, named <name>.safetensors and pinned by its SHA-256 in the plan. Its metadata say
how large the parts are:

    {"architecture": '{"image_size":28,"layers":[[16,1],[32,2]],"classes":10}'}

Nothing of a file is looked at before its hash is the plan's: what a site's people had a look at is
what is read. After that it is still a file of others, which must not break who reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, deserialize

from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.spec import Spec

FEATURES = 64
FEATURE_BOUND = 1.0
LARGEST_FILE = 16 << 20
METADATA = "architecture"

_LARGEST_VALUE = 1e30  # of whatever is computed from an image; float32 ends at 3.4e38
_SUFFIX = ".safetensors"

Tensors = dict[str, NDArray[np.float32]]


class FeatureFileError(ValueError):
    """A feature network is not on this machine, or its file is not the pinned one."""


class Architecture(Spec):
    """How large the parts of a feature network are."""

    image_size: Annotated[int, Field(ge=4, le=256)]
    """s: images are resized to s×s."""

    layers: Annotated[
        tuple[tuple[Annotated[int, Field(ge=1, le=512)], Literal[1, 2]], ...],
        Field(min_length=1, max_length=8),
    ]
    """(channels, stride) of each 3×3 convolution."""

    classes: Annotated[int, Field(ge=2, le=1000)]
    """What it was trained to tell apart."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the file, by the names that `FeatureNetwork` gives them."""
        found: dict[str, tuple[int, ...]] = {}
        channels, size = 1, self.image_size
        for i, (width, stride) in enumerate(self.layers):
            found |= _part(f"convolutions.{2 * i}", width, (channels, 3, 3))
            channels, size = width, -(-size // stride)
        found |= _part("project", FEATURES, (channels * size * size,))
        return found | _part("classify", self.classes, (FEATURES,)) | {"center": (FEATURES,)}


@dataclass(frozen=True)
class StoredNetwork:
    """A feature network as its file has it."""

    architecture: Architecture
    tensors: Tensors


def read_network(
    name: str,
    sha256: str | None = None,
    files: Sequence[Path] = (),
    *,
    where: str = "feature_files",
) -> StoredNetwork:
    """The network `name` whose file has this hash: one that ships with the project (of those the
    hash may be left out), else the one of `files` that is called <name>.safetensors.

    `where` is what a person has to name the file in. Raises FeatureFileError.
    """
    shipped = FEATURE_NETWORKS.get(name)
    if shipped is not None:
        if sha256 not in (None, shipped.sha256):
            raise FeatureFileError(
                f'feature network "{name}" with SHA-256 {_short(str(sha256))} is not the one that '
                "this version ships: use the same version everywhere, or correct the plan"
            )
        path = Path(__file__).with_name(shipped.file)
        entries = _entries(path.name, _read(path, shipped.sha256, "reinstall the package"))
        parts = {"image_size": shipped.image_size, "layers": shipped.layers, "classes": 10}
        architecture = Architecture.model_validate(parts)
        return StoredNetwork(architecture, _tensors(path.name, entries, architecture))
    own = next((file for file in files if file.stem == name), None)
    if own is None or sha256 is None:
        raise FeatureFileError(
            f'feature network "{name}" is not here: use one of {", ".join(FEATURE_NETWORKS)}, or '
            f"get {name}{_SUFFIX} and name it in {where}"
        )
    return parse_network(own.name, _read(own, sha256, "get the file that the plan means"))


def parse_network(file: str, content: bytes) -> StoredNetwork:
    """The network that a file called so holds. Raises FeatureFileError for what is none, or could
    count wrongly."""
    entries = _entries(file, content)
    architecture = _architecture(file, content)
    tensors = _tensors(file, entries, architecture)
    if np.abs(tensors["center"]).max() > FEATURE_BOUND:
        raise _unfit(file, f"its centre exceeds ±{FEATURE_BOUND:g}")
    # An overflow would make some images' features NaN, and so the whole sum of whoever has them:
    # a network could be made to let one site's sum alone be finite.
    if _largest_value(tensors) > _LARGEST_VALUE:
        raise _unfit(file, "its weights are so large that features could overflow")
    return StoredNetwork(architecture, tensors)


def check_names(files: Sequence[Path]) -> None:
    """Raises ValueError for files that no plan could name, or could mean something else by."""
    names = [file.stem for file in files]
    for file in files:
        if file.suffix != _SUFFIX:
            raise ValueError(f"{file.name} is no {_SUFFIX} file")
        if file.stem in FEATURE_NETWORKS:
            raise ValueError(
                f'"{file.stem}" ships with the project, and no file takes its place: rename '
                f"{file.name}, and name it so in the plan"
            )
        if names.count(file.stem) > 1:
            raise ValueError(f"two files are called {file.name}: keep one")


def _part(name: str, outputs: int, inputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def _read(path: Path, sha256: str, remedy: str) -> bytes:
    """The file's content, once it is known to be the pinned one. Errors name no folder: those of a
    site are read by the study centre."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise FeatureFileError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_FILE:
        raise FeatureFileError(f"{path.name} is larger than {LARGEST_FILE >> 20} MiB: {remedy}")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise FeatureFileError(
            f"{path.name} has SHA-256 {_short(found)}, expected {_short(sha256)}: {remedy}"
        )
    return content


def _architecture(file: str, content: bytes) -> Architecture:
    """From the header, which is JSON where there are entries."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    try:
        if set(metadata) == {METADATA}:
            return Architecture.model_validate_json(metadata[METADATA], strict=True)
    except ValidationError:
        pass  # what is wrong would be told in the file's own words
    raise _unfit(
        file,
        f"its metadata are no {METADATA} of image_size 4 to 256, 1 to 8 layers of [channels up to "
        "512, stride 1 or 2], and 2 to 1000 classes",
    )


def _tensors(file: str, entries: dict[str, Any], architecture: Architecture) -> Tensors:
    wanted = architecture.shapes()
    if entries.keys() - wanted.keys():
        raise _unfit(file, "it holds tensors that its architecture does not have")
    tensors: Tensors = {}
    for name, shape in wanted.items():
        if name not in entries:
            raise _unfit(file, f"{name} is missing")
        entry = entries[name]
        if (entry["dtype"], tuple(entry["shape"])) != ("F32", shape):
            found = f"{entry['dtype']} {entry['shape']}"
            raise _unfit(file, f"{name} is {found}, expected F32 {list(shape)}")
        tensors[name] = np.frombuffer(bytearray(entry["data"]), dtype="<f4").reshape(shape)
        if not np.isfinite(tensors[name]).all():
            raise _unfit(file, f"{name} holds NaN or Inf")
    return tensors


def _entries(file: str, content: bytes) -> dict[str, Any]:
    try:
        return dict(deserialize(content))
    except SafetensorError as error:
        raise _unfit(file, "it is no safetensors file") from error


def _largest_value(tensors: Tensors) -> float:
    """A bound of every sum on the way from x in [−1, 1] to W·convs(x) + b, whatever x is."""
    bound = 1.0
    for name, weight in tensors.items():
        part, _, kind = name.rpartition(".")
        if kind == "weight" and part != "classify":
            gain = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(axis=1)
            bias = np.abs(tensors[f"{part}.bias"].astype(np.float64))
            bound = max(bound, float((gain * bound + bias).max()))
    return bound


def _unfit(file: str, why: str) -> FeatureFileError:
    return FeatureFileError(
        f"{file} is no feature network: {why} (`concilium feature-network` makes one)"
    )


def _short(sha256: str) -> str:
    return f"{sha256[:16]}…"
