"""This site's part of the anonymous union: synthetic images, audited here, each offered once.

    pool/weights.npy           the local DDPM
    pool/samples-<first>.npy   samples that passed the audit, by the number of their first draw; in
                               a conditional study each after its label (`study.reservation`)
    pool/pool.json             how many were drawn, which files there are, how many were offered
    pool/reservation-<a>.npz   attempt a: the slots and tags drawn, and which samples they are for

Samples are offered in the order in which they were kept. They count as offered from the moment
slots are drawn for them: a sample whose attempt came to nothing is not offered again.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from silo.errors import ProposalRefused
from silo.files import read_json, write_file, write_json
from silo.home import StudyHome
from silo.orders import Machine, Order, SampleLocal, TrainLocal
from study.plan import Plan
from study.quantity import ImagesWork, TagsWork
from study.reservation import Reservation, images_vector, renumber, reserve, share

R = TypeVar("R")
log = structlog.get_logger(__name__)

# A model that copies its training images loses nearly all samples in the audit: then stop.
_MOST_DRAWS_PER_IMAGE = 4


@dataclass(frozen=True)
class Pool:
    """What pool.json says."""

    drawn: int = 0
    """Samples drawn so far, whether kept or not."""
    files: tuple[str, ...] = ()
    kept: int = 0
    offered: int = 0


class Auxiliary:
    """The pool of one study. `run` hands an order to the worker."""

    def __init__(
        self,
        study: StudyHome,
        plan: Plan,
        machine: Machine,
        seed: int,
        run: Callable[[Order[Any]], Awaitable[Any]],
    ) -> None:
        self._home, self._plan, self._machine, self._seed = study, plan, machine, seed
        self._run = run

    async def tags(self, attempt: int, work: TagsWork, count: int, images: Path) -> bytes:
        """The vector of the first sum, for the share of a site with coarse count `count`."""
        wanted = share(work.images, count, work.total_count)
        pool = await self._fill(wanted, images)
        size = min(wanted, pool.kept - pool.offered)
        reservation = reserve(size, work.slots, os.urandom)
        # First the pool: a crash between the two loses samples and offers none twice.
        self._write_pool(replace(pool, offered=pool.offered + size))
        self._write_reservation(attempt, reservation, pool.offered)
        return reservation.vector().astype("<u4").tobytes()

    def images(self, attempt: int, work: ImagesWork, total: Path) -> bytes:
        """The vector of the second sum: every image in the record of the slot it won.

        `total` is the first sum as it was downloaded. Raises ProposalRefused where the number of
        occupied slots is not what the coordinator says, and where nothing was reserved here.
        """
        tags = np.fromfile(total, dtype="<u4").astype(np.uint32, copy=False)
        occupied = len(renumber(tags))
        if occupied != work.occupied:
            raise ProposalRefused(
                f"images {attempt}: {work.occupied} slots are said to be occupied, it is {occupied}"
            )
        reservation, first = self._read_reservation(attempt)
        if reservation.length != len(tags):
            raise ProposalRefused(f"images {attempt}: the sum of tags has {len(tags)} slots")
        chosen = self._samples(first, len(reservation.slots))
        return images_vector(chosen, reservation, tags).tobytes()

    async def _fill(self, wanted: int, images: Path) -> Pool:
        """Draw and audit until `wanted` samples are there that were never offered."""
        weights = self._home.pool / "weights.npy"
        if not weights.exists():
            await self._train(images, weights)
        pool, drawn = self._pool(), 0
        while (missing := wanted - (pool.kept - pool.offered)) > 0:
            if drawn >= _MOST_DRAWS_PER_IMAGE * wanted + 16:
                log.warning("audit dropped too many samples", wanted=wanted, missing=missing)
                break
            samples = missing + missing // 8 + 8
            pool = await self._draw(pool, samples, images, weights)
            drawn += samples
        return pool

    async def _train(self, images: Path, weights: Path) -> None:
        order = TrainLocal(
            machine=self._machine,
            plan=self._plan.toml(),
            images=images,
            seed=self._seed,
            weights=weights,
            checkpoint=self._home.work / "local.checkpoint",
        )
        done = await self._run(order)
        log.info("local model trained", loss=done.loss, first_bad_step=done.first_bad_step)

    async def _draw(self, pool: Pool, samples: int, images: Path, weights: Path) -> Pool:
        kept = self._home.pool / f"samples-{pool.drawn}.npy"
        order = SampleLocal(
            machine=self._machine,
            plan=self._plan.toml(),
            images=images,
            weights=weights,
            seed=self._seed,
            first=pool.drawn,
            samples=samples,
            kept=kept,
        )
        report = await self._run(order)
        log.info(
            "samples audited",
            samples=report.samples,
            dropped=report.samples - report.kept,
            threshold=report.threshold,
        )
        filled = replace(
            pool,
            drawn=pool.drawn + samples,
            files=(*pool.files, kept.name),
            kept=pool.kept + report.kept,
        )
        self._write_pool(filled)
        return filled

    def _samples(self, first: int, size: int) -> NDArray[np.uint8]:
        """Kept samples number `first` … `first + size − 1`: uint8 (size, …), a record's bytes."""
        folder = self._home.pool
        parts = [np.load(folder / name, mmap_mode="r") for name in self._pool().files]
        if not parts:
            return np.zeros((0, self._plan.record_size - 1), dtype=np.uint8)
        everything: NDArray[np.uint8] = np.concatenate(parts)
        return everything[first : first + size]

    def _pool(self) -> Pool:
        stored = read_json(self._home.pool / "pool.json") or {}
        return Pool(**{**stored, "files": tuple(stored.get("files", ()))})

    def _write_pool(self, pool: Pool) -> None:
        write_json(self._home.pool / "pool.json", vars(pool))

    def _write_reservation(self, attempt: int, reservation: Reservation, first: int) -> None:
        content = io.BytesIO()
        np.savez(
            content,
            slots=reservation.slots,
            tags=reservation.tags,
            length=reservation.length,
            first=first,
        )
        write_file(self._reservation(attempt), content.getvalue())

    def _read_reservation(self, attempt: int) -> tuple[Reservation, int]:
        path = self._reservation(attempt)
        if not path.exists():
            raise ProposalRefused(f"images {attempt}: this site has reserved no slots")
        with np.load(path) as stored:
            length, first = int(stored["length"]), int(stored["first"])
            return Reservation(stored["slots"], stored["tags"], length), first

    def _reservation(self, attempt: int) -> Path:
        return self._home.pool / f"reservation-{attempt}.npz"


def derived_seed(secret: bytes, purpose: str) -> int:
    """A 63-bit seed: the same again after a crash, and nothing to anyone without the secret."""
    return int.from_bytes(hashlib.sha256(secret + purpose.encode()).digest()[:8], "big") >> 1
