"""A feature network of one's own: trained from a data set, pinned, used by a simulation."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from concilium.cli import main
from concilium.simulate.spec import load_sweep
from concilium.simulate.sweep import identity_of
from diffusion.model import model_digest
from study.problems import PlanError
from tests.concilium.simulations import simulate, study
from tests.networks import make_network

DIGITS = "9fb79a8912226791a58ea0d29720e44da22c67879da2f1e7ddf219bdcb70dfed"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["feature-network", *map(str, arguments)])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's layout: light squares in one of four corners."""
    folder, rng = tmp_path_factory.mktemp("corners"), np.random.default_rng(2)
    labels = rng.integers(0, 4, 120).astype(np.uint8)
    pixels = rng.integers(0, 60, (120, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        y, x = divmod(int(label), 2)
        image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 150
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = np.array([0x0800 | array.ndim, *array.shape], dtype=">i4").tobytes()
        content = gzip.compress(header + array.tobytes())
        (folder / f"train-{name}-ubyte.gz").write_bytes(content)
    return folder


def test_a_network_is_trained_and_a_simulation_measures_with_it(
    images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "corners.safetensors"
    made = run(file, "--data", images, "--image-size", 8, "--steps", 60)
    assert made.exit_code == 0, made.output
    sha256 = model_digest(file)
    assert f'feature_network = "corners"\nsha256 = "{sha256}"' in made.output
    assert 'feature_files = ["corners.safetensors"]' in made.output
    told = re.search(r"accuracy on 108 images .* ([\d.]+), on 12 others ([\d.]+)", made.output)
    assert told is not None
    assert min(map(float, told.groups())) > 0.8, "a quarter would be chance"

    again = tmp_path / "again.safetensors"
    assert run(again, "--data", images, "--image-size", 8, "--steps", 60).exit_code == 0
    assert again.read_bytes() == file.read_bytes()
    refused = run(file, "--data", images, "--image-size", 8)
    assert (refused.exit_code, "plans may pin it" in refused.output) == (2, True)

    plan = {'"digits"\nsha256': '"corners"\nsha256', DIGITS: sha256}
    named = {"silos = 4": 'silos = 4\nfeature_file = "corners.safetensors"'}
    lines = simulate(study(tmp_path, {"fedavg": ""}, **plan, **named), tmp_path / "out")
    last = lines["fedavg-3"][-1]
    assert (last["network"], last["network_sha256"]) == ("corners", sha256)
    shipped = simulate(study(tmp_path, {"fedavg": ""}), tmp_path / "out")["fedavg-3"][-1]
    assert shipped["fid"] != last["fid"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits.safetensors",), '"digits" ships with the project'),
        (("own.pt",), "call it NAME.safetensors"),
        (("own net.safetensors",), "call it NAME.safetensors"),
    ],
)
def test_a_name_that_no_plan_could_use_is_refused(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    refused = run(tmp_path / arguments[0], "--data", tmp_path, "--image-size", 8)
    assert refused.exit_code == 2
    assert said in refused.output


def test_data_that_cannot_be_used_are_told_with_the_option_to_correct(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) % 2)
    few = run(tmp_path / "own.safetensors", "--data", tmp_path / "few.npz", "--image-size", 8)
    assert few.exit_code == 1
    assert "9 images of 2 classes: give at least 20" in few.output
    missing = run(tmp_path / "own.safetensors", "--data", tmp_path / "no", "--image-size", 8)
    assert missing.exit_code == 1
    assert "correct --data" in missing.output


@pytest.mark.parametrize(
    ("named", "name", "sha256", "said"),
    [
        ("", "own", None, "get own.safetensors and name it in feature_file of [simulation]"),
        ("own", "mri", None, 'feature network "mri" is not here'),
        ("own", "own", "ab" * 32, "expected abab"),
        ("own", "digits", "ab" * 32, "not the one that this version ships"),
        ("digits", "digits", DIGITS, 'simulation.feature_file: "digits" ships with the project'),
    ],
)
def test_a_simulation_without_the_network_of_its_plan_is_refused_before_it_begins(
    named: str, name: str, sha256: str | None, said: str, tmp_path: Path
) -> None:
    made = make_network(tmp_path / "own.safetensors")
    changes = {'"digits"\nsha256': f'"{name}"\nsha256', DIGITS: sha256 or made}
    if named:
        changes["silos = 4"] = f'silos = 4\nfeature_file = "{named}.safetensors"'
    with pytest.raises(PlanError) as error:
        load_sweep(study(tmp_path, {"fedavg": ""}, **changes))
    assert said in str(error.value)


def test_a_run_is_the_same_wherever_the_file_of_its_network_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    sha256 = make_network(here / "own.safetensors")
    plan = {'"digits"\nsha256': '"own"\nsha256', DIGITS: sha256}
    named = {"silos = 4": 'silos = 4\nfeature_file = "own.safetensors"'}
    path = study(here, {"fedavg": ""}, **plan, **named)
    shutil.copytree(here, there)
    identities = {
        identity_of(next(load_sweep(place / path.name).points())) for place in (here, there)
    }
    assert len(identities) == 1
