"""What is kept between sessions: vectors, residuals, the pool; what is never given twice."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secagg.context import SessionContext
from secagg.ledger import SessionRecord, Settled
from silo.auxiliary import Auxiliary
from silo.config import Data, SiloConfig, Site
from silo.errors import DataError, ProposalRefused
from silo.files import write_json
from silo.home import SiloHome
from silo.jobs.images import cache_images
from silo.orders import (
    CacheImages,
    Evaluated,
    EvaluateModel,
    FeatureMoments,
    LocalTrained,
    Machine,
    MomentsSummed,
    RoundTrained,
    Sampled,
    SampleLocal,
    TrainLocal,
    TrainRound,
)
from silo.proposal import Proposal
from silo.quantities import Quantities
from study.integers import Integers
from study.quantity import (
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    count_encoding,
    session_context,
)
from study.reservation import collect
from tests.silo.studies import make_plan, make_roster

PLAN = make_plan()
ROSTER, _ = make_roster(PLAN)
ROUND = RoundWork(total_count=400, sizes=(10,), clips=(1.0,))


@dataclass
class FakeWorker:
    """Answers orders at once, with files of the right kind; the real ones are in test_jobs."""

    machine: Machine = field(default_factory=lambda: Machine("cpu", 1))
    orders: list[Any] = field(default_factory=list)
    passing: float = 1.0

    async def run(self, order: Any, progress: Path, on_progress: object) -> Any:
        self.orders.append(order)
        match order:
            case CacheImages():
                return cache_images(order, lambda *_: None)  # type: ignore[arg-type]
            case TrainRound():
                np.full(12, len(self.orders), "<u2").tofile(order.vector)
                np.save(order.new_residual, np.full(10, len(self.orders), np.float32))
                return RoundTrained(0.5, 0, False, False, None)
            case FeatureMoments():
                order.vector.write_bytes(b"")
                return MomentsSummed(0)
            case EvaluateModel():
                order.vector.write_bytes(b"")
                return Evaluated(0.0, 1.0, 0.0, 1.0, False)
            case TrainLocal():
                np.save(order.weights, np.zeros(3, np.float32))
                return LocalTrained(0.5, None)
            case SampleLocal():
                numbers = np.arange(order.first, order.first + int(order.samples * self.passing))
                images = np.zeros((len(numbers), 1, 8, 8), np.uint8)
                images[:, 0, 0, 0] = numbers
                np.save(order.kept, images)
                return Sampled(order.samples, len(images), 0.1)
        raise AssertionError(order)

    def count(self, kind: type) -> int:
        return sum(isinstance(order, kind) for order in self.orders)


class Place:
    """A site with 30 images."""

    def __init__(self, tmp_path: Path) -> None:
        self.data = tmp_path / "x.npz"
        np.savez(self.data, images=np.zeros((34, 8, 8), dtype=np.uint8))
        self.home = SiloHome(tmp_path / "home")
        self.home.cache.mkdir(exist_ok=True)
        self.study = self.home.study("trial")
        self.config = SiloConfig(site=Site(name="site-1"), data=Data(path=str(self.data)))
        self.worker = FakeWorker()

    def quantities(self) -> Quantities:
        worker: Any = self.worker
        return Quantities(self.home, self.study, PLAN, self.config, worker, 1)

    async def prepare(self, context: SessionContext, work: Work) -> bytes:
        artifact = self.study.artifacts / context.model.hex()
        proposal = Proposal(context, work)
        vector = await self.quantities().prepare(proposal, ROSTER, [artifact], lambda _: None)
        return vector.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def context_of(work: Work, round: int = 1, session: int = 1, **changes: Any) -> SessionContext:
    context = session_context(ROSTER, PLAN.digest(), 16, work, session=session, round=round)
    return replace(context, **changes)


def settled(context: SessionContext, *, summed: bool, included: bool) -> SessionRecord:
    end = Settled(context.digest, bytes(32), summed, included)
    return SessionRecord(context, masked=True, settled=end)


def residual(place: Place) -> float | None:
    return float(np.load(place.study.residual)[0]) if place.study.residual.exists() else None


async def test_the_census_holds_the_coarse_count(place: Place) -> None:
    vector = await place.prepare(context_of(CensusWork()), CensusWork())
    encoding: Integers = count_encoding(4)
    assert encoding.decode(np.frombuffer(vector, "<u4")) == {"count": 34}
    assert await place.quantities().count() == 34


async def test_a_conditional_study_begins_only_where_every_image_has_a_label(
    place: Place,
) -> None:
    plan = make_plan("[model]", "[model]\nclasses = 2")
    worker: Any = place.worker

    def quantities() -> Quantities:
        return Quantities(place.home, place.study, plan, place.config, worker, 1)

    with pytest.raises(DataError, match="not every image here has a label"):
        await quantities().count()
    images = np.zeros((34, 8, 8), dtype=np.uint8)
    np.savez(place.data, images=images, labels=np.arange(34) % 3)
    with pytest.raises(DataError, match="labels here go up to 2"):
        await quantities().count()
    np.savez(place.data, images=images, labels=np.arange(34) % 2)
    later = place.data.stat().st_mtime_ns + 10**9  # some kernels' clocks of files are coarse
    os.utime(place.data, ns=(later, later))
    assert await quantities().count() == 34
    assert await quantities().count() == 34


async def test_a_session_that_is_tried_again_sums_the_very_same_vector(place: Place) -> None:
    first = await place.prepare(context_of(ROUND, session=1), ROUND)
    place.quantities().settle(settled(context_of(ROUND, session=1), summed=False, included=False))
    assert await place.prepare(context_of(ROUND, session=2), ROUND) == first
    assert place.worker.count(TrainRound) == 1
    other = context_of(ROUND, session=3, model=b"m" * 32)
    assert await place.prepare(other, ROUND) != first
    assert place.worker.count(TrainRound) == 2


async def test_what_was_computed_for_other_proposals_does_not_pile_up(place: Place) -> None:
    for round, model in ((1, b"m" * 32), (2, b"n" * 32), (3, b"n" * 32)):
        (place.study.work / f"round-{round}-{model.hex()}.checkpoint").touch()
        await place.prepare(context_of(ROUND, round, session=round, model=model), ROUND)
    await place.prepare(context_of(CensusWork(), session=4), CensusWork())
    folders = {folder.name for folder in (place.study.path / "vectors").iterdir()}
    assert folders == {"round-3", "census-1"}
    left = {path.name for path in place.study.work.glob("*.checkpoint")}
    assert left == {f"round-3-{(b'n' * 32).hex()}.checkpoint"}


async def test_the_auxiliary_images_stay_for_the_next_round_also_after_a_restart(
    place: Place,
) -> None:
    shared, model = "5" * 64, "6" * 64
    write_json(place.study.shared, {"sha256": shared, "images": 3})
    for name in (shared, model, f"{model}.partial"):
        (place.study.artifacts / name).touch()
    place.quantities().forget_artifacts([model])
    assert {file.name for file in place.study.artifacts.iterdir()} == {
        shared,
        model,
        f"{model}.partial",
    }
    await place.prepare(context_of(ROUND), ROUND)
    place.quantities().settle(settled(context_of(ROUND), summed=True, included=True))
    assert [file.name for file in place.study.artifacts.iterdir()] == [shared]


async def test_a_study_that_is_over_leaves_neither_images_of_others_nor_half_a_training(
    place: Place,
) -> None:
    (place.study.artifacts / ("5" * 64)).touch()
    (place.study.work / "local.checkpoint").touch()
    place.quantities().end()
    assert not list(place.study.artifacts.iterdir())
    assert not list(place.study.work.iterdir())


async def test_models_whose_hashes_differ_in_the_last_bit_alone_share_no_checkpoint(
    place: Place,
) -> None:
    """Two that share 64 bits are found by 2³² trials: training begun from one of them must not go
    on in a session of the other."""
    checkpoints: list[Path] = []
    for session, last in ((1, b"\x00"), (2, b"\x01")):
        context = context_of(ROUND, session=session, model=b"m" * 31 + last)
        await place.prepare(context, ROUND)
        (checkpoint,) = {o.checkpoint for o in place.worker.orders if isinstance(o, TrainRound)} - {
            *checkpoints
        }
        assert not any(earlier.exists() for earlier in checkpoints), "nor is it left behind"
        checkpoint.touch()
        checkpoints.append(checkpoint)


async def test_the_residual_is_replaced_only_by_an_outcome_that_includes_us(place: Place) -> None:
    def trained(round: int) -> SessionContext:
        return context_of(ROUND, round, session=round, model=bytes([round]) * 32)

    await place.prepare(trained(1), ROUND)
    assert residual(place) is None, "not before the outcome is known"
    place.quantities().settle(settled(trained(1), summed=True, included=True))
    assert residual(place) == 2
    place.quantities().settle(settled(trained(1), summed=True, included=True))
    assert residual(place) == 2, "settling twice changes nothing"
    await place.prepare(trained(2), ROUND)
    place.quantities().settle(settled(trained(2), summed=True, included=False))
    assert residual(place) == 2, "dropped: what it was"
    await place.prepare(trained(3), ROUND)
    place.quantities().settle(settled(trained(3), summed=False, included=False))
    assert residual(place) == 2, "aborted: what it was"
    place.quantities().settle(settled(trained(3), summed=True, included=True))
    assert residual(place) == 4


async def test_the_worker_gets_the_feature_networks_that_the_site_names(place: Place) -> None:
    file = Path("/nets/own.safetensors")
    policy = place.config.policy.model_copy(update={"feature_files": (file,)})
    place.config = place.config.model_copy(update={"policy": policy})
    ab = "ab" * 32
    moments = MomentsWork(total_count=400, network="own", sha256=ab, dimension=64, bound=4.0)
    await place.prepare(context_of(moments), moments)
    asked = place.worker.orders[-1]
    assert isinstance(asked, FeatureMoments)
    assert asked.feature_files == (file,)
    evaluation = EvaluationWork(samples=ab, images=8, network="own", sha256=ab, bins=10)
    context, made = context_of(evaluation), place.study.artifacts
    proposal = Proposal(context, evaluation)
    await place.quantities().prepare(proposal, ROSTER, [made / "m", made / "s"], lambda _: None)
    asked = place.worker.orders[-1]
    assert isinstance(asked, EvaluateModel)
    assert asked.feature_files == (file,)


async def test_the_data_are_those_that_the_study_began_with(place: Place) -> None:
    await place.prepare(context_of(CensusWork()), CensusWork())
    np.savez(place.data, images=np.zeros((90, 8, 8), dtype=np.uint8))
    assert await place.quantities().count() == 34
    for file in sorted(place.home.cache.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    with pytest.raises(DataError, match="not those that this study began with"):
        await place.quantities().count()


# --- the auxiliary set


TAGS = TagsWork(total_count=100, images=24, slots=192)


def auxiliary(place: Place) -> Auxiliary:
    async def run(order: Any) -> Any:
        return await place.worker.run(order, Path(), None)

    return Auxiliary(place.study, PLAN, place.worker.machine, 1, run)


async def offer(place: Place, attempt: int, count: int = 50) -> np.ndarray:
    """Tags and images of one silo alone: the union is what it offers."""
    images = place.study.path / "images.npy"
    total = np.frombuffer(await auxiliary(place).tags(attempt, TAGS, count, images), "<u4")
    (place.study.path / "sum").write_bytes(total.tobytes())
    occupied = int(np.count_nonzero(total))
    work = ImagesWork(tags="0" * 64, occupied=occupied, record_size=65)
    vector = auxiliary(place).images(attempt, work, place.study.path / "sum")
    return collect(np.frombuffer(vector, np.uint8), (1, 8, 8))[:, 0, 0, 0]


async def test_a_total_below_our_own_count_does_not_have_us_draw_images_for_ever(
    place: Place,
) -> None:
    """34 images here, 2 at all sites: the share of 24 wanted images would be 408."""
    false = TAGS.model_copy(update={"total_count": 2})
    with pytest.raises(DataError, match="more images than all sites"):
        await place.prepare(context_of(false), false)
    assert place.worker.count(SampleLocal) == 0


async def test_a_silo_offers_its_share_and_no_sample_twice(place: Place) -> None:
    first = await offer(place, 1)
    second = await offer(place, 2)
    assert 4 <= len(first) <= 12, "half of 24, less those it collided with itself"
    assert len(set(first) | set(second)) == len(first) + len(second)
    assert place.worker.count(TrainLocal) == 1
    with np.load(place.study.pool / "reservation-1.npz") as reserved:
        assert len(reserved["slots"]) == 12


async def test_samples_count_as_offered_once_slots_are_drawn(place: Place) -> None:
    images = place.study.path / "images.npy"
    await auxiliary(place).tags(1, TAGS, 50, images)
    await auxiliary(place).tags(1, TAGS, 50, images)
    with np.load(place.study.pool / "reservation-1.npz") as reserved:
        assert int(reserved["first"]) == 12


async def test_a_model_that_copies_offers_fewer_samples_and_ends(place: Place) -> None:
    place.worker.passing = 0.05
    images = place.study.path / "images.npy"
    await auxiliary(place).tags(1, TAGS, 50, images)
    with np.load(place.study.pool / "reservation-1.npz") as reserved:
        assert len(reserved["slots"]) < 12
    place.worker.passing = 0.0
    await auxiliary(place).tags(2, TAGS, 50, images)
    assert place.worker.count(SampleLocal) < 20


async def test_a_sum_of_tags_that_is_not_as_announced_is_refused(place: Place) -> None:
    total = await auxiliary(place).tags(1, TAGS, 50, place.study.path / "images.npy")
    path = place.study.path / "sum"
    path.write_bytes(total)
    wrong = ImagesWork(tags="0" * 64, occupied=3, record_size=65)
    with pytest.raises(ProposalRefused, match="3 slots are said to be occupied"):
        auxiliary(place).images(1, wrong, path)
    occupied = int(np.count_nonzero(np.frombuffer(total, "<u4")))
    right = wrong.model_copy(update={"occupied": occupied})
    with pytest.raises(ProposalRefused, match="reserved no slots"):
        auxiliary(place).images(2, right, path)
