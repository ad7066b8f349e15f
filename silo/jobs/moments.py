"""Feature moments of the real images: n, Σ(f − m) and the upper triangle of Σ(f − m)(f − m)ᵀ.

Each is divided by Σñ before it is encoded, so that the bound of the fixed-point encoding limits a
mean, however many images there are. m is the public centre that the network's file holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.features.file import FeatureFileError
from diffusion.features.network import FeatureNetwork, load_feature_network
from diffusion.frechet import moments
from silo.errors import ProposalRefused
from silo.files import write_file
from silo.jobs.training import read_images
from silo.orders import FeatureMoments, MomentsSummed
from silo.worker import ProgressFile
from study.quantity import EvaluationWork, MomentsWork, decode_work, moments_encoding

_BATCH = 4096


def feature_moments(order: FeatureMoments, progress: ProgressFile) -> MomentsSummed:
    """Leaves the vector. Raises ProposalRefused for a network that is not on this machine."""
    work = decode_work(order.work)
    if not isinstance(work, MomentsWork):
        raise TypeError(f"{work.purpose} is no sum of moments")
    network = network_of(work, order.feature_files)
    values = _weighted_moments(work, network, order, progress)
    encoding = moments_encoding(work, order.silos)
    write_file(order.vector, encoding.encode(values).tobytes())
    return MomentsSummed(int(np.count_nonzero(np.abs(values) > work.bound)))


def network_of(work: MomentsWork | EvaluationWork, files: Sequence[Path]) -> FeatureNetwork:
    """Raises ProposalRefused for a feature network that is not on this machine."""
    try:
        return load_feature_network(work.network, work.sha256, files)
    except FeatureFileError as error:
        raise ProposalRefused(f"{work.purpose}: {error}") from error


def _weighted_moments(
    work: MomentsWork, network: FeatureNetwork, order: FeatureMoments, progress: ProgressFile
) -> NDArray[np.float64]:
    # Progress reaches the study centre, so it must not tell how many images there are.
    progress("computing features", 0, 1)
    images, center = read_images(order.images), network.public_center()
    total = None
    for start in range(0, len(images), _BATCH):
        part = moments(network.extract(images[start : start + _BATCH]), center)
        total = part if total is None else total + part
    if total is None or len(total.total) != work.dimension:
        raise ProposalRefused(f"moments: the network's features are not of size {work.dimension}")
    upper = total.outer[np.triu_indices(work.dimension)]
    return np.concatenate([[float(total.count)], total.total, upper]) / work.total_count
