"""FID, KID and coverage of samples against all silos' images, by the plan's feature network, how
many of them are near-copies of one of these images, by their pixels, and a model's loss on the
silos' images by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from concilium.simulate.memo import Arrays, Memo, digest_array
from concilium.simulate.silos import Federation
from concilium.simulate.spec import Simulation
from diffusion.audit import copy_share
from diffusion.classifier import synthetic_to_real
from diffusion.coverage import covered, neighbour_radii
from diffusion.evaluation import LOSS_IMAGES, evenly_spaced
from diffusion.execution import Execution
from diffusion.features.network import load_feature_network
from diffusion.frechet import fid, kid, moments
from diffusion.labels import even_labels
from diffusion.loss import loss_curve, loss_table
from diffusion.model import build_model, load_vector
from diffusion.sampling import sample
from study.plan import Plan
from study.quantity import evaluation_bins
from study.reservation import share

Vector = NDArray[np.float32]
Images = NDArray[np.uint8]
# As coordinator.jobs: after the numbers of the grids, and others for what is never shown.
_FIRST_MEASURED, _FIRST_JUDGED = 1_000_000, 2_000_000
_TESTED = 10_000


@dataclass(frozen=True)
class Measured:
    """How far samples are from the silos' images."""

    samples: int
    fid: float
    kid: float
    coverage: float
    """Share of all real images that are covered."""
    coverage_by_silo: tuple[float, ...]
    """The same of each silo's own."""
    copies: float
    """Share of the samples that are near-copies of a real image, of whatever silo."""
    network: str
    """Feature network: figures of different ones never share a table."""
    network_sha256: str
    """Of its weights."""

    def line(self) -> dict[str, Any]:
        """For a line of metrics.jsonl."""
        return {**vars(self), "coverage_by_silo": list(self.coverage_by_silo)}


