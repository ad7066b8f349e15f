"""The algebra of sharing and masking, and what sealing, locking and secrets promise."""

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


def test_a_signature_verifies_for_its_message_and_key_only() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, signature = key.public_key().public_bytes_raw(), primitives.sign(key, b"message")
    assert primitives.verify(public, signature, b"message")
    assert not primitives.verify(public, signature, b"massage")
    assert not primitives.verify(b"short", signature, b"message")


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
