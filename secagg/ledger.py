"""What a silo must never do twice: the entries of its write-ahead ledger and the rules over them.

The file itself (fsync, exclusive lock, hash chain) belongs to the agent. Here an entry is a value
with a canonical encoding, `History` is the fold of all entries of one study, and the rules are
methods of `History`. An entry is durable before anything that depends on it leaves the silo.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from secagg.certificate import Certificate
from secagg.codec import Reader, blob, indices, u8
from secagg.context import NO_HASH, Quantity, SessionContext
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.primitives import HASH_BYTES
from secagg.roster import MAX_SILOS


@dataclass(frozen=True)
class Purpose:
    """What the sums of one purpose are bound to, and so when one is the same sum again.

    `static`: summed once per roster epoch (round = epoch); a second sum over another set would
    give one silo by subtraction. `once`: and not again in a later epoch either.
    `model`: made from an input model, and from each one once. `reserved_by`: made by exactly the
    silos of an earlier sum, of this purpose and the same round.
    """

    static: bool = False
    once: bool = False
    model: bool = False
    reserved_by: str = ""


# Closed: under a name of its own the coordinator could ask for the same thing a second time.
PURPOSES = {
    "census": Purpose(static=True),
    "moments": Purpose(static=True, once=True),
    "tags": Purpose(),
    "images": Purpose(reserved_by="tags"),
    "round": Purpose(model=True),
    "evaluation": Purpose(model=True),
}
STATIC_PURPOSES = frozenset(name for name, purpose in PURPOSES.items() if purpose.static)
# An ABORT for a session that we never opened costs the coordinator nothing and us an entry.
MAX_FOREIGN_ABORTS = 4096
_MAX_CONTEXT = 4096
_MAX_LOCKED = 1 << 20


@dataclass(frozen=True, slots=True)
class Opened:
    """Before ADVERTISE: this session number is used up."""

    context: SessionContext


@dataclass(frozen=True, slots=True)
class Masked:
    """Before the masked vector leaves: this quantity was masked in this session."""

    ctx: bytes
    vector: bytes


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Before CONFIRM: the one survivor set, and the shares that unmasking needs, encrypted."""

    ctx: bytes
    t2: bytes
    members: tuple[int, ...]
    survivors: tuple[int, ...]
    vector: bytes
    locked_shares: bytes


@dataclass(frozen=True, slots=True)
class Unmasked:
    """Before UNMASK: this session can no longer be aborted by this silo."""

    ctx: bytes


@dataclass(frozen=True, slots=True)
class Aborted:
    """Before ABORT: this silo will never unmask this session."""

    ctx: bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """A verified certificate: how the session ended, and whether our input is in its sum."""

    ctx: bytes
    certificate: bytes
    summed: bool
    included: bool


@dataclass(frozen=True, slots=True)
class Overruled:
    """The operators of the silo settled a session in doubt by hand: it stays closed for ever."""

    ctx: bytes


Later = Masked | Confirmed | Unmasked | Aborted | Settled | Overruled
Entry = Opened | Later


def encode_entry(entry: Entry) -> bytes:
    match entry:
        case Opened(context):
            return u8(1) + blob(context.encode())
        case Masked(ctx, vector):
            return u8(2) + blob(ctx) + blob(vector)
        case Confirmed():
            return (
                u8(3)
                + blob(entry.ctx)
                + blob(entry.t2)
                + indices(entry.members)
                + indices(entry.survivors)
                + blob(entry.vector)
                + blob(entry.locked_shares)
            )
        case Unmasked(ctx):
            return u8(4) + blob(ctx)
        case Aborted(ctx):
            return u8(5) + blob(ctx)
        case Settled(ctx, certificate, summed, included):
            return u8(6) + blob(ctx) + blob(certificate) + u8(summed) + u8(included)
    return u8(7) + blob(entry.ctx)


