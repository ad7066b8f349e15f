"""Strategies compute their papers' equations, and decide for reasons that can be checked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from study.strategies import (
    FedAdam,
    FedAvg,
    FedDDPM,
    FedDDPMPlus,
    FedProx,
    FedYogi,
    RoundRecord,
    Scaffold,
)

ALL = [FedAvg(), FedProx(mu=0.1), Scaffold(), FedAdam(), FedYogi(), FedDDPM(), FedDDPMPlus()]
ALL.append(FedDDPMPlus(control_variates=True))


def f32(*values: float):
    return np.array(values, np.float32)


def history(*losses: float | None, corrected: tuple[int, ...] = ()):
    return [RoundRecord(r, loss, None, r in corrected) for r, loss in enumerate(losses, 1)]


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.kind)
def test_aggregation_keeps_dtype_shape_and_its_arguments(strategy):
    theta, delta = f32(1, 2, 3), np.tile(f32(0.5, 0, -0.5), strategy.parts)
    state = strategy.initial_state(3)
    before = {k: np.copy(v) for k, v in state.items()}
    _, new = strategy.aggregate(state, theta, delta, 1)
    assert new.dtype == np.float32
    assert new.shape == (3,)
    assert strategy.round_input(state, theta).shape == (3 * strategy.parts,)
    np.testing.assert_array_equal(theta, f32(1, 2, 3))
    np.testing.assert_array_equal(delta, np.tile(f32(0.5, 0, -0.5), strategy.parts))
    for key, value in before.items():
        np.testing.assert_array_equal(state[key], value)


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedProx(mu=0.1), FedDDPM(), FedDDPMPlus()], ids=lambda s: s.kind
)
def test_fedavg_adds_the_mean_delta(strategy):
    _, new = strategy.aggregate({}, f32(1, 2), f32(0.25, -1), 1)
    np.testing.assert_array_equal(new, f32(1.25, 1))


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_server_optimisers_follow_algorithm_2(kind):
    strategy = kind(server_learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3)
    rng = np.random.default_rng(0)
    state, theta = strategy.initial_state(5), np.zeros(5, np.float32)
    m, v, x = np.zeros(5), np.full(5, 1e-6), np.zeros(5)
    for round_ in range(1, 20):
        delta = rng.standard_normal(5).astype(np.float32) * 0.01
        state, theta = strategy.aggregate(state, theta, delta, round_)
        d = delta.astype(float)
        m = 0.9 * m + 0.1 * d
        if kind is FedAdam:
            v = 0.99 * v + 0.01 * d**2
        else:
            v = v - 0.01 * d**2 * np.sign(v - d**2)
        x = x + 0.1 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(theta, x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAdam(), FedYogi()], ids=lambda s: s.kind)
def test_a_state_that_went_through_bytes_goes_on_the_same(strategy):
    state, theta = strategy.aggregate(strategy.initial_state(3), f32(0, 0, 0), f32(1, 2, 3), 1)
    restored = {k: np.frombuffer(np.asarray(v).tobytes(), np.float32) for k, v in state.items()}
    _, one = strategy.aggregate(state, theta, f32(1, -1, 1), 2)
    _, other = strategy.aggregate(restored, theta, f32(1, -1, 1), 2)
    np.testing.assert_array_equal(one, other)


def test_only_fedprox_changes_local_training():
    assert FedProx(mu=0.1).local_rules().proximal_mu == 0.1
    assert {s.local_rules().proximal_mu for s in ALL if s.kind != "fedprox"} == {0.0}


def test_only_the_fedddpm_family_corrects():
    assert {s.kind for s in ALL if s.correction} == {"fedddpm", "fedddpm_plus"}
    assert not FedAvg().decide(history(1.0, 1.0, 1.0, 1.0)).correct
    assert FedDDPM().decide(history(1.0)).correct


LATE = FedDDPMPlus(window=2, tau=0.05, first_correction_steps=0, correct_last=True)


def test_learning_is_slow_when_the_improvement_over_the_window_is_below_tau():
    decision = LATE.decide(history(1.0, 0.99, 0.96))
    assert decision.correct
    assert decision.numbers["improvement"] == pytest.approx(0.04)
    assert decision.numbers["loss"] == 0.96
    assert decision.numbers["loss_then"] == 1.0
    assert (decision.numbers["round_then"], decision.numbers["round"]) == (1, 3)
    assert "4.00%" in decision.reason


def test_learning_that_improves_by_tau_or_more_is_left_alone():
    assert not LATE.decide(history(1.0, 0.99, 0.95)).correct
    assert not LATE.decide(history(1.0, 0.97, 0.5)).correct


def test_a_loss_that_rises_is_slow():
    assert LATE.decide(history(1.0, 1.0, 1.2)).correct


def test_only_the_last_window_counts():
    assert LATE.decide(history(9.0, 5.0, 1.0, 1.0, 1.0)).correct


def test_no_decision_before_the_window_is_full():
    decision = LATE.decide(history(1.0, 1.0))
    assert not decision.correct
    assert "needs 3 completed rounds, has 2" in decision.reason
    assert not LATE.decide([]).correct


def test_after_a_correction_it_waits_for_the_window_and_measures_only_what_came_after():
    losses = [1.0] * 8
    fired = []
    for r in range(1, 9):
        records = history(*losses[:r], corrected=tuple(fired))
        if LATE.decide(records).correct:
            fired.append(r)
    assert fired == [3, 6]
    waiting = LATE.decide(history(1.0, 1.0, 1.0, 1.0, corrected=(3,)))
    assert "waits 2 rounds after a correction" in waiting.reason


def test_a_window_never_spans_a_correction():
    records = history(5.0, 5.0, 5.0, 1.0, 1.0, 1.0, corrected=(3,))
    decision = LATE.decide(records)
    assert decision.numbers["round_then"] == 4


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_loss_that_is_no_number_never_triggers(loss):
    decision = LATE.decide(history(1.0, 1.0, loss))
    assert not decision.correct


def test_scaffold_keeps_c_the_mean_of_all_c_i_and_sends_it_behind_the_model():
    strategy = Scaffold(server_learning_rate=0.5)
    rng = np.random.default_rng(1)
    weights, own = np.array([0.5, 0.3, 0.2]), np.zeros((3, 4))
    state, theta = strategy.initial_state(4), np.zeros(4, np.float32)
    assert strategy.local_rules().control
    for round_ in range(1, 6):
        deltas, new = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
        sent = np.concatenate([deltas, new - own], axis=1)
        state, after = strategy.aggregate(state, theta, f32(*(weights @ sent)), round_)
        np.testing.assert_allclose(after - theta, 0.5 * weights @ deltas, rtol=1e-5, atol=1e-6)
        theta, own = after, new
        np.testing.assert_allclose(state["c"], weights @ own, rtol=1e-4, atol=1e-5)
        given = strategy.round_input(state, theta)
        np.testing.assert_array_equal(given, np.concatenate([theta, np.asarray(state["c"])]))


def test_the_last_round_is_corrected_in_any_case_unless_the_plan_says_otherwise():
    fast = history(1.0, 0.5, 0.2)
    assert LATE.decide(fast, last=True).correct
    assert not LATE.decide(fast, last=False).correct
    assert not LATE.model_copy(update={"correct_last": False}).decide(fast, last=True).correct


def test_the_silos_loss_is_watched_where_the_plan_says_so():
    records = [RoundRecord(r, 1.0, silo_loss=loss) for r, loss in enumerate((1.0, 0.9, 0.5), 1)]
    assert LATE.decide(records).correct, "the auxiliary loss stands still"
    decision = FedDDPMPlus(window=2, tau=0.05, signal="silos").decide(records)
    assert not decision.correct
    assert decision.numbers["improvement"] == pytest.approx(0.5)
    assert "the silos' loss" in decision.reason


@pytest.mark.parametrize(
    ("average", "middle", "end"),
    [("never", False, False), ("last", False, True), ("always", True, True)],
)
def test_a_correction_is_averaged_in_the_rounds_that_the_plan_says(average, middle, end):
    correction = FedDDPM(correction_average=average).correction
    assert (correction.averages(last=False), correction.averages(last=True)) == (middle, end)


def test_with_control_variates_the_rounds_are_scaffold_s_and_the_corrections_stay():
    plain, controlled = Scaffold(), FedDDPMPlus(control_variates=True, auxiliary_share=0.0)
    assert controlled.local_rules() == plain.local_rules() != FedDDPMPlus().local_rules()
    assert (controlled.parts, FedDDPMPlus().parts) == (2, 1)
    model, mean = np.float32([1.0, 2.0]), np.float32([0.5, -0.5, 3.0, 4.0])
    results = []
    for strategy in (plain, controlled):
        state, after = strategy.aggregate(strategy.initial_state(2), model, mean, 1)
        results.append([after.tolist(), strategy.round_input(state, after).tolist()])
    assert results[0] == results[1] == [[1.5, 1.5], [1.5, 1.5, 3.0, 4.0]]
    assert controlled.correction == FedDDPMPlus().correction


def test_a_cool_down_may_be_longer_than_the_window_but_not_shorter():
    patient = FedDDPMPlus(window=1, tau=0.05, cool_down=3, first_correction_steps=0)
    fired = []
    for r in range(1, 9):
        if patient.decide(history(*[1.0] * r, corrected=tuple(fired))).correct:
            fired.append(r)
    assert fired == [2, 6]
    with pytest.raises(ValueError, match="cool_down = 1 is shorter than window = 2"):
        FedDDPMPlus(window=2, cool_down=1)


def test_the_last_correction_may_be_longer():
    correction = FedDDPMPlus(correction_steps=10, last_correction_steps=30).correction
    assert (correction.steps_in(5, 6, 1), correction.steps_in(5, 5, 1)) == (10, 30)
    assert FedDDPM(correction_steps=10).correction.steps_in(5, 5, 1) == 10


def test_the_first_round_is_corrected_in_any_case_where_steps_are_given_for_it():
    early = LATE.model_copy(update={"correction_steps": 10, "first_correction_steps": 40})
    assert early.decide(history(1.0)).correct
    assert early.correction.steps_in(1, 3, 1) == 40
    assert early.correction.steps_in(2, 3, 1) == 10
    assert early.correction.steps_in(1, 1, 1) == 10, "a study of one round"
    assert not LATE.decide(history(1.0)).correct
    slow = early.decide(history(1.0, 1.0, corrected=(1,)))
    assert not slow.correct, "then it waits as after any other"


def test_losses_of_other_silos_are_not_compared():
    watching = FedDDPMPlus(window=1, tau=0.05, signal="silos", first_correction_steps=0)
    every, fewer = (1, "a", "b", "c"), (1, "a", "b")

    def records(*rounds):
        return [RoundRecord(r, 1.0, None, False, *own) for r, own in enumerate(rounds, 1)]

    # All learn: by 10 % a round. "c" is missing in the second, whose sum is smaller for it.
    lost = records((1.0, every), (0.6, fewer))
    back = [*lost, RoundRecord(3, 1.0, None, False, 0.8, every)]
    for told in (lost, back):
        decision = watching.decide(told)
        assert not decision.correct
        assert "other silos" in decision.reason
    assert "improvement" not in watching.decide(back).numbers
    assert watching.decide(records((0.6, fewer), (0.6, fewer))).correct
    assert not watching.decide(records((1.0, every), (None, every))).correct, "a fault"
    auxiliary = watching.model_copy(update={"signal": "auxiliary"})
    assert auxiliary.decide(lost).correct, "which is not theirs"


@pytest.mark.parametrize(
    ("judged", "middle", "end"),
    [("never", False, False), ("last", False, True), ("always", True, True)],
)
def test_a_correction_is_judged_in_the_rounds_that_the_plan_says(judged, middle, end):
    correction = FedDDPM(correction_judged=judged).correction
    assert (correction.judges(last=False), correction.judges(last=True)) == (middle, end)


def test_by_default_ours_corrects_once_after_the_first_round_and_silos_train_on_the_set_too():
    plus = FedDDPMPlus()
    assert plus.decide(history(1.0)).correct
    assert plus.correction.steps_in(1, 30, 40) == 2 * 30 * 40, "twice as many as a silo takes"
    assert plus.correction.steps_in(2, 30, 40) == 50
    assert FedDDPM().correction.steps_in(1, 30, 40) == 50
    falls = history(1.0, 0.9, 0.8, 0.7, 0.7, 0.71, 0.71, corrected=(1,))
    assert not plus.decide(falls).correct
    assert not plus.decide(falls, last=True).correct
    assert plus.decide(history(1.0, 0.8, 0.7, 0.7, 0.85, corrected=(1,))).correct, "it rises"
    assert plus.local_rules().auxiliary_share == 0.5
    assert FedDDPM().local_rules().auxiliary_share == 0.0, "the paper's silos know no such set"


def test_the_paper_keeps_every_correction_and_ours_judges_the_last():
    assert FedDDPM().correction.judged == "never"
    assert FedDDPMPlus().correction.judged == "last"


@pytest.mark.parametrize(
    ("fids", "share"),
    [
        ([], True),
        ([0.20], True),
        ([0.20, 0.13], True),
        ([0.20, 0.125], False),
        ([0.20, 0.12, 0.108], False),
        ([0.20, 0.12, 0.109], True),
        ([0.20, 0.12, 0.109, 0.08], True),
        ([0.20, 0.12, 0.10, 0.119], False),
        ([0.20, 0.12, 0.10, 0.121], True),
        ([0.20, 0.12, 0.10, 0.121, 0.08], True),
        ([0.20, 0.19, 0.18, 0.12], False),
        ([0.20, 0.19, 0.18, 0.17, 0.12], True),
        ([math.nan], True),
        ([0.20, 0.12, math.nan], True),
        ([0.20, 0.12, 0.10, math.nan], True),
    ],
)
def test_silos_share_until_the_model_is_near_the_set_and_again_where_it_got_worse(fids, share):
    plus = FedDDPMPlus(share_until=1.25)
    decided = plus.shares(fids, 6, 0.1)
    assert decided.share is share
    assert decided.numbers["auxiliary_fid"] == 0.1
    assert plus.shares(fids, 6, None).share, "where the set was not measured"
    assert FedDDPMPlus(share_until=0.0).shares(fids, 6, 0.1).share
    assert FedDDPM(auxiliary_share=0.5).shares(fids, 6, 0.1).share
    assert not FedDDPMPlus(auxiliary_share=0.0).shares(fids, 6, 0.1).share
