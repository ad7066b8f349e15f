"""coordinator.toml, and where everything of a coordinator lies on disk."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion.features.file import check_names
from study.problems import explain

ADDRESS = r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"


class ConfigError(ValueError):
    """coordinator.toml cannot be used; the text names key, value and fix."""


class CoordinatorConfig(BaseModel):
    """What an operator may set; each key is explained in the file that `init` writes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    address: Annotated[str, Field(pattern=ADDRESS)]
    """host:port that silos dial; the host is in the server's certificate."""

    listen: Annotated[str, Field(pattern=ADDRESS)] | None = None
    """host:port to bind; absent = every interface, at the port of `address`."""

    database: Annotated[str, Field(pattern=r"^(sqlite|postgresql\+psycopg)://")] | None = None
    """SQLAlchemy URL of the store; absent = store.sqlite in the coordinator's folder."""

    absent_after: Annotated[float, Field(ge=0.5, le=3600.0)] = 30.0
    """Seconds without a sign of life after which a silo counts as out of contact: a step whose
    awaited silos are all out of contact is closed before its deadline."""

    takeover_after: Annotated[float, Field(ge=1.0, le=3600.0)] = 15.0
    """Seconds without a sign of life from the coordinator that holds the studies after which one
    that waits on the same store takes over."""

    certificate_days: Annotated[float, Field(ge=1e-4, le=365.0)] = 30.0
    """How long a silo's certificate is good; its agent renews it after two thirds of that."""

    largest_vector: Annotated[int, Field(ge=1024, le=2**38)] = 2**31
    """Largest upload of one silo, in bytes."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] | None = None
    """Where corrections and samples are computed; absent = a GPU if there is one."""

    worker_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of the child process that computes with torch; absent = torch's own choice."""

    feature_files: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Files of feature networks that do not ship with the project, each called <name>.safetensors,
    for the plans that pin them; relative paths start at this file's folder."""

    metrics: Annotated[str, Field(pattern=ADDRESS)] | None = None
    """host:port where Prometheus may fetch metrics, over HTTP and by anybody who reaches it: bind
    it to 127.0.0.1 or to a network of your own; absent = nowhere."""

    log: Literal["auto", "console", "json"] = "auto"
    """Log lines for people, or one JSON object a line; auto = for people on a terminal."""

    @property
    def bind(self) -> str:
        """host:port that the server binds."""
        return self.listen or f"[::]:{self.address.rpartition(':')[2]}"

    @property
    def host(self) -> str:
        """The host of `address`, without the brackets of an IPv6 literal."""
        return self.address.rpartition(":")[0].strip("[]")


@dataclass(frozen=True)
class Home:
    """The folder of one coordinator; every path in it has its name here."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "coordinator.toml"

    @property
    def authority(self) -> Path:
        """The authority's key and certificate, and the server's."""
        return self.root / "authority"

    @property
    def artifacts(self) -> Path:
        """Models and sums, each named by its SHA-256."""
        return self.root / "artifacts"

    @property
    def spool(self) -> Path:
        """Uploads of the sessions that are under way."""
        return self.root / "spool"

    @property
    def lock(self) -> Path:
        """Held by the process that serves from this folder; its content names that process."""
        return self.root / "lock"

    @property
    def scratch(self) -> Path:
        """Files between the service and its worker; emptied at each start."""
        return self.root / "scratch"

    def corrections(self, study: str) -> Path:
        """How far corrections of the study have come that are under way; kept over a restart."""
        return self.root / "corrections" / study

    def study(self, study: str) -> Path:
        """What a study publishes: model, samples, metrics, report."""
        return self.root / "studies" / study

    def config(self) -> CoordinatorConfig:
        """Raises ConfigError where the file is missing or wrong."""
        return read_config(self.config_file)

    def database(self, config: CoordinatorConfig) -> str:
        return config.database or f"sqlite:///{(self.root / 'store.sqlite').resolve()}"

    def feature_files(self) -> tuple[Path, ...]:
        """As coordinator.toml names them now: whoever starts a study has looked there, and not at
        what it was when the service started. Raises ConfigError."""
        files = self.config().feature_files
        return tuple((self.root / Path(file).expanduser()).resolve() for file in files)


def read_config(path: Path) -> CoordinatorConfig:
    """Raises ConfigError, which says for every problem where it is and what to write instead."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: make a coordinator with `concilium coordinator init`"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    if "address" not in raw:
        raise ConfigError(f'{path}: address is missing: write `address = "host:port"`')
    return _validated(raw, str(path))


def new_config(address: str, listen: str | None = None) -> CoordinatorConfig:
    """The configuration of a new coordinator; raises ConfigError for a wrong address."""
    given = {"address": address, "listen": listen}
    return _validated({k: v for k, v in given.items() if v is not None}, "coordinator init")


def _validated(raw: dict[str, Any], where: str) -> CoordinatorConfig:
    try:
        config = CoordinatorConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(explain(error, CoordinatorConfig))) from error
    for key in ("address", "listen"):
        value = getattr(config, key)
        if value is not None and not 0 < int(value.rpartition(":")[2]) < 65536:
            raise ConfigError(f'{where}: {key} = "{value}": use a port between 1 and 65535')
    try:
        check_names([Path(file) for file in config.feature_files])
    except ValueError as error:
        raise ConfigError(f"{where}: feature_files: {error}") from error
    return config


def config_text(config: CoordinatorConfig) -> str:
    """The file that `init` writes: what is set, and what can be, each with its meaning."""
    lines = ["# The coordinator. Restart the service after a change."]
    for name, info in CoordinatorConfig.model_fields.items():
        lines.append("")
        lines += [f"# {line.strip()}" for line in (info.description or "").splitlines()]
        value = getattr(config, name)
        if value is None:
            lines.append(f"# {name} =")
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"
