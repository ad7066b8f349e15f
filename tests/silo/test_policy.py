"""The site policy: each rule, by its name, and who decides what it does not forbid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffusion.model import build_model
from diffusion.spec import ModelSpec
from protos.v1 import coordination_pb2 as pb
from secagg.roster import Member, Roster
from silo.admin import approve, roster
from silo.config import Approval, Data, Policy, SiloConfig, Site
from silo.errors import SiloError
from silo.files import write_file
from silo.home import SiloHome, StudyHome
from silo.identity import load_or_make_identity
from silo.model_size import parameter_count
from silo.offers import (
    BadOffer,
    Terms,
    decide,
    keep_offer,
    other_studies,
    parse_terms,
    pin,
    record,
    stored_decision,
)
from silo.policy import check_study
from study.plan import Plan
from tests.networks import make_network
from tests.silo.studies import make_plan, make_roster

PLAN = make_plan()
ROSTER, KEYS = make_roster(PLAN)
IDENTITY = KEYS[0].public_key().public_bytes_raw()


def offer(study: StudyHome, terms: Terms) -> None:
    keep_offer(study, pb.Offer(plan=terms.plan.toml(), roster=terms.roster.encode()))


def broken(policy: Policy, plan: object = PLAN, roster: Roster = ROSTER) -> str:
    declined = check_study(policy, plan, roster, site="site-1", identity=IDENTITY)  # type: ignore[arg-type]
    return declined.rule if declined else ""


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (Policy(), ""),
        (Policy(smallest_silos=5), "smallest_silos"),
        (Policy(smallest_threshold=4), "smallest_threshold"),
        (Policy(smallest_colluders=2), "smallest_colluders"),
        (Policy(largest_rounds=2), "largest_rounds"),
        (Policy(largest_steps=8), "largest_steps"),
        (Policy(largest_steps=9), ""),
        (Policy(largest_auxiliary=23), "largest_auxiliary"),
        (Policy(smallest_audit_quantile=0.06), "smallest_audit_quantile"),
        (Policy(largest_model=100), "largest_model"),
        (Policy(auxiliary_samples=False), "auxiliary_samples"),
        (Policy(purposes=("census", "round")), "purposes"),
        (Policy(feature_networks=("fashion-mnist",)), "feature_networks"),
    ],
)
def test_the_first_broken_rule_is_named(policy: Policy, rule: str) -> None:
    assert broken(policy) == rule


def test_images_go_to_the_other_sites_only_where_a_site_allows_it() -> None:
    everywhere = make_plan('kind = "fedddpm"', 'kind = "fedddpm"\nauxiliary_share = 0.5')
    assert broken(Policy(), everywhere) == ""
    assert broken(Policy(auxiliary_among_sites=False), everywhere) == "auxiliary_among_sites"
    assert broken(Policy(auxiliary_among_sites=False)) == ""


def test_an_evaluation_at_the_silos_is_for_sites_that_allow_it() -> None:
    compared = make_plan("samples = 8", "samples = 8\nat_silos = true")
    assert broken(Policy(), compared) == "purposes"
    purposes = (*Policy().purposes, "evaluation")
    assert broken(Policy(purposes=purposes), compared) == ""
    assert broken(Policy(), PLAN) == "", "FID alone needs no comparison at the silos"


def test_a_roster_without_this_site_or_with_another_key_is_declined() -> None:
    others = replace(ROSTER, members=(*ROSTER.members[1:], Member("site-9", bytes(31) + b"\1")))
    assert broken(Policy(), roster=others) == "roster"
    forged = replace(ROSTER, members=(Member("site-1", bytes(31) + b"\2"), *ROSTER.members[1:]))
    assert broken(Policy(), roster=forged) == "roster"


def test_a_feature_network_with_other_weights_than_the_shipped_is_declined() -> None:
    assert broken(Policy(), make_plan(sha256="ab" * 32)) == "feature_networks"


def test_a_network_that_does_not_ship_needs_its_name_its_file_and_its_hash(tmp_path: Path) -> None:
    own = tmp_path / "mri.safetensors"
    pinned = make_network(own)
    named, files = ("digits", "mri"), (own,)
    plan = make_plan('"digits"', '"mri"', sha256=pinned)

    def said(policy: Policy, wanted: Plan = plan) -> str:
        declined = check_study(policy, wanted, ROSTER, site="site-1", identity=IDENTITY)
        return str(declined) if declined else ""

    assert said(Policy(feature_networks=named, feature_files=files)) == ""
    assert "allowed: digits, fashion-mnist" in said(Policy(feature_files=files)), "not its name"
    assert said(Policy(feature_networks=named)) == (
        'declined by site policy: feature_files: feature network "mri" is not here: use one of '
        "digits, fashion-mnist, or get mri.safetensors and name it in feature_files"
    )
    everything = Policy(feature_networks=named, feature_files=files)
    other = make_plan('"digits"', '"mri"', sha256="ab" * 32)
    assert f"mri.safetensors has SHA-256 {pinned[:16]}…, expected abab" in said(everything, other)
    own.write_bytes(own.read_bytes()[:-4] + b"\0\0\0\0")
    assert f"expected {pinned[:16]}…: get the file that the plan means" in said(everything)
    own.unlink()
    assert "mri.safetensors cannot be read" in said(everything)
    assert len(said(everything)) < 200, "the study centre gets so much of it"
    assert str(tmp_path) not in said(everything)


def test_a_threshold_other_than_the_plan_s_is_declined() -> None:
    assert broken(Policy(), roster=replace(ROSTER, colluders=0)) == "roster"


def test_the_sentence_says_what_is_asked_and_what_is_allowed() -> None:
    declined = check_study(Policy(largest_rounds=2), PLAN, ROSTER, site="site-1", identity=IDENTITY)
    assert str(declined) == "declined by site policy: largest_rounds: 3 rounds, at most 2"


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(image_size=8, block_out_channels=(32, 64), attention=(False, True)),
        ModelSpec(image_size=8, block_out_channels=(32,), attention=(True,), classes=7),
        ModelSpec(
            image_size=16,
            channels=3,
            block_out_channels=(64, 32, 96),
            attention=(True, False, True),
            layers_per_block=3,
            mid_attention=False,
        ),
    ],
)
def test_parameters_are_counted_as_the_model_has_them(spec: ModelSpec) -> None:
    assert parameter_count(spec) == sum(p.numel() for p in build_model(spec).parameters())


# --- decisions


def config(**approval: bool) -> SiloConfig:
    return SiloConfig(site=Site(name="site-1"), data=Data(path="x"), approval=Approval(**approval))


@pytest.fixture
def study(tmp_path: Path) -> StudyHome:
    return SiloHome(tmp_path).study("trial")


def test_a_person_decides_unless_the_site_says_otherwise(study: StudyHome) -> None:
    terms = Terms(PLAN, ROSTER)
    assert decide(study, terms, config(), IDENTITY) is None
    record(study, terms, accepted=True)
    decision = decide(study, terms, config(), IDENTITY)
    assert decision is not None
    assert decision.accepted


def test_automatic_approval_is_for_the_first_terms_only(study: StudyHome) -> None:
    terms = Terms(PLAN, ROSTER)
    first = decide(study, terms, config(automatic=True), IDENTITY)
    assert first is not None
    assert first.accepted
    pin(study, terms)
    grown = Terms(PLAN, replace(ROSTER, epoch=2))
    assert decide(study, grown, config(automatic=True), IDENTITY) is None
    changed = Terms(make_plan("count = 3", "count = 4"), replace(ROSTER, epoch=2))
    assert decide(study, changed, config(automatic=True), IDENTITY) is None


def test_automatic_approval_is_for_the_first_study_of_a_site_only(study: StudyHome) -> None:
    pin(study, Terms(PLAN, ROSTER))
    another = SiloHome(study.path.parent.parent).study("another")
    terms = Terms(PLAN, replace(ROSTER, study="another"))
    assert decide(another, terms, config(automatic=True), IDENTITY) is None
    assert other_studies(another) == ["trial"]
    assert other_studies(study) == []


def test_the_person_who_decides_reads_that_every_site_is_sent_the_images(study: StudyHome) -> None:
    sent = "Every site is sent the synthetic images of all"
    pin(study, Terms(PLAN, ROSTER))
    home = study.path.parent.parent
    assert sent not in roster(home)
    everywhere = make_plan('kind = "fedddpm"', 'kind = "fedddpm"\nauxiliary_share = 0.5')
    pin(study, Terms(everywhere, replace(ROSTER, epoch=2)))
    assert f"{sent}, some 24; they\n  are 50% of what" in roster(home)
    bigger, _ = make_roster(PLAN, 5)
    offer(study, Terms(everywhere, replace(bigger, epoch=3)))
    assert "Who joins is sent the synthetic images that were made before" in roster(home)
    smaller = replace(ROSTER, epoch=3, members=ROSTER.members[:3], threshold=3, colluders=0)
    offer(study, Terms(everywhere, smaller))
    assert "Who joins" not in roster(home)


def test_a_person_cannot_approve_what_the_policy_declines(study: StudyHome) -> None:
    site = SiloHome(study.path.parent.parent)
    text = '[site]\nname = "site-1"\n[data]\npath = "x"\n[policy]\nlargest_rounds = 2\n'
    site.config.write_text(text)
    key = load_or_make_identity(site)
    members = (Member("site-1", key.public), *ROSTER.members[1:])
    offer(study, Terms(PLAN, replace(ROSTER, members=members)))
    with pytest.raises(SiloError, match="largest_rounds: 3 rounds, at most 2. If this institution"):
        approve(site.path, "trial")
    assert stored_decision(study) is None
    site.config.write_text(text.replace("2\n", "3\n"))
    approve(site.path, "trial")
    decision = stored_decision(study)
    assert decision is not None
    assert decision.accepted


def test_a_roster_never_rolls_back(study: StudyHome) -> None:
    pin(study, Terms(PLAN, replace(ROSTER, epoch=2)))
    decision = decide(study, Terms(PLAN, ROSTER), config(automatic=True), IDENTITY)
    assert decision is not None
    assert not decision.accepted
    assert "older" in decision.rule


def test_the_policy_declines_before_anybody_is_asked(study: StudyHome) -> None:
    strict = config().model_copy(update={"policy": Policy(largest_rounds=1)})
    decision = decide(study, Terms(PLAN, ROSTER), strict, IDENTITY)
    assert decision is not None
    assert decision.rule == "declined by site policy: largest_rounds: 3 rounds, at most 1"


def test_an_offer_that_is_not_what_it_says_is_refused(study: StudyHome) -> None:
    plan, roster = PLAN.toml(), ROSTER.encode()
    assert parse_terms("trial", plan, roster) == Terms(PLAN, ROSTER)
    with pytest.raises(BadOffer, match="roster of 'trial'"):
        parse_terms("other", plan, roster)
    with pytest.raises(BadOffer, match="canonical"):
        parse_terms("trial", plan + "\n", roster)
    with pytest.raises(BadOffer, match="too many at the end"):
        parse_terms("trial", plan, roster + b"x")
    write_file(study.plan, b"")
