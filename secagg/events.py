"""What happens to a party (events) and what a party wants done (effects). No I/O happens here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.ledger import Entry
from secagg.masking import MaskKey
from secagg.messages import Parcel, Signed

# --- events at a silo: what the coordinator relays, and what the silo's own shell reports


@dataclass(frozen=True)
class Open:
    """Step 0: the coordinator proposes a session; the shell has checked policy and has a vector."""

    context: SessionContext


@dataclass(frozen=True)
class Adverts:
    """Step 1: the signed adverts of U1 in order of sender."""

    messages: tuple[Signed, ...]


@dataclass(frozen=True)
class Headers:
    """Step 2: the signed headers of U2, and each other member's parcel for this silo."""

    messages: tuple[Signed, ...]
    parcels: Mapping[int, Parcel]


@dataclass(frozen=True)
class InputMasked:
    """The shell added the masks and made the result durable: its SHA-256 and size in bytes."""

    vector: bytes
    size: int


@dataclass(frozen=True)
class Survivors:
    """Step 3: the coordinator says whose inputs it holds."""

    survivors: tuple[int, ...]


@dataclass(frozen=True)
class Confirmations:
    """Step 4: the signed confirmations the coordinator holds, in order of sender."""

    messages: tuple[Signed, ...]


@dataclass(frozen=True)
class GiveUp:
    """The session with this context digest is given up; sign ABORT unless we unmasked it."""

    ctx: bytes


@dataclass(frozen=True)
class Settle:
    """A certificate of this or an earlier session."""

    certificate: Certificate


SiloEvent = Open | Adverts | Headers | InputMasked | Survivors | Confirmations | GiveUp | Settle

# --- effects at a silo, carried out in order


@dataclass(frozen=True)
class Record:
    """Append to the ledger and make it durable before any later effect."""

    entry: Entry


@dataclass(frozen=True)
class Send:
    """Send this message (and, at step 1, a parcel per receiver) to the coordinator."""

    message: Signed
    parcels: Mapping[int, Parcel] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskInput:
    """Add these keystreams to the encoded vector, store it, and report `InputMasked`."""

    keys: tuple[MaskKey, ...] = field(repr=False)


SiloEffect = Record | Send | MaskInput

# --- events at the coordinator


@dataclass(frozen=True)
class Received:
    """A signed message from an authenticated silo. At step 2 the vector is already committed."""

    message: Signed
    parcels: Mapping[int, Parcel] = field(default_factory=dict)


@dataclass(frozen=True)
class Deadline:
    """The current step's time is over; go on with those who answered, or give up."""


@dataclass(frozen=True)
class Cancel:
    """A person or a failure ends the session."""

    why: str


CoordinatorEvent = Received | Deadline | Cancel

# --- effects at the coordinator


@dataclass(frozen=True)
class Unveil:
    """Sum the vectors of `survivors` and add these keystreams: what is left is the sum."""

    survivors: tuple[int, ...]
    keys: tuple[MaskKey, ...] = field(repr=False)
    certificate: Certificate


@dataclass(frozen=True)
class Ended:
    """The session ended without a sum. `certificate` is there once inputs had been asked for."""

    why: str
    certificate: Certificate | None
    accused: int | None = None


CoordinatorEffect = Unveil | Ended
