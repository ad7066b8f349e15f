"""Step 2 at a silo: open what the others dealt, check every piece, and mask the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from secagg import keys
from secagg.context import SessionContext
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.events import Adverts, Headers, InputMasked, MaskInput, Record, Send, Survivors
from secagg.ledger import Masked
from secagg.masking import MaskKey
from secagg.messages import (
    Advert,
    Header,
    MaskedInput,
    Parcel,
    Signed,
    Step,
    check_set,
    transcript,
)
from secagg.primitives import SealingKey, Secret, digest
from secagg.shamir import SHARE_BYTES, parse_share
from secagg.silo.base import Next, SiloState, second_view

Shares = tuple[Secret, Secret]
"""A dealer's shares for us: of its b and of its r."""


@dataclass(frozen=True)
class Shared(SiloState):
    """Our header and parcels are on their way; waiting for those of U2."""

    context: SessionContext
    r: Secret = field(repr=False)
    b: Secret = field(repr=False)
    mailbox: SealingKey = field(repr=False)
    t1: bytes
    adverts: Mapping[int, Advert] = field(repr=False)
    members: tuple[int, ...]
    dealt_to_self: Shares = field(repr=False)
    sent: Send = field(repr=False)

    @property
    def session(self) -> SessionContext:
        return self.context

    def wipe(self) -> None:
        for secret in (self.r, self.b, *self.dealt_to_self):
            secret.wipe()

    def on_adverts(self, event: Adverts) -> Next:
        if transcript("T1", self.context.digest, event.messages) != self.t1:
            raise second_view("adverts")
        return self, [self.sent]

    def on_headers(self, event: Headers) -> Next:
        headers = self._check_headers(event.messages)
        t2 = transcript("T2", self.t1, event.messages)
        shares, mask_keys = self._open_all(headers, event.parcels, t2)
        masking = Masking(
            self.party,
            self.history,
            self.context,
            t1=self.t1,
            t2=t2,
            members=tuple(sorted(headers)),
            shares=shares,
            keys=mask_keys,
        )
        self.r.wipe()
        self.b.wipe()
        return masking, [MaskInput(mask_keys)]

    def _check_headers(self, messages: Sequence[Signed]) -> dict[int, Header]:
        ctx, roster = self.context.digest, self.party.roster
        check_set(messages, roster, ctx, Step.SHARE)
        if len(messages) < roster.threshold:
            raise Refused(Reason.BELOW_THRESHOLD, f"{len(messages)} headers")
        if self.sent.message not in messages:
            raise Refused(Reason.OWN_MESSAGE_CHANGED, "header")
        headers = {}
        for message in messages:
            name = roster.member(message.sender).name
            if message.sender not in self.members:
                raise Refused(Reason.NOT_A_SUBSET, f"{name} shares but did not advertise")
            try:
                header = Header.decode(message.body)
            except MalformedMessage as error:
                raise Refused(Reason.BAD_COMMITMENT, str(error), message.sender) from error
            if header.t1 != self.t1:  # an honest coordinator relays none: it is not the dealer's
                raise Refused(Reason.TRANSCRIPT_MISMATCH, f"header of {name}")
            if header.receivers != self.members:
                raise Refused(Reason.BAD_COMMITMENT, f"header of {name}", message.sender)
            headers[message.sender] = header
        return headers

    def _open_all(
        self, headers: Mapping[int, Header], parcels: Mapping[int, Parcel], t2: bytes
    ) -> tuple[dict[int, Shares], tuple[MaskKey, ...]]:
        ctx, me = self.context.digest, self.party.index
        shares = {me: self.dealt_to_self}
        mask_keys = [keys.self_mask(self.b, ctx, t2, me)]
        mask = keys.mask_key(self.r, ctx)
        for i in sorted(headers):
            if i == me:
                continue
            parcel = self._parcel(i, headers[i], parcels)
            try:
                shares[i] = self._open_mailbox(i, headers[i], parcel)
                seed = (
                    self._open_seed(mask, i, headers[i], parcel)
                    if i < me
                    else keys.pair_seed(self.r, ctx, self.t1, me, i)
                )
            except (Refused, MalformedMessage) as error:
                reason = error.reason if isinstance(error, Refused) else Reason.BAD_COMMITMENT
                raise Refused(reason, f"dealt by {self.party.roster.member(i).name}", i) from error
            mask_keys.append(keys.pair_mask(seed, ctx, t2, min(i, me), max(i, me), me))
            seed.wipe()
        return shares, tuple(mask_keys)

    def _parcel(self, i: int, header: Header, parcels: Mapping[int, Parcel]) -> Parcel:
        """The parcel that dealer i signed for. An honest coordinator took and relays no other, so
        another is not held against the dealer."""
        parcel, dealt = parcels.get(i, Parcel(b"", b"")), header.to(self.party.index)
        seed = digest("parcel", parcel.seed) if i < self.party.index else dealt.seed_parcel
        if (digest("parcel", parcel.mailbox), seed) != (dealt.mailbox_parcel, dealt.seed_parcel):
            raise Refused(Reason.BAD_CIPHERTEXT, f"relayed from {self.party.roster.member(i).name}")
        return parcel

    def _open_mailbox(self, i: int, header: Header, parcel: Parcel) -> Shares:
        ctx, me = self.context.digest, self.party.index
        dealt = header.to(me)
        opened = self.mailbox.open(
            parcel.mailbox, keys.sealing_info("mailbox", ctx, self.t1, i, me)
        )
        raw = opened.reveal()
        opened.wipe()
        share_b, share_r = Secret(raw[:SHARE_BYTES]), Secret(raw[SHARE_BYTES:])
        for kind, share, commitment in (
            ("share b", share_b, dealt.share_b),
            ("share r", share_r, dealt.share_r),
        ):
            parse_share(share)
            if keys.commit(kind, ctx, self.t1, i, me, share) != commitment:
                raise Refused(Reason.BAD_COMMITMENT)
        return share_b, share_r

    def _open_seed(self, mask: SealingKey, i: int, header: Header, parcel: Parcel) -> Secret:
        ctx, me = self.context.digest, self.party.index
        dealt = header.to(me)
        seed = mask.open(parcel.seed, keys.sealing_info("seed", ctx, self.t1, i, me))
        if keys.commit("seed", ctx, self.t1, i, me, seed) != dealt.seed:
            raise Refused(Reason.BAD_COMMITMENT)
        return seed


