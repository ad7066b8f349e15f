"""FedAvg: McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks* (arXiv
1602.05629).

θ_{r+1} = Σ_i (n_i / n) θ_i  =  θ_r + Σ_i w_i δ_i,      δ_i = θ_i − θ_r        (algorithm 1)
"""

from __future__ import annotations

from typing import Literal

from study.strategies.base import Strategy


class FedAvg(Strategy):
    """The global model moves by the weighted mean of the silos' deltas."""

    kind: Literal["fedavg"] = "fedavg"
    """The mean of the local models."""