def decode_entry(data: bytes) -> Entry:
    """Raises `MalformedMessage`; decode then encode gives the same bytes."""
    r = Reader(data, "ledger entry")
    kind = r.u8()
    entry: Entry
    if kind == 1:
        entry = Opened(SessionContext.decode(r.blob(_MAX_CONTEXT)))
    elif kind == 2:
        entry = Masked(r.exactly(HASH_BYTES), r.exactly(HASH_BYTES))
    elif kind == 3:
        ctx, t2 = r.exactly(HASH_BYTES), r.exactly(HASH_BYTES)
        members, survivors = r.indices(MAX_SILOS), r.indices(MAX_SILOS)
        entry = Confirmed(ctx, t2, members, survivors, r.exactly(HASH_BYTES), r.blob(_MAX_LOCKED))
    elif kind == 4:
        entry = Unmasked(r.exactly(HASH_BYTES))
    elif kind == 5:
        entry = Aborted(r.exactly(HASH_BYTES))
    elif kind == 6:
        ctx, certificate = r.exactly(HASH_BYTES), r.exactly(HASH_BYTES)
        summed, included = r.u8(), r.u8()
        if summed > 1 or included > 1:
            raise MalformedMessage("ledger entry: a flag is neither 0 nor 1")
        entry = Settled(ctx, certificate, bool(summed), bool(included))
    elif kind == 7:
        entry = Overruled(r.exactly(HASH_BYTES))
    else:
        raise MalformedMessage(f"ledger entry: no kind {kind}")
    r.finish()
    return entry


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """All that the ledger says of one session."""

    context: SessionContext
    masked: bool = False
    confirmed: Confirmed | None = None
    unmasked: bool = False
    aborted: bool = False
    settled: Settled | None = None
    overruled: bool = False

    @property
    def in_doubt(self) -> bool:
        """Our masked input left, and nothing proves yet how the session ended."""
        return self.masked and self.settled is None and not self.overruled


@dataclass(frozen=True)
class History:
    """The fold of a study's ledger, and the rules of "never twice"."""

    last_session: int = 0
    sessions: dict[bytes, SessionRecord] = field(default_factory=dict)
    # ABORT may be signed for a session that we never opened, so these are kept apart.
    aborted: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> History:
        history = cls()
        for entry in entries:
            history = history.after(entry)
        return history

    def after(self, entry: Entry) -> History:
        if isinstance(entry, Opened):
            record = SessionRecord(entry.context)
            sessions = {**self.sessions, entry.context.digest: record}
            return replace(self, last_session=entry.context.session, sessions=sessions)
        aborted = self.aborted | {entry.ctx} if isinstance(entry, Aborted) else self.aborted
        record_before = self.sessions.get(entry.ctx)
        if record_before is None:
            return replace(self, aborted=aborted)
        sessions = {**self.sessions, entry.ctx: _applied(record_before, entry)}
        return replace(self, sessions=sessions, aborted=aborted)

    @property
    def last(self) -> SessionRecord | None:
        """The session that was opened last."""
        return next(reversed(self.sessions.values()), None)

    @property
    def in_doubt(self) -> tuple[SessionRecord, ...]:
        return tuple(record for record in self.sessions.values() if record.in_doubt)

    def check_open(self, context: SessionContext) -> None:
        """Raises `Refused` where taking part could let two sums be subtracted.

        Called before ADVERTISE, after the certificates of earlier sessions were settled.
        """
        if context.session <= self.last_session:
            raise Refused(
                Reason.SESSION_NOT_NEW,
                f"session {context.session} was proposed, the ledger holds {self.last_session}",
            )
        if context.digest in self.aborted:
            raise Refused(Reason.ALREADY_ABORTED, f"session {context.session}")
        for record in self.in_doubt:
            raise Refused(
                Reason.IN_DOUBT, f"session {record.context.session} ({record.context.quantity})"
            )
        self._check_purpose(context)
        for record in self.sessions.values():
            if record.masked and not _aborted_for_certain(record):
                _check_against(record.context, context)

    def _check_purpose(self, context: SessionContext) -> None:
        q = context.quantity
        purpose = PURPOSES.get(q.purpose)
        if purpose is None:
            raise Refused(Reason.UNKNOWN_PURPOSE, repr(q.purpose))
        if purpose.static and q.round != context.epoch:
            raise Refused(Reason.QUANTITY_CLOSED, f"{q.purpose} is summed once per roster epoch")
        if purpose.model is (context.model == NO_HASH):
            raise Refused(Reason.WRONG_BINDING, f"{q}: input model")
        reserved = bool(purpose.reserved_by)
        if (context.reservation != NO_HASH, bool(context.survivors)) != (reserved, reserved):
            raise Refused(Reason.WRONG_BINDING, f"{q}: reservation")
        if reserved:
            self._check_reservation(Quantity(purpose.reserved_by, q.round), context)

    def _check_reservation(self, earlier: Quantity, context: SessionContext) -> None:
        """We are in the sum that reserved, under this roster; and if we confirmed its survivors,
        they are those that may be summed now."""
        for record in self.sessions.values():
            then, settled, confirmed = record.context, record.settled, record.confirmed
            if (then.quantity, then.roster) != (earlier, context.roster):
                continue
            if settled is None or not settled.included:
                continue
            if confirmed is not None and confirmed.survivors != context.survivors:
                raise Refused(Reason.WRONG_SURVIVORS, f"{earlier} was over {confirmed.survivors}")
            return
        raise Refused(Reason.WRONG_BINDING, f"we are in no sum of {earlier}")

    def check_unmask(self, ctx: bytes) -> None:
        """UNMASK and ABORT exclude each other."""
        if ctx in self.aborted:
            raise Refused(Reason.ALREADY_ABORTED)

    def check_abort(self, ctx: bytes) -> None:
        record = self.sessions.get(ctx)
        if record is not None and record.unmasked:
            raise Refused(Reason.ALREADY_UNMASKED)
        foreign = self.aborted - self.sessions.keys()
        if record is None and ctx not in foreign and len(foreign) >= MAX_FOREIGN_ABORTS:
            raise Refused(Reason.TOO_MANY_ABORTS)

    def settle(self, certificate: Certificate, index: int) -> Settled | None:
        """The entry for a certificate that was checked against the session's roster, or None if it
        says what we know already or is of a session that we never opened.

        Raises `Refused(BAD_CERTIFICATE)` for a sum other than the one we confirmed, for a second
        outcome of one session, and for an ABORT of ours that this ledger does not hold. Only a
        lying coordinator comes by the first two, by split views and because CONFIRM and ABORT do
        not exclude each other; the third is a ledger that was set back, or a second one under our
        key, and what it knows of UNMASK cannot be relied on. A person should look.
        """
        record = self.sessions.get(certificate.context)
        if record is None:
            return None
        ours = record.confirmed and (record.confirmed.t2, record.confirmed.survivors)
        if certificate.is_sum and ours and ours != (certificate.t2, certificate.survivors):
            raise Refused(Reason.BAD_CERTIFICATE, "another sum than the one we confirmed")
        if record.settled is not None:
            if record.settled.summed != certificate.is_sum:
                raise Refused(Reason.BAD_CERTIFICATE, "this session ended otherwise")
            return None
        ours_is_in = not certificate.is_sum and index in certificate.senders
        if ours_is_in and certificate.context not in self.aborted:
            raise Refused(Reason.BAD_CERTIFICATE, "an ABORT of ours that our ledger does not hold")
        included = record.masked and index in certificate.survivors
        return Settled(certificate.context, certificate.digest, certificate.is_sum, included)


