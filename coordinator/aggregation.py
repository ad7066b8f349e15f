"""From the sum of a round to the next global model: decode, aggregate, widen or narrow the clips.

numpy only; files of float32 vectors in, files out.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.artifacts import Artifacts
from diffusion.frechet import Moments
from secagg.masking import DTYPES
from study.encoding import next_clips
from study.plan import Plan
from study.quantity import (
    EvaluationWork,
    MomentsWork,
    RoundWork,
    count_encoding,
    delta_encoding,
    evaluation_encoding,
    moments_encoding,
)
from study.strategies import State

MODEL = np.dtype("<f4")


@dataclass(frozen=True)
class Step:
    """What a round made of the model. Digests are of artifacts."""

    model: bytes
    state: bytes
    clips: tuple[float, ...]
    loss: float
    """Mean training loss over the silos, weighted by their counts."""
    saturated: int
    """Parameters that exceeded their clip, over all silos."""
    faults: int
    """Silos whose delta was not finite and counted as zero, or that voided the sum."""
    void: int
    """Silos that voided it: then the model is the input, and nothing else is known."""
    moved: float
    """‖θ_{r+1} − θ_r‖."""


def aggregate(
    artifacts: Artifacts,
    plan: Plan,
    work: RoundWork,
    silos: int,
    *,
    round: int,
    model: bytes,
    state: bytes | None,
    total: bytes,
) -> Step:
    """The next model by the plan's strategy, from the sum `total` of round `round`."""
    ring = plan.secure_sum.ring
    encoding = delta_encoding(work, silos, ring)
    decoded = encoding.decode(np.frombuffer(artifacts.read(total), dtype=DTYPES[ring]))
    before = np.frombuffer(artifacts.read(model), dtype=MODEL)
    known = (
        plan.strategy.initial_state(before.size)
        if state is None
        else read_state(artifacts.read(state))
    )
    mean = unbiased(plan, decoded.mean_delta, before.size, round, silos)
    remembered, after = plan.strategy.aggregate(known, before, mean, round)
    return Step(
        model=artifacts.put(after.astype(MODEL).tobytes()),
        state=artifacts.put(write_state(remembered)),
        clips=next_clips(decoded.mean_delta, encoding, parts=plan.strategy.parts),
        loss=decoded.loss * silos / len(plan.working(round, silos)),
        saturated=decoded.saturated,
        faults=decoded.faults,
        void=decoded.void,
        moved=float(np.linalg.norm(after.astype(np.float64) - before)),
    )


def unbiased(
    plan: Plan, mean: NDArray[np.float32], parameters: int, round: int, silos: int
) -> NDArray[np.float32]:
    """Σ_{i ∈ S} w_i δ_i · N/m for the m silos S that worked: over the draws of S its mean is that
    of all silos. A control variate's change (the part after the model's) stays as it is: c is the
    sum of all c_i, and those of silos that rested did not change (arXiv 1910.06378, algorithm 1).
    """
    working = len(plan.working(round, silos))
    if working == silos:
        return mean
    scaled = mean.copy()
    scaled[:parameters] *= np.float32(silos / working)
    return scaled


def round_input(artifacts: Artifacts, plan: Plan, model: bytes, state: bytes | None) -> bytes:
    """The artifact that the silos are sent: the model, followed by what the strategy adds."""
    if plan.strategy.parts == 1:
        return model
    vector = np.frombuffer(artifacts.read(model), dtype=MODEL)
    known = (
        plan.strategy.initial_state(vector.size)
        if state is None
        else read_state(artifacts.read(state))
    )
    return artifacts.put(plan.strategy.round_input(known, vector).astype(MODEL).tobytes())


def census_total(total: bytes, silos: int) -> int:
    """Σñ from the census' sum."""
    words = np.frombuffer(total, dtype=DTYPES[32])
    return count_encoding(silos).decode(words)["count"]


def summed_moments(
    total: bytes, work: MomentsWork, silos: int, summed: int, center: NDArray[np.float64]
) -> tuple[Moments, int, int]:
    """(moments of all real images, values that were clipped, silos whose values were faulty)."""
    found = moments_encoding(work, silos).decode(np.frombuffer(total, DTYPES[32]), summed)
    d, values = work.dimension, found.values * work.total_count
    outer = np.zeros((d, d))
    outer[np.triu_indices(d)] = values[1 + d :]
    outer = np.triu(outer) + np.triu(outer, 1).T
    real = Moments(round(float(values[0])), values[1 : 1 + d], outer, center)
    return real, found.clipped, found.faults


def mean_comparison(total: bytes, work: EvaluationWork, silos: int, summed: int) -> dict[str, Any]:
    """The means over the silos that could measure, and how many those were; `clipped` counts values
    beyond the encoding's bound. No means where no silo could, or where one voided the sum."""
    encoding = evaluation_encoding(work, silos)
    found = encoding.decode(np.frombuffer(total, DTYPES[32]), summed)
    measured = 0 if found.void else summed - found.faults
    counters = {"measured": measured, "clipped": found.clipped}
    if measured == 0:
        return counters
    kid, coverage, copies, *losses = (found.values / measured).tolist()
    return {"kid": kid, "coverage": coverage, "copies": copies, "losses": losses, **counters}


def write_state(state: State) -> bytes:
    """A strategy's state as .npz."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **{k: np.asarray(v) for k, v in state.items()})
    return content.getvalue()


def read_state(content: bytes) -> State:
    """The inverse of `write_state`: integers come back as integers."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return {k: stored[k] if stored[k].ndim else int(stored[k]) for k in stored.files}
