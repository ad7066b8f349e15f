"""FedDDPM+: FedDDPM that corrects only when learning is slow (arXiv 2503.06426).

The paper's exact rule could not be recovered; this is ours. Let L_r be the DDPM loss of the
aggregate of round r on the held-out auxiliary images, with timesteps and noise that are the same
in every round (common random numbers), and r' the completed round W before r:

    improvement = (L_{r'} − L_r) / L_{r'}                learning is slow when improvement < τ

One correction, then C ≥ W completed rounds without one (the cool-down). Thus no window holds a
correction: the two losses compared are always those of aggregates between which nothing but
federated rounds happened.
The aggregate of the first round is corrected in any case (`first_correction_steps`), with
`correct_last` that of the last as well.

The defaults are the recipe that measured best, and not the paper's (docs/fedddpm.md): one long
correction after the first round, of twice as many steps as a silo takes in all; from then on silos
draw half of each batch from the auxiliary set (`auxiliary_share`), which keeps them from drifting
away from what it taught; and a correction later on only where the held-out loss goes up
(τ = −0.05): a loss that stands still is that of a model that is nearly done, and a correction harms
it. Where the model has come near the set (`share_until`), as it soon does on IID data, the set only
holds it back, and silos go on with their own images alone. What is corrected late, without sharing,
is undone by the silos' next local steps.

With `signal` = "silos" L_r is the silos' mean training loss of round r, which the secure sum of
the round carries anyway; a round compares with one of the same silos alone. It costs nothing, but
its random numbers differ from round to round, and it is the loss of local models on what they train
on (their own images, with `auxiliary_share` the auxiliary ones too), which also falls where the
global model learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from study.strategies.base import Decision, RoundRecord, Sharing, When
from study.strategies.fedddpm import Corrected

# Sharing would have brought something too: what is to take its place has to bring clearly more.
_GAIN = 0.9
_SIGNALS = {"auxiliary": "held-out", "silos": "the silos'"}


class FedDDPMPlus(Corrected):
    """FedAvg, corrected once on the auxiliary set when its held-out loss improves too slowly."""

    kind: Literal["fedddpm_plus"] = "fedddpm_plus"
    """Correct the aggregate only when learning is slow."""

    auxiliary_share: Annotated[float, Field(ge=0.0, le=0.9)] = 0.5
    """Part of every local batch that is of the auxiliary set, against the silos' drift (data that
    all share: arXiv 1806.00582). Every site is sent the set, without the held-out images; with 0
    none is. Without drift it does harm, hence `share_until`."""

    share_until: Annotated[float, Field(ge=0.0, le=100.0)] = 2.0
    """Silos share until the FID of the global model is at most this many times the auxiliary set's
    own. Where the next evaluation does not find it lower by a tenth, or a later one finds it higher
    than it was, they share from then on to the end. 0 = to the end in any case; so it is without
    [evaluation]."""

    first_correction_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """K of the correction after the first round, before the silos drift apart; absent = twice as
    many as a silo takes in all rounds together, 0 = round 1 is like the others."""

    window: Annotated[int, Field(ge=1, le=10_000)] = 3
    """W: rounds an improvement is measured over."""

    cool_down: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """C: rounds to wait after a correction, at least W; absent = W."""

    tau: Annotated[float, Field(ge=-1.0, lt=1.0)] = -0.05
    """τ: the relative improvement over W rounds below which learning is slow; below 0 the loss has
    to rise."""

    signal: Literal["auxiliary", "silos"] = "auxiliary"
    """The loss that is watched: of held-out auxiliary images, or of the silos' training."""

    correct_last: bool = False
    """Whether the aggregate of the last round is corrected, however fast learning is: worth it
    where silos do not train on the auxiliary images."""

    correction_judged: When = "last"
    """In which rounds a correction is kept only where it lowers the FID against the silos' images,
    of samples that no evaluation shows. Needs [evaluation]; without it every correction is kept. A
    model that is trained to the end rarely needs the last one (docs/fedddpm.md)."""

    @model_validator(mode="after")
    def _no_window_spans_a_correction(self) -> Self:
        if self.cool_down is not None and self.cool_down < self.window:
            raise ValueError(
                f"cool_down = {self.cool_down} is shorter than window = {self.window}: an "
                "improvement would be measured across a correction; use at least the window"
            )
        return self

    @property
    def _first_steps(self) -> int | None:
        steps = self.first_correction_steps
        return self.correction_steps if steps == 0 else steps

    @property
    def stops_sharing(self) -> bool:
        return self.auxiliary_share > 0.0 and self.share_until > 0.0

    def shares(
        self, fids: Sequence[float], evaluations: int, auxiliary_fid: float | None
    ) -> Sharing:
        """Until FID(θ_r) ≤ ρ · FID(A), and again where the next one is above 0.9 · FID(θ_r), or a
        later one above FID(θ_r); the numbers: both FIDs, ρ, the next FID, and the highest since."""
        planned = super().shares(fids, evaluations, auxiliary_fid)
        if not self.stops_sharing or auxiliary_fid is None:
            return planned
        limit = self.share_until * auxiliary_fid
        numbers = {"auxiliary_fid": auxiliary_fid, "share_until": self.share_until}
        # Two evaluations have to follow: one that shows what it did, one in which it is mended.
        so_far = fids[: max(0, evaluations - 2)]
        near = next((k for k, fid in enumerate(so_far) if fid <= limit), None)
        if near is None:
            return Sharing(True, f"no FID was at most {limit:.4g} in time", numbers)
        then, after = fids[near], fids[near + 1 :]
        numbers["fid"] = then
        why = f"FID was {then:.4g}, at most {limit:.4g}"
        if not after:
            return Sharing(False, why, numbers)
        numbers |= {"next_fid": after[0], "highest_since": max(after)}
        if not after[0] <= _GAIN * then:  # also where it is not a number
            return Sharing(True, f"{why}, and without sharing came to {after[0]:.4g} only", numbers)
        if not all(fid <= then for fid in after):
            return Sharing(True, f"{why}, but {max(after):.4g} without sharing", numbers)
        return Sharing(False, f"{why}, and without sharing came to {after[0]:.4g}", numbers)

    def decide(self, history: Sequence[RoundRecord], last: bool = False) -> Decision:
        """Whether learning is slow; the numbers: both losses, their rounds, improvement, W, τ."""
        W = self.window
        C = W if self.cool_down is None else self.cool_down
        numbers: dict[str, float] = {"window": W, "tau": self.tau}
        if last and self.correct_last:
            return Decision(True, "the last round is corrected in any case", numbers)
        if self.first_correction_steps != 0 and history[-1].round == 1:
            return Decision(True, "the first round is corrected in any case", numbers)
        since = next((k for k, record in enumerate(reversed(history)) if record.corrected), None)
        if since is not None and since <= C:
            numbers |= {"rounds_since_correction": since, "cool_down": C}
            return Decision(False, f"waits {C} rounds after a correction, {since} passed", numbers)
        if len(history) <= W:
            numbers["rounds_completed"] = len(history)
            return Decision(False, f"needs {W + 1} completed rounds, has {len(history)}", numbers)
        now, then = history[-1], history[-1 - W]
        if self.signal == "silos" and now.silos != then.silos:
            why = f"rounds {then.round} and {now.round} summed losses of other silos or images"
            return Decision(False, why, numbers)
        before, after = self._loss(then), self._loss(now)
        if before is None or after is None:
            return Decision(False, "no loss was measured", numbers)
        numbers |= {
            "round": now.round,
            "loss": after,
            "loss_then": before,
            "round_then": then.round,
        }
        if not (math.isfinite(before) and math.isfinite(after) and before > 0):
            return Decision(False, "the loss is not a positive number", numbers)
        improvement = (before - after) / before
        numbers["improvement"] = improvement
        slow = improvement < self.tau
        reason = (
            f"{_SIGNALS[self.signal]} loss {before:.6g} (round {then.round}) → "
            f"{after:.6g} (round {now.round}): "
            f"improved by {improvement:.2%}, {'below' if slow else 'not below'} τ = {self.tau:.2%}"
        )
        return Decision(slow, reason, numbers)

    def _loss(self, record: RoundRecord) -> float | None:
        return record.silo_loss if self.signal == "silos" else record.aux_loss_before
