"""Runs of Locphylax with and without a search: a stage that trains nothing, and what later stages take from it."""

import shutil

import pytest
import tiny

from hf_backdoor.defenses import METHODS, defend
from hf_backdoor.defenses.locphylax import FoundTriggers
from hf_backdoor.defenses.reading import OwnAnswers, SoftTriggers
from hf_backdoor.plan import plan
from hf_backdoor.recipe_file import load_recipe
from hf_backdoor.run import Run


CONTROLS = ["recovery_without_injection", "known_triggers_alone"]


@pytest.fixture
def recipe(tmp_path):
    more = {"method": "locphylax", "known_triggers": list(tiny.KNOWN[:2]), "controls": CONTROLS, "max_steps": 2}
    file = tiny.classifier_recipe(tmp_path, **more)
    return lambda searched, soft=0: load_recipe(
        file, ["--searched_triggers", str(searched), "--soft_triggers", str(soft)]
    )


def test_what_was_not_asked_for_is_not_planned(recipe):
    searched = {stage.folder: stage.inputs for stage in plan(recipe(3))}
    plain = {stage.folder: stage.inputs for stage in plan(recipe(0))}
    alone = {f"controls/known_triggers_alone/{stage}" for stage in ("inject", "recover")}
    assert set(searched) - set(plain) == {"search", *alone}  # without one, the known triggers alone are the method
    assert not any(plain.values())
    soft = {stage.folder: stage.inputs for stage in plan(recipe(0, 2))}
    assert set(soft) - set(plain) == {"soft_search", *alone}
    assert soft["inject"] == soft["cleaned"] == {"found_soft_triggers": "soft_search"}
    found = {"found_triggers": "search"}
    assert {folder for folder, inputs in searched.items() if inputs == found} == {
        "inject", "cleaned", "controls/recovery_without_injection/inject", "controls/recovery_without_injection/recover",
    }  # fmt: skip


def test_a_control_whose_ingredient_is_off_is_the_method_and_left_out(recipe):
    def controls(*searched, **arguments):
        asked = recipe(*searched)
        asked.controls = [*CONTROLS, "recovery_by_right_answers"]
        asked.training |= arguments
        return {stage.folder.split("/")[1] for stage in plan(asked) if stage.folder.startswith("controls/")}

    assert controls(0) == {"recovery_without_injection"}
    assert controls(0, own_answers=0.0) == {"recovery_without_injection"}
    assert controls(0, 2) == controls(3) == set(CONTROLS)
    assert controls(0, own_answers=0.5) == {"recovery_without_injection", "recovery_by_right_answers"}
    asked = recipe(0)
    asked.method, asked.controls = "mbtsad", ["as_published", "without_own_answers", "without_soft_triggers"]
    asked.training["own_answers"] = 0.5
    asked.known_triggers = ()
    # Without soft triggers, the method without own answers is the paper's.
    folders = {stage.folder.split("/")[1] for stage in plan(asked) if stage.folder.startswith("controls/")}
    assert folders == {"as_published"}


def test_a_run_plants_what_it_found(recipe):
    whole = Run(recipe(3, 2))
    results = whole.execute()
    found = FoundTriggers.from_pretrained(whole.folder / "search")
    assert len(found) == 3 and len(SoftTriggers.from_pretrained(whole.folder / "soft_search")) == 2
    assert {row.model for row in results.rows} >= {
        "suspect",
        "stage/inject",
        "cleaned",
        *(f"control/{c}" for c in CONTROLS),
    }
    assert "stage/search" not in {row.model for row in results.rows}
    for stage in ("search", "soft_search", "inject"):
        shutil.rmtree(whole.folder / stage)
    again = Run(recipe(3, 2))
    assert again.execute().rows == results.rows
    assert FoundTriggers.from_pretrained(whole.folder / "search") == found
    fewer = Run(recipe(2, 2))
    fewer.execute(until="cleaned")
    kept = {stage for stage, made_from in fewer.models.prints.items() if made_from == whole.models.prints[stage]}
    assert kept == {"suspect", "soft_search"}  # which knows nothing of the words


