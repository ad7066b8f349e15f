"""What simulated silos hold and compute: images, a round, their part of the anonymous union."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from concilium.datasets import DataMissing, ImageSet
from concilium.simulate.memo import Arrays, Memo, digest_array
from concilium.simulate.spec import Point
from concilium.simulate.summing import SecureSum
from diffusion.audit import audit
from diffusion.batches import Shared
from diffusion.execution import Execution, choose_execution
from diffusion.labels import Labels, drawn_labels
from diffusion.model import build_model
from silo.auxiliary import derived_seed
from silo.jobs.local import draw, label_weights
from silo.jobs.round import train_from
from silo.jobs.warm_up import warm_up
from study.integers import coarse_count
from study.plan import Plan
from study.quantity import ImagesWork, TagsWork
from study.reservation import (
    Reservation,
    collect,
    images_vector,
    renumber,
    reserve,
    share,
    split_labels,
    with_labels,
)

T = TypeVar("T")
R = TypeVar("R")
Words = TypeVar("Words", NDArray[np.uint8], NDArray[np.uint32])
Vector = NDArray[np.float32]
Images = NDArray[np.uint8]

_MOST_DRAWS_PER_IMAGE = 4


class Pool(Protocol):
    """Where independent pieces of work are computed."""

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """The results, in the order of the tasks."""


class Here:
    """One after the other, in this process."""

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """The results, in the order of the tasks."""
        return [function(task) for task in tasks]


@dataclass(frozen=True)
class Federation:
    """Silos 1 … N: their images, and the counts that they would tell."""

    images: tuple[Images, ...]
    labels: tuple[Labels, ...]
    """Empty where not every image has one."""
    secrets: tuple[bytes, ...]
    """What each silo draws from the system's entropy, here a function of the simulation's seed."""
    unseen: ImageSet | None = None
    """Images of the same distribution that no silo has, in random order."""

    @property
    def size(self) -> int:
        """N."""
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the roster."""
        return tuple(f"silo-{index:03}" for index in range(1, self.size + 1))

    @property
    def counts(self) -> tuple[int, ...]:
        """ñ_i."""
        return tuple(coarse_count(len(images)) for images in self.images)

    @property
    def total(self) -> int:
        """Σñ."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """w_i = ñ_i / Σñ."""
        return tuple(count / self.total for count in self.counts)

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Images per silo and class, [N, classes]; one column where there are no labels."""
        kinds = self.labels or tuple(np.zeros(len(own), np.int64) for own in self.images)
        classes = 1 + max(int(own.max()) for own in kinds)
        return np.stack([np.bincount(own, minlength=classes) for own in kinds])

    def labels_for(self, plan: Plan) -> tuple[Labels | None, ...]:
        """What each silo trains with: its labels, where the plan's model is conditional."""
        return (None,) * self.size if plan.model.classes is None else self.labels

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images, who has them, and the secrets."""
        return digest_array(*self.images, *(np.frombuffer(s, np.uint8) for s in self.secrets))


def check_labels(point: Point, data: ImageSet) -> None:
    """Raises DataMissing where a setting of the point needs labels that the data set has not."""
    if point.needs_labels is None:
        return
    setting, otherwise = point.needs_labels
    # A classifier is tested on the test images; to spread images over silos these need no labels.
    tested = point.plan.model.classes is not None and data.test is not None
    for what, part in (("images", data), ("test images", data.test if tested else None)):
        if part is not None and part.labels is None:
            raise DataMissing(
                f'run "{point.name}": {setting} needs labels, and {part.unlabelled} of '
                f'{len(part.images)} {what} of data = "{point.simulation.data}" have none: '
                f"{otherwise}, or give a source with one label for each image, such as a folder "
                "with a subfolder per class"
            )


def federate(point: Point, data: ImageSet) -> Federation:
    """The data set split over the point's silos. Raises ValueError where it cannot be, and
    DataMissing as `check_labels` does."""
    check_labels(point, data)
    simulation, seed = point.simulation, point.seed
    images, labels = data.images, data.labels
    # A publisher's order may be one of patients, and the first are those that are measured.
    unseen = None if data.test is None else _shuffled(data.test, seed)
    if simulation.images is not None and simulation.images < len(images):
        order = np.random.default_rng(seed).permutation(len(images))
        chosen, rest = np.sort(order[: simulation.images]), order[simulation.images :]
        unseen = ImageSet(images[rest], None if labels is None else labels[rest])
        images, labels = images[chosen], None if labels is None else labels[chosen]
    n, partition = simulation.silos, simulation.partition
    kinds = np.zeros(len(images), np.int64) if labels is None else labels
    parts = partition.split(kinds, n, seed)
    if partition.alters or sum(map(len, parts)) < len(images):
        unseen = None  # they would be of another distribution than what the silos have
    return Federation(
        tuple(partition.altered(images[part], k, n, seed) for k, part in enumerate(parts)),
        () if labels is None else tuple(labels[part] for part in parts),
        tuple(secret_of(seed, index) for index in range(1, n + 1)),
        unseen,
    )


def _shuffled(data: ImageSet, seed: int) -> ImageSet:
    order = np.random.default_rng(seed).permutation(len(data.images))
    return ImageSet(data.images[order], None if data.labels is None else data.labels[order])


def execution_of(precision: Literal["auto", "float32"]) -> Execution:
    """As a silo chooses it, or that in float32."""
    chosen = choose_execution()
    if precision == "auto" or chosen.device.type != "cpu":
        return chosen if precision == "auto" else replace(chosen, dtype=torch.float32)
    return Execution(chosen.device, torch.float32, torch.contiguous_format)


def secret_of(seed: int, index: int) -> bytes:
    """The secret of a simulated silo."""
    return hashlib.sha256(f"concilium/simulate/1 {seed} {index}".encode()).digest()


# --- a round


@dataclass(frozen=True)
class RoundTask:
    """The local steps of one silo in one round."""

    point: Point
    round: int
    secret: bytes
    given: Vector
    images: Images
    labels: Labels | None
    """Where the model is conditional."""
    own_control: Vector | None
    shared: Shared | None
    """Auxiliary images, where the strategy has silos train on them."""


def train_round(task: RoundTask) -> Arrays:
    """{change, loss} and, with a control variate, {control}; see `silo.jobs.round.train_from`."""
    plan = task.point.plan
    done = train_from(
        build_model(plan.model),
        plan,
        task.given,
        task.images,
        labels=task.labels,
        shared=task.shared,
        round=task.round,
        seed=derived_seed(task.secret, f"round {task.round}"),
        execution=execution_of(task.point.simulation.precision),
        own_control=task.own_control,
    )
    result: Arrays = {"change": done.change, "loss": np.array(done.loss)}
    if done.control is not None:
        result["control"] = done.control
    return result


# --- the auxiliary set


@dataclass(frozen=True)
class UnionTask:
    """The anonymous union of a study."""

    point: Point
    federation: Federation
    common: dict[str, Any]
    """What every result depends on."""


@dataclass(frozen=True)
class _SiloTask:
    point: Point
    secret: bytes
    images: Images
    labels: Labels | None
    wanted: int
    weights: Vector | None = None


def union(task: UnionTask, memo: Memo, pool: Pool, secure: SecureSum | None) -> Arrays:
    """{images}: those of all silos, in the order of their random slots, uint8 (n, c, h, w), with
    {labels} where the model is conditional; and {tag_bytes, image_bytes}: how long the vector of
    each of the two sums was."""
    plan, federation = task.point.plan, task.federation
    if plan.auxiliary is None or plan.warm_up is None:
        raise ValueError("the plan has no [auxiliary] and [warm_up]")
    images = plan.auxiliary.images
    local = {
        **task.common,
        "what": "local models",
        "optimizer": plan.optimizer.model_dump(mode="json"),
        "warm_up": plan.warm_up.model_dump(mode="json"),
    }
    inputs = {
        **local,
        "what": "union",
        "sampler": plan.sampler.model_dump(mode="json"),
        "auxiliary": plan.auxiliary.model_dump(mode="json"),
        "secure": secure is not None,
    }
    if not task.point.simulation.audit:
        inputs["audit"] = False

    def compute() -> Arrays:
        wanted = [share(images, n, federation.total) for n in federation.counts]
        labels = federation.labels_for(plan)
        silos = zip(federation.secrets, federation.images, labels, wanted, strict=True)
        tasks = [_SiloTask(task.point, *silo) for silo in silos]
        models = memo.get(local, lambda: {"weights": np.stack(pool.map(_warm_up, tasks))})
        tasks = [replace(t, weights=w) for t, w in zip(tasks, models["weights"], strict=True)]
        drawn = pool.map(_draw, tasks)
        counts = {
            "drawn": np.array(sum(own.drawn for own in drawn)),
            "dropped": np.array(sum(own.dropped for own in drawn)),
        }
        return {**unite([own.kept for own in drawn], task, secure), **counts}

    return memo.get(inputs, compute)


def _warm_up(task: _SiloTask) -> Vector:
    execution = execution_of(task.point.simulation.precision)
    seed = derived_seed(task.secret, "local model")
    return warm_up(
        task.point.plan, task.images, labels=task.labels, seed=seed, execution=execution
    ).weights


@dataclass(frozen=True)
class _Drawn:
    kept: Images
    drawn: int
    dropped: int
    """By the audit."""


def _draw(task: _SiloTask) -> _Drawn:
    """As many audited samples as wanted, or as the audit lets through; of a conditional model
    each after its label, and labels as often as this silo has them."""
    plan, execution = task.point.plan, execution_of(task.point.simulation.precision)
    if plan.auxiliary is None or task.weights is None:
        raise ValueError("the plan has no [auxiliary]")
    seed = derived_seed(task.secret, "local model")
    kept: list[Images] = [np.empty((0, *_drawn_shape(plan)), np.uint8)]
    drawn = found = 0
    while found < task.wanted and drawn < _MOST_DRAWS_PER_IMAGE * task.wanted + 16:
        missing = task.wanted - found
        n = missing + missing // 8 + 8
        labels = None
        if task.labels is not None:
            labels = drawn_labels(label_weights(task.labels), n, seed=seed, first_index=drawn)
        samples = draw(plan, task.weights, n, drawn, seed, execution, labels)
        if task.point.simulation.audit:
            keep, _ = audit(samples, task.images, quantile=plan.auxiliary.audit_quantile)
        else:
            keep = np.ones(len(samples), bool)
        kept.append(samples[keep] if labels is None else with_labels(samples[keep], labels[keep]))
        drawn, found = drawn + n, found + int(keep.sum())
    return _Drawn(np.concatenate(kept)[: task.wanted], drawn, drawn - found)


def _drawn_shape(plan: Plan) -> tuple[int, ...]:
    """Of an image, or of a conditional model's image after its label."""
    return plan.data.shape if plan.model.classes is None else (plan.record_size - 1,)


