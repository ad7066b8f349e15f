"""FedAdam and FedYogi: Reddi et al. 2021, *Adaptive Federated Optimization* (arXiv 2003.00295).

The mean delta Δ_r is taken for a (negative) gradient by an optimiser at the server (algorithm 2):

    m_r = β1 m_{r−1} + (1 − β1) Δ_r
    v_r = v_{r−1} − (1 − β2) Δ_r² sign(v_{r−1} − Δ_r²)       FedYogi
    v_r = β2 v_{r−1} + (1 − β2) Δ_r²                         FedAdam
    θ_{r+1} = θ_r + η m_r / (√v_r + τ),       m_0 = 0, v_0 = τ²

One file for the two, which differ in one line. All of it is elementwise float32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from study.strategies.base import State, Strategy, Vector


class _FedOpt(Strategy):
    server_learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-2
    """η: how far one round moves a parameter, about."""

    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment per round."""

    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Decay of the second moment per round."""

    tau: Annotated[float, Field(ge=1e-12, le=1.0)] = 1e-3
    """τ: degree of adaptivity; smaller = more alike steps for all parameters."""

    def initial_state(self, size: int) -> State:
        m = np.zeros(size, dtype=np.float32)
        v = np.full(size, self.tau**2, dtype=np.float32)
        return {"m": m, "v": v}

    def aggregate(
        self, state: State, global_vector: Vector, mean_delta: Vector, round: int
    ) -> tuple[State, Vector]:
        m, v = np.asarray(state["m"]), np.asarray(state["v"])
        m = np.float32(self.beta1) * m + np.float32(1 - self.beta1) * mean_delta
        v = self._second_moment(v, np.float32(1 - self.beta2), np.square(mean_delta))
        step = np.float32(self.server_learning_rate) * m / (np.sqrt(v) + np.float32(self.tau))
        return {"m": m, "v": v}, (global_vector + step).astype(np.float32, copy=False)

    @abstractmethod
    def _second_moment(self, v: Vector, rate: np.float32, square: Vector) -> Vector: ...


class FedAdam(_FedOpt):
    """Adam at the server."""

    kind: Literal["fedadam"] = "fedadam"
    """An exponential moving average of the squares."""

    def _second_moment(self, v: Vector, rate: np.float32, square: Vector) -> Vector:
        return v + rate * (square - v)


class FedYogi(_FedOpt):
    """Yogi at the server."""

    kind: Literal["fedyogi"] = "fedyogi"
    """Squares enter additively, so that the second moment forgets slowly."""

    def _second_moment(self, v: Vector, rate: np.float32, square: Vector) -> Vector:
        sign: Vector = np.sign(v - square)
        return v - rate * square * sign
