"""The sections of a study plan, one model each; `study/plan.py` puts them together.

[model], [schedule], [objective], [optimizer] and [sampler] are those of `diffusion.spec`, and
[strategy] is one of `study.strategies`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from diffusion.features.pinned import NETWORK_NAME
from diffusion.spec import Spec
from study.problems import PlanError

Seconds = Annotated[float, Field(gt=0.0, le=30 * 86_400)]


def printable(text: str) -> str:
    """One line of what a screen shows as it is. What else there is moves the cursor, turns the
    direction of writing or hides, on the very screens where people compare fingerprints."""
    if not text.isprintable():
        hidden = next(c for c in text if not c.isprintable())
        raise ValueError(
            f"{text!r} holds {hidden!r}, which no screen shows as it is: use letters, digits, "
            "punctuation and plain spaces only"
        )
    return text


Line = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(printable)]


class Study(Spec):
    """[study]: who this is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Short name: lower-case letters, digits and hyphens."""

    title: Line
    """One line for people."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """The first model is derived from it at every site."""


class Quorum(NamedTuple):
    """Threshold t and tolerated colluding silos c of a study with a given roster."""

    threshold: int
    colluders: int


class SecureSum(Spec):
    """[secure_sum]: what the secure sum tolerates, and the width of its words."""

    threshold: Annotated[int, Field(ge=2, le=255)] | None = None
    """t: silos that must stay for a sum to be revealed; absent = floor(2N/3) + 1."""

    colluders: Annotated[int, Field(ge=0, le=255)] | None = None
    """c: silos that may be in league with the coordinator; absent = as many as possible."""

    ring: Literal[8, 16, 32] = 16
    """Bits per parameter on the wire."""

    def quorum(self, silos: int) -> Quorum:
        """t and c for a roster of N silos; raises PlanError unless 2t > N + c and t − c ≥ 2.

        2t > N + c: any two sets of t silos share one that is honest, and it unmasks only once.
        t − c ≥ 2: what c colluders subtract from a sum leaves at least two silos in it.
        """
        N, where = silos, f"[secure_sum] with a roster of {silos}"
        if N < 3:
            raise PlanError(where, "of two silos each can compute the other's part: invite more")
        t = 2 * N // 3 + 1 if self.threshold is None else self.threshold
        if t > N:
            raise PlanError(where, f"threshold = {t} exceeds the {N} silos: use at most {N}")
        most = min(2 * t - N - 1, t - 2)
        if most < 0:
            fix = f"use at least {N // 2 + 1}, or leave it out"
            raise PlanError(where, f"threshold = {t} is no majority (2t > N + c): {fix}")
        c = most if self.colluders is None else self.colluders
        if c > most:
            fix = f"use at most {most}" + (", or a higher threshold" if t < N else "")
            rule = f"too many for threshold = {t} (2t > N + c and t − c ≥ 2)"
            raise PlanError(where, f"colluders = {c} is {rule}: {fix}")
        return Quorum(t, c)


class Deadlines(Spec):
    """[deadlines]: seconds after which the coordinator closes an offer, or a step of a session."""

    offer: Seconds = 14 * 86_400.0
    """For the sites' answers: then the study goes without those that gave none."""

    advertise: Seconds = 900.0
    """From the task to the adverts: local training, sampling and encoding happen here."""

    share: Seconds = 60.0
    """Key shares."""

    input: Seconds = 300.0
    """The upload of the masked vector."""

    confirm: Seconds = 60.0
    """Confirmations of who is in the sum."""

    unmask: Seconds = 60.0
    """What unmasking needs."""


class Data(Spec):
    """[data]: the images every site brings, as uint8."""

    image_size: Annotated[int, Field(ge=4, le=1024)]
    """Height and width in pixels; sites resize to it."""

    channels: Annotated[int, Field(ge=1, le=16)] = 1
    """1 = greyscale, 3 = RGB."""

    class_names: tuple[Line, ...] | None = None
    """Names of the classes of a conditional model, in the order of their labels; needed where sites
    name classes (folders, CIFAR), since each numbers only those that it has."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.image_size, self.image_size


class WarmUp(Spec):
    """[warm_up]: the local DDPM that each silo samples its auxiliary images from."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Training steps from the study's first model, on the silo's own images: the most that are
    taken, and the time that is taken whatever the criterion below finds."""

    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """w: the model has converged when the loss of the silo's own held-out images was not improved
    in so many checks. Absent = `steps` is no cap but a fixed count, which no criterion ends: 2 is
    what the shipped plans say. That is no default, since a plan that sites have agreed to without
    it would come to mean something else."""

    improvement: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """x: by how much, relative to the best loss so far, a check has to be better to count."""

    check_every: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Steps between two checks."""

    held_out: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of the silo's images that is watched instead of trained on, where there is patience."""


class Auxiliary(Spec):
    """[auxiliary]: the anonymous union of locally sampled images."""

    images: Annotated[int, Field(ge=10, le=1_000_000)]
    """M: images wanted in all; each silo makes its share by the coarse counts."""

    slots_per_image: Annotated[int, Field(ge=2, le=64)] = 8
    """Places drawn from, per image wanted: at 8, one image in eight is lost to a collision."""

    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Reservations before the union goes on without the silos that keep vanishing."""

    audit_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """A sample nearer to a training image than this quantile of the nearest-neighbour distances
    within the site's own images is dropped."""

    def most(self, silos: int) -> int:
        """How many images `silos` of them can offer at most, if each keeps to its share: the shares
        add up to M but for their rounding (`study.reservation.share`)."""
        return self.images + silos


class Rounds(Spec):
    """[rounds]: the federated rounds."""

    count: Annotated[int, Field(ge=1, le=99_999)]
    """Number of model rounds."""

    local_steps: Annotated[int, Field(ge=1, le=1_000_000)]
    """Training steps per silo and round: the same everywhere, so that time tells nothing."""

    final_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Local learning rate of the last round as a share of the first round's; a geometric sequence
    between them. Late rounds with small steps drift apart less."""

    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the silos that work in a round, the same number in each; who rests sends zeros.
    Drawn from study.seed, so that everyone knows who and nobody can choose."""

    first_clip: Annotated[float, Field(ge=1e-6, le=100.0)] | None = None
    """Largest change of a parameter in the first round (later clips follow the aggregates);
    absent = learning_rate · local_steps."""


class Evaluation(Spec):
    """[evaluation]: FID by securely summed features, and what only silos can measure."""

    feature_network: Annotated[str, Field(pattern=NETWORK_NAME)]
    """One that ships with the project, or what a file is called without its .safetensors."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of its file: 64 lower-case hexadecimal digits."""

    feature_bound: Annotated[float, Field(gt=0.0, le=1e6)] = 2.0
    """Largest magnitude of a feature; what exceeds it is clipped and counted."""

    samples: Annotated[int, Field(ge=2, le=1_000_000)]
    """Images sampled from the global model; FID depends on it."""

    every: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Evaluate after every so many rounds, and after the last."""

    at_silos: bool = False
    """Whether each silo compares the samples, and the model, with its own images, and the mean of
    KID, coverage, near-copies and loss by timestep is summed. A site's policy has to allow it."""
