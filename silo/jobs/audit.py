"""What the memorisation audit found, for the people of this site: figures and pictures.

    pool/audit-<first>.json           thresholds, counts, distances of one draw of samples
    pool/audit-<first>-leaving.png    the samples that leave, each beside its nearest training image
    pool/audit-<first>-dropped.png    the same for those that were dropped

The closest pairs come first. Real images are in these files: they stay in the agent's folder, and
nothing about the audit is told to anybody else.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.audit import REPORTED_QUANTILES, AuditReport, nearest_images
from diffusion.sampling import grid_png
from silo.files import write_json

Images = NDArray[np.uint8]
PAIRS, _PAIRS_A_ROW = 20, 4


def write_audit(
    pool: Path,
    first: int,
    report: AuditReport,
    samples: Images,
    training: Images,
    keep: NDArray[np.bool_],
) -> None:
    """Report and sheets of the draw that begins with sample number `first`."""
    found = {"dropped": report.dropped, **asdict(report), "at_quantiles": REPORTED_QUANTILES}
    write_json(pool / f"audit-{first}.json", found)
    if samples.shape[1] not in (1, 3):
        return
    for name, chosen in (("leaving", keep), ("dropped", ~keep)):
        if chosen.any():
            _write_sheet(pool / f"audit-{first}-{name}.png", samples[chosen], training)


def _write_sheet(path: Path, samples: Images, training: Images) -> None:
    distances, nearest = nearest_images(samples, training)
    closest = np.argsort(distances, kind="stable")[:PAIRS]
    pairs = np.stack([samples[closest], training[nearest[closest]]], axis=1)
    grid_png(pairs.reshape(-1, *samples.shape[1:]), path, columns=2 * _PAIRS_A_ROW)
