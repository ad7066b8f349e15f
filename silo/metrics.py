"""Prometheus metrics of an agent, over HTTP at an address of its own; for the institution itself.

They say what `concilium silo status` says: contact, certificate, the step of the plan that is at
work. No count, no loss, nothing about the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from study.exposition import Exposition


class Metrics(Exposition):
    """`read` gives the values of status.json."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        times = (
            ("last_contact_seconds", "Unix time of the coordinator's last answer.", "last_contact"),
            ("certificate_expires_seconds", "Unix time of its end.", "certificate_expires"),
        )
        for name, text, key in times:
            if now[key] is not None:
                yield GaugeMetricFamily(f"concilium_silo_{name}", text, value=now[key])
        yield _trouble(now)
        yield from _studies(now["studies"])


def _trouble(now: dict[str, Any]) -> Metric:
    text = "1 while the coordinator does not answer as it should."
    return GaugeMetricFamily("concilium_silo_trouble", text, value=float(bool(now["trouble"])))


def _studies(studies: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    waits = _family("study_waits_for_approval", "1 while a person has to decide.")
    trouble = _family("study_trouble", "1 while this site cannot do its part.")
    done = _family("study_step", "Step of the work under way, of the plan's.")
    for name, study in studies.items():
        waits.add_metric([name], float(study.get("state") == "waits for approval"))
        trouble.add_metric([name], float(bool(study.get("trouble"))))
        done.add_metric([name], float(study.get("step") or 0))
    yield from (waits, trouble, done)


def _family(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"concilium_silo_{name}", text, labels=["study"])
