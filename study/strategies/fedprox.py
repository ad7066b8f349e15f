"""FedProx: Li et al. 2020, *Federated Optimization in Heterogeneous Networks* (arXiv 1812.06127).

Silo i minimises, from θ_r, its own loss held near the global model:

    h_i(θ; θ_r) = F_i(θ) + μ/2 · ‖θ − θ_r‖²        (equation 2)

The aggregation is FedAvg's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from study.strategies.base import LocalRules, Strategy


class FedProx(Strategy):
    """FedAvg with a proximal term at the silos."""

    kind: Literal["fedprox"] = "fedprox"
    """The mean of local models that are held near the global one."""

    mu: Annotated[float, Field(gt=0.0, le=1e3)]
    """μ: how strongly; the paper tunes it over 0.001, 0.01, 0.1, 1."""

    def local_rules(self) -> LocalRules:
        return LocalRules(proximal_mu=self.mu)