def unite(samples: Sequence[Images], task: UnionTask, secure: SecureSum | None) -> Arrays:
    """The union by two sums, over each silo's samples."""
    plan, secrets = task.point.plan, task.federation.secrets
    if plan.auxiliary is None:
        raise ValueError("the plan has no [auxiliary]")
    slots = plan.auxiliary.images * plan.auxiliary.slots_per_image
    drawn: dict[int, Reservation] = {}
    for index, images in enumerate(samples, 1):
        seed = derived_seed(secrets[index - 1], "slots")
        drawn[index] = reserve(len(images), slots, np.random.default_rng(seed).bytes)
    tags = {index: own.vector() for index, own in drawn.items()}
    if secure is None:
        total = _plain_sum(list(tags.values()))
    else:
        work = TagsWork(total_count=1, images=plan.auxiliary.images, slots=slots)
        total = secure.sum(work, 1, tags)
    if not total.any():
        raise ValueError(
            "no silo offered a synthetic image: the audit dropped all of them, or auxiliary.images "
            f"({plan.auxiliary.images}) is too small for the silos' shares: raise it"
        )
    sent = {"tag_bytes": np.array(total.nbytes)}
    records = {i: images_vector(samples[i - 1], own, total) for i, own in drawn.items()}
    if secure is None:
        summed = _plain_sum(list(records.values()))
        sent["image_bytes"] = np.array(summed.nbytes)
        return {**_collected(summed, plan), **sent}
    name = hashlib.sha256(total.tobytes()).digest()
    occupied, size = len(renumber(total)), plan.record_size
    images_work = ImagesWork(tags=name.hex(), occupied=occupied, record_size=size)
    survivors = tuple(sorted(records))
    summed = secure.sum(images_work, 1, records, reservation=name, survivors=survivors)
    sent["image_bytes"] = np.array(summed.nbytes)
    return {**_collected(summed, plan), **sent}


def _collected(total: NDArray[np.uint8], plan: Plan) -> Arrays:
    if plan.model.classes is None:
        return {"images": collect(total, plan.data.shape)}
    images, labels = split_labels(collect(total, (plan.record_size - 1,)), plan.data.shape)
    return {"images": images, "labels": labels}


def _plain_sum(vectors: Sequence[Words]) -> Words:
    """Σ in the ring of the words."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total
