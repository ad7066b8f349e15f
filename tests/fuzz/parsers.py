"""Every parser that reads bytes of another party: one function each, and seeds from the vectors.

A target parses; what parses must encode to the same bytes, and what does not must raise the one
error of its kind. Anything else that escapes is a finding. Two kinds are not canonical as bytes,
and are compared as values instead: protobuf messages, and invitations, which people copy by hand.
Of two kinds of files that are only read nothing is written again.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from safetensors.numpy import save

from coordinator.journal import decode_event, encode_event
from coordinator.wire import BadRequest, check, parcels_of, task_of
from diffusion.features.file import METADATA, Architecture, FeatureFileError, parse_network
from protos.v1 import coordination_pb2 as pb
from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.errors import MalformedMessage
from secagg.events import Deadline, Received
from secagg.ledger import Confirmed, Masked, Opened, Settled, decode_entry, encode_entry
from secagg.messages import (
    Abort,
    Advert,
    Complaint,
    Confirm,
    Header,
    MaskedInput,
    Signed,
    Unmask,
)
from secagg.roster import Roster
from silo.data.pickled import bytes_of_rows, parse
from silo.errors import ProposalRefused
from silo.offers import BadOffer, parse_terms
from silo.proposal import Pinned, check_open
from silo.wire import event_of
from study.invitation import Invitation, InvitationError
from study.quantity import (
    AuxiliaryImages,
    CensusWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    decode_work,
    encode_work,
    session_context,
)
from tests.silo.pickles import cifar_batch, python_2
from tests.silo.studies import make_plan, make_roster

Target = Callable[[bytes], None]
VECTORS = Path(__file__).parents[1] / "vectors" / "secure_sum"


def _canonical(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Target:
    def target(data: bytes) -> None:
        try:
            value = decode(data)
        except MalformedMessage:
            return
        if encode(value) != data:
            raise AssertionError(f"not canonical: {data.hex()} parsed as {value!r}")

    return target


def _invitation(data: bytes) -> None:
    try:
        token = data.decode("utf-8")
        found = Invitation.decode(token)
    except (InvitationError, UnicodeDecodeError):
        return
    if Invitation.decode(found.encode()) != found:
        raise AssertionError(f"an invitation changes when written again: {token!r}")


def _read(kind: type[Message], data: bytes) -> Any:
    """What gRPC would hand on; it refuses the rest by itself."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def _task(data: bytes) -> None:
    """What a coordinator asks of an agent in a session."""
    task = _read(pb.Task, data)
    if task is None:
        return
    try:
        event = event_of(task)
    except MalformedMessage:
        return
    if event_of(task_of("trial", 1, event, b"", [], "")) != event:
        raise AssertionError(f"a task changes when written again: {event}")


def _open(data: bytes) -> None:
    """What a coordinator proposes; nothing but exactly what was agreed passes."""
    message = _read(pb.Open, data)
    if message is None:
        return
    try:
        proposal = check_open(1, message, PINNED)
    except ProposalRefused:
        return
    if (proposal.context.encode(), encode_work(proposal.work)) != (message.context, message.work):
        raise AssertionError(f"a proposal changes when written again: {proposal}")


def _offer(data: bytes) -> None:
    """A plan and a roster, as a coordinator offers them."""
    offer = _read(pb.Offer, data)
    if offer is None:
        return
    try:
        terms = parse_terms("trial", offer.plan, offer.roster)
    except BadOffer:
        return
    if (terms.plan.toml(), terms.roster.encode()) != (offer.plan, offer.roster):
        raise AssertionError(f"an offer changes when written again: {terms}")


def _submit(data: bytes) -> None:
    """A message and its parcels, as a silo hands them in."""
    request = _read(pb.SubmitRequest, data)
    if request is None:
        return
    try:
        check(request, ("study", "session", "signed"))
        message, parcels = Signed.decode(request.signed), parcels_of(request.parcels)
    except (BadRequest, MalformedMessage):
        return
    if (message.encode(), len(parcels)) != (request.signed, len(request.parcels)):
        raise AssertionError(f"a submission changes when written again: {message}")


def _pickle(data: bytes) -> None:
    """A batch of CIFAR's Python version, which anybody may have made."""
    with suppress(ValueError):
        found = parse(data)
        bytes_of_rows(found.get("data") if isinstance(found, dict) else found, 3072)


def _network(data: bytes) -> None:
    """The file of a feature network, which whoever proposes a study made."""
    try:
        found = parse_network("net.safetensors", data)
    except FeatureFileError:
        return
    sizes = {name: tensor.shape for name, tensor in found.tensors.items()}
    if sizes != found.architecture.shapes():
        raise AssertionError(f"a network of other sizes than it says: {sizes}")


