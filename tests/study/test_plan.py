"""A plan is read whole or refused with the key, the value and the fix."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from study.plan import Plan, load_plan
from study.problems import PlanError
from study.strategies import FedAvg, FedDDPMPlus

EXAMPLE = (resources.files("study") / "plans" / "digits.toml").read_text("utf-8")

MINIMAL = """
[study]
name = "tiny"
title = "The least a plan can say"
seed = 1
[data]
image_size = 8
[model]
block_out_channels = [32]
attention = [false]
[rounds]
count = 1
local_steps = 1
"""


def changed(old: str, new: str) -> str:
    assert EXAMPLE.count(old) >= 1
    return EXAMPLE.replace(old, new, 1)


def test_the_example_plan_loads():
    plan = load_plan(EXAMPLE)
    assert plan.study.name == "digits"
    assert isinstance(plan.strategy, FedDDPMPlus)
    assert plan.data.shape == (1, 8, 8)
    assert (plan.model.image_size, plan.model.channels) == (8, 1)


def test_a_minimal_plan_has_the_documented_defaults():
    plan = load_plan(MINIMAL)
    assert plan.strategy == FedAvg()
    assert plan.secure_sum.ring == 16
    assert plan.auxiliary is None
    assert plan.evaluation is None


def test_a_plan_is_read_from_a_file(tmp_path: Path):
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE, "utf-8")
    assert load_plan(path) == load_plan(EXAMPLE)


@pytest.mark.parametrize("text", [EXAMPLE, MINIMAL])
def test_the_canonical_text_is_the_same_plan(text):
    plan = load_plan(text)
    assert load_plan(plan.toml()) == plan
    assert load_plan(plan.toml()).toml() == plan.toml()


def test_the_digest_does_not_see_formatting():
    plain = load_plan(EXAMPLE)
    squeezed = re.sub(r"\s*#[^\n]*", "", EXAMPLE).replace("5.0", "5").replace("3e-3", "0.0030")
    assert load_plan(squeezed).digest() == plain.digest()
    sections = [f"[{part}" for part in squeezed.split("\n[") if part.strip()]
    assert load_plan("\n".join(reversed(sections))).digest() == plain.digest()
    assert len(plain.digest()) == 32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed = 2503", "seed = 2504"),
        ("ring = 16", "ring = 32"),
        ("tau = -0.05", "tau = 0.06"),
        ("# threshold = 3", "threshold = 3"),
        ("digits, 8×8", "digits, 8x8"),
    ],
)
def test_the_digest_changes_with_every_value(old, new):
    assert load_plan(changed(old, new)).digest() != load_plan(EXAMPLE).digest()


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=50))
def test_any_title_survives_the_canonical_text(title):
    plan = load_plan(MINIMAL)
    study = plan.study.model_copy(update={"title": title})
    text = plan.model_copy(update={"study": study}).toml()
    assert tomllib.loads(text)["study"]["title"] == title


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 7", "count = -1", r"rounds\.count = -1: use at least 1"),
        ("count = 7", "count = true", r"rounds\.count = true: use a whole number"),
        ("count = 7", "cuont = 7", r"rounds\.cuont = 7 is unknown: did you mean count\?"),
        ("count = 7", "", r"rounds\.count is missing: write `count = …` in \[rounds\]"),
        ("[rounds]", "[round]", r"\[round\] is unknown: did you mean rounds\?"),
        ("[rounds]", "[round]", r"rounds is missing: add a section \[rounds\] with count, local"),
        ("window = 3", 'window = "2"', r'strategy\.window = "2": use a whole number, without quo'),
        ("window = 3", "windw = 2", r"strategy\.windw = 2 is unknown: did you mean window\?"),
        ('"fedddpm_plus"', '"fedavgg"', r'strategy\.kind = "fedavgg" is unknown: use one of "fed'),
        ('kind = "fedddpm_plus"', "", r"strategy\.kind is missing: write `kind = …` in \[strat"),
        ("ring = 16", "ring = 12", r"secure_sum\.ring = 12: use 8, 16 or 32"),
        ("share = 30", "share = 0", r"deadlines\.share = 0: use more than 0"),
        ("[16, 32]", "[16, 0]", r"model\.block_out_channels\[1\] = 0: use at least 1"),
        ("[16, 32]", "[16, 60]", r"model\.norm_num_groups = 8 does not divide 60"),
        ("steps = 50", "steps = 37", r"sampler\.steps = 37 does not divide .* use 40"),
        (
            "steps = 50",
            "steps = 50\nguidance = 2.0",
            r"sampler\.guidance = 2\.0 needs a model with cl",
        ),
        ("[model]", "[model]\nclasses = 0", r"model\.classes = 0: use at least 1"),
        ("[model]", "[model]\nimage_size = 16", r"model\.image_size = 16 differs from data\.image"),
        ("tau = -0.05", "tau = nan", r"strategy\.tau = NaN: use a finite number"),
        ('name = "digits"', 'name = "My digits"', r'study\.name = "My digits": use text that mat'),
    ],
)
def test_a_wrong_value_is_refused_with_the_key_the_value_and_the_fix(old, new, message):
    with pytest.raises(PlanError, match=message):
        load_plan(changed(old, new))


def test_every_problem_is_named_at_once():
    text = changed("count = 7", "count = 0").replace("ring = 16", "ring = 64")
    with pytest.raises(PlanError) as caught:
        load_plan(text)
    assert len(caught.value.problems) == 2


def test_the_first_clip_is_learning_rate_times_steps_unless_the_plan_says_otherwise():
    assert load_plan(EXAMPLE).first_clip == pytest.approx(3e-3 * 100)
    given = load_plan(changed("count = 7", "count = 8\nfirst_clip = 0.25"))
    assert given.first_clip == 0.25


@pytest.mark.parametrize("hidden", ["\\u009b", "\\u202e", "\\u2028", "\\u001b", "\\u200b"])
def test_text_that_no_screen_shows_as_it_is_is_refused_and_quoted_as_escapes(hidden):
    with pytest.raises(PlanError, match=r"study\.title: 'The l.*' holds .*: use letters") as title:
        load_plan(MINIMAL.replace("The least", f"The l{hidden}east"))
    names = f'[data]\nclass_names = ["a", "b{hidden}"]'
    with pytest.raises(PlanError, match=r"data\.class_names\[1\]: 'b.*' holds") as name:
        load_plan(MINIMAL.replace("[data]", names))
    with pytest.raises(PlanError, match=r"data\..* is unknown") as key:
        load_plan(MINIMAL.replace("[data]", f'[data]\n"x{hidden}" = "{hidden}"'))
    for caught in (title, name, key):
        assert all(problem.isprintable() for problem in caught.value.problems)


def test_a_title_may_be_in_any_script():
    title = "Röntgen – 胸部 X 線, грудь, صدر ½ (№ 7)"
    assert load_plan(MINIMAL.replace("The least a plan can say", title)).study.title == title


def test_wrong_toml_is_refused_with_line_and_column(tmp_path: Path):
    path = tmp_path / "broken.toml"
    path.write_text('[study]\nname = "a\n', "utf-8")
    with pytest.raises(PlanError, match=r"broken\.toml: is no TOML: .*line 2, column 10"):
        load_plan(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(PlanError, match=r"none\.toml: cannot be read"):
        load_plan(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes('title = "Ä"'.encode("latin-1"))
    with pytest.raises(PlanError, match=r"latin\.toml: byte 9 is no UTF-8"):
        load_plan(tmp_path / "latin.toml")


def test_a_strategy_that_corrects_needs_auxiliary_images_and_these_a_warm_up():
    with pytest.raises(PlanError, match=r"strategy.kind = \"fedddpm\" corrects .* add \[auxiliary"):
        load_plan(MINIMAL + '[strategy]\nkind = "fedddpm"\n')
    with pytest.raises(PlanError, match=r"warm_up is missing, .* add \[warm_up\]"):
        load_plan(MINIMAL + "[auxiliary]\nimages = 100\n")


def secure_sum(**values: int) -> Plan:
    lines = "".join(f"{k} = {v}\n" for k, v in values.items())
    return load_plan(MINIMAL + "[secure_sum]\n" + lines)


@given(st.integers(3, 255))
def test_the_default_quorum_is_safe_for_every_roster(silos):
    t, c = load_plan(MINIMAL).validate_roster(silos)
    assert t == 2 * silos // 3 + 1
    assert 2 * t > silos + c
    assert t - c >= 2
    assert c >= 1
    assert not (2 * t > silos + c + 1 and t - c - 1 >= 2), "c is not the largest possible"


@pytest.mark.parametrize(("silos", "quorum"), [(3, (3, 1)), (4, (3, 1)), (5, (4, 2))])
def test_small_rosters_get_the_documented_quorum(silos, quorum):
    assert load_plan(MINIMAL).validate_roster(silos) == quorum


@pytest.mark.parametrize(
    ("values", "silos", "message"),
    [
        ({}, 2, "invite more"),
        ({"threshold": 5}, 4, "threshold = 5 exceeds the 4 silos: use at most 4"),
        ({"threshold": 2}, 4, "threshold = 2 is no majority .*: use at least 3"),
        ({"threshold": 3, "colluders": 2}, 4, "colluders = 2 is too many .* use at most 1"),
        ({"ring": 8}, 127, "ring = 8 has room for 126 silos: use 16"),
        ({}, 256, "has room for 255 silos: that is the most"),
    ],
)
def test_a_roster_that_cannot_be_safe_is_refused(values, silos, message):
    with pytest.raises(PlanError, match=message):
        secure_sum(**values).validate_roster(silos)


def test_nothing_here_imports_torch():
    modules = "study.plan, study.encoding, study.reservation, study.fixed_point, study.strategies"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shipped", ["study/plans", "concilium/demo", "tests/e2e"])
def test_shipped_plans_load_and_pin_the_shipped_feature_networks(shipped: str):
    from diffusion.features.pinned import FEATURE_NETWORKS

    found = sorted((Path(__file__).parents[2] / shipped).glob("*.toml"))
    assert found
    for path in found:
        evaluation = load_plan(path).evaluation
        if evaluation is not None:
            assert evaluation.sha256 == FEATURE_NETWORKS[evaluation.feature_network].sha256


def test_the_local_learning_rate_falls_geometrically_to_its_final_share():
    plan = load_plan(EXAMPLE)
    rates = [plan.optimizer_of(r).learning_rate for r in range(1, plan.rounds.count + 1)]
    assert rates[0] == plan.optimizer.learning_rate
    assert rates[-1] == pytest.approx(0.1 * rates[0])
    assert np.allclose(np.diff(np.log(rates)), np.log(0.1) / (plan.rounds.count - 1))
    constant = load_plan(MINIMAL)
    assert constant.optimizer_of(1) == constant.optimizer


def test_the_first_correction_is_twice_a_silo_s_training_unless_the_plan_says_otherwise():
    plan = load_plan(EXAMPLE)
    assert [plan.correction_steps(r) for r in (1, 2, 7)] == [2 * 7 * 100, 50, 50]
    for r in range(1, 8):
        assert plan.correction_rate(r) == plan.optimizer_of(r).learning_rate
    ours = "first_correction_steps = 9\ncorrection_learning_rate = 0.5\n[evaluation]"
    given = load_plan(changed("[evaluation]", ours))
    assert (given.correction_steps(1), given.correction_rate(1)) == (9, 0.5)
    with pytest.raises(ValueError, match="fedavg does not correct"):
        load_plan(MINIMAL).correction_steps(1)


def test_the_silos_loss_is_no_signal_where_others_train_in_every_round():
    watched = "tau = -0.05\nsignal = "
    assert load_plan(changed("tau = -0.05", watched + '"silos"')).strategy.signal == "silos"
    text = changed("tau = -0.05", watched + '"silos"')
    with pytest.raises(PlanError, match=r"participation = 0.7 others train in each: use signal"):
        load_plan(text.replace("count = 7", "count = 7\nparticipation = 0.7"))


def test_a_conditional_plan_has_a_digest_of_its_own_and_longer_records():
    plain = load_plan(EXAMPLE)
    conditional = load_plan(EXAMPLE.replace("[model]", "[model]\nclasses = 10"))
    assert conditional.model.classes == 10
    assert conditional.digest() != plain.digest()
    assert conditional.record_size == plain.record_size + 2 == 1 + 2 + 64
    assert load_plan(conditional.toml()) == conditional
    named = conditional.toml().replace("[data]", '[data]\nclass_names = ["a", "b"]')
    with pytest.raises(PlanError, match=r"class_names has 2 names, 2 of them different, but mod"):
        load_plan(named)
    two = load_plan(named.replace("classes = 10", "classes = 2"))
    assert load_plan(two.toml()).data.class_names == ("a", "b")
    with pytest.raises(PlanError, match="1 of them different"):
        load_plan(named.replace("classes = 10", "classes = 2").replace('"b"', '"a"'))


def test_a_share_that_is_no_whole_image_of_a_batch_is_refused() -> None:
    """Else all sites would be sent images that nobody trains on."""
    text = load_plan(EXAMPLE).toml()
    assert "auxiliary_share = 0.5" in text
    with pytest.raises(PlanError, match=r"auxiliary_share = 0.001 of optimizer.batch_size = \d+"):
        load_plan(text.replace("auxiliary_share = 0.5", "auxiliary_share = 0.001"))
    load_plan(text.replace("auxiliary_share = 0.5", "auxiliary_share = 0.0"))


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 5000, "a." * 4000 + "a = 1", "a = " + "9" * 5000, "a = 0x" + "f" * 9000],
    ids=["deep array", "deep table", "long integer", "long hexadecimal"],
)
def test_a_text_made_to_exhaust_the_parser_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        load_plan(text)


def test_the_same_number_of_silos_works_in_every_round_and_each_as_often_as_any_other():
    plan = load_plan(changed("count = 7", "count = 7\nparticipation = 0.7"))
    rounds = [plan.working(number, 10) for number in range(1, 2001)]
    assert {len(working) for working in rounds} == {7}
    times = np.bincount([index for working in rounds for index in working], minlength=11)[1:]
    assert abs(times - 1400).max() < 5 * (2000 * 0.7 * 0.3) ** 0.5
    assert load_plan(EXAMPLE).working(3, 10) == frozenset(range(1, 11))


def test_a_sum_always_keeps_two_honest_silos_that_worked():
    plan = load_plan(changed("count = 7", "count = 7\nparticipation = 0.5"))
    with pytest.raises(PlanError, match="lets 5 silos work.*it takes 8"):
        plan.validate_roster(10)
    more = changed("count = 7", "count = 7\nparticipation = 0.8")
    assert load_plan(more).validate_roster(10) == (7, 3)


def test_the_control_variate_has_the_longest_gradient_as_its_first_clip():
    scaffold = EXAMPLE.partition("[strategy]")[0] + '[strategy]\nkind = "scaffold"\n'
    plan = load_plan(scaffold)
    assert plan.first_clips(2) == (plan.first_clip, plan.first_clip, 1.0, 1.0)


def test_a_plan_says_from_which_round_on_sharing_may_stop_and_how_often_it_is_evaluated():
    plan = load_plan(EXAMPLE)
    assert plan.evaluation is not None
    every, count = plan.evaluation.every, plan.rounds.count
    evaluated = [number for number in range(1, count + 1) if plan.evaluates(number)]
    assert plan.evaluations == len(evaluated)
    assert [plan.may_stop_sharing(number) for number in (1, every, every + 1)] == [0, 0, 1]
    without = plan.model_copy(update={"evaluation": None})
    assert (without.evaluations, without.may_stop_sharing(count)) == (0, False)
