"""What a person types, and what is answered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from concilium.cli import main
from concilium.commands.demo import demo_plan
from concilium.datasets import DATASETS

README = Path(__file__).parents[2] / "README.md"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ((), "coordinator silo study sample feature-network demo"),
        (("coordinator",), "init invite sites approve revoke serve status"),
        (("silo",), "init join roster approve decline settle check run status"),
        (("study",), "check start pause resume stop list"),
    ],
)
def test_help_names_every_command_with_a_sentence(group: tuple[str, ...], commands: str) -> None:
    shown = run(*group, "--help")
    assert shown.exit_code == 0
    for command in commands.split():
        assert re.search(rf"^  {command} +\w", shown.output, re.MULTILINE), command


def test_help_answers_without_loading_torch_or_the_services() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from concilium.cli import main\n"
        "CliRunner().invoke(main, ['--help'])\n"
        "print(sorted({'torch', 'grpc', 'sqlalchemy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_command_of_the_readme_exists() -> None:
    typed = re.findall(r"^concilium (.+?)(?:  +#.*)?$", README.read_text("utf-8"), re.MULTILINE)
    assert len(typed) > 10
    for line in typed:
        words = [word for word in line.split() if not word.startswith("-")]
        depth = 2 if words[0] in ("coordinator", "silo", "study") else 1
        shown = run(*words[:depth], "--help")
        assert shown.exit_code == 0, line
        for option in re.findall(r"--[a-z-]+", line):
            assert option in shown.output, line


@pytest.mark.parametrize("data", list(DATASETS))
def test_the_demonstrations_plans_load_and_take_another_number_of_rounds(data: str) -> None:
    assert demo_plan(data, None).rounds.count > 1
    assert demo_plan(data, 3).rounds.count == 3


def test_study_check_says_what_a_plan_means() -> None:
    shown = run("study", "check", README.parent / "study" / "plans" / "digits.toml")
    assert shown.exit_code == 0
    assert "threshold 3, 1 colluders tolerated" in shown.output
    assert "all sites are sent the union, to draw 50% of each batch from it" in shown.output
    assert "until the model's FID is at most 2 times its own" in shown.output
    assert "classes" not in shown.output


def test_study_check_says_which_file_a_plan_needs(tmp_path: Path) -> None:
    text = (README.parent / "study" / "plans" / "digits.toml").read_text("utf-8")
    plan = tmp_path / "plan.toml"
    plan.write_text(text, "utf-8")
    assert "feature_files" not in run("study", "check", plan).output
    plan.write_text(text.replace('feature_network = "digits"', 'feature_network = "mri"'), "utf-8")
    shown = run("study", "check", plan)
    assert "FID of" in shown.output
    assert "mri.safetensors has to be here,\n              and at every site" in shown.output


def test_study_check_says_what_ends_the_training_of_a_local_model(tmp_path: Path) -> None:
    text = (README.parent / "study" / "plans" / "digits.toml").read_text("utf-8")
    plan, patience = tmp_path / "plan.toml", re.compile(r"^patience = 2.*\n", re.MULTILINE)
    plan.write_text(text, "utf-8")
    assert "until 2 checks in a row improve by less than 1%" in run("study", "check", plan).output
    plan.write_text(patience.sub("", text), "utf-8")
    shown = run("study", "check", plan).output
    assert "after 1200 local steps" in shown
    assert "converged or not: for a criterion, write patience = 2 in [warm_up]" in shown


def test_study_check_says_what_a_conditional_plan_asks_of_the_sites(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    text = (README.parent / "study" / "plans" / "digits.toml").read_text("utf-8")
    text = text.replace("[data]", '[data]\nclass_names = ["benign", "malignant"]', 1)
    text = text.replace("[model]", "[model]\nclasses = 2")
    plan.write_text(text.replace("samples = 500", "samples = 500\nat_silos = true"), "utf-8")
    shown = run("study", "check", plan)
    assert "2 classes (benign, malignant), guidance 1" in shown.output
    assert "at the silos, whose policy has to allow it: KID" in shown.output


def test_a_wrong_plan_is_refused_with_key_value_and_fix(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    text = (README.parent / "study" / "plans" / "digits.toml").read_text("utf-8")
    plan.write_text(text.replace("ring = 16", "ring = 12"), "utf-8")
    shown = run("study", "check", plan)
    assert shown.exit_code == 1
    assert "secure_sum.ring = 12" in shown.output
    assert "Traceback" not in shown.output


def test_an_institution_sets_up_and_looks_at_its_data(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(5):
        pixels = rng.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    home = tmp_path / "silo"
    made = run("silo", "init", "st-marys", "--data", folder, "--home", home)
    assert made.exit_code == 0, made.output
    checked = run("silo", "check", "--image-size", "8", "--home", home)
    assert checked.exit_code == 0, checked.output
    assert "5 images, cached as 1×8×8" in checked.output
    assert "broken.png" in checked.output
    assert run("silo", "status", "--home", home).output.startswith("the agent has not run yet")


def test_check_counts_classes_and_reasons(tmp_path: Path) -> None:
    folder, home = tmp_path / "images", tmp_path / "silo"
    for name, count in (("benign", 3), ("malignant", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (12, 12), 40 * number).save(folder / name / f"{number}.png")
        (folder / name / "notes.txt").touch()
    run("silo", "init", "st-marys", "--data", folder, "--home", home)
    checked = run("silo", "check", "--image-size", "8", "--home", home)
    assert checked.exit_code == 0, checked.output
    lines = [line.strip() for line in checked.output.splitlines()]
    assert "3  benign" in lines
    assert "2  malignant" in lines
    assert "5  12×12×1" in lines
    assert lines.index("2  neither PNG nor JPEG") + 1 == lines.index(
        "benign/notes.txt, malignant/notes.txt"
    )


def test_an_empty_data_folder_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    home = tmp_path / "silo"
    run("silo", "init", "st-marys", "--data", tmp_path / "images", "--home", home)
    shown = run("silo", "check", "--home", home)
    assert shown.exit_code == 1
    assert "images" in shown.output
    assert "Traceback" not in shown.output


@pytest.mark.parametrize("side", ["silo run", "coordinator serve"])
def test_what_runs_without_a_folder_says_how_to_make_one(side: str, tmp_path: Path) -> None:
    shown = run(*side.split(), "--home", tmp_path / "nowhere")
    assert shown.exit_code == 1
    assert shown.output.startswith("Error: ")
    assert f"concilium {side.split()[0]} init" in shown.output
    assert not (tmp_path / "nowhere").exists()


def test_a_wrong_token_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    home = tmp_path / "silo"
    run("silo", "init", "st-marys", "--data", tmp_path / "images", "--home", home)
    shown = run("silo", "join", "concilium-nonsense", "--home", home)
    assert shown.exit_code == 1
    assert "Error" in shown.output
    assert "Traceback" not in shown.output


def test_a_study_centre_sets_up_and_invites(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    made = run("coordinator", "init", "--address", "127.0.0.1:7443", "--home", home)
    assert made.exit_code == 0, made.output
    again = run("coordinator", "init", "--address", "127.0.0.1:7443", "--home", home)
    assert again.exit_code == 1
    token = run("coordinator", "invite", "st-marys", "--home", home)
    assert token.output.startswith("concilium-")
    assert "st-marys" in run("coordinator", "sites", "--home", home).output
    assert run("coordinator", "approve", "st-marys", "--home", home).exit_code == 1
    assert "no study yet" in run("study", "list", "--home", home).output
    page = run("coordinator", "status", "--home", home).output
    assert "st-marys  invited" in page
    assert "no study yet" in page
    found = json.loads(run("coordinator", "status", "--json", "--home", home).output)
    assert [site["status"] for site in found["sites"]] == ["invited"]


def test_sample_draws_a_grid_from_a_model_folder(tmp_path: Path) -> None:
    from diffusion.model import build_model, initialise, save_pipeline

    plan = demo_plan("digits", None)
    model = build_model(plan.model)
    initialise(model, 1)
    save_pipeline(tmp_path / "model", model, plan.schedule, plan.objective)
    out = tmp_path / "grid.png"
    drawn = run("sample", tmp_path / "model", "-n", "4", "--steps", "2", "--out", out)
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(out).size[0] > 0
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = run("sample", empty)
    assert refused.exit_code == 1
    assert "is no model folder" in refused.output


@pytest.mark.parametrize(("steps", "mended"), [(300, "use 250"), (1001, "use at most 1000")])
def test_sample_refuses_steps_that_would_draw_wrong_images(
    tmp_path: Path, steps: int, mended: str
) -> None:
    from diffusion.model import build_model, initialise, save_pipeline
    from diffusion.spec import ModelSpec, ObjectiveSpec, ScheduleSpec

    spec = ModelSpec(image_size=4, block_out_channels=(8,), attention=(False,), mid_attention=False)
    model = build_model(spec)
    initialise(model, 1)
    save_pipeline(tmp_path / "model", model, ScheduleSpec(), ObjectiveSpec())
    out = tmp_path / "grid.png"
    refused = run("sample", tmp_path / "model", "-n", "1", "--steps", str(steps), "--out", out)
    assert refused.exit_code == 2
    assert f"steps = {steps}" in refused.output
    assert mended in refused.output
    assert not out.exists()


def test_sample_asks_a_conditional_model_for_one_class(tmp_path: Path) -> None:
    from diffusion.model import build_model, initialise, save_pipeline
    from diffusion.spec import ModelSpec, ObjectiveSpec, ScheduleSpec

    small = {"image_size": 8, "block_out_channels": (8,), "attention": (False,)}
    for name, classes in (("plain", None), ("model", 3)):
        model = build_model(ModelSpec(**small, classes=classes, attention_head_dim=4))
        initialise(model, 1)
        save_pipeline(tmp_path / name, model, ScheduleSpec(), ObjectiveSpec())
    grids = {}
    for options in ("--label 2", "--label 1", "--label 2 --guidance 3", ""):
        out = tmp_path / "grid.png"
        fixed = ("-n", "4", "--steps", "2", "--out", out)
        drawn = run("sample", tmp_path / "model", *fixed, *options.split())
        assert drawn.exit_code == 0, drawn.output
        grids[options] = out.read_bytes()
    assert len(set(grids.values())) == 4
    refused = run("sample", tmp_path / "model", "--label", "3")
    assert "has the classes 0 to 2" in refused.output
    refused = run("sample", tmp_path / "plain", "--guidance", "2")
    assert "has no classes: leave --label and --guidance out" in refused.output
    assert refused.exit_code == 2


def test_the_demonstration_never_replaces_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    shown = run("demo", "--out", tmp_path)
    assert shown.exit_code == 1
    assert "choose another --out" in shown.output
    assert (tmp_path / "precious").exists()
