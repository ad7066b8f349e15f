"""Values that no party may hold or send: each is refused where it is made or parsed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from secagg import shamir
from secagg.certificate import Certificate
from secagg.codec import Reader, blob, indices, items, text, u8, u16, u32
from secagg.context import MAX_VECTOR_BYTES, Quantity, SessionContext
from secagg.errors import InvalidParameters, MalformedMessage, Reason, Refused
from secagg.messages import Advert, Confirm, Dealt, Header, Signed, Step, Unmask
from secagg.primitives import Secret, unlock, usable
from secagg.roster import Member, Roster, default_threshold, largest_colluders
from tests.secagg.world import make_context, make_roster


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": b"short"}, "32 bytes long"),
        ({"ring": 24}, "choose one of"),
        ({"length": 0}, "does not fit"),
        ({"length": MAX_VECTOR_BYTES // 2 + 1}, "does not fit"),
        ({"session": 0}, "starts at 1"),
        ({"quantity": Quantity("", 1)}, "has a purpose"),
        ({"quantity": Quantity("p" * 33, 1)}, "has a purpose"),
        ({"quantity": Quantity("é" * 17, 1)}, "has a purpose"),
    ],
)
def test_a_context_that_cannot_be_summed_is_not_made(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidParameters, match=said):
        make_context(make_roster(4)[0], **change)


def test_a_context_of_a_ring_that_does_not_exist_does_not_parse() -> None:
    good = make_context(make_roster(4)[0]).encode()
    ring = good.index(b"\x10\x00\x00\x00\x00\x00\x00\x03\xe8")
    with pytest.raises(MalformedMessage, match="choose one of"):
        SessionContext.decode(good[:ring] + b"\x18" + good[ring + 1 :])


def test_an_unsafe_roster_does_not_parse() -> None:
    good = make_roster(4)[0]
    raw = good.encode()
    weak = raw.replace(u16(3) + u16(1), u16(2) + u16(0), 1)
    with pytest.raises(MalformedMessage, match="break 2t > N"):
        Roster.decode(weak)


def test_an_identity_of_another_length_is_refused() -> None:
    members = tuple(Member(name, name.encode()) for name in ("a", "b", "c"))
    with pytest.raises(InvalidParameters, match="32 bytes"):
        Roster("trial", 1, 3, 1, members)


def test_members_are_found_by_name_and_named_to_people() -> None:
    roster, _ = make_roster(4)
    assert roster.index_of("site-003") == 3
    with pytest.raises(KeyError):
        roster.index_of("elsewhere")
    assert roster.names([2, 4]) == "site-002, site-004"
    assert roster.names([]) == "nobody"
    assert len(roster.fingerprint.replace(" ", "")) == 40


def test_default_parameters_keep_both_bounds_for_every_size() -> None:
    for silos in range(3, 256):
        t = default_threshold(silos)
        c = largest_colluders(silos, t)
        assert 2 * t > silos + c
        assert t - c >= 2
        assert c >= 0
        assert t <= silos


def header(*dealt: Dealt) -> bytes:
    return Header(bytes(32), bytes(32), bytes(32), dealt).encode()


EMPTY = (b"", b"", b"", b"", b"")


@pytest.mark.parametrize(
    ("decode", "raw"),
    [
        (Signed.decode, u8(9) + u16(1) + blob(b"") + blob(bytes(64))),
        (Signed.decode, u8(0) + u16(1) + blob(b"") + blob(bytes(63))),
        (Signed.decode, u8(0) + u16(1) + u32(2**21) + bytes(8)),
        (Advert.decode, blob(bytes(1216)) + blob(bytes(1215))),
        (Header.decode, header(Dealt(2, *EMPTY), Dealt(1, *EMPTY))),
        (Header.decode, header(Dealt(1, *EMPTY), Dealt(1, *EMPTY))),
        (Header.decode, header(Dealt(1, b"x", *EMPTY[1:]))),
        (Unmask.decode, items([u16(2) + blob(bytes(33)), u16(1) + blob(bytes(33))]) + items([])),
        (Unmask.decode, items([u16(1) + blob(bytes(32))]) + items([])),
        (Confirm.decode, blob(bytes(32)) + indices((2, 1)) + blob(bytes(32))),
        (Confirm.decode, blob(bytes(32)) + u32(256) + bytes(600)),
        (Certificate.decode, u8(3) + blob(bytes(32)) + items([])),
    ],
)
def test_what_an_encoder_never_writes_does_not_parse(
    decode: Callable[[bytes], object], raw: bytes
) -> None:
    with pytest.raises(MalformedMessage):
        decode(raw)


def test_text_that_is_no_utf_8_does_not_parse() -> None:
    with pytest.raises(MalformedMessage, match="UTF-8"):
        Reader(blob(b"\xff\xfe"), "name").text(10)
    assert Reader(text("Žižkov"), "name").text(10) == "Žižkov"


def test_a_certificate_without_signatures_proves_nothing() -> None:
    roster, _ = make_roster(4)
    for kind in (Step.CONFIRM, Step.ABORT):
        with pytest.raises(Refused) as caught:
            Certificate(kind, bytes(32), ()).check(roster)
        assert caught.value.reason is Reason.BAD_CERTIFICATE


def test_shares_of_different_secrets_give_no_secret_or_another_one() -> None:
    """f(0) of what does not lie on one polynomial may be one of the 297 values above 2^256."""
    outside = Secret((2**256 + 1).to_bytes(33, "big"))
    with pytest.raises(MalformedMessage, match="not lie on one polynomial"):
        shamir.combine({1: outside, 2: outside, 3: outside})


def test_coefficients_are_drawn_again_until_they_are_below_the_prime() -> None:
    """257 bits reach beyond p; taking them modulo p would prefer small coefficients."""
    draws = iter([b"\xff" * 33, shamir.PRIME.to_bytes(33, "big"), (5).to_bytes(33, "big")])
    shares = shamir.split(Secret(bytes(32)), 2, [1, 2], lambda _: next(draws))
    assert [shamir.parse_share(shares[x]) for x in (1, 2)] == [5, 10]


def test_a_locked_record_that_is_cut_is_refused() -> None:
    for locked in (b"", bytes(11), bytes(12), bytes(40)):
        with pytest.raises(Refused):
            unlock(Secret(bytes(32)), locked, b"")


def test_a_secret_equals_only_a_secret_of_the_same_bytes() -> None:
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"
    with pytest.raises(TypeError):
        hash(Secret(b"a"))


def test_keys_that_nobody_can_seal_to_are_known() -> None:
    from secagg.primitives import SealingKey

    key = SealingKey.from_seed(Secret(bytes(32)), b"ctx", "mask")
    assert repr(key) == "SealingKey()"
    assert usable(key.public)
    for bad in (
        key.public[:1184] + bytes(32),
        key.public[:1184] + b"\x01" + bytes(31),
        b"\xff" * 1184 + key.public[1184:],
        key.public[:-1],
    ):
        assert not usable(bad)


def test_every_reason_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "secure-sum.md").read_text("utf-8")
    assert [reason.name for reason in Reason if f"`{reason.name}`" not in page] == []
