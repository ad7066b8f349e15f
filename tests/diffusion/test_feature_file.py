"""The file of a feature network that does not ship: only what was pinned, and whatever it holds."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from diffusion.features import file as module
from diffusion.features.file import (
    FEATURE_BOUND,
    LARGEST_FILE,
    Architecture,
    FeatureFileError,
    check_names,
    read_network,
)
from diffusion.features.network import CENTRED_BOUND, FeatureNetwork, load_feature_network
from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.features.train import architecture_for, save_network, train_network
from diffusion.model import initialise

Tensors = dict[str, NDArray[np.float32]]
PARTS = Architecture(image_size=8, layers=((4, 1), (6, 2)), classes=3)
METADATA = {"architecture": PARTS.model_dump_json()}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    network = FeatureNetwork(PARTS.image_size, PARTS.layers, PARTS.classes)
    initialise(network, seed=1)
    network.center.copy_(torch.linspace(-1, 1, 64))
    save_network(network, PARTS, tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(path: Path, content: bytes) -> str:
    """What is said about a file with this content, by who pinned it."""
    path.write_bytes(content)
    with pytest.raises(FeatureFileError) as error:
        read_network(path.stem, digest(path), [path])
    return str(error.value)


def test_a_file_is_the_network_that_it_was_written_from(own: Path) -> None:
    network = load_feature_network("own", digest(own), [own.with_name("other.safetensors"), own])
    same = FeatureNetwork(PARTS.image_size, PARTS.layers, PARTS.classes)
    initialise(same, seed=1)
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 12, 12), dtype=np.uint8)
    features = network.extract(images)
    np.testing.assert_array_equal(features, same.eval().extract(images))
    assert np.abs(features - network.public_center()).max() <= CENTRED_BOUND


def test_reading_one_never_loads_torch() -> None:
    code = "import sys, diffusion.features.file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_of_another_hash_is_refused_before_it_is_parsed(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, content = digest(own), bytearray(own.read_bytes())
    content[-1] ^= 1
    own.write_bytes(content)
    monkeypatch.setattr(module, "deserialize", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(FeatureFileError) as error:
        read_network("own", pinned, [own])
    assert f"own.safetensors has SHA-256 {digest(own)[:16]}…, expected {pinned[:16]}…" in str(
        error.value
    )
    assert str(own.parent) not in str(error.value), "the study centre reads why a site declines"


def test_a_file_that_is_not_there_is_named_with_where_to_name_it(own: Path) -> None:
    with pytest.raises(FeatureFileError, match=r"use one of digits.* get mri.safetensors and name"):
        read_network("mri", "ab" * 32, [own])
    with pytest.raises(FeatureFileError, match="name it in feature_files of here"):
        read_network("own", None, [own], where="feature_files of here")
    own.unlink()
    with pytest.raises(FeatureFileError, match="own.safetensors cannot be read: No such file"):
        read_network("own", "ab" * 32, [own])


def test_more_than_16_mib_are_not_read(own: Path) -> None:
    assert "larger than 16 MiB" in refused(own, bytes(LARGEST_FILE + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("center"), "center is missing"),
        (lambda t: t.update({"more\x1b[2J": t["center"]}), "does not have"),
        (
            lambda t: t.update({"project.weight": t["project.weight"].reshape(32, -1)}),
            "project.weight is F32 [32, 192], expected F32 [64, 96]",
        ),
        (
            lambda t: t.update({"center": t["center"].astype(np.float16)}),
            "center is F16 [64], expected F32 [64]",
        ),
        (lambda t: t["convolutions.2.weight"].fill(np.nan), "convolutions.2.weight holds NaN"),
        (lambda t: t["classify.bias"].fill(np.inf), "classify.bias holds NaN or Inf"),
        (lambda t: t["center"].fill(np.nan), "center holds NaN or Inf"),
        (lambda t: t["center"].fill(1.001 * FEATURE_BOUND), "its centre exceeds ±1"),
        (lambda t: t["convolutions.0.weight"].fill(1e29), "features could overflow"),
        (lambda t: t["project.bias"].fill(-2e30), "features could overflow"),
    ],
)
def test_tensors_that_are_not_the_architecture_s_are_refused(
    own: Path, change: Callable[[Tensors], object], said: str
) -> None:
    tensors = load_file(own)
    change(tensors)
    told = refused(own, save(tensors, METADATA))
    assert said in told
    assert told.isprintable()


@pytest.mark.parametrize(
    "changed",
    [
        {"image_size": 3},
        {"image_size": 257},
        {"image_size": 8.0},
        {"image_size": "8"},
        {"layers": []},
        {"layers": [[4, 1]] * 9},
        {"layers": [[4, 1], [6, 3]]},
        {"layers": [[4, 1], [513, 2]]},
        {"layers": [[4, 1], [6, 2, 1]]},
        {"classes": 1},
        {"classes": 1001},
        {"activation": "os.system"},
    ],
)
def test_an_architecture_beyond_the_limits_is_refused(
    own: Path, changed: dict[str, object]
) -> None:
    parts = json.dumps(PARTS.model_dump(mode="json") | changed)
    assert "its metadata are no architecture" in refused(
        own, save(load_file(own), {"architecture": parts})
    )


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"architecture": "{"}, {"architecture": "[" * 10_000}, METADATA | {"note": "x"}],
)
def test_metadata_that_say_anything_else_are_refused(
    own: Path, metadata: dict[str, str] | None
) -> None:
    assert "its metadata are no architecture" in refused(own, save(load_file(own), metadata))


def test_bytes_that_are_no_safetensors_are_refused(own: Path) -> None:
    for content in (b"", b"\0" * 7, b"\xff" * 64, b"PK\3\4" + bytes(200), own.read_bytes()[:-1]):
        assert "it is no safetensors file" in refused(own, content)


def test_whatever_is_changed_in_a_file_is_read_or_refused(own: Path) -> None:
    """Nothing but FeatureFileError comes of a file whose maker pinned it, bytes and all."""
    whole, rng = own.read_bytes(), np.random.default_rng(5)
    header = 8 + int.from_bytes(whole[:8], "little")
    fates = {"read": 0, "refused": 0}
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        own.write_bytes(content)
        try:
            read_network("own", digest(own), [own])
        except FeatureFileError:
            fates["refused"] += 1
        else:
            fates["read"] += 1
    assert fates["refused"] > 300


def test_no_image_makes_an_accepted_network_overflow(own: Path) -> None:
    tensors = load_file(own)
    for name in ("convolutions.0.weight", "convolutions.2.weight", "project.weight"):
        tensors[name] *= 1e7
    own.write_bytes(save(tensors, METADATA))
    network = load_feature_network("own", digest(own), [own])
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    images[:2] = np.array([0, 255], np.uint8)[:, None, None, None]
    assert np.isfinite(network.extract(images)).all()


@pytest.mark.parametrize("name", sorted(FEATURE_NETWORKS))
def test_a_file_never_stands_in_for_a_network_that_ships(name: str, own: Path) -> None:
    shadow = own.rename(own.with_name(f"{name}.safetensors"))
    with pytest.raises(ValueError, match=f'"{name}" ships with the project'):
        check_names([shadow])
    with pytest.raises(FeatureFileError, match="not the one that this version ships"):
        read_network(name, digest(shadow), [shadow])
    shipped = read_network(name, FEATURE_NETWORKS[name].sha256, [shadow])
    assert shipped.architecture.image_size == FEATURE_NETWORKS[name].image_size


def test_files_that_no_plan_could_name_are_refused() -> None:
    check_names([Path("a/own.safetensors"), Path("b/other.safetensors")])
    with pytest.raises(ValueError, match=r"own.pt is no .safetensors file"):
        check_names([Path("own.pt")])
    with pytest.raises(ValueError, match="two files are called own.safetensors"):
        check_names([Path("a/own.safetensors"), Path("b/own.safetensors")])


def test_a_batch_takes_a_bounded_amount_of_memory() -> None:
    wide = FeatureNetwork(256, ((512, 1), (2, 2)), 2)
    assert wide._largest_batch == 1
    assert FeatureNetwork(28, FEATURE_NETWORKS["fashion-mnist"].layers, 10)._largest_batch > 512


@pytest.mark.parametrize("size", [4, 8, 28, 64, 100, 256])
def test_the_architecture_for_images_of_any_size_is_one_that_is_read(
    size: int, tmp_path: Path
) -> None:
    parts = architecture_for(size, 2)
    network = FeatureNetwork(size, parts.layers, parts.classes)
    images = np.random.default_rng(0).integers(0, 256, (8, 1, size, size), dtype=np.uint8)
    train_network(network, (images, np.arange(8) % 2), steps=1)
    save_network(network, parts, tmp_path / "n.safetensors")
    read = read_network("n", digest(tmp_path / "n.safetensors"), [tmp_path / "n.safetensors"])
    assert read.architecture == parts
