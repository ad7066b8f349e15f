"""An offered study: kept for a person to read, checked against the policy, decided, pinned."""

from __future__ import annotations

from dataclasses import dataclass

from protos.v1 import coordination_pb2 as pb
from secagg.errors import InvalidParameters, MalformedMessage
from secagg.primitives import digest
from secagg.roster import Roster
from silo.config import SiloConfig
from silo.errors import SiloError
from silo.files import read_json, write_file, write_json
from silo.home import StudyHome
from silo.policy import Declined, check_study
from study.plan import Plan, load_plan, text_digest
from study.problems import PlanError


class BadOffer(SiloError):
    """An offer that no site could accept."""


@dataclass(frozen=True)
class Terms:
    """A plan and the roster it is offered to."""

    plan: Plan
    roster: Roster

    @property
    def digests(self) -> tuple[bytes, bytes]:
        return self.plan.digest(), self.roster.digest


def digests_of(offer: pb.Offer) -> tuple[bytes, bytes]:
    """The digests of an offer as it came, also of one that cannot be used."""
    return text_digest(offer.plan), digest("roster", offer.roster)


@dataclass(frozen=True)
class Decision:
    """What was decided about one plan and one roster."""

    plan: str
    roster: str
    """Their digests, hexadecimal."""
    accepted: bool
    rule: str = ""
    """Why not."""

    def about(self, terms: Terms) -> bool:
        return (self.plan, self.roster) == tuple(part.hex() for part in terms.digests)


def parse_terms(study: str, plan: str, roster: bytes) -> Terms:
    """Raises BadOffer for a plan or roster that cannot be used, or that is for another study."""
    try:
        terms = Terms(load_plan(plan), Roster.decode(roster))
    except (PlanError, MalformedMessage, InvalidParameters) as error:
        raise BadOffer(f"study {study!r} was offered with a plan or roster: {error}") from error
    if terms.plan.toml() != plan:
        raise BadOffer(f"study {study!r} was offered with a plan that is not in canonical form")
    if terms.roster.study != study:
        raise BadOffer(f"study {study!r} was offered with the roster of {terms.roster.study!r}")
    return terms


def keep_offer(study: StudyHome, offer: pb.Offer) -> Terms:
    """Parse an offer and keep it for `concilium silo roster`. Raises BadOffer."""
    terms = parse_terms(study.name, offer.plan, offer.roster)
    if offered_terms(study) != terms:
        write_file(study.offered_plan, offer.plan.encode())
        write_file(study.offered_roster, offer.roster)
    return terms


def offered_terms(study: StudyHome) -> Terms | None:
    """What was last offered."""
    if not study.offered_plan.exists() or not study.offered_roster.exists():
        return None
    plan = study.offered_plan.read_text("utf-8")
    return parse_terms(study.name, plan, study.offered_roster.read_bytes())


def pinned_terms(study: StudyHome) -> Terms | None:
    """What this site accepted."""
    if not study.plan.exists() or not study.roster.exists():
        return None
    plan = study.plan.read_text("utf-8")
    return parse_terms(study.name, plan, study.roster.read_bytes())


def decide(study: StudyHome, terms: Terms, config: SiloConfig, identity: bytes) -> Decision | None:
    """What this site answers; None while a person has not decided.

    The policy comes first: a person cannot accept what it forbids without changing it. Only the
    very first terms of the site's first study can be accepted automatically. A change of plan
    or roster is what a person has to see, above all when nobody expects one. So is another study:
    its sums go over other sets of silos, or can be made to, and the static ones of both studies
    give, subtracted, what a single silo put in.
    """
    declined = check_study(
        config.policy, terms.plan, terms.roster, site=config.site.name, identity=identity
    )
    if declined is not None:
        return record(study, terms, accepted=False, rule=str(declined))
    pinned = pinned_terms(study)
    if pinned is not None and _rolls_back(pinned.roster, terms.roster):
        older = Declined("roster", "it is older than the one that this site accepted")
        return record(study, terms, accepted=False, rule=str(older))
    known = stored_decision(study)
    if known is not None and known.about(terms):
        return known
    if pinned == terms or (config.approval.automatic and _first(study)):
        return record(study, terms, accepted=True)
    return None


def _first(study: StudyHome) -> bool:
    """Whether this site has accepted nothing so far."""
    return not study.roster.exists() and not other_studies(study)


def other_studies(study: StudyHome) -> list[str]:
    """The studies that this site has accepted beside this one, by name."""
    accepted = (path.parent.name for path in study.path.parent.glob("*/roster"))
    return sorted(name for name in accepted if name != study.name)


def _rolls_back(pinned: Roster, offered: Roster) -> bool:
    return offered != pinned and offered.epoch <= pinned.epoch


def stored_decision(study: StudyHome) -> Decision | None:
    stored = read_json(study.decision)
    return None if stored is None else Decision(**stored)


def record(study: StudyHome, terms: Terms, *, accepted: bool, rule: str = "") -> Decision:
    """Make a decision durable."""
    plan, roster = (part.hex() for part in terms.digests)
    decision = Decision(plan, roster, accepted, rule)
    if decision != stored_decision(study):
        write_json(study.decision, vars(decision))
    return decision


def pin(study: StudyHome, terms: Terms) -> None:
    """From here on the study means this plan and this roster.

    Never while a session of the roster before is in doubt: a certificate of that roster could not
    be checked any more, and would leave it in doubt for good.
    """
    if pinned_terms(study) != terms:
        # Who had left, or was taken out, is in again. Before the roster: what a crash leaves is the
        # roster before, under which the study centre says once more that it has ended.
        study.leave.unlink(missing_ok=True)
        study.ended.unlink(missing_ok=True)
        write_file(study.roster, terms.roster.encode())
        write_file(study.plan, terms.plan.toml().encode())


def newer_offer(study: StudyHome, pinned: Terms) -> Terms | None:
    """Terms under a later roster than the pinned one, whatever was decided about them."""
    offered = offered_terms(study)
    later = offered is not None and offered.roster.epoch > pinned.roster.epoch
    return offered if later else None
