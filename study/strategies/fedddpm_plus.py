"""FedDDPM+: FedDDPM that corrects only when learning is slow (arXiv 2503.06426).

The paper's exact rule could not be recovered; this is ours. Let L_r be the DDPM loss of the
aggregate of round r on the held-out auxiliary images, with timesteps and noise that are the same
in every round (common random numbers), and r' the completed round W before r:

    improvement = (L_{r'} − L_r) / L_{r'}                learning is slow when improvement < τ

One correction, then W completed rounds without one. Thus no window holds a correction: the two
losses compared are always those of aggregates between which nothing but federated rounds happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from study.strategies.base import Decision, RoundRecord
from study.strategies.fedddpm import Corrected


class FedDDPMPlus(Corrected):
    """FedAvg, corrected once on the auxiliary set when its held-out loss improves too slowly."""

    kind: Literal["fedddpm_plus"] = "fedddpm_plus"
    """Correct the aggregate only when learning is slow."""

    window: Annotated[int, Field(ge=1, le=10_000)] = 3
    """W: rounds an improvement is measured over, and rounds to wait after a correction."""

    tau: Annotated[float, Field(ge=-1.0, lt=1.0)] = 0.02
    """τ: the relative improvement over W rounds below which learning is slow."""

    def decide(self, history: Sequence[RoundRecord]) -> Decision:
        """Whether learning is slow; the numbers: both losses, their rounds, improvement, W, τ."""
        W = self.window
        numbers: dict[str, float] = {"window": W, "tau": self.tau}
        since = next((k for k, record in enumerate(reversed(history)) if record.corrected), None)
        if since is not None and since <= W:
            numbers["rounds_since_correction"] = since
            return Decision(False, f"waits {W} rounds after a correction, {since} passed", numbers)
        if len(history) <= W:
            numbers["rounds_completed"] = len(history)
            return Decision(False, f"needs {W + 1} completed rounds, has {len(history)}", numbers)
        now, then = history[-1], history[-1 - W]
        if now.aux_loss_before is None or then.aux_loss_before is None:
            return Decision(False, "no held-out loss was measured", numbers)
        before, after = then.aux_loss_before, now.aux_loss_before
        numbers |= {
            "round": now.round,
            "loss": after,
            "loss_then": before,
            "round_then": then.round,
        }
        if not (math.isfinite(before) and math.isfinite(after) and before > 0):
            return Decision(False, "the held-out loss is not a positive number", numbers)
        improvement = (before - after) / before
        numbers["improvement"] = improvement
        slow = improvement < self.tau
        reason = (
            f"held-out loss {before:.6g} (round {then.round}) → {after:.6g} (round {now.round}): "
            f"improved by {improvement:.2%}, {'below' if slow else 'not below'} τ = {self.tau:.2%}"
        )
        return Decision(slow, reason, numbers)
