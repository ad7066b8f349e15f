"""What the worker computes: encoded rounds and residuals, the local model, samples, moments."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import compare
from diffusion.execution import Execution, choose_execution
from diffusion.features.network import load_feature_network
from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.frechet import moments
from diffusion.model import build_model, load_vector, parameter_layout, to_vector
from silo.errors import DataError, ProposalRefused
from silo.jobs import round as round_job
from silo.jobs.evaluation import evaluate_model
from silo.jobs.local import label_weights, sample_local, train_local
from silo.jobs.moments import feature_moments
from silo.jobs.publish import publish_model
from silo.jobs.round import Trained, shared_images, train_round
from silo.jobs.training import first_model, model_sha256
from silo.orders import (
    EvaluateModel,
    FeatureMoments,
    Machine,
    PublishModel,
    SampleLocal,
    TrainLocal,
    TrainRound,
)
from silo.worker import ProgressFile
from study.quantity import (
    EvaluationWork,
    MomentsWork,
    RoundWork,
    decode_work,
    delta_encoding,
    encode_work,
    evaluation_encoding,
    moments_encoding,
)
from study.reservation import split_labels, with_labels
from tests.networks import make_network
from tests.silo.studies import make_plan

CPU = Machine("cpu", None)
SHA256 = FEATURE_NETWORKS["digits"].sha256
PLAN = make_plan(sha256=SHA256)
SIZES = tuple(int(np.prod(shape)) for _, shape, _ in parameter_layout(build_model(PLAN.model)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    return tmp_path / "images.npy"


@pytest.fixture
def order(tmp_path: Path, images: Path) -> TrainRound:
    to_vector(first_model(PLAN)).astype("<f4").tofile(tmp_path / "model")
    work = RoundWork(total_count=40, sizes=SIZES, clips=(1.0,) * len(SIZES))
    return TrainRound(
        machine=CPU,
        plan=PLAN.toml(),
        round=1,
        silos=4,
        silo=2,
        work=encode_work(work),
        model=tmp_path / "model",
        images=images,
        auxiliary=None,
        auxiliary_sheet=tmp_path / "shared.png",
        count=20,
        seed=11,
        residual=tmp_path / "residual.npy",
        vector=tmp_path / "vector",
        new_residual=tmp_path / "new.npy",
        control=tmp_path / "control.npy",
        new_control=tmp_path / "new-control.npy",
        checkpoint=tmp_path / "checkpoint",
    )


@pytest.fixture
def progress(tmp_path: Path) -> ProgressFile:
    return ProgressFile(tmp_path / "progress")


def encoding_of(order: TrainRound):  # type: ignore[no-untyped-def]
    work = decode_work(order.work)
    assert isinstance(work, RoundWork)
    return delta_encoding(work, order.silos, PLAN.secure_sum.ring)


def test_a_round_encodes_the_weighted_delta_and_keeps_what_is_left_over(
    order: TrainRound, progress: ProgressFile, tmp_path: Path
) -> None:
    done = train_round(order, progress)
    assert not done.fault
    encoding = encoding_of(order)
    decoded = encoding.decode(np.fromfile(order.vector, "<u2"))
    assert decoded.loss == pytest.approx(done.loss / 2, abs=1e-6), "weight 20 of 40"
    # What is encoded and what is carried make up the delta, element by element.
    delta = 2 * decoded.mean_delta + np.load(order.new_residual)
    again = replace(order, silo=3, vector=tmp_path / "v2", new_residual=tmp_path / "n2.npy")
    train_round(again, progress)
    other = 2 * encoding.decode(np.fromfile(again.vector, "<u2")).mean_delta
    assert np.allclose(delta, other + np.load(again.new_residual), atol=1e-6)
    assert not np.array_equal(np.fromfile(order.vector, "<u2"), np.fromfile(again.vector, "<u2"))
    assert np.abs(delta).max() > 1e-4


def test_the_residual_of_earlier_rounds_is_added(order: TrainRound, progress: ProgressFile) -> None:
    train_round(order, progress)
    encoding = encoding_of(order)
    without = encoding.decode(np.fromfile(order.vector, "<u2")).mean_delta
    np.save(order.residual, np.full(sum(SIZES), 0.25, dtype=np.float32))
    train_round(order, progress)
    with_residual = encoding.decode(np.fromfile(order.vector, "<u2")).mean_delta
    assert np.allclose(with_residual - without, 0.125, atol=1e-3)


def test_a_model_made_to_break_training_voids_the_sum_and_leaves_nobody_alone_in_it(
    order: TrainRound, progress: ProgressFile
) -> None:
    """Were zeros sent, a model that breaks at all silos but one would show that one's delta."""
    np.save(order.residual, np.full(sum(SIZES), 0.5, dtype=np.float32))
    broken = np.full(sum(SIZES), np.nan, dtype="<f4")
    broken.tofile(order.model)
    done = train_round(replace(order, round=2), progress)
    assert (done.fault, done.void) == (True, True)
    assert done.first_bad_step == 0
    vector = np.fromfile(order.vector, "<u2")
    assert len(set(vector[:1000])) > 900, "random words"
    decoded = encoding_of(order).decode(vector)
    assert (decoded.faults, decoded.void) == (1, 1)
    assert np.all(np.load(order.new_residual) == 0.5), "the old residual is kept"


