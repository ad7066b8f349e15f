"""How a study learns: one file per strategy, each with both its halves, all of them only through
sums.

A strategy is one table of the plan (a frozen pydantic model named by its `kind`) together with
what that table means at a silo (`local_rules`) and at the coordinator (`aggregate`, `decide`).
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from study.strategies.base import (
    Correction,
    Decision,
    LocalRules,
    RoundRecord,
    Sharing,
    State,
    Strategy,
)
from study.strategies.fedavg import FedAvg
from study.strategies.fedddpm import FedDDPM
from study.strategies.fedddpm_plus import FedDDPMPlus
from study.strategies.fedopt import FedAdam, FedYogi
from study.strategies.fedprox import FedProx
from study.strategies.scaffold import Scaffold

AnyStrategy: TypeAlias = Annotated[
    FedAvg | FedProx | Scaffold | FedAdam | FedYogi | FedDDPM | FedDDPMPlus,
    Field(discriminator="kind"),
]
"""The [strategy] table of a plan: which one is told by its `kind`."""

__all__ = [
    "AnyStrategy",
    "Correction",
    "Decision",
    "FedAdam",
    "FedAvg",
    "FedDDPM",
    "FedDDPMPlus",
    "FedProx",
    "FedYogi",
    "LocalRules",
    "RoundRecord",
    "Scaffold",
    "Sharing",
    "State",
    "Strategy",
]
