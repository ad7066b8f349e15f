"""What a person at the institution does: set up, join, look, decide. Used by `concilium silo …`.

These functions read and write the agent's folder, and work whether or not the agent runs; only
`join` talks to the coordinator.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secagg.ledger import History, Overruled
from silo.client import Client
from silo.config import SiloConfig, data_path, load_config
from silo.data.cache import Cached, cache_dataset
from silo.data.dataset import open_dataset
from silo.data.sheet import write_sheet
from silo.enrolment import join as enrol
from silo.enrolment import renew as renew_certificate
from silo.enrolment import way_of, why_unreachable
from silo.errors import ConfigError, EnrolmentError, SiloError
from silo.files import make_folder, read_json, write_file, write_json
from silo.heads import signed_heads
from silo.home import SiloHome, StudyHome
from silo.identity import Enrolment, load_enrolment, load_or_make_identity
from silo.ledger import LedgerFile
from silo.offers import Terms, offered_terms, other_studies, pinned_terms, record, stored_decision
from silo.policy import check_study
from study.audit_log import AuditError, Verified, read_entries, verify

_PATIENCE_SECONDS = 20.0
_CONFIG = """\
# What this institution brings to a study, and what it allows a study to ask for.
# Restart the agent after a change.

[site]
name = {name}

# [coordinator]
# proxy = "http://proxy.example.org:3128"   # absent: as https_proxy and no_proxy say
# keepalive = 60                            # seconds of silence after which the line is pinged

[data]
path = {data}                         # a file or folder; never leaves this machine
format = {format}                     # auto, dicom, images (PNG, JPEG), nifti, npz, idx, cifar
# window = [40, 400]                  # DICOM, NIfTI: centre and width; absent: as each file says
# burned_in = true                    # DICOM: read what says it has text burned into its pixels
# slices = "axial"                    # NIfTI: axial, coronal or sagittal

[policy]                              # no plan can override these; what asks for more is declined
smallest_silos = 3                    # fewest institutions in a study
smallest_threshold = 2                # fewest institutions that a sum may be revealed over
smallest_colluders = 0                # fewest that may be in league with the study centre in vain
largest_rounds = 1000
largest_steps = 10_000_000            # training steps of the whole study
largest_model = 200_000_000           # parameters
auxiliary_samples = true              # may audited synthetic images leave, in an anonymous union?
auxiliary_among_sites = true          # may all sites be sent that union, to train on it too?
largest_auxiliary = 100_000           # of all sites together
smallest_audit_quantile = 0.01        # a less strict audit of them is declined
purposes = ["census", "moments", "tags", "images", "round"]
feature_networks = ["digits", "fashion-mnist"]
# feature_files = ["our-net.safetensors"]   # those of the above that do not ship

[resources]
{device}
{threads}
idle_seconds = 60.0                   # how long the worker stays after its last job
niceness = 10                         # how readily it gives way to other programs: 0 to 19
# memory_mib = 16_000                 # what the worker may allocate
# hours = "19:00-06:00"               # when it may compute; absent: always
# time_zone = "Europe/Berlin"         # whose clock that is; absent: this machine's
# processes = 2                       # training processes that share a batch: one per GPU

[approval]
automatic = {automatic}                     # true: accept the first study that the policy allows
"""


def init(
    home: Path,
    *,
    name: str,
    data: Path,
    format: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    automatic: bool = False,
) -> SiloConfig:
    """Make the agent's folder, its keys and a site.toml that explains itself.

    Raises ConfigError for values that site.toml does not allow, and where there is one already.
    """
    place = SiloHome(home)
    if place.config.exists():
        raise ConfigError(f"{place.config} exists already: edit it, or choose another folder")
    make_folder(home)
    text = _CONFIG.format(
        name=_quoted(name),
        data=_quoted(str(data.expanduser().resolve())),
        format=_quoted(format),
        device=f"device = {_quoted(device)}" if device else '# device = "cpu"',
        threads=f"threads = {threads}" if threads else "# threads = 2",
        automatic=json.dumps(automatic),
    )
    write_file(place.config, text.encode())
    try:
        config = load_config(place)
    except ConfigError:
        place.config.unlink()
        raise
    load_or_make_identity(place)
    return config


async def join(home: Path, token: str, announce: Callable[[str], None]) -> Enrolment:
    """Hand in this site's keys and wait for the approval; see `silo.enrolment.join`."""
    place = SiloHome(home)
    config = load_config(place)
    identity = load_or_make_identity(place)
    return await enrol(
        place,
        identity,
        token,
        site=config.site.name,
        announce=announce,
        proxy=config.coordinator.proxy.get_secret_value(),
    )


