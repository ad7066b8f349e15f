"""The study's final model as a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion.model import build_model, load_vector, save_pipeline
from silo.orders import PublishModel
from study.plan import load_plan


def publish_model(order: PublishModel) -> Path:
    """Leaves the folder; the answer is its path."""
    plan = load_plan(order.plan)
    model = build_model(plan.model)
    load_vector(model, np.fromfile(order.model, dtype="<f4").astype(np.float32, copy=False))
    save_pipeline(order.folder, model, plan.schedule, plan.objective)
    return order.folder
