"""The site policy: which studies this institution declines, whoever asks for them.

Pure: values in, the first broken rule out. What the policy does not forbid still waits for a
person, unless site.toml says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from secagg.roster import Roster
from silo.config import Policy
from silo.model_size import parameter_count
from study.plan import Plan
from study.problems import PlanError


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
    rules = (_roster_rules(policy, plan, roster, site, identity), _plan_rules(policy, plan))
    return next((declined for found in rules for declined in found), None)


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


def _plan_rules(policy: Policy, plan: Plan) -> Iterator[Declined]:
    if plan.rounds.count > policy.largest_rounds:
        yield Declined(
            "largest_rounds", f"{plan.rounds.count} rounds, at most {policy.largest_rounds}"
        )
    parameters = parameter_count(plan.model)
    if parameters > policy.largest_model:
        yield Declined(
            "largest_model", f"{parameters:,} parameters, at most {policy.largest_model:,}"
        )
    if plan.auxiliary is not None and not policy.auxiliary_samples:
        yield Declined("auxiliary_samples", "it asks for synthetic images in the anonymous union")
    for purpose in purposes(plan):
        if purpose not in policy.purposes:
            yield Declined(
                "purposes", f"it sums {purpose!r}, allowed: {', '.join(policy.purposes)}"
            )
    network = plan.evaluation.feature_network if plan.evaluation else None
    if network is not None and network not in policy.feature_networks:
        allowed = ", ".join(policy.feature_networks) or "none"
        yield Declined("feature_networks", f"it evaluates with {network!r}, allowed: {allowed}")


def purposes(plan: Plan) -> tuple[str, ...]:
    """What the sums of a study are for."""
    return (
        "census",
        "round",
        *(("moments",) if plan.evaluation else ()),
        *(("tags", "images") if plan.auxiliary else ()),
    )