async def renew(home: Path) -> Enrolment:
    """A fresh certificate now; the agent does it by itself in time. Raises EnrolmentError."""
    place = SiloHome(home)
    line = load_config(place).coordinator
    identity, enrolment = load_or_make_identity(place), load_enrolment(place)
    enrolment.check()
    way = way_of(enrolment, identity, line)
    client = Client(way, lambda _: None)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await renew_certificate(place, identity, client, line)
    except TimeoutError as error:
        raise EnrolmentError(await asyncio.to_thread(why_unreachable, way)) from error
    finally:
        await client.close()


def roster(home: Path, study: str | None = None) -> str:
    """For each study (or one): who takes part, and the fingerprint that the sites compare."""
    texts = [_roster_text(found) for found in _studies(home, study)]
    return "\n\n".join(text for text in texts if text) or "no study was offered to this site yet"


def approve(home: Path, study: str) -> Terms:
    """Accept the plan and roster of `study` as last offered; a running agent acts on it within a
    second. Raises SiloError where nothing was offered, and for what the site policy declines."""
    place, site = _study(home, study), SiloHome(home)
    terms, config = _offered(place), load_config(site)
    identity = load_or_make_identity(site).public
    declined = check_study(
        config.policy, terms.plan, terms.roster, site=config.site.name, identity=identity
    )
    if declined is not None:
        raise SiloError(
            f"study {study!r} is {declined}. If this institution wants it all the same, change "
            f"[policy] in {site.config} and restart the agent"
        )
    record(place, terms, accepted=True)
    return terms


def decline(home: Path, study: str, why: str) -> None:
    """Do not take part in `study` as last offered; the study centre reads `why`."""
    place = _study(home, study)
    record(place, _offered(place), accepted=False, rule=f"declined by a person: {why}")


def leave(home: Path, study: str, reason: str) -> None:
    """Take no further part in `study`. A running agent begins no session any more, sees the one
    under way settled, tells the study centre, and ends the study here; the ledger stays."""
    place = _study(home, study)
    if pinned_terms(place) is None:
        raise SiloError(f"this site has not accepted study {study!r}: decline it instead")
    if place.ended.exists():
        raise SiloError(f"study {study!r} is over here: there is nothing to leave")
    write_json(place.leave, {"reason": reason or "decided by a person"})


def heads(home: Path) -> str:
    """What this site signed of the study centre's audit log, one line of JSON each."""
    path = SiloHome(home).heads
    return path.read_text("utf-8") if path.exists() else ""


def audit(home: Path, log: Path) -> Verified:
    """Check an exported audit log against what this site signed.

    Raises SiloError where it was changed, cut off, or never held what this site signed.
    """
    try:
        return verify(read_entries(log.read_text("utf-8")), signed_heads(SiloHome(home).heads))
    except AuditError as error:
        raise SiloError(str(error)) from error


def settle_doubt(home: Path, study: str) -> list[str]:
    """Close for ever every session of `study` of which nothing proves how it ended; which those
    were. For a person, after a talk with the other sites, with the agent stopped: if such a
    session was summed after all, a later sum can be compared with it.

    Raises LedgerError while the agent runs.
    """
    place = _study(home, study)
    ledger = LedgerFile(place.ledger, place.name)
    try:
        doubtful = History.of(ledger.entries()).in_doubt
        for session in doubtful:
            ledger.append(Overruled(session.context.digest))
    finally:
        ledger.close()
    return [f"session {s.context.session} ({s.context.quantity})" for s in doubtful]


@dataclass(frozen=True)
class Checked:
    """What `check` found."""

    data: Cached
    shape: tuple[int, int, int]
    """(c, h, w) as cached."""
    classes: dict[str, int]
    """How many images each class has; empty where not every image has one."""
    sheet: Path
    """A PNG with up to a hundred of the images."""


