"""FedDDPM: Peng, Wang, Chen, Rao, Shen, *Federated Learning for Diffusion Models* (arXiv
2503.06426).

    θ̃_{r+1} = θ_r + Σ_i w_i δ_i                          aggregate, as FedAvg does
    θ_{r+1} = K steps of AdamW on L_DDPM(θ; A), from θ̃_{r+1}     correct, every round

where A is the auxiliary set: samples of the silos' local models. The correction is the
coordinator's to run; this file says when, how long and on which share of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from study.strategies.base import (
    Correction,
    Decision,
    LocalRules,
    RoundRecord,
    State,
    Strategy,
    Vector,
    When,
)
from study.strategies.fedavg import FedAvg
from study.strategies.scaffold import Scaffold


class Corrected(Strategy):
    """FedAvg, or SCAFFOLD, with corrections on the auxiliary set; when, is for its heirs to say."""

    control_variates: bool = False
    """Whether silos train with control variates against their drift, as SCAFFOLD's do: twice the
    bytes each way. A correction does not touch them."""

    auxiliary_share: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """Part of every local batch that is of the auxiliary set, against the silos' drift (data that
    all share: arXiv 1806.00582). Every site is sent the set, without the held-out images."""

    correction_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """K: optimiser steps per correction."""

    first_correction_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """K of a correction after the first round; absent = the same. A model that has seen images of
    all kinds early leaves the silos less to drift apart (docs/fedddpm.md)."""

    last_correction_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """K of a correction after the last round; absent = the same. What is done then is not undone by
    the silos' next local steps."""

    correction_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """AdamW's step size in a correction after round 1; absent = the silos' own,
    optimizer.learning_rate. It falls from round to round as theirs does."""

    correction_average: When = "last"
    """In which rounds a correction ends in the moving average of its weights. The average samples
    better but lags some ten steps behind, which the rounds that follow would have to make up."""

    correction_judged: When = "never"
    """In which rounds a correction is kept only where it lowers the FID against the silos' images,
    of samples that no evaluation shows. Needs [evaluation]; without it every correction is kept."""

    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the auxiliary images that correction never sees: the loss is watched on these."""

    @property
    def _base(self) -> Strategy:
        return Scaffold() if self.control_variates else FedAvg()

    @property
    def _first_steps(self) -> int | None:
        return self.first_correction_steps or self.correction_steps

    def local_rules(self) -> LocalRules:
        return replace(self._base.local_rules(), auxiliary_share=self.auxiliary_share)

    def initial_state(self, size: int) -> State:
        return self._base.initial_state(size)

    def round_input(self, state: State, global_vector: Vector) -> Vector:
        return self._base.round_input(state, global_vector)

    def aggregate(
        self, state: State, global_vector: Vector, mean_delta: Vector, round: int
    ) -> tuple[State, Vector]:
        return self._base.aggregate(state, global_vector, mean_delta, round)

    @property
    def correction(self) -> Correction:
        return Correction(
            self.correction_steps,
            self._first_steps,
            self.last_correction_steps or self.correction_steps,
            self.correction_learning_rate,
            self.held_out,
            self.correction_average,
            self.correction_judged,
        )


class FedDDPM(Corrected):
    """FedAvg, corrected after every aggregation."""

    kind: Literal["fedddpm"] = "fedddpm"
    """Correct the aggregate every round."""

    def decide(self, history: Sequence[RoundRecord], last: bool = False) -> Decision:
        return Decision(True, "FedDDPM corrects every round")
