"""The silo's side of a secure sum: `start`, then `state, effects = state.handle(event)`."""

from secagg.silo.base import SiloParty, SiloState, complain
from secagg.silo.ended import Lost, Waiting, resume, start

__all__ = ["Lost", "SiloParty", "SiloState", "Waiting", "complain", "resume", "start"]
