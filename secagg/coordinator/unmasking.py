"""Steps 3 and 4 at the coordinator: one confirmed survivor set, and the keys to its sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from secagg import keys, shamir
from secagg.certificate import Certificate
from secagg.coordinator.base import CoordinatorState, Next, in_order
from secagg.coordinator.ended import Aborting, Summed
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.events import Confirmations, Ended, Received, SiloEvent, Survivors, Unveil
from secagg.masking import MaskKey
from secagg.messages import Confirm, Header, MaskedInput, Signed, Step, Unmask
from secagg.primitives import Secret
from secagg.shamir import parse_share

if TYPE_CHECKING:
    from secagg.coordinator.gathering import Collecting


@dataclass(frozen=True)
class Confirming(CoordinatorState):
    """Step 3: the inputs of U3 are committed; waiting for each of U3 to confirm that very set."""

    collected: Collecting
    confirmations: Mapping[int, Signed] = field(default_factory=dict)

    @property
    def survivors(self) -> tuple[int, ...]:
        """U3."""
        return tuple(sorted(self.collected.inputs))

    @property
    def awaited(self) -> tuple[int, ...]:
        return tuple(i for i in self.survivors if i not in self.confirmations)

    def heard(self) -> Collection[Signed]:
        return [*self.collected.heard(), *self.confirmations.values()]

    def request_for(self, index: int) -> SiloEvent | None:
        return Survivors(self.survivors) if index in self.awaited else None

    def on_received(self, event: Received) -> Next:
        if not self.accept(event, Step.CONFIRM, self.awaited):
            return self, []
        state = self.with_confirmation(event.message)
        return (state, []) if state.awaited else state._close()

    def with_confirmation(self, message: Signed) -> Confirming:
        """Raises `Refused` unless it confirms exactly (T2, U3) and the input that is here."""
        sender = message.sender
        confirm = Confirm.decode(message.body)
        vector = MaskedInput.decode(self.collected.inputs[sender].body).vector
        if confirm != Confirm(self.collected.t2, self.survivors, vector):
            raise Refused(
                Reason.TRANSCRIPT_MISMATCH, f"confirmation of {self.name(sender)}", sender
            )
        return replace(self, confirmations={**self.confirmations, sender: message})

    def on_deadline(self) -> Next:
        if len(self.confirmations) < self.roster.threshold:
            return self.on_cancel(self.too_few(self.confirmations, "confirmed the survivors"))
        return self._close()

    def on_cancel(self, why: str) -> Next:
        return Aborting(self.roster, self.context, why), []

    def _close(self) -> Next:
        signed = self.collected.headers
        headers = {sender: Header.decode(message.body) for sender, message in signed.items()}
        return Unmasking(self.roster, self.context, self, headers), []


@dataclass(frozen=True)
class Unmasking(CoordinatorState):
    """Step 4: waiting for t silos' shares.

    There is no way back: some silo may have released its shares. The confirmations are in the
    silos' ledgers, so this state ends as soon as t of U3 are reachable, after restarts too: one
    that had not confirmed in time may do so now, lest a confirmed one be lost for good.
    """

    confirmed: Confirming
    headers: Mapping[int, Header]
    shares: Mapping[int, Unmask] = field(default_factory=dict, repr=False)
    messages: Mapping[int, Signed] = field(default_factory=dict, repr=False)

    @property
    def awaited(self) -> tuple[int, ...]:
        return tuple(i for i in self.confirmed.survivors if i not in self.shares)

    @property
    def dropped(self) -> tuple[int, ...]:
        """U2 ∖ U3."""
        return tuple(i for i in sorted(self.headers) if i not in self.confirmed.survivors)

    def heard(self) -> Collection[Signed]:
        return [*self.confirmed.heard(), *self.messages.values()]

    def request_for(self, index: int) -> SiloEvent | None:
        if index not in self.awaited:
            return None
        if index in self.confirmed.awaited:
            return Survivors(self.confirmed.survivors)
        return Confirmations(in_order(self.confirmed.confirmations))

    def on_received(self, event: Received) -> Next:
        if event.message.step is Step.CONFIRM:
            return self._on_late_confirmation(event)
        if not self.accept(event, Step.UNMASK, self.awaited):
            return self, []
        sender = event.message.sender
        unmask = Unmask.decode(event.message.body)
        self._check_shares(sender, unmask)
        state = replace(
            self,
            shares={**self.shares, sender: unmask},
            messages={**self.messages, sender: event.message},
        )
        if len(state.shares) < self.roster.threshold:
            return state, []
        return state._unveil()

    def _on_late_confirmation(self, event: Received) -> Next:
        if not self.accept(event, Step.CONFIRM, self.confirmed.awaited):
            return self, []
        return replace(self, confirmed=self.confirmed.with_confirmation(event.message)), []

    def _check_shares(self, sender: int, unmask: Unmask) -> None:
        ctx, t1 = self.context.digest, self.confirmed.collected.t1
        for kind, shares, owners in (
            ("share b", unmask.shares_b, self.confirmed.survivors),
            ("share r", unmask.shares_r, self.dropped),
        ):
            if tuple(owner for owner, _ in shares) != owners:
                raise MalformedMessage(f"unmask of {self.name(sender)}: shares of other silos")
            for owner, share in shares:
                dealt = self.headers[owner].to(sender)
                wanted = dealt.share_b if kind == "share b" else dealt.share_r
                parse_share(share)
                if keys.commit(kind, ctx, t1, owner, sender, share) != wanted:
                    raise Refused(Reason.BAD_COMMITMENT, f"{kind} of {self.name(owner)}", sender)

    def _unveil(self) -> Next:
        certificate = Certificate(
            Step.CONFIRM, self.context.digest, in_order(self.confirmed.confirmations)
        )
        try:
            removed = tuple(self._self_masks()) + tuple(self._pair_masks())
        except Refused as error:
            # Shares that match their commitments but not one another: only the dealer can have
            # done that, and a sum without its mask cannot be computed by anyone.
            why = f"session {self.context.session} ({self.context.quantity}): {error}"
            summed = Summed(self.roster, self.context, certificate)
            return summed, [Ended(why, certificate, error.accused)]
        state = Summed(self.roster, self.context, certificate)
        return state, [Unveil(self.confirmed.survivors, removed, certificate)]

    def _self_masks(self) -> list[MaskKey]:
        ctx, t2 = self.context.digest, self.confirmed.collected.t2
        masks = []
        for i in self.confirmed.survivors:
            b = self._restore("b", i)
            masks.append(MaskKey(keys.self_mask(b, ctx, t2, i).key, -1))
            b.wipe()
        return masks

    def _pair_masks(self) -> list[MaskKey]:
        """The keystreams that survivors share with dropped silos and that nothing cancels."""
        collected, ctx = self.confirmed.collected, self.context.digest
        masks = []
        for d in self.dropped:
            r = self._restore("r", d)
            mask_key = keys.mask_key(r, ctx)
            for i in self.confirmed.survivors:
                low, high = min(d, i), max(d, i)
                if low == d:
                    seed = keys.pair_seed(r, ctx, collected.t1, d, i)
                else:
                    info = keys.sealing_info("seed", ctx, collected.t1, i, d)
                    try:
                        seed = mask_key.open(collected.parcels[i][d].seed, info)
                    except Refused as error:
                        raise Refused(error.reason, f"seed dealt by {self.name(i)}", i) from error
                wanted = self.headers[low].to(high).seed
                if keys.commit("seed", ctx, collected.t1, low, high, seed) != wanted:
                    raise Refused(
                        Reason.BAD_COMMITMENT, f"seed dealt by {self.name(low)}", accused=low
                    )
                applied = keys.pair_mask(seed, ctx, collected.t2, low, high, owner=i)
                masks.append(MaskKey(applied.key, -applied.sign))
                seed.wipe()
            r.wipe()
        return masks

    def _restore(self, kind: str, owner: int) -> Secret:
        ctx, t1 = self.context.digest, self.confirmed.collected.t1
        shares = {
            sender: dict(unmask.shares_b if kind == "b" else unmask.shares_r)[owner]
            for sender, unmask in self.shares.items()
        }
        accused = f"{kind} shared by {self.name(owner)}"
        try:
            secret = shamir.combine(shares)
        except MalformedMessage as error:
            raise Refused(Reason.BAD_COMMITMENT, accused, accused=owner) from error
        header = self.headers[owner]
        wanted = header.commit_b if kind == "b" else header.commit_r
        if keys.commit(kind, ctx, t1, owner, 0, secret) != wanted:
            raise Refused(Reason.BAD_COMMITMENT, accused, accused=owner)
        return secret