_MESSAGES = (Signed, Advert, Header, MaskedInput, Confirm, Unmask, Abort, Complaint)
_VALUES = (Certificate, SessionContext, Roster)
TARGETS: dict[str, Target] = {
    kind.__name__.lower(): _canonical(kind.decode, lambda value: value.encode())
    for kind in (*_MESSAGES, *_VALUES)
} | {
    "entry": _canonical(decode_entry, encode_entry),
    "work": _canonical(decode_work, encode_work),
    "journal": _canonical(decode_event, encode_event),
    "invitation": _invitation,
    "task": _task,
    "open": _open,
    "offer": _offer,
    "submit": _submit,
    "pickle": _pickle,
    "network": _network,
}
PLAN = make_plan()
ROSTER, _ = make_roster(PLAN)
PINNED = Pinned(PLAN, ROSTER, ("census", "moments", "tags", "images", "round"))


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    return SEEDS[target]


def _sessions() -> list[dict[str, Any]]:
    files = sorted(VECTORS.glob("4-*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def _works() -> list[bytes]:
    sha = "0" * 64
    works = (
        CensusWork(),
        MomentsWork(total_count=70, network="tiny", sha256=sha, dimension=8, bound=4.5),
        TagsWork(total_count=70, images=16, slots=4096),
        ImagesWork(tags=sha, occupied=12, record_size=65),
        RoundWork(total_count=70, sizes=(3, 4), clips=(0.5, 1e-7)),
        RoundWork(
            total_count=70,
            sizes=(3, 4),
            clips=(0.5, 1e-7),
            auxiliary=AuxiliaryImages(sha256=sha, images=12),
        ),
    )
    return [encode_work(work) for work in works]


def _invitations() -> list[bytes]:
    pem = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"
    certificate, key = (pem.format(kind).encode() for kind in ("CERTIFICATE", "PRIVATE KEY"))
    when = datetime(2030, 1, 1, tzinfo=UTC)
    token = Invitation("st-marys", "host:443", certificate, certificate, key, when).encode()
    return [token.encode()]


def _tasks(session: dict[str, Any]) -> list[bytes]:
    """The steps of a recorded session as they are relayed to its first silo."""
    silos = session["silos"]

    def of(step: str) -> list[bytes]:
        return [b64decode(silo[step]) for silo in silos if step in silo]

    parcels = [pb.Parcel(silo=2, mailbox=b"mailbox", seed=b"seed")]
    asked = (
        {"adverts": pb.Adverts(signed=of("advertise"))},
        {"headers": pb.Headers(signed=of("share"), parcels=parcels)},
        {"survivors": pb.Survivors(silos=[1, 2, 3])},
        {"confirmations": pb.Confirmations(signed=of("confirm"))},
        {"give_up": pb.GiveUp(context_digest=bytes(32), reason="why")},
    )
    return [pb.Task(study="trial", session=1, **task).SerializeToString() for task in asked]


def _proposals() -> list[bytes]:
    work = CensusWork()
    context = session_context(ROSTER, PLAN.digest(), 16, work, session=1, round=1)
    message = pb.Open(context=context.encode(), work=encode_work(work))
    return [message.SerializeToString()]


def _networks() -> list[bytes]:
    architecture = Architecture(image_size=4, layers=((1, 2), (2, 1)), classes=2)
    tensors = {name: np.zeros(size, "<f4") for name, size in architecture.shapes().items()}
    return [save(tensors, {METADATA: architecture.model_dump_json()})]


def _pickles() -> list[bytes]:
    images = np.zeros((1, 3, 32, 32), np.uint8)
    return [python_2(cifar_batch(images, [7], kind)) for kind in ("", "fine_")]


def _seeds() -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    bodies = {"advertise": "advert", "share": "header", "masked_input": "maskedinput"}
    bodies |= {"confirm": "confirm", "unmask": "unmask"}
    for session in _sessions():
        found["roster"].append(bytes.fromhex(session["roster"]))
        found["sessioncontext"].append(bytes.fromhex(session["context"]))
        found["certificate"].append(b64decode(session["certificate"]))
        for step, body in bodies.items():
            if step in session["silos"][0]:
                raw = b64decode(session["silos"][0][step])
                found["signed"].append(raw)
                found[body].append(Signed.decode(raw).body)
    context = SessionContext.decode(found["sessioncontext"][0])
    digest = bytes(32)
    entries = (
        Opened(context),
        Masked(digest, digest),
        Confirmed(digest, digest, (1, 2, 3, 4), (1, 2, 3), digest, b"locked"),
        Settled(digest, digest, True, False),
    )
    found["complaint"] = [Complaint(3).encode()]
    found["abort"] = [Abort(bytes(range(32))).encode()]
    found["entry"] = [encode_entry(entry) for entry in entries]
    found["work"], found["invitation"] = _works(), _invitations()
    found["task"], found["open"] = _tasks(_sessions()[0]), _proposals()
    offer = pb.Offer(plan=PLAN.toml(), roster=ROSTER.encode())
    found["offer"] = [offer.SerializeToString()]
    signed = found["signed"][1]
    parcels = [pb.Parcel(silo=2, mailbox=b"mailbox", seed=b"seed")]
    submit = pb.SubmitRequest(study="trial", session=1, signed=signed, parcels=parcels)
    found["submit"] = [submit.SerializeToString()]
    received = Received(Signed.decode(signed), parcels_of(parcels))
    found["journal"] = [encode_event(received), encode_event(Deadline())]
    found["pickle"], found["network"] = _pickles(), _networks()
    return found


SEEDS = _seeds()
