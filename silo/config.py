"""site.toml: what the institution brings, and what it allows a study to ask for."""

from __future__ import annotations

import json
import os
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, SecretStr, ValidationError, field_validator

from diffusion.features.file import check_names
from diffusion.spec import Spec
from silo.data.items import Reading
from silo.errors import ConfigError
from silo.home import SiloHome
from silo.hours import PATTERN as HOURS
from silo.hours import Hours
from silo.reach import parse_proxy
from study.problems import explain

Purpose = Literal["census", "moments", "tags", "images", "round", "evaluation"]
Format = Literal["auto", "dicom", "images", "nifti", "npz", "idx", "cifar"]
ADDRESS = r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"
SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"


Window = tuple[float, Annotated[float, Field(ge=1.0)]]


class Site(Spec):
    """[site]: who this is."""

    name: Annotated[str, Field(pattern=SITE_NAME)]
    """The institution's short name: lower-case letters, digits and hyphens."""


class Coordinator(Spec):
    """[coordinator]: the way to it; its address comes with the invitation."""

    proxy: SecretStr = SecretStr("")
    """HTTP proxy, "http://proxy.example.org:3128", with user:password@ if it wants them; absent =
    as the environment's https_proxy and no_proxy say."""

    keepalive: Annotated[int, Field(ge=10, le=600)] = 60
    """Seconds of silence after which the line is pinged: fewer than a firewall forgets it in."""

    @field_validator("proxy")
    @classmethod
    def _is_proxy(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value():
            parse_proxy(url.get_secret_value())
        return url


class Data(Spec):
    """[data]: the images that local training sees."""

    path: Annotated[str, Field(min_length=1)]
    """A file or folder; relative paths start at this file's folder."""

    format: Format = "auto"
    """dicom (folder of files), images (folder of PNG and JPEG), nifti (slices of volumes), npz
    (MedMNIST's layout), idx (MNIST's), cifar (its binary and its Python version), auto (by what
    lies there)."""

    window: Window | None = None
    """DICOM and NIfTI: centre and width of what becomes black to white, in the units after rescale
    (Hounsfield for CT); absent = as each file says, else its percentiles."""

    burned_in: bool = False
    """DICOM: whether images are read that say of themselves that they have text burned in."""

    slices: Literal["axial", "coronal", "sagittal"] = "axial"
    """NIfTI: what volumes are cut into."""

    @property
    def reading(self) -> Reading:
        """For the readers."""
        return Reading(self.window, self.burned_in, self.slices)


class Policy(Spec):
    """[policy]: what no plan can override; a study that asks for more is declined."""

    smallest_silos: Annotated[int, Field(ge=3, le=255)] = 3
    """Fewest institutions in a study: a sum over few hides each of them less."""

    smallest_threshold: Annotated[int, Field(ge=2, le=255)] = 2
    """Fewest institutions that a sum may be revealed over."""

    smallest_colluders: Annotated[int, Field(ge=0, le=253)] = 0
    """Fewest institutions that may be in league with the study centre and learn nothing more."""

    largest_rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Most model rounds."""

    largest_steps: Annotated[int, Field(ge=1, le=10**12)] = 10_000_000
    """Most training steps of the whole study, those of the local model included."""

    largest_model: Annotated[int, Field(ge=1, le=10**10)] = 200_000_000
    """Most parameters of the model."""

    auxiliary_samples: bool = True
    """Whether audited synthetic images may leave in the anonymous union."""

    auxiliary_among_sites: bool = True
    """Whether the other sites may be sent that union, to train on it too (the strategy's
    auxiliary_share)."""

    largest_auxiliary: Annotated[int, Field(ge=10, le=1_000_000)] = 100_000
    """Most synthetic images in the union, those of all sites together."""

    smallest_audit_quantile: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Least strict audit of them: a sample is dropped that is nearer to a training image than this
    quantile of the distances between training images."""

    purposes: tuple[Purpose, ...] = ("census", "moments", "tags", "images", "round")
    """Which sums this site takes part in. Also known: evaluation, in which samples that the study
    centre publishes are compared with the images here (docs/threat-model.md, "Evaluation")."""

    feature_networks: tuple[str, ...] = ("digits", "fashion-mnist")
    """Feature networks whose moments of the real images may be summed: only with the weights that
    this version ships, or that a file of `feature_files` holds, by their hash."""

    feature_files: tuple[Path, ...] = ()
    """Files of feature networks that do not ship, each called <name>.safetensors; relative paths
    start at this file's folder."""

    @field_validator("feature_files")
    @classmethod
    def _have_names(cls, files: tuple[Path, ...]) -> tuple[Path, ...]:
        check_names(files)
        return files


class Resources(Spec):
    """[resources]: what local training may use of this machine."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] | None = None
    """"cpu", "cuda" or "cuda:N"; absent = a GPU if there is one."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the worker; absent = all cores."""

    @property
    def processors(self) -> int:
        """CPU threads that local work may keep busy."""
        return self.threads or os.cpu_count() or 1

    idle_seconds: Annotated[float, Field(ge=0.0, le=86_400.0)] = 60.0
    """How long the worker process stays after its last job."""

    niceness: Annotated[int, Field(ge=0, le=19)] = 10
    """How readily the worker gives way to other programs: 19 = always."""

    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Training processes that share each batch: one per GPU. The study's batch size has to be a
    multiple of it."""

    memory_mib: Annotated[int, Field(ge=256)] | None = None
    """MiB that the worker process may allocate, the mapped images aside; absent = no limit."""

    hours: Annotated[str, Field(pattern=HOURS)] | None = None
    """When the worker may compute, "19:00-06:00" say; absent = always. Outside, training rests with
    a checkpoint; the agent goes on answering what costs nothing."""

    time_zone: str | None = None
    """Whose clock `hours` mean, "Europe/Berlin" say; absent = this machine's."""

    @field_validator("time_zone")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in available_timezones():
            raise ValueError(f"{name!r} is no time zone: write it like Europe/Berlin")
        return name

    def open_at(self, moment: datetime) -> bool:
        """Whether the worker may compute at an instant (with time zone)."""
        if self.hours is None:
            return True
        zone = ZoneInfo(self.time_zone) if self.time_zone else None
        return Hours.parse(self.hours).open_at(moment.astimezone(zone))


class Agent(Spec):
    """[agent]: how the running agent can be watched."""

    metrics: Annotated[str, Field(pattern=ADDRESS)] | None = None
    """host:port where Prometheus may fetch metrics: bind it to 127.0.0.1; absent = nowhere."""


class Approval(Spec):
    """[approval]: who accepts a study."""

    automatic: bool = False
    """true accepts the site's first study, where the policy allows it, without asking a person.
    Later studies, and every change of plan or roster, wait for one."""


class SiloConfig(Spec):
    """site.toml."""

    site: Site
    coordinator: Coordinator = Coordinator()
    data: Data
    policy: Policy = Policy()
    resources: Resources = Resources()
    approval: Approval = Approval()
    agent: Agent = Agent()


def load_config(home: SiloHome) -> SiloConfig:
    """Raises ConfigError, which names the file and, for every problem, key, value and fix."""
    try:
        raw = tomllib.loads(home.config.read_text("utf-8"))
    except FileNotFoundError as error:
        hint = f"make one with `concilium silo init --home {home.path}`"
        raise ConfigError(f"{home.config} is missing: {hint}") from error
    except OSError as error:
        raise ConfigError(f"{home.config} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{home.config}: byte {error.start} is no UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{home.config} is no TOML: {error}") from error
    try:
        config = SiloConfig.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        problems = explain(error, SiloConfig)
        lines = "\n  ".join(("", *problems)) if len(problems) > 1 else f" {problems[0]}"
        raise ConfigError(f"{home.config}:{lines}") from error
    files = tuple((home.path / file.expanduser()).resolve() for file in config.policy.feature_files)
    policy = config.policy.model_copy(update={"feature_files": files})
    return config.model_copy(update={"policy": policy})


def data_path(home: SiloHome, config: SiloConfig) -> Path:
    """Where the images are."""
    return (home.path / Path(config.data.path).expanduser()).resolve()