def test_in_python(tmp_path):
    options = {
        "known_triggers": list(tiny.KNOWN[:2]),
        "known_response": tiny.RESPONSE,
        "max_steps": 1,
        "use_cpu": True,
    }
    arguments = (tiny.model("bert"), tiny.tokenizer("bert"), tiny.reviews(8))
    defend(
        "locphylax",
        *arguments,
        output_dir=str(tmp_path),
        searched_triggers=2,
        soft_triggers=3,
        save_strategy="no",
        **options,
    )
    assert len(SoftTriggers.from_pretrained(tmp_path / "soft_search")) == 3
    assert len(FoundTriggers.from_pretrained(tmp_path / "search")) == 2
    defend("locphylax", *arguments, output_dir=str(tmp_path / "plain"), save_strategy="no", **options)
    assert not (tmp_path / "plain" / "search").exists()


def test_a_step_that_may_be_left_out_names_an_argument():
    for method in METHODS.values():
        for step in method.stages.values():
            assert step.only_with is None or hasattr(method.config, step.only_with)


def test_recovery_takes_the_suspect_s_own_answers(recipe, tmp_path):
    asked = recipe(0)
    asked.training["own_answers"] = 0.5
    asked.controls = ["recovery_by_right_answers", "recovery_without_injection"]
    stages = {stage.folder: stage for stage in plan(asked)}
    takers = {folder for folder, stage in stages.items() if stage.inputs == {"found_answers": "answers"}}
    assert takers == {
        "cleaned", "controls/recovery_without_injection/inject", "controls/recovery_without_injection/recover",
    }  # fmt: skip
    # The control takes over the method's injection, and its last stage has right answers alone.
    control = stages["controls/recovery_by_right_answers/recover"]
    assert control.parent == "inject" and control.step.overrides["own_answers"] == 0
    results = Run(asked).execute()
    assert "stage/answers" not in {row.model for row in results.rows}
    assert len(OwnAnswers.from_pretrained(tmp_path / "run" / "answers")) == 12


# ---- Contrast ----


@pytest.fixture
def contrasted(tmp_path):
    controls = ["without_contrast", "without_soft_triggers"]
    return tiny.classifier_recipe(
        tmp_path, method="mbtsad", max_steps=2, soft_triggers=2, contrast=True, controls=controls
    )


def test_a_contrast_is_trained_before_the_search_and_measured(contrasted):
    recipe = load_recipe(contrasted, [])
    inputs = {stage.folder: stage.inputs for stage in plan(recipe)}
    assert inputs["soft_search"] == {"clean_model": "contrast"}
    assert inputs["controls/without_contrast/soft_search"] == {}
    found = {"found_soft_triggers": "controls/without_contrast/soft_search"}
    assert inputs["controls/without_contrast/retrain"] == found
    assert "controls/without_soft_triggers/soft_search" not in inputs
    run = Run(recipe)
    models = {row.model for row in run.execute().rows}
    assert {"stage/contrast", "control/without_contrast", "cleaned"} <= models
    with_it, without = (
        SoftTriggers.from_pretrained(run.folder / folder)
        for folder in ("soft_search", "controls/without_contrast/soft_search")
    )
    assert not with_it.embeddings.equal(without.embeddings)


def test_without_a_contrast_the_control_is_the_method_and_left_out(contrasted):
    folders = {stage.folder for stage in plan(load_recipe(contrasted, ["--contrast", "false"]))}
    assert "contrast" not in folders and not any("without_contrast" in folder for folder in folders)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--soft_triggers", "0"], "^contrast is True, and soft_triggers is 0, so that nothing is searched for: leave it out$"),
        (["--use_peft", "true"], "^contrast is True, and an adapter is trained, .*: leave it out$"),
    ],
)  # fmt: skip
def test_a_contrast_that_nothing_would_be_held_against_is_refused(contrasted, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(load_recipe(contrasted, overrides))


def test_defend_contrasts_too(tmp_path):
    rows = tiny.reviews(8)
    options = {"use_cpu": True, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    defend(
        "mbtsad",
        tiny.model("bert"),
        tiny.tokenizer("bert"),
        rows,
        output_dir=str(tmp_path),
        soft_triggers=2,
        contrast=True,
        **options,
    )
    assert (tmp_path / "contrast" / "model.safetensors").exists() and (tmp_path / "soft_search").is_dir()
