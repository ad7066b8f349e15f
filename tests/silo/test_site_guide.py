"""docs/site-guide.md says what site.toml takes: no key is missing, and its example is one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from silo.config import SiloConfig, load_config
from silo.home import SiloHome

GUIDE = (Path(__file__).parents[2] / "docs" / "site-guide.md").read_text("utf-8")


def example() -> str:
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    return str(text)


def test_the_example_is_a_site_toml(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(example(), "utf-8")
    config = load_config(SiloHome(tmp_path))
    assert config.site.name == "st-marys"
    assert config.data.window == (40.0, 400.0)


@pytest.mark.parametrize("section", SiloConfig.model_fields)
def test_every_key_is_in_the_example(section: str) -> None:
    model = SiloConfig.model_fields[section].annotation
    assert model is not None
    assert set(tomllib.loads(example())[section]) == set(model.model_fields)
