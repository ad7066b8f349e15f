"""What stops an agent, in words for the person at the institution who has to act."""

from __future__ import annotations


class SiloError(Exception):
    """Base of every error of the agent; the text says what is wrong and what to do about it."""


class ConfigError(SiloError):
    """site.toml cannot be used."""


class DataError(SiloError):
    """The institution's images cannot be read, or not as the study needs them."""


class WrongSource(DataError):
    """Nothing can be read where the images should be; `problem` alone is for readers that have no
    site.toml, such as a simulation."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)  # both, so that it can be pickled
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


class EnrolmentError(SiloError):
    """The institution cannot join, or its certificate cannot be used."""


class LedgerError(SiloError):
    """The ledger of a study is in use by another process, or damaged."""


class ProposalRefused(SiloError):
    """The coordinator asked for something that differs from what this site agreed to."""


class RefusedByCoordinator(SiloError):
    """The coordinator answered with an error that trying again cannot mend."""


class WorkFailed(SiloError):
    """The worker could not compute what a session needs."""


class Paused(SiloError):
    """The working hours are over; the order goes on from its checkpoint when they begin again."""


class SessionOver(SiloError):
    """The coordinator went on while this site was still computing; what was computed is kept."""
