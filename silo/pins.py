"""What this site accepted in the first proposal that named it, and holds every later one to."""

from __future__ import annotations

from silo.files import read_json, write_json
from silo.home import StudyHome
from silo.proposal import Proposal
from study.quantity import AuxiliaryImages, RoundWork


class Pins:
    """Of a study, under the roster of an epoch."""

    def __init__(self, study: StudyHome, epoch: int) -> None:
        self._study, self._epoch = study, epoch

    @property
    def total(self) -> int | None:
        """Σñ of this epoch."""
        stored = read_json(self._study.total)
        if stored is None or stored["epoch"] != self._epoch:
            return None
        return int(stored["total_count"])

    @property
    def shared(self) -> AuxiliaryImages | None:
        """The auxiliary images that all silos train on: the study's, whatever the epoch."""
        stored = read_json(self._study.shared)
        return None if stored is None else AuxiliaryImages(**stored)

    def keep(self, proposal: Proposal) -> None:
        """From here on what a checked proposal says is what this site goes by."""
        work = proposal.work
        total = getattr(work, "total_count", None)
        if total is not None and self.total is None:
            write_json(self._study.total, {"epoch": self._epoch, "total_count": total})
        if isinstance(work, RoundWork) and work.auxiliary is not None and self.shared is None:
            write_json(self._study.shared, work.auxiliary.model_dump())