def check(
    home: Path,
    image_size: int | None = None,
    channels: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Checked:
    """Read all images once, into the cache that training maps into memory.

    `progress` is called with how many images there are so far, where they are not cached yet.
    Size and channels are those given, else those of a study that this site knows, else 32 and 1.
    Raises DataError for data that cannot be used.
    """
    place = SiloHome(home)
    config = load_config(place)
    known = next((terms for terms in map(_terms, place.studies()) if terms), None)
    data = known.plan.data if known else None
    size = image_size or (data.image_size if data else 32)
    depth = channels or (data.channels if data else 1)
    dataset = open_dataset(
        data_path(place, config),
        config.data.format,
        size,
        depth,
        config.data.reading,
        config.resources.processors,
    )
    cached = cache_dataset(dataset, place.cache, progress)
    sheet = cached.folder / "contact-sheet.png"
    write_sheet(np.asarray(cached.images()), sheet)
    return Checked(cached, dataset.shape, _per_class(cached), sheet)


def _per_class(cached: Cached) -> dict[str, int]:
    labels = cached.labels()
    if labels is None:
        return {}
    counts = np.bincount(labels, minlength=len(cached.classes))
    return dict(zip(cached.classes, counts.tolist(), strict=True))


def status(home: Path) -> dict[str, Any]:
    """What the agent last wrote about itself, or {"running": False} where it never ran.

    `quiet_seconds` is how long ago that was: an agent that was killed did not say goodbye.
    """
    stored: dict[str, Any] | None = read_json(SiloHome(home).status)
    if stored is None:
        return {"running": False, "studies": {}}
    for study in SiloHome(home).studies():
        if study.name in stored["studies"] and (found := _audits(study)):
            stored["studies"][study.name]["audit"] = found
    return stored | {"quiet_seconds": time.time() - stored["written"]}


def _audits(study: StudyHome) -> str:
    """What the memorisation audits of a study found, in a line; empty before the first."""
    reports = [read_json(path) or {} for path in sorted(study.pool.glob("audit-*.json"))]
    if not reports:
        return ""
    dropped, samples = (sum(report[key] for report in reports) for key in ("dropped", "samples"))
    return (
        f"{dropped} of {samples} synthetic images dropped as too near a real one "
        f"(figures and pictures: {study.pool / 'audit-*'})"
    )


def _roster_text(study: StudyHome) -> str:
    pinned, offered = pinned_terms(study), offered_terms(study)
    if offered is not None and offered != pinned:
        decision = stored_decision(study)
        decided = decision is not None and decision.about(offered)
        return _described(study, offered, "decided" if decided else "waits for approval")
    return _described(study, pinned, "accepted") if pinned else ""


def _changes(before: Terms, offered: Terms) -> str:
    """What accepting another roster of a study means, for the person who decides."""
    then = {member.name: member for member in before.roster.members}
    now = {member.name: member for member in offered.roster.members}
    lines = [
        f"  compared with the roster accepted before (epoch {before.roster.epoch}):",
        f"    joined       {', '.join(sorted(now.keys() - then.keys())) or 'nobody'}",
        f"    left         {', '.join(sorted(then.keys() - now.keys())) or 'nobody'}",
    ]
    changed = [name for name in sorted(now.keys() & then.keys()) if now[name] != then[name]]
    if changed:
        lines.append(f"    other keys   {', '.join(changed)}: ask these sites why")
    if before.plan != offered.plan:
        lines.append("    the plan is another one: read offer.toml")
    if now.keys() - then.keys() and offered.plan.strategy.local_rules().auxiliary_share > 0.0:
        lines.append(
            "  Who joins is sent the synthetic images that were made before, those of this site\n"
            "  and of sites that left among them."
        )
    lines.append(
        "  If you accept, the images are counted again for this roster. Every site knows both\n"
        "  totals: where one site alone joined or left, their difference is its count, rounded to\n"
        "  two digits. Feature moments are not summed again."
    )
    return "\n".join(lines) + "\n"


def _described(study: StudyHome, terms: Terms, state: str) -> str:
    group = terms.roster
    members = "\n".join(f"    {i:3}  {group.member(i).name}" for i in group.indices)
    others = ", ".join(other_studies(study))
    warning = (
        f"\n  This site has accepted other studies ({others}): a study centre that lies can\n"
        "  compare the sums of both, and so learn this site's count and feature moments."
    )
    before = pinned_terms(study)
    changes = _changes(before, terms) if before is not None and before != terms else ""
    share, auxiliary = terms.plan.strategy.local_rules().auxiliary_share, terms.plan.auxiliary
    shared = ""
    if share and auxiliary:
        shared = (
            f"  Every site is sent the synthetic images of all, some {auxiliary.images:,}; they\n"
            f"  are {share:.0%} of what it trains on.\n"
        )
    return (
        f"{study.name}: {terms.plan.study.title} ({state})\n"
        f"  epoch {group.epoch}, {group.size} silos, threshold {group.threshold}, "
        f"{group.colluders} colluders tolerated\n{members}\n{shared}{changes}"
        f"  fingerprint  {group.fingerprint}\n"
        "  Compare the fingerprint with the other sites, by phone, before you approve."
        f"{warning if others else ''}"
    )


def _studies(home: Path, study: str | None) -> list[StudyHome]:
    return [_study(home, study)] if study else list(SiloHome(home).studies())


def _study(home: Path, study: str) -> StudyHome:
    names = [known.name for known in SiloHome(home).studies()]
    if study not in names:
        known = ", ".join(names) or "none"
        raise SiloError(f"no study {study!r} was offered to this site; offered so far: {known}")
    return SiloHome(home).study(study)


def _terms(study: StudyHome) -> Terms | None:
    return pinned_terms(study) or offered_terms(study)


def _offered(study: StudyHome) -> Terms:
    terms = offered_terms(study)
    if terms is None:
        raise SiloError(f"study {study.name!r} has not been offered yet: is the agent running?")
    return terms


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
