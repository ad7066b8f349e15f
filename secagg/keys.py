"""Derivations of the protocol: what hides what, written once for both sides.

Letters as in docs/secure-sum.md: r root, b self-mask seed, s_ij pair seed, ctx context digest,
T1 and T2 transcript digests, i and j roster indices.
"""

from __future__ import annotations

from secagg.codec import blob, u16
from secagg.masking import MaskKey
from secagg.primitives import SealingKey, Secret, derive, digest


def mask_key(r: Secret, ctx: bytes) -> SealingKey:
    """The key that pair seeds are sealed to. It derives from r, so that the survivors, who can
    restore r of a dropped silo, can also restore what was sealed to it."""
    return SealingKey.from_seed(r, ctx, "mask")


def pair_seed(r_i: Secret, ctx: bytes, t1: bytes, i: int, j: int) -> Secret:
    """s_ij for i < j, dealt by i alone: uniform to everyone who does not hold r_i or opens it."""
    return derive(r_i, ctx, b"pair seed" + blob(t1) + u16(i) + u16(j))


def pair_mask(s_ij: Secret, ctx: bytes, t2: bytes, i: int, j: int, owner: int) -> MaskKey:
    """The keystream of the pair (i, j), i < j: `owner` i adds it and `owner` j subtracts it."""
    key = derive(s_ij, ctx, b"pair mask" + blob(t2) + u16(i) + u16(j))
    return MaskKey(key, 1 if owner == i else -1)


def self_mask(b_i: Secret, ctx: bytes, t2: bytes, i: int) -> MaskKey:
    """The keystream that stays on an input until t silos give their shares of b_i."""
    return MaskKey(derive(b_i, ctx, b"self mask" + blob(t2) + u16(i)), 1)


def commit(kind: str, ctx: bytes, t1: bytes, dealer: int, receiver: int, secret: Secret) -> bytes:
    """H(kind, ctx, T1, dealer, receiver, secret). Hiding, since every committed secret has 256
    bits of entropy of its own; binding by collision resistance. Receiver 0: a secret of the
    dealer itself (r or b)."""
    return digest("commit/" + kind, ctx, t1, u16(dealer), u16(receiver), secret.reveal())


def sealing_info(kind: str, ctx: bytes, t1: bytes, sender: int, receiver: int) -> bytes:
    """HPKE `info`: a ciphertext opens only as this sender's, to this receiver, in this session."""
    return digest("seal/" + kind, ctx, t1, u16(sender), u16(receiver))
