"""Where an agent keeps things: one folder that only its user can read.

HOME/
  site.toml                 the institution's configuration and site policy
  agent.lock                held by the running agent
  status.json               what the agent is doing, for `concilium silo status`
  heads.jsonl               heads of the study centre's audit log that this site signed
  enrolment.json            the coordinator's address and the site's name there
  keys/                     identity.pem (Ed25519), tls.pem (P-256), ledger.key; never leave
  certificates/             authority.pem, site.pem, request.der
  cache/<digest>/           images.npy (uint8), labels.npy, report.json, contact-sheet.png
  studies/<study>/
    offer.toml, offer.roster        as last offered
    decision.json                   what a person (or the policy) decided about that offer
    plan.toml, roster               as accepted: pinned
    ledger                          what is never done twice (silo/ledger.py)
    shares.key                      opens the shares in the ledger; new when a session has ended
    outcomes/<epoch>/<session>.certificate  how sessions ended
    artifacts/<sha256>              input models and other public files
    vectors/<purpose>-<round>/      prepared vectors, kept until their outcome is known
    masked/<session>.vector         masked vectors while they are uploaded
    residual.npy                    what rounding and clipping left out so far
    control.npy                     SCAFFOLD: this silo's control variate
    pool/                           synthetic images of this site, and which were offered
    work/                           checkpoints and progress of the worker
    leave.json                      that a person wants to leave, and why
    ended.json, model/              how the study ended, and its final model
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from silo.errors import SiloError
from silo.files import make_folder

_STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StudyHome:
    """The folder of one study."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def offered_plan(self) -> Path:
        return self.path / "offer.toml"

    @property
    def offered_roster(self) -> Path:
        return self.path / "offer.roster"

    @property
    def decision(self) -> Path:
        return self.path / "decision.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.toml"

    @property
    def roster(self) -> Path:
        return self.path / "roster"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def shares_key(self) -> Path:
        return self.path / "shares.key"

    def outcomes(self, epoch: int) -> Path:
        """Certificates of the sessions under the roster of an epoch."""
        return make_folder(self.path / "outcomes" / str(epoch))

    @property
    def artifacts(self) -> Path:
        return make_folder(self.path / "artifacts")

    @property
    def masked(self) -> Path:
        return make_folder(self.path / "masked")

    @property
    def work(self) -> Path:
        return make_folder(self.path / "work")

    @property
    def pool(self) -> Path:
        return make_folder(self.path / "pool")

    @property
    def total(self) -> Path:
        return self.path / "total.json"

    @property
    def shared(self) -> Path:
        return self.path / "shared.json"

    @property
    def shared_sheet(self) -> Path:
        return self.pool / "shared.png"

    @property
    def residual(self) -> Path:
        return self.path / "residual.npy"

    @property
    def control(self) -> Path:
        return self.path / "control.npy"

    @property
    def leave(self) -> Path:
        return self.path / "leave.json"

    @property
    def ended(self) -> Path:
        return self.path / "ended.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def vector(self, purpose: str, round: int) -> Path:
        return make_folder(self.path / "vectors" / f"{purpose}-{round}")

    def artifact(self, digest: bytes) -> Path:
        return self.artifacts / digest.hex()


@dataclass(frozen=True)
class SiloHome:
    """The folder of an agent."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "site.toml"

    @property
    def lock(self) -> Path:
        return self.path / "agent.lock"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def heads(self) -> Path:
        return self.path / "heads.jsonl"

    @property
    def enrolment(self) -> Path:
        return self.path / "enrolment.json"

    @property
    def keys(self) -> Path:
        return make_folder(self.path / "keys")

    @property
    def certificates(self) -> Path:
        return make_folder(self.path / "certificates")

    @property
    def cache(self) -> Path:
        return make_folder(self.path / "cache")

    def study(self, name: str) -> StudyHome:
        """The folder of study `name`, made where missing.

        Safe with names from the wire: one path component that is neither hidden nor a parent.
        """
        if not _STUDY_NAME.fullmatch(name):
            raise SiloError(f"{name!r} cannot be the name of a study here")
        return StudyHome(make_folder(self.path / "studies" / name))

    def studies(self) -> Iterator[StudyHome]:
        """Every study that this site was ever offered, by name."""
        # Not made here: a command that only looks must not leave folders under a mistyped --home.
        for path in sorted((self.path / "studies").glob("*")):
            if path.is_dir() and _STUDY_NAME.fullmatch(path.name):
                yield StudyHome(path)