def test_training_that_fails_here_alone_gives_zeros_and_a_flag_inside_the_sum(
    order: TrainRound, progress: ProgressFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graphics card that computes NaN from a model that a CPU can train is nobody's attack."""
    whole = round_job.train_from

    def broken_card(*arguments: Any, execution: Execution, **options: Any) -> Trained:
        trained = whole(*arguments, execution=execution, **options)
        if "save" not in options:  # the second look
            return trained
        return replace(trained, change=trained.change * np.nan, first_bad_step=0)

    monkeypatch.setattr(round_job, "train_from", broken_card)
    done = train_round(replace(order, round=2), progress)
    assert (done.fault, done.void) == (True, False)
    decoded = encoding_of(order).decode(np.fromfile(order.vector, "<u2"))
    assert (decoded.faults, decoded.void) == (1, 0)
    assert not decoded.mean_delta.any()


def test_the_first_model_must_be_the_one_that_the_seed_gives(
    order: TrainRound, progress: ProgressFile
) -> None:
    changed = np.fromfile(order.model, "<f4")
    changed[7] += 1e-3
    changed.tofile(order.model)
    with pytest.raises(ProposalRefused, match="first model is not the one"):
        train_round(order, progress)
    train_round(replace(order, round=2), progress)


def test_sizes_other_than_the_model_s_are_refused(
    order: TrainRound, progress: ProgressFile
) -> None:
    work = RoundWork(total_count=40, sizes=(sum(SIZES),), clips=(1.0,))
    with pytest.raises(ProposalRefused, match="tensor sizes"):
        train_round(replace(order, work=encode_work(work)), progress)


def test_an_interrupted_round_goes_on_from_its_checkpoint(
    order: TrainRound, progress: ProgressFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = make_plan("local_steps = 2", "local_steps = 6", sha256=SHA256)
    order = replace(order, plan=long.toml())
    train_round(order, progress)
    whole = 2 * encoding_of(order).decode(np.fromfile(order.vector, "<u2")).mean_delta
    whole += np.load(order.new_residual)
    steps: list[int] = []

    def die(activity: str, step: int, total: int) -> None:
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("silo.jobs.round.SAVE_EVERY", 3)
    with pytest.raises(KeyboardInterrupt):
        train_round(order, die)  # type: ignore[arg-type]
    train_round(order, die)  # type: ignore[arg-type]
    assert steps == [1, 2, 3, 4, 4, 5, 6]
    resumed = 2 * encoding_of(order).decode(np.fromfile(order.vector, "<u2")).mean_delta
    assert np.allclose(whole, resumed + np.load(order.new_residual), atol=1e-6)
    assert not order.checkpoint.exists()


def test_local_model_is_sampled_and_copies_of_training_images_are_dropped(
    images: Path, tmp_path: Path, progress: ProgressFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.npy"
    train_local(
        TrainLocal(CPU, PLAN.toml(), images, 5, weights, tmp_path / "local.checkpoint"), progress
    )
    order = SampleLocal(CPU, PLAN.toml(), images, weights, 5, 0, 6, tmp_path / "kept.npy")
    report = sample_local(order, progress)
    first = np.load(order.kept)
    assert (report.samples, report.kept) == (6, len(first))
    assert first.dtype == np.uint8
    assert first.shape[1:] == (1, 8, 8)
    # Numbers go on: samples 3 … 5 are the same images, and a model that copies is caught.
    sample_local(replace(order, first=3, samples=3, kept=tmp_path / "more.npy"), progress)
    training = np.load(images)
    monkeypatch.setattr("silo.jobs.local.sample", lambda *_, **__: training[:5])
    caught = sample_local(replace(order, kept=tmp_path / "none.npy"), progress)
    assert caught.kept == 0


def test_the_audit_leaves_figures_and_the_closest_pairs_for_the_people_of_the_site(
    images: Path, tmp_path: Path, progress: ProgressFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.npy"
    np.save(weights, to_vector(first_model(PLAN)))
    training = np.load(images)
    fresh = np.random.default_rng(9).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)
    drawn = np.concatenate([fresh, training[[4, 7]]])
    monkeypatch.setattr("silo.jobs.local.sample", lambda *_, **__: drawn)
    (tmp_path / "pool").mkdir()
    kept = tmp_path / "pool" / "samples-30.npy"
    done = sample_local(SampleLocal(CPU, PLAN.toml(), images, weights, 5, 30, 8, kept), progress)
    found = json.loads((kept.parent / "audit-30.json").read_text())
    assert (found["samples"], found["kept"]) == (8, done.kept)
    assert found["dropped"] == 8 - done.kept >= 2
    assert found["threshold"] == done.threshold > 0
    # Each sample lies beside the training image it is nearest to, the closest pair first.
    sheet = np.asarray(Image.open(kept.parent / "audit-30-dropped.png"))
    tile = sheet[2:66, 2:66], sheet[2:66, 68:132]
    assert np.array_equal(*tile)
    leaving = np.asarray(Image.open(kept.parent / "audit-30-leaving.png"))
    assert not np.array_equal(leaving[2:66, 2:66], leaving[2:66, 68:132])


CONDITIONAL = make_plan("[model]", "[model]\nclasses = 3", sha256=SHA256)


@pytest.fixture
def labels(images: Path) -> np.ndarray:
    """Twelve images of class 0, six of class 1, two of class 2."""
    made = np.repeat(np.arange(3), [12, 6, 2])
    np.save(images.with_name("labels.npy"), made)
    return made


def test_a_conditional_round_trains_with_the_labels(
    order: TrainRound, progress: ProgressFile, labels: np.ndarray
) -> None:
    to_vector(first_model(CONDITIONAL)).astype("<f4").tofile(order.model)
    shapes = [shape for _, shape, _ in parameter_layout(build_model(CONDITIONAL.model))]
    sizes = tuple(int(np.prod(shape)) for shape in shapes)
    work = RoundWork(total_count=20, sizes=sizes, clips=(1.0,) * len(sizes))
    order = replace(order, plan=CONDITIONAL.toml(), work=encode_work(work))

    def delta() -> np.ndarray:
        train_round(order, progress)
        decoded = delta_encoding(work, 4, 16).decode(np.fromfile(order.vector, "<u2"))
        return decoded.mean_delta + np.load(order.new_residual)

    first = delta()
    assert np.allclose(first, delta(), atol=1e-6)
    np.save(order.images.with_name("labels.npy"), labels[::-1].copy())
    assert not np.allclose(first, delta(), atol=1e-4)


def test_synthetic_images_leave_with_labels_of_classes_that_are_not_rare_here(
    images: Path, tmp_path: Path, progress: ProgressFile, labels: np.ndarray
) -> None:
    weights = tmp_path / "weights.npy"
    text = CONDITIONAL.toml()
    seed = 9  # 42 pass the audit: a CPU's rounding moves that by one or two
    train_local(TrainLocal(CPU, text, images, seed, weights, tmp_path / "checkpoint"), progress)
    order = SampleLocal(CPU, text, images, weights, seed, 0, 60, tmp_path / "kept.npy")
    done = sample_local(order, progress)
    drawn, known = split_labels(np.load(order.kept), (1, 8, 8))
    assert len(drawn) == done.kept > 30
    assert set(known.tolist()) == {0, 1}, "two images of class 2: it is not sampled"
    assert 1.2 < (known == 0).sum() / (known == 1).sum() < 3.5
    later = replace(order, first=20, samples=40, kept=tmp_path / "later.npy")
    sample_local(later, progress)
    _, again = split_labels(np.load(later.kept), (1, 8, 8))
    assert len(again) < len(known)


def test_a_conditional_plan_refuses_images_without_labels_or_of_too_many_classes(
    order: TrainRound, progress: ProgressFile, images: Path
) -> None:
    order = replace(order, plan=CONDITIONAL.toml(), round=2)
    sizes = [shape for _, shape, _ in parameter_layout(build_model(CONDITIONAL.model))]
    work = RoundWork(
        total_count=40, sizes=tuple(int(np.prod(s)) for s in sizes), clips=(1.0,) * len(sizes)
    )
    order = replace(order, work=encode_work(work))
    vector = to_vector(first_model(CONDITIONAL))
    vector.astype("<f4").tofile(order.model)
    with pytest.raises(DataError, match="has 3 classes, but not every image here has a label"):
        train_round(order, progress)
    np.save(images.with_name("labels.npy"), np.arange(20) % 4)
    with pytest.raises(DataError, match="3 classes, 0 to 2, but labels here go up to 3"):
        train_round(order, progress)
    with pytest.raises(DataError, match="no class has 5 images"):
        label_weights(np.arange(20) % 10)


def test_progress_that_leaves_the_site_does_not_tell_how_many_images_there_are(
    images: Path, tmp_path: Path, order: TrainRound
) -> None:
    def told(count: int) -> list[tuple[str, int, int]]:
        seen: list[tuple[str, int, int]] = []
        note: Any = lambda *shown: seen.append(shown)  # noqa: E731
        np.save(images, np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), np.uint8))
        weights = tmp_path / "weights.npy"
        local = TrainLocal(CPU, PLAN.toml(), images, 5, weights, tmp_path / "local.checkpoint")
        train_local(local, note)
        sample = SampleLocal(CPU, PLAN.toml(), images, weights, 5, 0, count // 4, tmp_path / "k")
        sample_local(sample, note)
        work = MomentsWork(
            total_count=80, network="digits", sha256=SHA256, dimension=64, bound=4096.0
        )
        feature_moments(
            FeatureMoments(CPU, 4, encode_work(work), images, tmp_path / "vector"), note
        )
        train_round(order, note)
        return seen

    assert told(20) == told(48)


def test_moments_are_those_of_the_features_about_the_public_centre(
    images: Path, tmp_path: Path, progress: ProgressFile
) -> None:
    work = MomentsWork(total_count=80, network="digits", sha256=SHA256, dimension=64, bound=64.0**2)
    order = FeatureMoments(CPU, 4, encode_work(work), images, tmp_path / "vector")
    assert feature_moments(order, progress).clipped == 0
    values = moments_encoding(work, 4).decode(np.fromfile(order.vector, "<u4"), 1).values * 80
    network = load_feature_network("digits")
    expected = moments(network.extract(np.load(images)), network.public_center())
    assert values[0] == pytest.approx(20)
    assert np.allclose(values[1:65], expected.total, atol=1e-6)
    assert np.allclose(values[65:], expected.outer[np.triu_indices(64)], atol=1e-6)
    other = work.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ProposalRefused, match="not the one that this version ships"):
        feature_moments(replace(order, work=encode_work(other)), progress)


def test_moments_are_those_of_the_network_that_the_site_s_file_holds(
    images: Path, tmp_path: Path, progress: ProgressFile
) -> None:
    file = tmp_path / "own.safetensors"
    sha256 = make_network(file)
    work = MomentsWork(total_count=80, network="own", sha256=sha256, dimension=64, bound=4.0)
    vector, files = tmp_path / "vector", (tmp_path / "other.safetensors", file)
    order = FeatureMoments(CPU, 4, encode_work(work), images, vector, files)
    assert feature_moments(order, progress).clipped == 0
    values = moments_encoding(work, 4).decode(np.fromfile(vector, "<u4"), 1).values * 80
    network = load_feature_network("own", sha256, files)
    features = network.extract(np.load(images)).astype(np.float64) - 0.25
    assert np.allclose(values[1:65], features.sum(axis=0), atol=1e-6)
    assert np.abs(values[1:65]).max() > 1.0
    with pytest.raises(ProposalRefused, match="moments: feature network .own. is not here"):
        feature_moments(replace(order, feature_files=()), progress)
    make_network(file, seed=2)
    with pytest.raises(ProposalRefused, match=f"expected {sha256[:16]}"):
        feature_moments(order, progress)


def test_an_evaluation_encodes_the_four_measures_of_this_site(
    order: TrainRound, tmp_path: Path, progress: ProgressFile, images: Path
) -> None:
    plan = make_plan("samples = 8", "samples = 8\nat_silos = true", sha256=SHA256)
    samples = np.random.default_rng(1).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    samples[0] = np.load(images)[3]
    samples.tofile(tmp_path / "samples")
    work = EvaluationWork(samples="ab" * 32, images=8, network="digits", sha256=SHA256, bins=10)
    asked = EvaluateModel(
        machine=CPU,
        plan=plan.toml(),
        silos=4,
        work=encode_work(work),
        model=order.model,
        samples=tmp_path / "samples",
        images=images,
        vector=tmp_path / "vector",
    )
    done = evaluate_model(asked, progress)
    assert not done.fault
    found = evaluation_encoding(work, 4).decode(np.fromfile(asked.vector, "<u4"), 1)
    expected = compare(
        first_model(plan),
        samples,
        np.load(images),
        load_feature_network("digits"),
        schedule=plan.schedule,
        objective=plan.objective,
        seed=plan.study.seed,
        execution=choose_execution("cpu"),
    )
    values = [expected.kid, expected.coverage, expected.copies, *expected.losses]
    assert found.values == pytest.approx(values, abs=1e-8)
    assert expected.copies >= 1 / 8
    assert (found.clipped, found.faults) == (0, 0)
    np.save(images, np.load(images)[:4])
    assert evaluate_model(asked, progress).fault, "four images have no fifth neighbour"
    found = evaluation_encoding(work, 4).decode(np.fromfile(asked.vector, "<u4"), 1)
    assert (found.faults, found.void) == (1, 0)
    assert not found.values.any()
    np.full(sum(SIZES), np.nan, "<f4").tofile(asked.model)
    assert evaluate_model(asked, progress).fault
    found = evaluation_encoding(work, 4).decode(np.fromfile(asked.vector, "<u4"), 1)
    assert found.void == 1, "a model that measures nothing here may measure at one other site"


def test_the_final_model_becomes_a_folder_that_diffusers_loads(
    order: TrainRound, tmp_path: Path
) -> None:
    from diffusion.model import load_pipeline

    publish_model(PublishModel(CPU, PLAN.toml(), order.model, tmp_path / "published"))
    unet = load_pipeline(tmp_path / "published").unet
    model = build_model(PLAN.model)
    load_vector(model, np.fromfile(order.model, "<f4"))
    assert np.array_equal(to_vector(unet), to_vector(model))
    assert model_sha256(model) == hashlib.sha256(order.model.read_bytes()).digest()


def test_auxiliary_images_change_what_is_trained_and_a_label_that_is_none_is_left_out(
    order: TrainRound, progress: ProgressFile, tmp_path: Path
) -> None:
    plan = make_plan('kind = "fedddpm"', 'kind = "fedddpm"\nauxiliary_share = 0.5', sha256=SHA256)
    alone = replace(order, plan=plan.toml())
    train_round(alone, progress)
    before = order.vector.read_bytes()
    records = tmp_path / "auxiliary"
    np.full((6, 64), 255, np.uint8).tofile(records)
    train_round(replace(alone, auxiliary=records), progress)
    assert order.vector.read_bytes() != before
    with Image.open(order.auxiliary_sheet) as sheet:
        assert sheet.size == (660, 66), "a row of ten places, for the person who looks"

    labelled = make_plan("[model]", "[model]\nclasses = 3", sha256=SHA256)
    with_labels(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 2, 3, 700])).tofile(records)
    shared = shared_images(labelled, records)
    assert shared is not None
    assert shared.labels is not None
    assert shared.labels.tolist() == [0, 2]
    with_labels(np.zeros((2, 1, 8, 8), np.uint8), np.array([3, 700])).tofile(records)
    with pytest.raises(ProposalRefused, match="no auxiliary image has a label"):
        shared_images(labelled, records)
