"""The coordinator's side of a secure sum: `open_session`, then `state.handle(event)`."""

from secagg.coordinator.base import CoordinatorState
from secagg.coordinator.ended import Abandoned, Aborted, Aborting, Summed
from secagg.coordinator.gathering import Advertising, Collecting, Sharing, open_session
from secagg.coordinator.unmasking import Confirming, Unmasking

__all__ = [
    "Abandoned",
    "Aborted",
    "Aborting",
    "Advertising",
    "Collecting",
    "Confirming",
    "CoordinatorState",
    "Sharing",
    "Summed",
    "Unmasking",
    "open_session",
]
