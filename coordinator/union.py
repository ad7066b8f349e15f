"""The auxiliary set: synthetic images of all silos in one anonymous union, by two secure sums.

The second sum must be over the very silos of the first, or both are void: then fresh samples are
reserved anew. The last attempt goes without the silos that vanished in an earlier one.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator import records, results
from coordinator.sessions import SessionEnd, Tools
from coordinator.studies import LiveStudy
from coordinator.summing import Asked, StudyFailed, Summing
from secagg.masking import DTYPES
from study.plan import Plan
from study.quantity import ImagesWork, TagsWork
from study.reservation import as_records, collect, renumber, split_labels

Json = dict[str, Any]
Once = Callable[[str, Callable[[], Awaitable[Json]]], Awaitable[Json]]


async def collect_union(
    tools: Tools,
    summing: Summing,
    live: LiveStudy,
    members: Sequence[int],
    count: int,
    once: Once,
) -> Json:
    """{training, held_out}: artifacts (.npy, uint8 [n, c, h, w]), and how many images each has; in
    a conditional study also {training_labels, held_out_labels} (.npy, int64 [n]). Where silos train
    on them too, {shared}: the training images as `study.quantity.AuxiliaryImages` has them.

    Raises StudyFailed where the attempts that the plan allows are used up.
    """
    plan = live.plan.auxiliary
    assert plan is not None  # noqa: S101 - a plan that corrects has [auxiliary]
    slots = plan.images * plan.slots_per_image
    vanished: set[int] = set()
    for attempt in range(1, plan.max_attempts + 1):
        asked = set(members)
        if attempt == plan.max_attempts and len(asked - vanished) >= live.roster.threshold:
            asked -= vanished
        most = plan.most(live.roster.size)
        tags_work = TagsWork(total_count=count, images=plan.images, slots=slots)
        tags = await once(
            f"tags {attempt}",
            partial(_sum_tags, tools, summing, live, most, Asked(tags_work, attempt, asked)),
        )
        images = await once(
            f"images {attempt}",
            partial(_sum_images, summing, live, attempt, tags),
        )
        if images["session"]["kind"] == "summed":
            parts = await asyncio.to_thread(_split, tools, live, images)
            if "shared" in parts:
                await _publish(tools, live, bytes.fromhex(parts["shared"]), "auxiliary")
            return parts
        if images["epoch"] == live.roster.epoch:  # indices mean nothing in another one
            vanished |= set(images["session"]["missing"])
        await tools.store.do(records.set_error, live.id, images["session"]["why"])
    raise StudyFailed(
        f"the auxiliary set could not be united in {plan.max_attempts} attempts; silos that were "
        f"missing: {live.roster.names(sorted(vanished))}. Start the study anew without them, or "
        "with longer deadlines"
    )


async def _sum_tags(
    tools: Tools, summing: Summing, live: LiveStudy, most: int, asked: Asked
) -> Json:
    end = await summing.sum(asked)
    sha256 = bytes.fromhex(end.sum)
    total = np.frombuffer(tools.artifacts.read(sha256), dtype=DTYPES[32])
    occupied = len(renumber(total))
    if occupied == 0:
        raise StudyFailed(
            "no silo offered a synthetic image: the audit dropped all of them, or auxiliary.images "
            "is too small for the sites' shares; see the sites' logs"
        )
    if occupied > most:
        raise StudyFailed(
            f"the silos marked {occupied} slots for synthetic images, together they may mark "
            f"{most}: a silo offers more than its share, and would be most of the auxiliary set. "
            "The sum does not tell which: ask the sites for their logs and the version they run"
        )
    await _publish(tools, live, sha256, "tags")
    return {"occupied": occupied, "epoch": live.roster.epoch, "session": asdict(end)}


async def _publish(tools: Tools, live: LiveStudy, sha256: bytes, role: str) -> None:
    """Let the silos of the study have an artifact."""
    size = tools.artifacts.path(sha256).stat().st_size
    await tools.store.do(results.record_artifact, live.id, sha256, role, size, published=True)


async def _sum_images(summing: Summing, live: LiveStudy, attempt: int, tags: Json) -> Json:
    epoch = live.roster.epoch
    if tags["epoch"] != epoch:
        why = f"the tags are of roster {tags['epoch']}, the study is under {epoch}: drawn anew"
        return {"epoch": epoch, "session": asdict(SessionEnd("abandoned", 0, why))}
    total = tags["session"]["sum"]
    survivors = tuple(tags["session"]["survivors"])
    work = ImagesWork(
        tags=total,
        occupied=tags["occupied"],
        record_size=live.plan.record_size,
    )
    sha256 = bytes.fromhex(total)
    end: SessionEnd = await summing.sum(
        Asked(
            work,
            attempt,
            survivors,
            reservation=sha256,
            survivors=survivors,
            artifacts=[sha256],
            once=True,
        )
    )
    return {"epoch": epoch, "session": asdict(end)}


def _split(tools: Tools, live: LiveStudy, images: Json) -> Json:
    """The union, cut into images to correct on and images that only the trigger sees.

    The order of the union is that of random slots, so any cut is a random one.
    """
    correction = live.plan.strategy.correction
    assert correction is not None  # noqa: S101 - the runner asks only then
    total = np.frombuffer(
        tools.artifacts.read(bytes.fromhex(images["session"]["sum"])), dtype=np.uint8
    )
    union, labels = _images_and_labels(live.plan, total)
    held = correction.held_back(len(union))
    if len(union) <= held:
        raise StudyFailed(
            f"the union holds {len(union)} images, too few to hold {held} out: raise "
            "auxiliary.images in the plan"
        )
    parts = {"training": slice(held, None), "held_out": slice(held)}
    named: dict[str, NDArray[Any]] = {name: union[part] for name, part in parts.items()}
    shared = {}
    if live.plan.strategy.local_rules().auxiliary_share:
        records = as_records(union[held:], None if labels is None else labels[held:])
        shared["shared"] = tools.artifacts.put(records.data.cast("B")).hex()
    histogram = {}
    if labels is not None:
        named |= {f"{name}_labels": labels[part] for name, part in parts.items()}
        histogram = {"labels": np.bincount(labels, minlength=live.plan.model.classes or 0).tolist()}
    return {
        **{name: tools.artifacts.put(_npy(array)).hex() for name, array in named.items()},
        **shared,
        **histogram,
        "images": len(union),
        "held_out_images": held,
    }


def _images_and_labels(
    plan: Plan, total: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    if plan.model.classes is None:
        return collect(total, plan.data.shape), None
    images, labels = split_labels(collect(total, (plan.record_size - 1,)), plan.data.shape)
    # A silo can send anything: a label that is none would end the correction.
    known = labels < plan.model.classes
    return images[known], labels[known]


def _npy(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array))
    return content.getvalue()
