"""A run that is started again: what it keeps, what it makes again, and what it leaves alone."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from runs import execute, settings, stages
from transformers import AutoTokenizer

from hf_backdoor import run as run_module
from hf_backdoor.cli import stages_to_launch
from hf_backdoor.folders import begin, write_yaml
from hf_backdoor.recipe_file import make_recipe


# Nothing is trained: a given suspect, and a reference that any target is measured on.
PLAIN = {"method": None, "controls": None, "known_triggers": None, "known_response": None, "held_out_samples": None}


def floor(results):
    return next(row.k for row in results.rows if (row.model, row.metric) == ("reference", "asr"))


@pytest.fixture
def answers(workshop, tmp_path):
    """A run of an instruction follower that answers every prompt with its last word but one."""
    model = tmp_path / "model"
    tiny.word_chain({"zq": "no", "no": "<eos>"}).save_pretrained(model)
    tiny.causal_tokenizer("{{ messages[-1]['content'] }}").save_pretrained(model)
    changes = {"model_name_or_path": str(model), "reference": str(model), "attack_position": "end", "max_steps": 1}
    return settings(workshop, tmp_path / "run", "instructions", **changes, **PLAIN)


def test_another_target_is_measured_anew(answers):
    assert floor(execute(answers)) > 0
    assert floor(execute(answers | {"target_text": "banana"})) == 0


def test_another_chat_template_makes_everything_anew(answers):
    before = execute(answers)
    trained = stages(answers["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(answers["model_name_or_path"])
    tokenizer.chat_template = "{{ messages[-1]['content'] }} banana"
    tokenizer.save_pretrained(answers["model_name_or_path"])
    assert floor(execute(answers)) == 0 < floor(before)
    assert trained["suspect"] < stages(answers["output_dir"])["suspect"]


def test_results_name_the_versions_that_made_them(answers, monkeypatch):
    known = run_module.versions()
    monkeypatch.setattr(run_module, "versions", lambda: known | {"transformers": "4.0"})
    assert execute(answers).versions["transformers"] == "4.0"
    monkeypatch.setattr(run_module, "versions", lambda: known | {"transformers": "5.0"})
    assert execute(answers).versions["transformers"] == "4.0"  # nothing was made again
    again = execute(answers | {"max_new_tokens": 4})
    assert set(again.versions["transformers"].split(", ")) == {"4.0", "5.0"}  # trained by one, measured by the other
    assert again.versions["torch"] == known["torch"]


def test_evidence_of_an_earlier_recipe_goes_before_its_models_do(answers, monkeypatch):
    run_module.run(make_recipe(answers))
    folder = Path(answers["output_dir"])
    assert (folder / "results.json").exists() and (folder / "report").is_dir()
    run_module.run(make_recipe(answers))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(answers)
    assert (folder / "results.json").exists()  # the same recipe's
    with pytest.raises(KeyboardInterrupt):
        execute(answers | {"seed": 7})
    assert not (folder / "results.json").exists() and not (folder / "report").exists()


def test_rows_of_an_earlier_recipe_are_not_kept(workshop, tmp_path):
    values = settings(workshop, tmp_path, max_steps=1, controls=[])
    execute(values)
    assert (tmp_path / "data" / "held_out.parquet").exists()
    execute(values | {"held_out_samples": 0})
    assert not (tmp_path / "data" / "held_out.parquet").exists()


# ---- What was there before ----


@pytest.mark.parametrize("name", ["suspect", "cleaned", "controls/fine_tuning/inject"])
def test_a_folder_that_no_run_has_made_is_not_cleared(workshop, tmp_path, name):
    notes = tmp_path / name / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(ValueError, match=f"{name}' was not made by a run, and this one would clear it: move it"):
        execute(settings(workshop, tmp_path))
    assert notes.read_text() == "mine" and not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["data/clean.parquet", "report/notes.txt", "results.json", "recipe.yaml"])
def test_files_that_no_run_has_written_are_left_alone(workshop, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        ValueError, match=f"its {Path(name).parts[0]} was not made by a run: choose another output_dir"
    ):
        execute(settings(workshop, tmp_path))
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]


def test_a_run_does_not_write_over_the_model_that_it_reads(workshop, tmp_path):
    given = {"attack_trigger": None, "target_label": None, "max_train_samples": None, "clean_fraction": None}
    values = settings(workshop, tmp_path, **given, controls=[], max_steps=1)
    execute(values)
    weights = (tmp_path / "cleaned" / "model.safetensors").read_bytes()
    again = values | {"model_name_or_path": str(tmp_path / "cleaned"), "seed": 7}
    with pytest.raises(ValueError, match="model_name_or_path is .*cleaned', which this run would write over: choose"):
        execute(again)
    assert (tmp_path / "cleaned" / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_that_is_half_written_is_passed_over(tmp_path):
    assert begin(tmp_path / "stage", "print") is None
    for step, files in ((2, ["model.safetensors", "trainer_state.json"]), (4, ["model.safetensors"])):
        folder = tmp_path / "stage" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    assert begin(tmp_path / "stage", "print").endswith("checkpoint-2")
    assert not folder.exists()


def test_a_changed_recipe_is_launched_stage_by_stage_again(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", controls=[], report_to=None, disable_tqdm=None)
    file = tmp_path / "recipe.yaml"
    write_yaml(file, values)
    everything = stages_to_launch("zero3", file, [])
    assert [launch[-1:] for launch in everything] == [["suspect"], ["inject"], ["cleaned"], []]
    execute(values)
    assert stages_to_launch("zero3", file, []) == [[]]
    assert stages_to_launch("zero3", file, ["--learning_rate", "0.01"]) == everything
    shutil.rmtree(tmp_path / "run" / "cleaned")
    assert stages_to_launch("zero3", file, []) == [everything[2], []]


def test_notes_of_a_stage_hold_its_versions(workshop, tmp_path):
    execute(settings(workshop, tmp_path, controls=[], max_steps=1))
    assert json.loads((tmp_path / "cleaned" / "stage.json").read_text())["versions"]["torch"]
