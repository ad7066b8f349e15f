"""A tiny study: plan, roster and keys for tests that need one."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from diffusion.features.pinned import FEATURE_NETWORKS
from secagg.roster import Member, Roster
from study.plan import Plan, load_plan

PLAN = """
[study]
name = "trial"
title = "A trial"
seed = 7
[data]
image_size = 8
[model]
block_out_channels = [8]
attention = [false]
mid_attention = false
norm_num_groups = 8
[schedule]
num_train_timesteps = 20
[optimizer]
batch_size = 8
[sampler]
steps = 2
[warm_up]
steps = 3
[auxiliary]
images = 24
max_attempts = 2
[rounds]
count = 3
local_steps = 2
[strategy]
kind = "fedddpm"
[evaluation]
feature_network = "digits"
sha256 = "{sha256}"
samples = 8
"""

FEDAVG = (
    PLAN.split("[warm_up]")[0]
    + """
[deadlines]
advertise = 60
[rounds]
count = 3
local_steps = 2
"""
)


def make_plan(
    old: str = "", new: str = "", sha256: str = FEATURE_NETWORKS["digits"].sha256
) -> Plan:
    text = PLAN.replace("{sha256}", sha256)
    assert old in text
    return load_plan(text.replace(old, new) if old else text)


def make_roster(
    plan: Plan, n: int = 4, study: str = "trial", epoch: int = 1
) -> tuple[Roster, list[Ed25519PrivateKey]]:
    keys = [Ed25519PrivateKey.generate() for _ in range(n)]
    members = tuple(
        Member(f"site-{i}", key.public_key().public_bytes_raw())
        for i, key in enumerate(keys, start=1)
    )
    quorum = plan.validate_roster(n)
    return Roster(study, epoch, quorum.threshold, quorum.colluders, members), keys
