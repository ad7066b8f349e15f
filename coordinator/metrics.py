"""Prometheus metrics of a coordinator, over HTTP at an address of its own.

Everything is read from the store when it is asked for, as `coordinator.admin.status` shows it, so
it is as true after a restart as before. Nothing here is about one silo's data: of a site there are
its last contact, certificate and signature under the audit log; counts and updates are known to
nobody but in sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from coordinator.admin import Status, StudyStatus
from study.exposition import Exposition

_STATES = ("offered", "running", "finished", "stopped", "failed")


class Metrics(Exposition):
    """`read` is asked for the status at every scrape."""

    def __init__(self, read: Callable[[], Status]) -> None:
        super().__init__()
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        yield from _of_sites(now)
        for name, text, value in _STUDY:
            yield _per_study(name, text, now.studies, value)
        yield _states(now.studies)
        yield _gauge("audit_log_entries", "Entries of the audit log.", now.log_entries)
        free = shutil.disk_usage(now.folder).free
        yield _gauge("disk_free_bytes", "Free space where the coordinator's folder is.", free)


def _of_sites(now: Status) -> Iterator[Metric]:
    contact = _family("site_last_contact_seconds", "Unix time of the last sign of life.", "site")
    expires = _family("site_certificate_expires_seconds", "Unix time of its end.", "site")
    signed = _family("site_countersigned_entry", "Last audit log entry it signed.", "site")
    approved = [site for site in now.sites if site.status == "approved"]
    for site in approved:
        _add(contact, site.name, site.last_contact)
        _add(expires, site.name, site.certificate_expires)
        _add(signed, site.name, site.countersigned)
    waiting = sum(site.status == "pending" for site in now.sites)
    yield from (contact, expires, signed)
    yield _gauge("sites_approved", "Sites that may take part.", len(approved))
    yield _gauge("sites_pending", "Sites that wait for approval.", waiting)


def _trouble(study: StudyStatus) -> float:
    return float(study.error is not None)


_STUDY: tuple[tuple[str, str, Callable[[StudyStatus], float | None]], ...] = (
    ("study_round", "Rounds that are done.", lambda s: s.round),
    ("study_rounds", "Rounds of the plan.", lambda s: s.rounds),
    ("study_epoch", "Epoch of its roster.", lambda s: s.epoch),
    ("study_threshold", "Silos that a sum needs.", lambda s: s.threshold),
    ("study_survivors", "Silos in the last round's sum.", lambda s: len(s.survivors)),
    ("study_present", "Silos that have answered the step under way.", lambda s: s.present),
    ("study_awaited", "Silos that are waited for.", lambda s: len(s.awaited)),
    ("study_deadline_seconds", "Unix time at which the step is closed.", lambda s: s.deadline),
    ("study_trouble", "1 while something keeps it from going on.", _trouble),
    ("study_loss", "Training loss of the last round, mean over silos.", lambda s: s.loss),
    ("study_fid", "FID of the global model, when last evaluated.", lambda s: s.fid),
    ("study_corrections", "Corrections so far.", lambda s: s.corrections),
)


def _per_study(
    name: str,
    text: str,
    studies: Sequence[StudyStatus],
    value: Callable[[StudyStatus], float | None],
) -> Metric:
    family = _family(name, text, "study")
    for study in studies:
        _add(family, study.id, value(study))
    return family


def _states(studies: Sequence[StudyStatus]) -> Metric:
    text = "1 for the state that the study is in."
    family = GaugeMetricFamily("concilium_study_state", text, labels=["study", "state"])
    for study in studies:
        for state in _STATES:
            family.add_metric([study.id, state], float(study.state == state))
    return family


def _family(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"concilium_{name}", text, labels=[label])


def _add(family: GaugeMetricFamily, label: str, value: float | None) -> None:
    if value is not None:
        family.add_metric([label], value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"concilium_{name}", text, value=value)
