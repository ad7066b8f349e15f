"""site.toml: every mistake is answered with file, key, value and fix."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from silo import admin
from silo.config import data_path, load_config
from silo.errors import ConfigError
from silo.home import SiloHome

GOOD = '[site]\nname = "north"\n[data]\npath = "images"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data]\npath = 'x'\n", "add a section [site] with name"),
        (GOOD.replace("north", "North Hospital"), 'site.name = "North Hospital"'),
        (GOOD + "fromat = 'npz'\n", "did you mean format?"),
        (GOOD + "format = 'tiff'\n", "data.format = \"tiff\": use 'auto'"),
        (GOOD + "[policy]\nsmallest_silos = 2\n", "policy.smallest_silos = 2: use at least 3"),
        (GOOD + "[approval]\nautomatic = 'yes'\n", 'approval.automatic = "yes": use true or false'),
        (GOOD + "[resources]\ndevice = 'tpu'\n", 'resources.device = "tpu"'),
        (GOOD + "[polcy]\n", "did you mean policy?"),
        (
            GOOD + "[policy]\nfeature_files = ['x/digits.safetensors']\n",
            'policy.feature_files: "digits" ships with the project, and no file takes its place',
        ),
        (GOOD + "[policy]\nfeature_files = ['own.pt']\n", "own.pt is no .safetensors file"),
        ("[site\n", "is no TOML"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_fix(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(SiloHome(tmp_path))
    assert said in str(error.value)
    assert str(tmp_path / "site.toml") in str(error.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="concilium silo init"):
        load_config(SiloHome(tmp_path))


def test_relative_data_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(GOOD)
    home = SiloHome(tmp_path)
    assert data_path(home, load_config(home)) == (tmp_path / "images").resolve()


def test_relative_feature_files_start_there_as_well(tmp_path: Path) -> None:
    text = "[policy]\nfeature_files = ['nets/own.safetensors', '/x/other.safetensors']\n"
    (tmp_path / "site.toml").write_text(GOOD + text)
    files = load_config(SiloHome(tmp_path)).policy.feature_files
    nets = (tmp_path / "nets").resolve()
    assert files == (nets / "own.safetensors", Path("/x/other.safetensors"))


def test_init_writes_a_file_that_loads_and_keys_that_only_the_user_reads(tmp_path: Path) -> None:
    home = tmp_path / "north"
    config = admin.init(
        home, name="north", data=tmp_path / 'a "quoted" name', threads=1, automatic=True
    )
    assert config.approval.automatic
    assert config.resources.threads == 1
    assert config.data.path.endswith('a "quoted" name')
    for key in (home / "keys").iterdir():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="exists already"):
        admin.init(home, name="north", data=tmp_path)


def test_init_with_a_wrong_name_leaves_nothing_to_trip_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.name"):
        admin.init(tmp_path / "x", name="No Good", data=tmp_path)
    admin.init(tmp_path / "x", name="good", data=tmp_path)