def _applied(record: SessionRecord, entry: Later) -> SessionRecord:
    match entry:
        case Masked():
            return replace(record, masked=True)
        case Confirmed():
            return replace(record, confirmed=entry)
        case Unmasked():
            return replace(record, unmasked=True)
        case Aborted():
            return replace(record, aborted=True)
        case Settled():
            # Nobody is owed a share any more, and their bytes are most of what a record holds.
            done = record.confirmed and replace(record.confirmed, locked_shares=b"")
            return replace(record, settled=entry, confirmed=done)
    return replace(record, overruled=True)


def _aborted_for_certain(record: SessionRecord) -> bool:
    return record.settled is not None and not record.settled.summed


def _check_against(done: SessionContext, asked: SessionContext) -> None:
    # Raw quantities first: the same thing under the same name, e.g. a finished round again.
    if done.quantity == asked.quantity:
        raise Refused(Reason.QUANTITY_CLOSED, f"{asked.quantity} in session {done.session}")
    if done.quantity.purpose != asked.quantity.purpose:
        return
    if PURPOSES[asked.quantity.purpose].once:
        # Unlike a count, which is coarse, they would show all of a site that joined or left.
        raise Refused(Reason.QUANTITY_CLOSED, f"{asked.quantity.purpose}: once in a study")
    if asked.quantity.round <= done.quantity.round:
        raise Refused(Reason.ROUND_NOT_NEW, f"{asked.quantity} after {done.quantity}")
    # The same input model under a new round number would be the same deltas once more.
    if asked.model != NO_HASH and asked.model == done.model:
        raise Refused(Reason.MODEL_REUSED, f"{asked.quantity} has the model of {done.quantity}")
