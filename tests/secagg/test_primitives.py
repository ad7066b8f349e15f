"""Known answers for what the secure sum builds on, and the algebra of sharing and masking."""

from __future__ import annotations

import contextlib
import os
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from secagg import primitives, shamir
from secagg.errors import InvalidParameters, MalformedMessage, Refused
from secagg.masking import CHUNK_BYTES, DTYPES, MaskKey, apply_masks
from secagg.primitives import SealingKey, Secret


def test_hkdf_gives_the_answer_of_rfc_5869_a_1() -> None:
    okm = primitives.derive(
        Secret(bytes.fromhex("0b" * 22)),
        salt=bytes.fromhex("000102030405060708090a0b0c"),
        info=bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"),
        length=42,
    )
    assert okm.reveal().hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_signatures_give_the_answer_of_rfc_8032_7_1_test_2() -> None:
    seed = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))
    assert primitives.sign(key, b"\x72").hex() == signature
    assert primitives.verify(bytes.fromhex(public), bytes.fromhex(signature), b"\x72")
    assert not primitives.verify(bytes.fromhex(public), bytes.fromhex(signature), b"\x73")
    assert not primitives.verify(b"short", bytes.fromhex(signature), b"\x72")


@pytest.mark.parametrize("ring", [8, 16, 32])
def test_the_keystream_is_that_of_rfc_8439_a_1(ring: int) -> None:
    """Test vectors 1 and 2 of appendix A.1: blocks 0 and 1 under the all-zero key and nonce."""
    block_0 = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    block_1 = (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    vector = np.zeros(128 // (ring // 8), DTYPES[ring])
    apply_masks(vector, [MaskKey(Secret(bytes(32)), 1)])
    assert vector.tobytes().hex() == block_0 + block_1


@pytest.mark.parametrize("size", [1, CHUNK_BYTES // 2 - 1, CHUNK_BYTES // 2 + 1, CHUNK_BYTES])
def test_masks_of_opposite_sign_cancel_at_any_length(size: int) -> None:
    key = Secret(os.urandom(32))
    vector = np.frombuffer(os.urandom(2 * size), DTYPES[16]).copy()
    masked = vector.copy()
    apply_masks(masked, [MaskKey(key, 1)])
    assert size < 16 or not np.array_equal(masked, vector)
    apply_masks(masked, [MaskKey(key, -1)])
    np.testing.assert_array_equal(masked, vector)


def test_masks_refuse_arrays_that_are_no_ring_vector() -> None:
    for array in (np.zeros(4, np.float32), np.zeros((2, 2), np.uint8), np.zeros(8, np.uint16)[::2]):
        with pytest.raises(InvalidParameters):
            apply_masks(array, [])  # type: ignore[arg-type]


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.data())
def test_any_threshold_of_shares_restores_the_secret(
    raw: bytes, threshold: int, data: st.DataObject
) -> None:
    everybody = range(1, threshold + data.draw(st.integers(0, 5)) + 1)
    shares = shamir.split(Secret(raw), threshold, everybody, os.urandom)
    chosen = data.draw(st.permutations(list(everybody)))[:threshold]
    assert shamir.combine({i: shares[i] for i in chosen}).reveal() == raw


def test_one_share_too_few_gives_another_value() -> None:
    shares = shamir.split(Secret(b"s" * 32), 3, range(1, 6), os.urandom)
    with contextlib.suppress(MalformedMessage):  # the value may not even be a 32-byte string
        assert shamir.combine({1: shares[1], 2: shares[2]}).reveal() != b"s" * 32


def test_a_share_outside_the_field_is_refused() -> None:
    for raw in (bytes(32), bytes(34), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33):
        with pytest.raises(MalformedMessage):
            shamir.parse_share(Secret(raw))


def test_what_is_sealed_opens_only_for_the_receiver_and_the_purpose() -> None:
    ours = SealingKey.from_seed(Secret(bytes(32)), b"session", "mailbox")
    other = SealingKey.from_seed(Secret(bytes(32)), b"session", "mask")
    assert ours.public != other.public
    sealed = primitives.seal(Secret(b"x" * 66), ours.public, b"from 1 to 2")
    assert ours.open(sealed, b"from 1 to 2").reveal() == b"x" * 66
    for key, info, box in (
        (ours, b"from 2 to 1", sealed),
        (other, b"from 1 to 2", sealed),
        (ours, b"from 1 to 2", sealed[:-1]),
        (ours, b"from 1 to 2", b""),
    ):
        with pytest.raises(Refused):
            key.open(box, info)


def test_the_same_seed_gives_the_same_sealing_key() -> None:
    a, b = (SealingKey.from_seed(Secret(b"r" * 32), b"session", "mask") for _ in range(2))
    assert a.public == b.public
    assert len(a.public) == primitives.PUBLIC_KEY_BYTES


def test_a_locked_record_opens_only_with_its_key_and_session() -> None:
    key = Secret(os.urandom(32))
    locked = primitives.lock(key, Secret(b"shares"), b"ctx", os.urandom)
    assert b"shares" not in locked
    assert primitives.unlock(key, locked, b"ctx").reveal() == b"shares"
    for wrong, bound in ((Secret(bytes(32)), b"ctx"), (key, b"other")):
        with pytest.raises(Refused):
            primitives.unlock(wrong, locked, bound)


def test_a_secret_is_neither_shown_nor_pickled() -> None:
    secret = Secret(b"do not show this secret anywhere")
    assert "show" not in repr(secret) + str(secret) + f"{secret}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    secret.wipe()
    assert secret.reveal() == bytes(32)


def test_hashes_of_different_splits_differ() -> None:
    assert primitives.digest("t", b"ab", b"c") != primitives.digest("t", b"a", b"bc")
    assert primitives.digest("t", b"a") != primitives.digest("u", b"a")
