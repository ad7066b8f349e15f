"""Proofs, signed by at least t silos, of how a session ended.

A *sum certificate* holds t confirmations of one (T2, U3): the sum over U3 was or will be revealed,
and no other ever. An *abort certificate* holds t ABORTs under the session's roster: an honest silo
that signed ABORT never unmasks, so at most N − t + c < t silos could, and nothing was or will be
revealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from secagg.codec import Reader, blob, items, u8
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.messages import Abort, Confirm, Signed, Step, check_set
from secagg.primitives import HASH_BYTES, digest
from secagg.roster import MAX_SILOS, Roster

_KINDS = {1: Step.CONFIRM, 2: Step.ABORT}


@dataclass(frozen=True)
class Certificate:
    """`kind` is `Step.CONFIRM` (sum) or `Step.ABORT`; `messages` are in order of sender."""

    kind: Step
    context: bytes
    messages: tuple[Signed, ...]

    def encode(self) -> bytes:
        kind = next(number for number, step in _KINDS.items() if step is self.kind)
        return u8(kind) + blob(self.context) + items(m.encode() for m in self.messages)

    @classmethod
    def decode(cls, data: bytes) -> Certificate:
        reader = Reader(data, "certificate")
        kind, context = reader.u8(), reader.exactly(HASH_BYTES)
        messages = reader.items(lambda: Signed.read(reader), MAX_SILOS)
        reader.finish()
        if kind not in _KINDS:
            raise MalformedMessage(f"certificate: no kind {kind}")
        return cls(_KINDS[kind], context, messages)

    @cached_property
    def digest(self) -> bytes:
        return digest("certificate", self.encode())

    @property
    def is_sum(self) -> bool:
        return self.kind is Step.CONFIRM

    def check(self, roster: Roster) -> None:
        """Raises `Refused` unless at least t members signed, all of them the same outcome."""
        try:
            check_set(self.messages, roster, self.context, self.kind)
            outcomes = {self._outcome(message) for message in self.messages}
        except (Refused, MalformedMessage) as error:
            raise Refused(Reason.BAD_CERTIFICATE, str(error)) from error
        if len(self.messages) < roster.threshold:
            raise Refused(
                Reason.BAD_CERTIFICATE,
                f"{len(self.messages)} signatures, the threshold is {roster.threshold}",
            )
        if len(outcomes) != 1:
            raise Refused(Reason.BAD_CERTIFICATE, "the signatures speak of different outcomes")
        if self.is_sum:
            self._check_survivors(roster)
        elif outcomes != {(roster.digest, ())}:
            raise Refused(Reason.BAD_CERTIFICATE, "the signatures are of another roster or study")

    def _check_survivors(self, roster: Roster) -> None:
        if not set(self.senders) <= set(self.survivors) or not set(self.survivors) <= set(
            roster.indices
        ):
            raise Refused(Reason.BAD_CERTIFICATE, "confirmed from outside the survivors")

    def _outcome(self, message: Signed) -> tuple[bytes, tuple[int, ...]]:
        if not self.is_sum:
            return Abort.decode(message.body).roster, ()
        confirm = Confirm.decode(message.body)
        return confirm.t2, confirm.survivors

    @property
    def senders(self) -> tuple[int, ...]:
        return tuple(message.sender for message in self.messages)

    @cached_property
    def t2(self) -> bytes:
        """T2 of a sum certificate, empty for an abort."""
        return Confirm.decode(self.messages[0].body).t2 if self.is_sum else b""

    @cached_property
    def survivors(self) -> tuple[int, ...]:
        """U3 of a sum certificate, empty for an abort."""
        return Confirm.decode(self.messages[0].body).survivors if self.is_sum else ()
