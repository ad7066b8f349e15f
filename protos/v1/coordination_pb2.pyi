from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NextTaskRequest(_message.Message):
    __slots__ = ("study", "settled_session", "wait_seconds", "epoch")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SETTLED_SESSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    study: str
    settled_session: int
    wait_seconds: int
    epoch: int
    def __init__(self, study: _Optional[str] = ..., settled_session: _Optional[int] = ..., wait_seconds: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("study", "session", "idle", "offer", "open", "adverts", "headers", "survivors", "confirmations", "give_up", "outcome", "ended")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    CONFIRMATIONS_FIELD_NUMBER: _ClassVar[int]
    GIVE_UP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    idle: Idle
    offer: Offer
    open: Open
    adverts: Adverts
    headers: Headers
    survivors: Survivors
    confirmations: Confirmations
    give_up: GiveUp
    outcome: Outcome
    ended: StudyEnded
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., idle: _Optional[_Union[Idle, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., adverts: _Optional[_Union[Adverts, _Mapping]] = ..., headers: _Optional[_Union[Headers, _Mapping]] = ..., survivors: _Optional[_Union[Survivors, _Mapping]] = ..., confirmations: _Optional[_Union[Confirmations, _Mapping]] = ..., give_up: _Optional[_Union[GiveUp, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., ended: _Optional[_Union[StudyEnded, _Mapping]] = ...) -> None: ...

class Idle(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Offer(_message.Message):
    __slots__ = ("plan", "roster")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    plan: str
    roster: bytes
    def __init__(self, plan: _Optional[str] = ..., roster: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("context", "work", "artifacts")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    work: bytes
    artifacts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, context: _Optional[bytes] = ..., work: _Optional[bytes] = ..., artifacts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Adverts(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Headers(_message.Message):
    __slots__ = ("signed", "parcels")
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedScalarFieldContainer[bytes]
    parcels: _containers.RepeatedCompositeFieldContainer[Parcel]
    def __init__(self, signed: _Optional[_Iterable[bytes]] = ..., parcels: _Optional[_Iterable[_Union[Parcel, _Mapping]]] = ...) -> None: ...

class Parcel(_message.Message):
    __slots__ = ("silo", "mailbox", "seed")
    SILO_FIELD_NUMBER: _ClassVar[int]
    MAILBOX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    silo: int
    mailbox: bytes
    seed: bytes
    def __init__(self, silo: _Optional[int] = ..., mailbox: _Optional[bytes] = ..., seed: _Optional[bytes] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("silos",)
    SILOS_FIELD_NUMBER: _ClassVar[int]
    silos: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, silos: _Optional[_Iterable[int]] = ...) -> None: ...

class Confirmations(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class GiveUp(_message.Message):
    __slots__ = ("context_digest", "reason")
    CONTEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    context_digest: bytes
    reason: str
    def __init__(self, context_digest: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("certificate", "log")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    log: LogHead
    def __init__(self, certificate: _Optional[bytes] = ..., log: _Optional[_Union[LogHead, _Mapping]] = ...) -> None: ...

class LogHead(_message.Message):
    __slots__ = ("place", "digest")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    place: int
    digest: bytes
    def __init__(self, place: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class StudyEnded(_message.Message):
    __slots__ = ("reason", "model")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[StudyEnded.Reason]
        FINISHED: _ClassVar[StudyEnded.Reason]
        STOPPED: _ClassVar[StudyEnded.Reason]
        REMOVED: _ClassVar[StudyEnded.Reason]
    REASON_UNSPECIFIED: StudyEnded.Reason
    FINISHED: StudyEnded.Reason
    STOPPED: StudyEnded.Reason
    REMOVED: StudyEnded.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    reason: StudyEnded.Reason
    model: bytes
    def __init__(self, reason: _Optional[_Union[StudyEnded.Reason, str]] = ..., model: _Optional[bytes] = ...) -> None: ...

class AnswerOfferRequest(_message.Message):
    __slots__ = ("study", "plan_digest", "roster_digest", "accepted", "rule")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    study: str
    plan_digest: bytes
    roster_digest: bytes
    accepted: bool
    rule: str
    def __init__(self, study: _Optional[str] = ..., plan_digest: _Optional[bytes] = ..., roster_digest: _Optional[bytes] = ..., accepted: bool = ..., rule: _Optional[str] = ...) -> None: ...

class AnswerOfferReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveStudyRequest(_message.Message):
    __slots__ = ("study", "reason")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    study: str
    reason: str
    def __init__(self, study: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveStudyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CountersignRequest(_message.Message):
    __slots__ = ("study", "log", "signature")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    study: str
    log: LogHead
    signature: bytes
    def __init__(self, study: _Optional[str] = ..., log: _Optional[_Union[LogHead, _Mapping]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class CountersignReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("study", "session", "signed", "parcels")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    signed: bytes
    parcels: _containers.RepeatedCompositeFieldContainer[Parcel]
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., signed: _Optional[bytes] = ..., parcels: _Optional[_Iterable[_Union[Parcel, _Mapping]]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportRefusalRequest(_message.Message):
    __slots__ = ("study", "session", "reason")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    reason: str
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ReportRefusalReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportProgressRequest(_message.Message):
    __slots__ = ("study", "session", "activity", "step", "steps")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    activity: str
    step: int
    steps: int
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., activity: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class ReportProgressReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UploadOffsetRequest(_message.Message):
    __slots__ = ("study", "session")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class UploadOffsetReply(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: int
    def __init__(self, committed: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("study", "session", "offset", "data", "size", "sha256")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    offset: int
    data: bytes
    size: int
    sha256: bytes
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: int
    def __init__(self, committed: _Optional[int] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("study", "sha256", "offset")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    study: str
    sha256: bytes
    offset: int
    def __init__(self, study: _Optional[str] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadChunk(_message.Message):
    __slots__ = ("offset", "data", "size")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    size: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...
