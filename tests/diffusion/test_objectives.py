"""What a plan can ask for fits together: every objective, schedule and sampler, by an oracle.

For a data set of one image the ideal network is known in closed form. Its training loss must be
zero, and every sampler must come back to the image from pure noise: then loss, schedule and
scheduler mean the same thing by "eps", "x0" and "v".
"""

from __future__ import annotations

from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.execution import Execution
from diffusion.loss import fixed_loss, loss_table
from diffusion.sampling import sample
from diffusion.schedule import alpha_bar
from study.plan import Plan, load_plan

EXAMPLE = (resources.files("study") / "plans" / "digits.toml").read_text("utf-8")
OBJECTIVES, SCHEDULES = ("eps", "x0", "v"), ("linear", "cosine", "sigmoid")
SAMPLERS = {
    "ddpm": 'kind = "ddpm"\nsteps = 100',
    "ddim": 'kind = "ddim"\nsteps = 20',
    "ddim, half the noise": 'kind = "ddim"\nsteps = 20\neta = 0.5',
    "dpmsolver++": 'kind = "dpmsolver++"\nsteps = 12',
}


def plan_of(prediction: str, schedule: str, sampler: str = 'kind = "ddim"\nsteps = 20') -> Plan:
    text = EXAMPLE.replace('prediction = "v"', f'prediction = "{prediction}"')
    text = text.replace('kind = "cosine"', f'kind = "{schedule}"').replace("= 1000", "= 100", 1)
    return load_plan(text.replace('kind = "ddim"', sampler, 1).replace("steps = 50\n", "\n", 1))


class Oracle(nn.Module):
    """The best network for images that are all `image`."""

    def __init__(self, plan: Plan, image: np.ndarray) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=8, num_class_embeds=None)
        self.prediction, self.bars = plan.objective.prediction, alpha_bar(plan.schedule).double()
        self.x_0 = torch.from_numpy(image).double() * (2 / 255) - 1

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, labels: None, return_dict: bool
    ) -> tuple[torch.Tensor]:
        bar = self.bars[t].view(-1, 1, 1, 1)
        eps = (x_t.double() - bar.sqrt() * self.x_0) / (1 - bar).sqrt()
        outputs = {
            "eps": eps,
            "x0": self.x_0.expand_as(eps),
            "v": bar.sqrt() * eps - (1 - bar).sqrt() * self.x_0,
        }
        return (outputs[self.prediction].float(),)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, 8, 8), dtype=np.uint8)


@pytest.fixture
def exact() -> Execution:
    return Execution(torch.device("cpu"), torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_ideal_network_has_no_loss(
    prediction: str, schedule: str, image: np.ndarray, exact: Execution
) -> None:
    plan = plan_of(prediction, schedule)
    oracle = Oracle(plan, image)
    fixed = {"schedule": plan.schedule, "seed": 1, "execution": exact}
    images = np.repeat(image[None], 50, axis=0)
    assert fixed_loss(oracle, images, objective=plan.objective, **fixed) < 1e-5
    inverted = np.repeat(255 - image[None], 50, axis=0)
    assert fixed_loss(oracle, inverted, objective=plan.objective, **fixed) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_every_sampler_comes_back_to_the_image(
    prediction: str, schedule: str, sampler: str, image: np.ndarray, exact: Execution
) -> None:
    plan = plan_of(prediction, schedule, SAMPLERS[sampler])
    drawn = sample(
        Oracle(plan, image),
        2,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=1,
        execution=exact,
    )
    assert np.abs(drawn.astype(int) - image).max() <= 2


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_min_snr_weighs_the_loss_as_published(
    prediction: str, image: np.ndarray, exact: Execution
) -> None:
    """arXiv 2303.09556 §3.4: min(SNR, γ) in terms of x0, over SNR for eps, over SNR + 1 for v."""
    plan, gamma = plan_of(prediction, "cosine"), 5.0
    images = np.repeat(255 - image[None], 6, axis=0)
    fixed = {"schedule": plan.schedule, "seed": 1, "execution": exact, "bins": 100}
    weighed = plan.objective.model_copy(update={"snr_gamma": gamma})
    # One timestep per bin, so that column t of the table is timestep t.
    oracle = Oracle(plan, image)
    plain = loss_table(oracle, images, objective=plan.objective, **fixed)[:, 1:98]
    ratio = loss_table(oracle, images, objective=weighed, **fixed)[:, 1:98] / plain
    bars = alpha_bar(plan.schedule).double().numpy()[1:98]
    snr = bars / (1 - bars)
    weight = np.minimum(snr, gamma) / {"eps": snr, "x0": 1.0, "v": snr + 1}[prediction]
    np.testing.assert_allclose(ratio, np.broadcast_to(weight, ratio.shape), rtol=1e-3)
