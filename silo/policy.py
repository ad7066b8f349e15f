"""The site policy: which studies this institution declines, whoever asks for them.

Values in, the first broken rule out; of files it reads that of the feature network alone. What the
policy does not forbid still waits for a person, unless site.toml says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusion.features.file import FeatureFileError, read_network
from diffusion.features.pinned import FEATURE_NETWORKS
from secagg.roster import Roster
from silo.config import Policy
from silo.model_size import parameter_count
from study.plan import Plan
from study.problems import PlanError
from study.sections import Auxiliary, Evaluation


@dataclass(frozen=True)
class Declined:
    """A rule that a study breaks."""

    rule: str
    """The rule's name: a key of [policy], or what every study has to keep."""
    why: str

    def __str__(self) -> str:
        return f"declined by site policy: {self.rule}: {self.why}"


def check_study(
    policy: Policy, plan: Plan, roster: Roster, *, site: str, identity: bytes
) -> Declined | None:
    """The first rule that plan and roster break for the site with this name and Ed25519 key."""
    rules = (_roster_rules(policy, plan, roster, site, identity), check_plan(policy, plan))
    return next((declined for found in rules for declined in found), None)


def check_plan(policy: Policy, plan: Plan) -> Iterator[Declined]:
    """Every rule that the plan breaks, whoever takes part."""
    yield from _limits(policy, plan)
    yield from _auxiliary_rules(policy, plan.auxiliary)
    if plan.strategy.local_rules().auxiliary_share and not policy.auxiliary_among_sites:
        yield Declined("auxiliary_among_sites", "it sends the synthetic images to every site")
    for purpose in purposes(plan):
        if purpose not in policy.purposes:
            yield Declined(
                "purposes", f"it sums {purpose!r}, allowed: {', '.join(policy.purposes)}"
            )
    if plan.evaluation is not None:
        yield from _network_rules(policy, plan.evaluation)


def _roster_rules(
    policy: Policy, plan: Plan, roster: Roster, site: str, identity: bytes
) -> Iterator[Declined]:
    members = {member.name: member.identity for member in roster.members}
    if members.get(site) != identity:
        yield Declined("roster", f"it does not hold {site!r} with this site's identity key")
    if roster.size < policy.smallest_silos:
        yield Declined(
            "smallest_silos", f"{roster.size} institutions, at least {policy.smallest_silos}"
        )
    if roster.threshold < policy.smallest_threshold:
        yield Declined(
            "smallest_threshold",
            f"threshold {roster.threshold}, at least {policy.smallest_threshold}",
        )
    if roster.colluders < policy.smallest_colluders:
        yield Declined(
            "smallest_colluders",
            f"{roster.colluders} colluders tolerated, at least {policy.smallest_colluders}",
        )
    try:
        agreed = plan.validate_roster(roster.size)
    except PlanError as error:
        yield Declined("roster", str(error))
        return
    if (roster.threshold, roster.colluders) != agreed:
        yield Declined(
            "roster",
            f"threshold {roster.threshold} and {roster.colluders} colluders, "
            f"the plan says {agreed.threshold} and {agreed.colluders}",
        )


def _limits(policy: Policy, plan: Plan) -> Iterator[Declined]:
    if plan.rounds.count > policy.largest_rounds:
        yield Declined(
            "largest_rounds", f"{plan.rounds.count} rounds, at most {policy.largest_rounds}"
        )
    parameters = parameter_count(plan.model)
    if parameters > policy.largest_model:
        yield Declined(
            "largest_model", f"{parameters:,} parameters, at most {policy.largest_model:,}"
        )
    steps = training_steps(plan)
    if steps > policy.largest_steps:
        yield Declined(
            "largest_steps", f"{steps:,} training steps, at most {policy.largest_steps:,}"
        )


def _auxiliary_rules(policy: Policy, wanted: Auxiliary | None) -> Iterator[Declined]:
    if wanted is None:
        return
    if not policy.auxiliary_samples:
        yield Declined("auxiliary_samples", "it asks for synthetic images in the anonymous union")
    if wanted.images > policy.largest_auxiliary:
        yield Declined(
            "largest_auxiliary",
            f"{wanted.images:,} synthetic images, at most {policy.largest_auxiliary:,}",
        )
    if wanted.audit_quantile < policy.smallest_audit_quantile:
        yield Declined(
            "smallest_audit_quantile",
            f"quantile {wanted.audit_quantile}, at least {policy.smallest_audit_quantile}",
        )


def _network_rules(policy: Policy, wanted: Evaluation) -> Iterator[Declined]:
    name = wanted.feature_network
    if name not in policy.feature_networks:
        allowed = ", ".join(policy.feature_networks) or "none"
        yield Declined("feature_networks", f"it evaluates with {name!r}, allowed: {allowed}")
        return
    try:
        read_network(name, wanted.sha256, policy.feature_files)
    except FeatureFileError as error:
        rule = "feature_networks" if name in FEATURE_NETWORKS else "feature_files"
        yield Declined(rule, str(error))


def training_steps(plan: Plan) -> int:
    """Steps that a site takes in the whole study."""
    warm_up = plan.warm_up.steps if plan.warm_up and plan.auxiliary else 0
    return warm_up + plan.rounds.count * plan.rounds.local_steps


def purposes(plan: Plan) -> tuple[str, ...]:
    """What the sums of a study are for."""
    return (
        "census",
        "round",
        *(("moments",) if plan.evaluation else ()),
        *(("evaluation",) if plan.evaluation and plan.evaluation.at_silos else ()),
        *(("tags", "images") if plan.auxiliary else ()),
    )
