"""Step 0 and 1 at a silo: draw the secrets, advertise two keys; then deal shares and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from secagg import keys, shamir
from secagg.context import SessionContext
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.events import Adverts, Open, Record, Send
from secagg.ledger import Opened
from secagg.messages import (
    Advert,
    Dealt,
    Header,
    Parcel,
    Signed,
    Step,
    check_set,
    transcript,
)
from secagg.primitives import (
    SECRET_BYTES,
    SealingKey,
    Secret,
    digest,
    seal,
)
from secagg.silo.base import Next, SiloState


@dataclass(frozen=True)
class Advertised(SiloState):
    """We are bound to the session; waiting for U1."""

    context: SessionContext
    r: Secret = field(repr=False)
    b: Secret = field(repr=False)
    mailbox: SealingKey = field(repr=False)
    advert: Signed

    @property
    def session(self) -> SessionContext:
        return self.context

    def wipe(self) -> None:
        self.r.wipe()
        self.b.wipe()

    def on_adverts(self, event: Adverts) -> Next:
        from secagg.silo.shared import Shared

        adverts = self._check_adverts(event.messages)
        t1 = transcript("T1", self.context.digest, event.messages)
        members = tuple(sorted(adverts))
        header, parcels, dealt_to_self = self._deal(t1, adverts)
        message = self.party.sign(Step.SHARE, self.context.digest, header.encode())
        shared = Shared(
            self.party,
            self.history,
            self.context,
            r=self.r,
            b=self.b,
            mailbox=self.mailbox,
            t1=t1,
            adverts=adverts,
            members=members,
            dealt_to_self=dealt_to_self,
            sent=Send(message, parcels),
        )
        return shared, [shared.sent]

    def _check_adverts(self, messages: Sequence[Signed]) -> dict[int, Advert]:
        ctx, roster = self.context.digest, self.party.roster
        check_set(messages, roster, ctx, Step.ADVERTISE)
        if len(messages) < roster.threshold:
            raise Refused(Reason.BELOW_THRESHOLD, f"{len(messages)} adverts")
        if self.advert not in messages:
            raise Refused(Reason.OWN_MESSAGE_CHANGED, "advert")
        adverts = {}
        for message in messages:
            try:
                adverts[message.sender] = Advert.decode(message.body)
            except MalformedMessage as error:
                raise Refused(Reason.BAD_KEY, str(error), message.sender) from error
        return adverts

    def _deal(
        self, t1: bytes, adverts: dict[int, Advert]
    ) -> tuple[Header, dict[int, Parcel], tuple[Secret, Secret]]:
        """Shares of b and r for every member of U1, pair seeds for those of a higher index.

        One-sided pair seeds are safe: i draws s_ij from its own r_i and seals it to j, so both
        ends know it and nobody else does, as with a Diffie-Hellman key; a dealer that would choose
        a bad seed could as well give its input away. The commitment lets the coordinator notice
        a seed that does not follow from r_i when it restores r_i (see the coordinator's unmask).
        """
        ctx, me, entropy = self.context.digest, self.party.index, self.party.entropy
        threshold = self.party.roster.threshold
        shares_b = shamir.split(self.b, threshold, adverts, entropy)
        shares_r = shamir.split(self.r, threshold, adverts, entropy)
        dealt, parcels = [], {}
        for j in sorted(adverts):
            mailbox_ct = seed_ct = seed_commitment = b""
            if j != me:
                info = keys.sealing_info("mailbox", ctx, t1, me, j)
                both = Secret(shares_b[j].reveal() + shares_r[j].reveal())
                mailbox_ct = self._seal(both, j, adverts[j].mailbox, info)
                both.wipe()
            if j > me:
                seed = keys.pair_seed(self.r, ctx, t1, me, j)
                info = keys.sealing_info("seed", ctx, t1, me, j)
                seed_ct = self._seal(seed, j, adverts[j].mask, info)
                seed_commitment = keys.commit("seed", ctx, t1, me, j, seed)
                seed.wipe()
            dealt.append(
                Dealt(
                    receiver=j,
                    share_b=keys.commit("share b", ctx, t1, me, j, shares_b[j]),
                    share_r=keys.commit("share r", ctx, t1, me, j, shares_r[j]),
                    mailbox_parcel=digest("parcel", mailbox_ct) if mailbox_ct else b"",
                    seed=seed_commitment,
                    seed_parcel=digest("parcel", seed_ct) if seed_ct else b"",
                )
            )
            if j != me:
                parcels[j] = Parcel(mailbox_ct, seed_ct)
                shares_b[j].wipe()
                shares_r[j].wipe()
        header = Header(
            t1,
            commit_r=keys.commit("r", ctx, t1, me, 0, self.r),
            commit_b=keys.commit("b", ctx, t1, me, 0, self.b),
            dealt=tuple(dealt),
        )
        return header, parcels, (shares_b[me], shares_r[me])

    def _seal(self, secret: Secret, to: int, public: bytes, info: bytes) -> bytes:
        try:
            return seal(secret, public, info)
        except Refused as error:
            name = self.party.roster.member(to).name
            raise Refused(error.reason, f"advert of {name}", accused=to) from error


def open_session(state: SiloState, event: Open) -> Next:
    """Step 0. Raises `Refused` where the roster is not the pinned one or the ledger forbids it."""
    party, context = state.party, event.context
    if isinstance(state, Advertised) and state.context == context:
        return state, [Send(state.advert)]  # our advert was lost on the way: the very same again
    if not context.agrees_with(party.roster):
        raise Refused(Reason.ROSTER_MISMATCH, f"session {context.session}")
    if context.survivors and party.index not in context.survivors:
        raise Refused(Reason.SELF_NOT_INCLUDED, "the reservation was made without us")
    state.history.check_open(context)
    state.wipe()  # an unmasked predecessor is superseded; its keys are of no use any more
    entry = Opened(context)
    r, b = Secret(party.entropy(SECRET_BYTES)), Secret(party.entropy(SECRET_BYTES))
    mailbox_seed = Secret(party.entropy(SECRET_BYTES))
    mailbox = SealingKey.from_seed(mailbox_seed, context.digest, "mailbox")
    mailbox_seed.wipe()
    advert = Advert(mailbox.public, keys.mask_key(r, context.digest).public)
    message = party.sign(Step.ADVERTISE, context.digest, advert.encode())
    advertised = Advertised(party, state.history.after(entry), context, r, b, mailbox, message)
    return advertised, [Record(entry), Send(message)]
