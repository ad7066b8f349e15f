"""SCAFFOLD: Karimireddy et al. 2020, *SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning* (arXiv 1910.06378, algorithm 1 with option II), through sums only.

Silo i keeps a control variate c_i, and all know c = Σ_i w_i c_i. In a round of K local steps

    y ← θ_r,   y ← y − η (g_i(y) + c − c_i)          each step is corrected for the silo's drift
    c_i⁺ = c_i − c + (θ_r − y_K) / (K η)             option II
    the silo's vector is [δ_i; Δc_i] = [y_K − θ_r; c_i⁺ − c_i]
    θ_{r+1} = θ_r + η_g Σ w_i δ_i,      c ← c + Σ w_i Δc_i

For plain SGD θ_r − y_K = η Σ_k (g_i(y_k) + c − c_i), and therefore option II is nothing but

    c_i⁺ = (1/K) Σ_k g_i(y_k),                       the mean gradient of the round.

Here the silos step with AdamW, for which θ_r − y_K is no multiple of a sum of gradients: option II
read literally would mix AdamW's preconditioner into c_i. What it *means* is kept: c_i is the mean
(clipped) loss gradient of the round, and c − c_i is added to the gradient before AdamW's moments
see it. Then E[g_i + c − c_i] ≈ ∇f, as in the paper, but AdamW's step is not linear in it: the
paper's theorems are for SGD and are not claimed for this.

Only sums leave a silo: Σ w_i Δc_i is the second half of the round's vector. c comes back as the
second half of the round's input, whose digest enters the masks like the model's: silos that were
shown different c make masks that do not cancel. A silo that was dropped from a sum keeps its c_i.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from study.strategies.base import LocalRules, State, Strategy, Vector


class Scaffold(Strategy):
    """FedAvg with control variates against client drift."""

    kind: Literal["scaffold"] = "scaffold"
    """The mean of local models that were corrected for their drift."""

    server_learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """η_g: how far the global model follows the mean delta."""

    def local_rules(self) -> LocalRules:
        return LocalRules(control=True)

    def initial_state(self, size: int) -> State:
        return {"c": np.zeros(size, dtype=np.float32)}

    def round_input(self, state: State, global_vector: Vector) -> Vector:
        return np.concatenate([global_vector, np.asarray(state["c"])])

    def aggregate(
        self, state: State, global_vector: Vector, mean_delta: Vector, round: int
    ) -> tuple[State, Vector]:
        n = len(global_vector)
        delta, change = mean_delta[:n], mean_delta[n:]
        c = np.asarray(state["c"]) + change
        return {"c": c}, global_vector + np.float32(self.server_learning_rate) * delta
