"""A model and its samples against the real images here: one short vector of measures."""

from __future__ import annotations

import math
import os

import numpy as np

from diffusion.evaluation import compare
from diffusion.execution import choose_execution
from diffusion.model import build_model, load_vector
from silo.files import write_file
from silo.jobs.moments import network_of
from silo.jobs.training import read_images, read_labels
from silo.orders import Evaluated, EvaluateModel
from silo.worker import ProgressFile
from study.plan import load_plan
from study.quantity import EvaluationWork, decode_work, evaluation_encoding


def evaluate_model(order: EvaluateModel, progress: ProgressFile) -> Evaluated:
    """Leaves the vector. Raises ProposalRefused for a network that is not on this machine."""
    plan, work = load_plan(order.plan), decode_work(order.work)
    if not isinstance(work, EvaluationWork):
        raise TypeError(f"{work.purpose} is no evaluation")
    network = network_of(work, order.feature_files)
    # Progress reaches the study centre, so it must not tell how many images there are.
    progress("evaluating the model", 0, 1)
    model = build_model(plan.model)
    load_vector(model, np.fromfile(order.model, dtype="<f4").astype(np.float32, copy=False))
    found = compare(
        model,
        np.fromfile(order.samples, dtype=np.uint8).reshape(work.images, *plan.data.shape),
        read_images(order.images),
        network,
        schedule=plan.schedule,
        objective=plan.objective,
        seed=plan.study.seed,
        execution=choose_execution(order.machine.device, order.machine.threads),
        labels=read_labels(plan, order.images),
        bins=work.bins,
    )
    values = np.array([found.kid, found.coverage, found.copies, *found.losses])
    encoding = evaluation_encoding(work, order.silos)
    # The model is of the study centre's choice: one whose loss is finite at a single site would
    # show what that one measured. Too few images for KID are nobody's choice, and cost zeros.
    broken = not bool(np.isfinite(found.losses).all())
    vector = encoding.void(os.urandom) if broken else encoding.encode(values)
    write_file(order.vector, vector.tobytes())
    fault = not bool(np.isfinite(values).all())
    loss = math.fsum(found.losses) / len(found.losses)
    return Evaluated(found.kid, found.coverage, found.copies, loss, fault)
