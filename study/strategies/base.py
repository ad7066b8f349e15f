"""The one interface of all strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffusion.spec import Spec

Vector: TypeAlias = NDArray[np.float32]
State: TypeAlias = Mapping[str, Vector | int]
"""What a strategy remembers between rounds: arrays and integers, so that any store can keep it."""


When: TypeAlias = Literal["never", "last", "always"]


@dataclass(frozen=True)
class LocalRules:
    """The silo's half: what a strategy changes in local training."""

    proximal_mu: float = 0.0
    """μ of the proximal term μ/2 · ‖θ − θ_global‖² in the local loss; 0 = none."""

    auxiliary_share: float = 0.0
    """Part of every local batch that is of the auxiliary set, which silos are sent for it."""

    control: bool = False
    """Whether every gradient gets c − c_i, and the silo's vector is [δ; Δc_i] (SCAFFOLD)."""


@dataclass(frozen=True)
class Correction:
    """How the coordinator optimises the aggregate on the auxiliary set when it is told to."""

    steps: int
    first_steps: int | None
    """Steps of a correction after the first round; None = twice as many as a silo takes in all
    rounds together."""
    last_steps: int
    """Steps of a correction after the last round."""
    learning_rate: float | None
    """AdamW's step size after round 1; None = as large as the silos'."""
    held_out: float
    """Share of the auxiliary images that correction never sees: the trigger watches these."""
    average: When = "last"
    """In which rounds the corrected model is the moving average of the correction's weights."""
    judged: When = "last"
    """In which rounds the corrected model replaces the aggregate only where its FID is lower."""

    def held_back(self, images: int) -> int:
        """How many of so many auxiliary images no correction sees, at least one."""
        return max(1, round(images * self.held_out))

    def steps_in(self, round: int, rounds: int, local_steps: int) -> int:
        """Steps after a round, 1 … rounds, of so many local steps each."""
        if round == rounds:
            return self.last_steps
        if round > 1:
            return self.steps
        return 2 * rounds * local_steps if self.first_steps is None else self.first_steps

    def averages(self, last: bool) -> bool:
        """Whether weights are averaged in a round that is the last one, or is not."""
        return self.average == "always" or (last and self.average == "last")

    def judges(self, last: bool) -> bool:
        """Whether the correction is judged in a round that is the last one, or is not."""
        return self.judged == "always" or (last and self.judged == "last")


@dataclass(frozen=True)
class RoundRecord:
    """What the coordinator noted of one completed round."""

    round: int
    aux_loss_before: float | None
    """Held-out auxiliary loss of the aggregate, before any correction."""
    aux_loss_after: float | None = None
    """The same after the correction, where there was one."""
    corrected: bool = False
    silo_loss: float | None = None
    """Training loss of the round, Σ w_i l_i over the silos that were summed: a secure sum. None
    where one of them had a fault: then nobody knows whose losses it adds."""
    silos: tuple[object, ...] = ()
    """Who was summed, under which weights, and whether they trained on the auxiliary images too.
    The losses of two rounds compare where these are the same: without one silo the sum is smaller,
    whatever anybody learned."""


@dataclass(frozen=True)
class Decision:
    """Whether to correct now, why, and the numbers the answer rests on."""

    correct: bool
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharing:
    """Whether silos train on the auxiliary images in the rounds that follow, why, and the numbers
    the answer rests on."""

    share: bool
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


class Strategy(Spec):
    """A table of the plan and what it means. Pure: state comes in and goes out."""

    def local_rules(self) -> LocalRules:
        """The silo's half."""
        return LocalRules()

    @property
    def correction(self) -> Correction | None:
        """How to correct, or None for a strategy that never does and needs no auxiliary set."""
        return None

    @property
    def parts(self) -> int:
        """Vectors of the model's size that travel each way: θ and δ; with a control variate also c
        and Δc."""
        return 2 if self.local_rules().control else 1

    @property
    def stops_sharing(self) -> bool:
        """Whether `shares` may ever say no where the plan has an auxiliary_share."""
        return False

    def initial_state(self, size: int) -> State:
        """The state before the first round, for a model of `size` parameters."""
        return {}

    def round_input(self, state: State, global_vector: Vector) -> Vector:
        """What the silos are sent: float32 [parts · n], the model first."""
        return global_vector

    def aggregate(
        self, state: State, global_vector: Vector, mean_delta: Vector, round: int
    ) -> tuple[State, Vector]:
        """The next state and global model (float32 [n]) from the weighted mean of what the silos
        sent (float32 [parts · n]).

        FedAvg's step θ_{r+1} = θ_r + mean δ unless a strategy says otherwise. Neither argument is
        changed. `round` counts from 1.
        """
        return state, global_vector + mean_delta

    def shares(
        self, fids: Sequence[float], evaluations: int, auxiliary_fid: float | None
    ) -> Sharing:
        """Whether the silos of the rounds that follow train on the auxiliary images too.

        `fids` are those of the global model so far, of `evaluations` in the whole study, in order;
        `auxiliary_fid` is the set's own, None where it was not measured.
        """
        return Sharing(self.local_rules().auxiliary_share > 0.0, "as the plan has it")

    def decide(self, history: Sequence[RoundRecord], last: bool = False) -> Decision:
        """Whether to correct the aggregate of the last round in `history` (completed rounds, in
        order); `last` where the plan has no further round.

        The last record has its `aux_loss_before` and is not corrected yet.
        """
        return Decision(False, f"{type(self).__name__} never corrects")
