"""Known answers for every primitive, by the functions that the protocol itself calls.

tests/vectors/hpke.json and wycheproof.json name their sources.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from secagg import primitives
from secagg.masking import DTYPES, MaskKey, apply_masks
from secagg.primitives import SealingKey, Secret, derive, seal, usable
from tests.secagg import spec

FOLDER = Path(__file__).parents[1] / "vectors"
HPKE = json.loads((FOLDER / "hpke.json").read_text())
WYCHEPROOF = json.loads((FOLDER / "wycheproof.json").read_text())["vectors"]


def unhex(value: str) -> bytes:
    return bytes.fromhex("".join(value.split()))


def cases(name: str) -> Any:
    found = WYCHEPROOF[name]
    return pytest.mark.parametrize("case", found, ids=[str(case["tcId"]) for case in found])


# --- RFC 5869 appendix A: the three cases with SHA-256

RFC_5869 = [
    (
        "0b" * 22,
        bytes(range(0x0D)).hex(),
        bytes(range(0xF0, 0xFA)).hex(),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
        "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
        "cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("ikm", "salt", "info", "okm"), RFC_5869)
def test_hkdf_gives_the_answers_of_rfc_5869(ikm: str, salt: str, info: str, okm: str) -> None:
    ours = derive(Secret(unhex(ikm)), unhex(salt), unhex(info), len(okm) // 2)
    assert ours.reveal().hex() == okm
    assert spec.hkdf(unhex(ikm), unhex(salt), unhex(info), len(okm) // 2).hex() == okm


@cases("hkdf_sha256")
def test_hkdf_gives_the_answers_of_wycheproof(case: dict[str, Any]) -> None:
    ikm, salt, info = (unhex(case[key]) for key in ("ikm", "salt", "info"))
    if case["result"] == "invalid":  # more than 255 blocks
        with pytest.raises(ValueError, match=r"(?i)large|length"):
            derive(Secret(ikm), salt, info, case["size"])
    else:
        assert derive(Secret(ikm), salt, info, case["size"]).reveal().hex() == case["okm"]


# --- RFC 8032 §7.1

RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_signatures_give_the_answers_of_rfc_8032(
    seed: str, public: str, message: str, signature: str
) -> None:
    key = Ed25519PrivateKey.from_private_bytes(unhex(seed))
    assert key.public_key().public_bytes_raw().hex() == public
    assert primitives.sign(key, unhex(message)).hex() == signature
    assert primitives.verify(unhex(public), unhex(signature), unhex(message))


@cases("ed25519")
def test_signatures_are_judged_as_wycheproof_does(case: dict[str, Any]) -> None:
    """Among them: malleable, truncated and padded signatures, points out of range."""
    good = primitives.verify(unhex(case["pk"]), unhex(case["sig"]), unhex(case["msg"]))
    assert good == (case["result"] == "valid")


# --- RFC 8439


def test_chacha20_gives_the_answer_of_rfc_8439_2_4_2() -> None:
    key, nonce = bytes(range(32)), unhex("000000000000004a00000000")
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you "
        b"only one tip for the future, sunscreen would be it."
    )
    cipher = Cipher(algorithms.ChaCha20(key, (1).to_bytes(4, "little") + nonce), None).encryptor()
    assert cipher.update(text).hex() == (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


RFC_8439_A_1 = [  # key (last byte), counter, block: those of appendix A.1 with the zero nonce
    (
        0,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        0,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        1,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
]


@pytest.mark.parametrize(("last", "counter", "block"), RFC_8439_A_1)
@pytest.mark.parametrize("ring", [8, 16, 32])
def test_masks_are_the_keystream_of_rfc_8439(
    ring: int, last: int, counter: int, block: str
) -> None:
    vector = np.zeros(128 // (ring // 8), DTYPES[ring])
    apply_masks(vector, [MaskKey(Secret(bytes(31) + bytes([last])), 1)])
    assert vector.tobytes()[64 * counter : 64 * (counter + 1)].hex() == block


@cases("chacha20_poly1305")
def test_what_is_locked_opens_as_wycheproof_says(case: dict[str, Any]) -> None:
    parts = ("key", "iv", "aad", "msg", "ct", "tag")
    key, nonce, aad, text, ct, tag = (unhex(case[part]) for part in parts)
    if len(nonce) != 12:
        with pytest.raises(ValueError, match=r"(?i)nonce"):
            ChaCha20Poly1305(key).decrypt(nonce, ct + tag, aad)
    elif case["result"] == "invalid":
        with pytest.raises(InvalidTag):
            ChaCha20Poly1305(key).decrypt(nonce, ct + tag, aad)
    else:
        assert ChaCha20Poly1305(key).encrypt(nonce, text, aad) == ct + tag
        assert primitives.unlock(Secret(key), nonce + ct + tag, aad).reveal() == text


# --- the parts of the hybrid KEM


@cases("x25519")
def test_x25519_gives_the_answers_of_wycheproof_or_refuses_zero(case: dict[str, Any]) -> None:
    key = X25519PrivateKey.from_private_bytes(unhex(case["private"]))
    public = X25519PublicKey.from_public_bytes(unhex(case["public"]))
    if set(case["shared"]) == {"0"}:
        with pytest.raises(ValueError, match=r"(?i)shared"):
            key.exchange(public)
    else:
        assert key.exchange(public).hex() == case["shared"]


@cases("mlkem_768_keygen_seed")
def test_ml_kem_keys_come_from_their_seed(case: dict[str, Any]) -> None:
    key = MLKEM768PrivateKey.from_seed_bytes(unhex(case["seed"]))
    assert key.public_key().public_bytes_raw().hex() == case["ek"]


@cases("mlkem_768")
def test_ml_kem_opens_as_wycheproof_says(case: dict[str, Any]) -> None:
    seed, ct = unhex(case["seed"]), unhex(case["c"])
    if case["result"] == "invalid":
        with pytest.raises(ValueError, match=r"."):
            MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ct)
    else:
        assert MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ct).hex() == case["K"]


@cases("mlkem_768_encaps")
def test_ml_kem_keys_out_of_range_cannot_be_sealed_to(case: dict[str, Any]) -> None:
    good = SealingKey.from_seed(Secret(bytes(32)), b"ctx", "mask").public
    with pytest.raises(ValueError, match=r"."):
        MLKEM768PublicKey.from_public_bytes(unhex(case["ek"])).encapsulate()
    assert not usable(unhex(case["ek"]) + good[1184:])


# --- HPKE: the library offers sealing without aad, the published answers have one. So the second
# implementation is held against the answers, and the library against the second implementation.


def test_the_second_hpke_gives_the_answer_for_mlkem768_x25519() -> None:
    """draft-ietf-hpke-pq with exactly our suite: KEM 0x647a, HKDF-SHA256, ChaCha20-Poly1305."""
    v = HPKE["mlkem768_x25519"]
    assert (v["kem_id"], v["kdf_id"], v["aead_id"], v["mode"]) == (0x647A, 1, 3, 0)
    expanded = hashlib.shake_256(unhex(v["skRm"])).digest(96)
    pq = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    ec = X25519PrivateKey.from_private_bytes(expanded[64:])
    public = pq.public_key().public_bytes_raw() + ec.public_key().public_bytes_raw()
    assert public.hex() == v["pkRm"]
    shared = spec.hpke_secret(pq, ec, unhex(v["enc"]))
    assert shared.hex() == v["shared_secret"]
    key, nonce = spec.hpke_schedule(shared, unhex(v["info"]))
    assert (key.hex(), nonce.hex()) == (v["key"], v["base_nonce"])
    first = v["encryptions"][0]
    sealed = unhex(v["enc"]) + unhex(first["ct"])
    opened = spec.hpke_open(pq, ec, sealed, unhex(v["info"]), unhex(first["aad"]))
    assert opened.hex() == first["pt"]


def test_the_key_schedule_gives_the_answer_of_rfc_9180_a_2_1() -> None:
    v = HPKE["x25519"]
    key, nonce = spec.hpke_schedule(unhex(v["shared_secret"]), unhex(v["info"]), v["kem_id"])
    assert (key.hex(), nonce.hex()) == (v["key"], v["base_nonce"])
    first = v["encryptions"][0]
    text = ChaCha20Poly1305(key).decrypt(nonce, unhex(first["ct"]), unhex(first["aad"]))
    assert text.hex() == first["pt"]


@pytest.mark.parametrize("length", [0, 32, 66, 500])
def test_what_the_library_seals_the_second_hpke_opens(length: int) -> None:
    key = SealingKey.from_seed(Secret(b"s" * 32), b"ctx", "mailbox")
    pq, ec, public = spec.sealing_key(b"s" * 32, b"ctx", "mailbox")
    assert public == key.public
    sealed = seal(Secret(b"x" * length), key.public, b"info")
    assert len(sealed) == length + primitives.SEALING_BYTES
    assert spec.hpke_open(pq, ec, sealed, b"info") == b"x" * length
    assert key.open(sealed, b"info").reveal() == b"x" * length