@dataclass(frozen=True)
class Masking(SiloState):
    """The shell is adding the masks; nothing masked has left yet."""

    context: SessionContext
    t1: bytes
    t2: bytes
    members: tuple[int, ...]
    shares: Mapping[int, Shares] = field(repr=False)
    keys: tuple[MaskKey, ...] = field(repr=False)

    @property
    def session(self) -> SessionContext:
        return self.context

    def wipe(self) -> None:
        for share_b, share_r in self.shares.values():
            share_b.wipe()
            share_r.wipe()
        for mask in self.keys:
            mask.key.wipe()

    def on_headers(self, event: Headers) -> Next:
        if transcript("T2", self.t1, event.messages) != self.t2:
            raise second_view("headers")
        # The shell failed to mask (a full disk, say) and may try again: only one result can
        # be reported, so the keys still cover one vector.
        return self, [MaskInput(self.keys)]

    def on_input_masked(self, event: InputMasked) -> Next:
        """One masked vector per session: its digest is in the ledger before a byte of it leaves."""
        from secagg.silo.masked import MaskedState

        entry = Masked(self.context.digest, event.vector)
        body = MaskedInput(self.t2, event.vector, event.size).encode()
        message = self.party.sign(Step.MASKED_INPUT, self.context.digest, body)
        for mask in self.keys:
            mask.key.wipe()
        masked = MaskedState(
            self.party,
            self.history.after(entry),
            self.context,
            t1=self.t1,
            t2=self.t2,
            members=self.members,
            shares=self.shares,
            vector=event.vector,
            sent=Send(message),
        )
        return masked, [Record(entry), masked.sent]

    def on_survivors(self, event: Survivors) -> Next:
        # A set that claims to hold an input which we have not even made cannot be honest.
        raise Refused(Reason.SECOND_VIEW, "survivors named before our input was made")