class Ruler:
    """Measures models of one study, always with the same noise."""

    def __init__(
        self,
        plan: Plan,
        federation: Federation,
        memo: Memo,
        execution: Execution,
        simulation: Simulation,
    ) -> None:
        self._plan, self._memo, self._execution = plan, memo, execution
        self._precision, self._federation = simulation.precision, federation
        self._evaluation = plan.evaluation
        if self._evaluation is None:
            return
        self._name, self._sha256 = self._evaluation.feature_network, self._evaluation.sha256
        self._network = load_feature_network(self._name, self._sha256, simulation.feature_files)
        self._center = self._network.public_center().astype(np.float64)
        self._by_silo = [self._network.extract(images) for images in federation.images]
        self._real = np.concatenate(self._by_silo)
        self._radii = neighbour_radii(self._real)
        self._moments = moments(self._real, self._center)

    def of_model(self, model: Vector) -> Measured:
        """Of samples of one model."""
        return self.of_models([model])

    def losses_of_model(self, model: Vector) -> list[float]:
        """Mean over the silos of the model's loss on each one's images, by bins of timesteps, the
        least noisy first: what an evaluation of the service sums up (`diffusion.evaluation`)."""
        bins = evaluation_bins(self._plan.schedule.num_train_timesteps)
        inputs = {
            **self._computed_as(model),
            "what": "losses",
            "images": LOSS_IMAGES,
            "bins": bins,
            "data": self._federation.digest,
        }
        labels = self._federation.labels_for(self._plan)
        if self._plan.model.classes is not None:
            inputs["labels"] = digest_array(*self._federation.labels)

        def compute() -> Arrays:
            network = self._loaded(model)
            curves = [
                loss_curve(
                    loss_table(
                        network,
                        evenly_spaced(images, LOSS_IMAGES),
                        schedule=self._plan.schedule,
                        objective=self._plan.objective,
                        seed=self._plan.study.seed,
                        execution=self._execution,
                        labels=None if own is None else evenly_spaced(own, LOSS_IMAGES),
                        bins=bins,
                    )
                )
                for images, own in zip(self._federation.images, labels, strict=True)
            ]
            return {"losses": np.mean(curves, axis=0)}

        losses: list[float] = self._memo.get(inputs, compute)["losses"].tolist()
        return losses

    def accuracy_of_model(self, model: Vector) -> dict[str, float]:
        """Of a classifier that is trained on samples of a conditional model (`accuracy`), and of
        one that is trained on the silos' images (`accuracy_of_real`, the bar to compare with): on
        images that no silo has, where the data set has some; else without the bar on the silos' own
        (`diffusion.classifier`)."""
        evaluation, classes = self._evaluation, self._plan.model.classes
        if evaluation is None or classes is None:
            raise ValueError("the plan has no [evaluation], or its model no classes")
        silos, n = self._federation, evaluation.samples
        own = np.concatenate(silos.images), np.concatenate(silos.labels)
        tested, unseen = own, silos.unseen
        if unseen is not None and unseen.labels is not None:
            tested = unseen.images[:_TESTED], unseen.labels[:_TESTED]
        data = {"tested": digest_array(*tested), "classes": classes}

        def of_samples() -> Arrays:
            drawn = self._images(model, n, _FIRST_MEASURED), even_labels(n, classes)
            return {"accuracy": np.array(synthetic_to_real(drawn, tested, classes))}

        def of_real() -> Arrays:
            return {"accuracy": np.array(synthetic_to_real(own, tested, classes))}

        inputs = {**self._samples_of(model), "what": "accuracy", "samples": n, **data}
        found = {"accuracy": float(self._memo.get(inputs, of_samples)["accuracy"])}
        if unseen is not None:
            trained = {"what": "accuracy of real", "trained": digest_array(*own), **data}
            found["accuracy_of_real"] = float(self._memo.get(trained, of_real)["accuracy"])
        return found

    def of_models(self, models: Sequence[Vector]) -> Measured:
        """Of the samples of several models together: of one, all; of one per silo, of each as many
        as its share of the images."""
        if self._evaluation is None:
            raise ValueError("the plan has no [evaluation]")
        n, silos = self._evaluation.samples, self._federation
        parts = [n] if len(models) == 1 else [share(n, c, silos.total) for c in silos.counts]
        wanted = [(model, part) for model, part in zip(models, parts, strict=True) if part]
        drawn = [self._described(model, part, _FIRST_MEASURED) for model, part in wanted]
        copies = np.average([one["copies"] for one in drawn], weights=[part for _, part in wanted])
        features = np.concatenate([one["features"] for one in drawn])
        return self._measure(features, float(copies))

    def judged_fid(self, model: Vector) -> float:
        """FID of samples that `of_model` never sees."""
        if self._evaluation is None:
            raise ValueError("the plan has no [evaluation]")
        features = self._described(model, self._evaluation.samples, _FIRST_JUDGED)["features"]
        return fid(self._moments, moments(features, self._center))

    def of_images(self, images: Images) -> Measured:
        """Of images that are there already."""
        if self._evaluation is None:
            raise ValueError("the plan has no [evaluation]")
        return self._measure(self._network.extract(images), self._copies(images))

    def _copies(self, images: Images) -> float:
        return copy_share(images, np.concatenate(self._federation.images))

    def _measure(self, features: Vector, copies: float) -> Measured:
        inside = covered(self._real, features, self._radii)
        ends = np.cumsum([len(own) for own in self._by_silo])[:-1]
        return Measured(
            samples=len(features),
            fid=fid(self._moments, moments(features, self._center)),
            kid=kid(self._real, features),
            coverage=float(inside.mean()),
            coverage_by_silo=tuple(float(own.mean()) for own in np.split(inside, ends)),
            copies=copies,
            network=self._name,
            network_sha256=self._sha256,
        )

    def _described(self, model: Vector, n: int, first: int) -> Arrays:
        """Features, and the share of near-copies, of so many samples from number `first` on."""
        inputs = {
            **self._samples_of(model),
            "what": "features of samples, and near-copies",
            "network": self._evaluation and self._evaluation.sha256,
            "data": self._federation.digest,
            "samples": [first, n],
        }

        def compute() -> Arrays:
            images = self._images(model, n, first)
            copies = np.array(self._copies(images))
            return {"features": self._network.extract(images), "copies": copies}

        return self._memo.get(inputs, compute)

    def _samples_of(self, model: Vector) -> dict[str, Any]:
        """What samples of a model depend on besides their number."""
        return {
            **self._computed_as(model),
            "sampler": self._plan.sampler.model_dump(mode="json"),
        }

    def _computed_as(self, model: Vector) -> dict[str, Any]:
        """A model, the noise that it is measured with, and how it is computed."""
        plan = self._plan
        return {
            "weights": digest_array(model),
            "seed": plan.study.seed,
            "precision": self._precision,
            **{
                part: getattr(plan, part).model_dump(mode="json")
                for part in ("model", "schedule", "objective")
            },
        }

    def _images(self, model: Vector, n: int, first: int) -> Images:
        classes = self._plan.model.classes
        return sample(
            self._loaded(model),
            n,
            schedule=self._plan.schedule,
            objective=self._plan.objective,
            sampler=self._plan.sampler,
            seed=self._plan.study.seed,
            execution=self._execution,
            labels=None if classes is None else even_labels(n, classes),
            first_index=first,
        )

    def _loaded(self, model: Vector) -> nn.Module:
        network = build_model(self._plan.model)
        load_vector(network, model)
        return network
