from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("certificate_request", "identity_key", "identity_proof", "agent_version")
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_PROOF_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    certificate_request: bytes
    identity_key: bytes
    identity_proof: bytes
    agent_version: str
    def __init__(self, certificate_request: _Optional[bytes] = ..., identity_key: _Optional[bytes] = ..., identity_proof: _Optional[bytes] = ..., agent_version: _Optional[str] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("state", "certificate", "fingerprint")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[JoinReply.State]
        PENDING: _ClassVar[JoinReply.State]
        APPROVED: _ClassVar[JoinReply.State]
    STATE_UNSPECIFIED: JoinReply.State
    PENDING: JoinReply.State
    APPROVED: JoinReply.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    state: JoinReply.State
    certificate: bytes
    fingerprint: str
    def __init__(self, state: _Optional[_Union[JoinReply.State, str]] = ..., certificate: _Optional[bytes] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("certificate_request",)
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    certificate_request: bytes
    def __init__(self, certificate_request: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...
