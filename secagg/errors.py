"""What can go wrong in a secure sum, as types and as words for the person who reads the log."""

from __future__ import annotations

from enum import Enum


class SecAggError(Exception):
    """Base of every error that this package raises."""


class MalformedMessage(SecAggError):
    """Bytes from the wire are not a canonical encoding; the only error that a parser raises."""


class InvalidParameters(SecAggError):
    """A roster or a session that could not keep its promise; refused before anything is drawn."""


class UnexpectedEvent(SecAggError):
    """An event that the current state has no answer to; the state is unchanged."""


class Reason(Enum):
    """Why a party refused; the value is the sentence that reaches the log and the other side."""

    NOT_IN_ROSTER = "a message came from outside the pinned roster"
    BAD_SIGNATURE = "a signature does not verify under the identity pinned in the roster"
    WRONG_STEP = "a message of another step was passed on in this one"
    DUPLICATE_SENDER = "two messages of one silo in a single step"
    NOT_ASCENDING = "a set of silos is not strictly ascending"
    BELOW_THRESHOLD = "fewer silos than the threshold"
    OWN_MESSAGE_CHANGED = "our own message is missing or is not the one we sent"
    NOT_A_SUBSET = "a silo appears that did not take part in the step before"
    SELF_NOT_INCLUDED = "we are asked to go on with a set that we are not in"
    TRANSCRIPT_MISMATCH = "a silo speaks of another transcript than ours: views were split"
    BAD_KEY = "an advertised public key cannot be used"
    BAD_CIPHERTEXT = "a ciphertext does not match its signed digest or does not open"
    BAD_COMMITMENT = "a share, seed or secret does not match the commitment its dealer signed"
    SECOND_VIEW = "the same step was asked again with different content"
    WRONG_SURVIVORS = "the survivors are not those that the reservation was made with"
    SESSION_NOT_NEW = "the session number is not higher than one already used"
    QUANTITY_CLOSED = "this quantity was already summed; a second sum could isolate one silo"
    UNKNOWN_PURPOSE = "the ledger has no rule for sums of this purpose"
    WRONG_BINDING = "a model or a reservation is bound where the purpose has none, or it is missing"
    MODEL_REUSED = "this input model was already used in another round of the study"
    ROUND_NOT_NEW = "the round is not later than the last one"
    IN_DOUBT = "an earlier session has neither a sum nor an abort certificate yet"
    BAD_CERTIFICATE = "a certificate does not verify"
    ALREADY_UNMASKED = "shares of this session were released; it can no longer be aborted"
    ALREADY_ABORTED = "we signed ABORT for this session; its shares stay closed"
    TOO_MANY_ABORTS = "ABORT was asked for too many sessions that we never opened"
    KEYS_LOST = "this process was restarted and the keys of the session are gone"
    ROSTER_MISMATCH = "the session names another roster, threshold or epoch than the pinned one"


class Refused(SecAggError):
    """A message or request that an honest party must not answer.

    `reason` says which rule was broken; `accused` is the roster index of the silo whose message
    broke it, where a single silo can be named.
    """

    def __init__(self, reason: Reason, detail: str = "", accused: int | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self.accused = accused
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
