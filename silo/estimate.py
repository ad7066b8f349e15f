"""What a plan would cost this site: bytes on the wire, hours of computing, room on the disk.

Bytes follow from the encodings; hours from training steps that were measured on this machine. With
P parameters (times the strategy's parts), ring b and N silos a round costs

    up      P·b/8 + 2,593·N + 780                          the masked vector, and messages
    down    4·P   + 154·N² + 4,142·N − 1,161               the input model, and messages

The sizes of messages are those of a session in which nobody is missing (keys, shares and headers
to and from every other silo), counted in tests/silo/test_estimate.py. What goes on between sessions
was counted at a proxy, TLS included: a report of progress (every 2 s of computing), a look whether
the session still wants this site (every 5 s; the answer repeats what is asked, 28 bytes a tensor),
and a long poll of 20 s for offers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from silo.config import Resources
from silo.hours import Hours
from silo.model_size import parameter_count
from silo.orders import Measured
from silo.policy import training_steps
from study.plan import Plan
from study.quantity import (
    CensusWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    count_encoding,
    delta_encoding,
    moments_bound,
    moments_encoding,
)

_TRANSPORT = 1.01  # TLS records, HTTP/2 frames, chunks
_FORWARD = 1 / 3  # of a training step: forward, and backward at twice its cost
_FEATURES = 64
_ANY_COUNT = 10**6


@dataclass(frozen=True)
class Traffic:
    """Bytes from and to this site."""

    up: float
    down: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.up * times, self.down * times)


_REPORT, _REPORTS_PER_HOUR = Traffic(111, 110), 1800
_LOOK, _LOOKS_PER_HOUR = Traffic(80, 600), 720
_POLL, _POLLS_PER_HOUR = Traffic(180, 225), 180
_PER_TENSOR = 28


@dataclass(frozen=True)
class Estimate:
    """A whole study at this site, if nothing has to be repeated."""

    traffic: Traffic
    hours: float
    """Of computing."""
    days: float
    """Of the calendar, within the site's working hours."""
    disk: float
    """Bytes in the agent's folder, without the cache of the images."""


def estimate(plan: Plan, silos: int, measured: Measured, resources: Resources) -> Estimate:
    """The cost of `plan` among `silos`, given what was measured on this machine."""
    hours = computing_seconds(plan, silos, measured.seconds_per_step) / 3600
    traffic = transfers(plan, silos) + between_sessions(measured.tensors) * hours
    parameters = parameter_count(plan.model) * plan.strategy.parts
    # Input model, vector, masked vector, residuals old and new, checkpoint of four vectors.
    disk = parameters * (4 + 2 * plan.secure_sum.ring / 8 + 2 * 4 + 4 * 4) + _shared_bytes(plan)
    return Estimate(traffic, hours, hours / _open_hours(resources), disk)


def between_sessions(tensors: int) -> Traffic:
    """An hour of computing. Sessions are short beside it, and waiting costs less."""
    looks = (_LOOK + Traffic(0, _PER_TENSOR * tensors)) * _LOOKS_PER_HOUR
    return _REPORT * _REPORTS_PER_HOUR + looks + _POLL * _POLLS_PER_HOUR


def transfers(plan: Plan, silos: int) -> Traffic:
    """Vectors, models and messages."""
    sizes = (parameter_count(plan.model),) * plan.strategy.parts
    clips = (plan.first_clip,) * len(sizes)
    round_ = RoundWork(total_count=_ANY_COUNT, sizes=sizes, clips=clips)
    total = session(CensusWork(), plan, silos)
    total += session(round_, plan, silos) * plan.rounds.count
    total += Traffic(0, 4 * sizes[0])  # the final model
    if plan.evaluation is not None:
        bound = moments_bound(plan.evaluation.feature_bound)
        total += session(
            MomentsWork(
                total_count=_ANY_COUNT,
                network=plan.evaluation.feature_network,
                sha256=plan.evaluation.sha256,
                dimension=_FEATURES,
                bound=bound,
            ),
            plan,
            silos,
        )
    if plan.evaluation is not None and plan.evaluation.at_silos:
        rounds = sum(plan.evaluates(round) for round in range(1, plan.rounds.count + 1))
        channels, height, width = plan.data.shape
        samples = plan.evaluation.samples * channels * height * width
        total += (messages(silos) + Traffic(0, 4 * sizes[0] + samples)) * rounds
    if plan.auxiliary is not None:
        slots = plan.auxiliary.images * plan.auxiliary.slots_per_image
        tags = TagsWork(total_count=_ANY_COUNT, images=plan.auxiliary.images, slots=slots)
        occupied = slots * (1 - np.exp(-plan.auxiliary.images / slots))
        records = Traffic(occupied * plan.record_size, 4 * slots)
        total += session(tags, plan, silos) + messages(silos) + records
    return (total + Traffic(0, _shared_bytes(plan))) * _TRANSPORT


def _shared_bytes(plan: Plan) -> int:
    """The auxiliary images, where silos train on them too: sent once, kept for the whole study."""
    if plan.auxiliary is None or not plan.strategy.local_rules().auxiliary_share:
        return 0
    return plan.auxiliary.images * (plan.record_size - 1)


def session(work: Work, plan: Plan, silos: int) -> Traffic:
    """One secure sum in which nobody is missing."""
    match work:
        case CensusWork():
            vector = Traffic(4 * count_encoding(silos).length, 0)
        case MomentsWork():
            vector = Traffic(4 * moments_encoding(work, silos).length, 0)
        case TagsWork():
            vector = Traffic(4 * work.slots, 0)
        case RoundWork():
            ring = plan.secure_sum.ring
            length = delta_encoding(work, silos, ring).length
            vector = Traffic(length * ring / 8, 4 * sum(work.sizes))
        case _:
            raise TypeError(f"the size of {work.purpose} follows from the tags")
    return vector + messages(silos)


def messages(silos: int) -> Traffic:
    """Keys, shares, headers, confirmations and the certificate of one session."""
    return Traffic(2593 * silos + 780, 154 * silos**2 + 4142 * silos - 1161)


def computing_seconds(plan: Plan, silos: int, seconds_per_step: float) -> float:
    """Training, and the samples of this site's even share of the auxiliary set."""
    rests = (1 - plan.rounds.participation) * plan.rounds.count * plan.rounds.local_steps
    seconds = (training_steps(plan) - rests) * seconds_per_step
    if plan.auxiliary is not None:
        images = plan.auxiliary.images / silos * 1.125
        forward = seconds_per_step * _FORWARD / plan.optimizer.batch_size
        seconds += images * plan.sampler.steps * forward
    return seconds


def _open_hours(resources: Resources) -> float:
    """Hours a day in which the worker may compute."""
    if resources.hours is None:
        return 24.0
    hours = Hours.parse(resources.hours)
    minutes = [t.hour * 60 + t.minute for t in (hours.begin, hours.end)]
    return ((minutes[1] - minutes[0]) % 1440 or 1440) / 60
