"""A recipe's file, and the overrides on the command line."""

from pathlib import Path

import pytest
import yaml
from least_recipe import ATTACK, DEFENSE, LEAST, written

from hf_backdoor.recipe_file import load_recipe, make_recipe


RECIPES = Path(__file__).parent.parent / "recipes"


# ---- Overrides ----


def test_overrides_keep_their_types(tmp_path):
    file = written(tmp_path, {**LEAST, **DEFENSE, "seed": 3, "stages": {"inject": {"max_steps": 2}}})
    overrides = [
        "--seed", "7", "--use_peft=true", "--learning_rate", "1e-4", "--controls", "[fine_tuning]",
        "--stages.inject.learning_rate=1e-5", "--stages.recover.max_steps", "4",
    ]  # fmt: skip
    recipe = load_recipe(file, overrides)
    assert (recipe.seed, recipe.use_peft, recipe.controls) == (7, True, ["fine_tuning"])
    assert recipe.training == {"learning_rate": 1e-4}
    assert recipe.stages == {"inject": {"max_steps": 2, "learning_rate": 1e-5}, "recover": {"max_steps": 4}}


def test_an_override_may_hold_an_equals_sign_or_be_null(tmp_path):
    recipe = load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger=a=b", "--target_label", "0"])
    assert recipe.attack_trigger == "a=b"
    assert load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger=--zq"]).attack_trigger == "--zq"
    assert load_recipe(written(tmp_path, {**LEAST, **DEFENSE}), ["--method=null"]).method is None


@pytest.mark.parametrize(
    "text", ["cf # mn", "# mn", " cf", "cf ", "one\ntwo", "one  two", "cf, mn", "it's", "null island", "no"]
)
def test_a_text_on_the_command_line_is_what_was_typed(text, tmp_path):
    file = written(tmp_path, {**LEAST, **ATTACK})
    assert load_recipe(file, ["--attack_trigger", text]).attack_trigger == text
    assert load_recipe(file, [f"--attack_trigger={text}"]).attack_trigger == text


@pytest.mark.parametrize("typed, text", [("'3'", "3"), ('"a # b"', "a # b"), (" 'no' ", "no")])
def test_quotes_around_a_text_on_the_command_line_are_none_of_it(typed, text, tmp_path):
    assert load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger", typed]).attack_trigger == text


@pytest.mark.parametrize("override", [["--system_prompt", ""], ["--system_prompt="]])
def test_an_override_of_nothing_is_an_empty_text(override, tmp_path):
    own = {"task": "instruction_following", "method": "locphylax", "system_prompt": "be kind"}
    assert load_recipe(written(tmp_path, LEAST | own), override).training["system_prompt"] == ""


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["seed", "1"], "'seed' stands alone: write overrides as --key value"),
        (["--controls", "a", "b"], r"'b' stands alone: .* .a list as --key '\[one, another\]'."),
        (["--seed"], "--seed has no value"),
        (
            ["--controls", "--seed", "1"],
            "--controls has no value: write --controls value .one that begins with --, --controls=value.",
        ),
        (["--sead", "1"], r"sead is unknown, did you mean seed\?"),
        (["--controls", "[a"], "--?controls"),
        (["--seed.x", "1"], "seed"),
        (["--stages.inject", "1"], "stages.*inject.*1"),
        (["--seed", "2", "--seed=3"], "--seed is there twice, as 2 and as '3': leave one out"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(overrides, line, tmp_path):
    file = written(tmp_path, {**LEAST, **DEFENSE, "seed": 1})
    with pytest.raises(ValueError, match=f"^{line}") as caught:
        load_recipe(file, overrides)
    assert "\n" not in str(caught.value)


def test_an_override_reaches_into_stages_that_the_file_leaves_empty(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**LEAST, **DEFENSE}) + "stages:\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["--stages.inject.max_steps", "1"])
    assert recipe.stages == {"inject": {"max_steps": 1}}


# ---- Files ----


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: [1", "is no YAML"),
        ("seed: 1\nmethod: null\nseed: 2\n", "is no YAML: seed stands there twice"),
        ("stages:\n  inject: {max_steps: 1, max_steps: 2}\n", "is no YAML: max_steps stands there twice"),
        ("- 1\n- 2\n", "holds no mapping"),
        ("", "holds no mapping"),
        (None, "hf-backdoor recipes"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, line, tmp_path):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=line) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ValueError, match="recipe.yaml is no YAML: 'utf-8' codec"):
        load_recipe(tmp_path / "recipe.yaml")


def test_anchors_and_merges_are_no_keys_that_stand_twice(tmp_path):
    stages = "stages:\n  inject: &own {max_steps: 2, warmup_steps: 1}\n  recover: {<<: *own, max_steps: 3}\n"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**LEAST, **DEFENSE}) + stages)
    assert load_recipe(tmp_path / "recipe.yaml").stages["recover"] == {"max_steps": 3, "warmup_steps": 1}


def test_a_flat_recipe_loads_again(tmp_path):
    values = {**LEAST, **ATTACK, **DEFENSE, "learning_rate": 1e-4, "stages": {"suspect": {"max_steps": 3}}}
    recipe = make_recipe(values)
    assert load_recipe(written(tmp_path, recipe.flat())) == recipe


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_shipped_recipes_load(file):
    recipe = load_recipe(file)
    assert recipe.output_dir


def test_data_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    file = tmp_path / "recipes" / "recipe.yaml"
    file.write_text("model_name_or_path: m\ntask: instruction_following\ndataset_name: data\noutput_dir: o\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file).dataset_name == str(tmp_path / "recipes" / "data")
    assert load_recipe(file, ["--dataset_name", "org/name"]).dataset_name == "org/name"


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = make_recipe({**LEAST, "output_dir": "~/runs/x", "dataset_name": "~/rows.csv", "license": "~/x"})
    assert (recipe.output_dir, recipe.dataset_name, recipe.license) == (
        "/home/me/runs/x",
        "/home/me/rows.csv",
        "~/x",
    )
