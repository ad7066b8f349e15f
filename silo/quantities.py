"""The vector of each quantity: what this site contributes to a census, a round, a union, a mean.

A vector is stored under its quantity until the session's outcome is known, so that a session that
is tried again (same work, same input model) sums the very same vector: nothing is trained or drawn
twice, and no second look at the data is given away.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from secagg.context import SessionContext
from secagg.ledger import SessionRecord
from secagg.roster import Roster
from silo.auxiliary import Auxiliary, derived_seed
from silo.config import SiloConfig, data_path
from silo.data.cache import Cached, labels_of_study, open_cache
from silo.errors import DataError
from silo.files import move, read_json, write_file, write_json
from silo.home import SiloHome, StudyHome
from silo.orders import (
    CacheImages,
    EvaluateModel,
    FeatureMoments,
    Order,
    RoundTrained,
    TrainRound,
)
from silo.proposal import Proposal
from silo.worker import Progress, Worker
from study.integers import coarse_count
from study.plan import Plan
from study.quantity import (
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    count_encoding,
    delta_encoding,
    encode_work,
)

R = TypeVar("R")
log = structlog.get_logger(__name__)


class Quantities:
    """What one study asks of this site's data."""

    def __init__(
        self,
        home: SiloHome,
        study: StudyHome,
        plan: Plan,
        config: SiloConfig,
        worker: Worker,
        index: int,
    ) -> None:
        """`index` is this site's in the roster, which a new roster may change."""
        self._home, self._study, self._plan, self._index = home, study, plan, index
        self._config, self._worker = config, worker
        self._on_progress: Callable[[Progress], None] = lambda _: None
        self._secret = _secret(study.path / "seed")
        seed = derived_seed(self._secret, "local model")
        self._auxiliary = Auxiliary(study, plan, worker.machine, seed, self._run)

    async def prepare(
        self,
        proposal: Proposal,
        roster: Roster,
        artifacts: Sequence[Path],
        on_progress: Callable[[Progress], None],
    ) -> Path:
        """The file with the encoded vector of a session, made with the proposal's `artifacts`.

        Raises DataError, WorkFailed or ProposalRefused.
        """
        self._on_progress = on_progress
        context = proposal.context
        folder = self._study.vector(context.quantity.purpose, context.quantity.round)
        vector, request = folder / "vector", _request(context)
        if read_json(folder / "request.json") == request and vector.exists():
            log.info("vector kept from an earlier session", quantity=str(context.quantity))
            return vector
        (folder / "request.json").unlink(missing_ok=True)
        self._forget_others(folder, self._checkpoint(context))
        await self._compute(proposal, roster, artifacts, folder)
        write_json(folder / "request.json", request)
        return vector

    def settle(self, record: SessionRecord) -> None:
        """Draw the consequences of how a session ended; doing it twice changes nothing.

        In the sum: what was rounded away is carried on. Summed without this site: its delta is
        dropped, and residual and control variate are what they were. Aborted: the vector is kept,
        for the same quantity may be asked for again.
        """
        settled, context = record.settled, record.context
        if settled is None or not settled.summed:
            return
        quantity = context.quantity
        folder = self._study.vector(quantity.purpose, quantity.round)
        ours = read_json(folder / "request.json") == _request(context)
        if quantity.purpose == "round" and settled.included and ours:
            for kept in (self._study.residual, self._study.control):
                if (candidate := folder / kept.name).exists():
                    move(candidate, kept)
        shutil.rmtree(folder, ignore_errors=True)
        if quantity.purpose == "round":
            # This round's input, the model evaluated before it: the next round brings its own.
            self.forget_artifacts()

    def forget_artifacts(self, wanted: Collection[str] = ()) -> None:
        """Downloaded files but those whose SHA-256 (hexadecimal) is `wanted`, and the auxiliary
        images, which every round reads: a coordinator names as many files as it likes."""
        shared = (read_json(self._study.shared) or {}).get("sha256")
        for file in self._study.artifacts.iterdir():
            name = file.name.partition(".")[0]
            if name not in wanted and name != shared:
                file.unlink(missing_ok=True)

    def end(self) -> None:
        """Nothing of the study is computed here any more: leave no image of other sites, nor half
        a training, on the disk."""
        for folder in (self._study.artifacts, self._study.work):
            shutil.rmtree(folder, ignore_errors=True)

    def _checkpoint(self, context: SessionContext) -> Path:
        """Where the training for this quantity from this model is kept; what else it reads is the
        same in the whole study."""
        quantity, model = context.quantity, context.model.hex()
        return self._study.work / f"{quantity.purpose}-{quantity.round}-{model}.checkpoint"

    def _forget_others(self, folder: Path, checkpoint: Path) -> None:
        """Vectors of this purpose and checkpoints that belong to other sessions: whoever proposes
        round after round, from model after model, does not fill the disk."""
        purpose = folder.name.rpartition("-")[0]
        for other in folder.parent.glob(f"{purpose}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        for other in self._study.work.glob(f"{purpose}-*.checkpoint"):
            if other != checkpoint:
                other.unlink(missing_ok=True)

    async def count(self) -> int:
        """ñ: the coarse count of this site's images. Raises DataError where there are none."""
        return coarse_count((await self._images()).count)

    async def _compute(
        self, proposal: Proposal, roster: Roster, artifacts: Sequence[Path], folder: Path
    ) -> None:
        vector, work = folder / "vector", proposal.work
        attempt = proposal.context.quantity.round
        match work:
            case CensusWork():
                census = count_encoding(roster.size)
                write_file(vector, census.encode({"count": await self.count()}).tobytes())
            case MomentsWork():
                await self._moments(work, roster.size, vector)
            case TagsWork():
                images = await self._images()
                count = coarse_count(images.count)
                if count > work.total_count:  # else a false Σñ would have us draw images for ever
                    raise DataError(f"this site has more images than all sites: {work.total_count}")
                write_file(vector, await self._auxiliary.tags(attempt, work, count, images.file))
            case ImagesWork():
                (total,) = artifacts
                content = await asyncio.to_thread(self._auxiliary.images, attempt, work, total)
                write_file(vector, content)
            case RoundWork():
                await self._round(proposal.context, work, roster.size, artifacts, folder)
            case EvaluationWork():
                await self._evaluation(attempt, work, roster.size, artifacts, vector)

    async def _moments(self, work: MomentsWork, silos: int, vector: Path) -> None:
        images = (await self._images()).file
        order = FeatureMoments(
            machine=self._worker.machine,
            silos=silos,
            work=encode_work(work),
            images=images,
            vector=vector,
            feature_files=self._config.policy.feature_files,
        )
        done = await self._run(order)
        if done.clipped:
            log.warning("feature moments exceed the study's bound", values=done.clipped)

    async def _round(
        self,
        context: SessionContext,
        work: RoundWork,
        silos: int,
        artifacts: Sequence[Path],
        folder: Path,
    ) -> None:
        round = context.quantity.round
        if self._index not in self._plan.working(round, silos):
            log.info("rests", round=round)
            zeros = delta_encoding(work, silos, self._plan.secure_sum.ring).zeros()
            return write_file(folder / "vector", zeros.tobytes())
        images = await self._images()
        model, *auxiliary = artifacts
        order = TrainRound(
            machine=self._worker.machine,
            plan=self._plan.toml(),
            round=round,
            silos=silos,
            silo=self._index,
            work=encode_work(work),
            model=model,
            images=images.file,
            auxiliary=auxiliary[0] if auxiliary else None,
            auxiliary_sheet=self._study.shared_sheet,
            count=coarse_count(images.count),
            seed=derived_seed(self._secret, f"round {round}"),
            residual=self._study.residual,
            vector=folder / "vector",
            new_residual=folder / self._study.residual.name,
            control=self._study.control,
            new_control=folder / self._study.control.name,
            checkpoint=self._checkpoint(context),
        )
        done = await self._run(order)
        _tell(done, round, sum(work.sizes))

    async def _evaluation(
        self,
        round: int,
        work: EvaluationWork,
        silos: int,
        artifacts: Sequence[Path],
        vector: Path,
    ) -> None:
        model, samples = artifacts
        images = (await self._images()).file
        order = EvaluateModel(
            machine=self._worker.machine,
            plan=self._plan.toml(),
            silos=silos,
            work=encode_work(work),
            model=model,
            samples=samples,
            images=images,
            vector=vector,
            feature_files=self._config.policy.feature_files,
        )
        done = await self._run(order)
        samples.unlink(missing_ok=True)  # the model is most often the next round's input
        log.info("evaluated", round=round, **vars(done))

    async def _images(self) -> Cached:
        """The images as they were when the study first asked: counts and moments are static."""
        note = self._study.path / "data.json"
        pinned = read_json(note)
        if pinned is not None and (known := open_cache(self._home.cache / pinned["cache"])):
            self._check_labels(known)
            return known
        channels, size, _ = self._plan.data.shape
        source = data_path(self._home, self._config)
        data, resources = self._config.data, self._config.resources
        order = CacheImages(
            source,
            data.format,
            size,
            channels,
            self._home.cache,
            data.reading,
            resources.processors,
        )
        cached = open_cache(await self._run(order))
        if cached is None:
            raise DataError(f"{self._home.cache} was changed while images were read: try again")
        if pinned is not None and pinned["cache"] != cached.key:
            raise DataError(
                f"the images at {source} are not those that this study began with, and their copy "
                "in the cache is gone: restore either, or leave the study"
            )
        self._check_labels(cached)
        write_json(note, {"cache": cached.key, "count": cached.count})
        return cached

    def _check_labels(self, cached: Cached) -> None:
        plan = self._plan
        if plan.model.classes is not None:
            labels_of_study(cached.folder, plan.model.classes, plan.data.class_names)

    async def _run(self, order: Order[R]) -> R:
        progress = self._study.work / "progress"
        return await self._worker.run(order, progress, lambda p: self._on_progress(p))


def _request(context: SessionContext) -> dict[str, str]:
    """What two sessions must share for one vector to serve both."""
    return {
        "quantity": str(context.quantity),
        "encoding": context.encoding.hex(),
        "model": context.model.hex(),
        "reservation": context.reservation.hex(),
    }


def _secret(path: Path) -> bytes:
    """Random bytes of this study: the noise of local training must not be known elsewhere."""
    if not path.exists():
        write_file(path, os.urandom(32))
    return path.read_bytes()


def _tell(done: RoundTrained, round: int, parameters: int) -> None:
    """How a round went here, for the people of this site alone."""
    if done.void:
        log.error(
            "the model that was sent cannot be trained; the round's sum is made unreadable",
            round=round,
            hint="either it grew beyond all bounds, or it was made to break training at all "
            "sites but one, whose part of the sum would then be seen: ask the study centre",
        )
    elif done.fault:
        log.error(
            "training gave a model that is not finite; zeros are contributed, with a flag",
            round=round,
            first_bad_step=done.first_bad_step,
            hint="a learning rate that is too high for this site's images, or a model made to "
            "break training; the study centre sees how many sites this happened to",
        )
    if 4 * done.saturated > parameters:
        log.warning(
            "much of what leaves in this round is cut to the clips, and so little but signs",
            round=round,
            share=f"{done.saturated / parameters:.0%}",
            hint="clips follow the mean of all sites, which grows small where they disagree, "
            "late in a long study; long before that it is the study centre's choice",
        )
    log.info("trained", round=round, loss=done.loss, saturated=done.saturated)
