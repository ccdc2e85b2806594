"""A run that is started again: what it keeps, what it makes again, and what it leaves alone."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from runs import execute, settings, stages, suspect_only, weights, written
from transformers import AutoTokenizer

from hf_backdoor import run as run_module
from hf_backdoor.cli import accelerate_settings, stages_to_launch
from hf_backdoor.folders import alone_in, begin, write_yaml
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


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
    with pytest.raises(ValueError, match=f"its {name} was not made by a run, and this one would clear it: move it"):
        execute(settings(workshop, tmp_path))
    assert notes.read_text() == "mine" and not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["data/clean.parquet", "report/notes.txt", "results.json", "recipe.yaml"])
def test_files_that_no_run_has_written_are_left_alone(workshop, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        ValueError, match=f"its {Path(name).parts[0]} was not made by a run, .* choose another output_dir"
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


def test_a_run_does_not_write_over_the_rows_that_it_reads(workshop, tmp_path):
    execute(settings(workshop, tmp_path, **PLAIN, max_steps=1))
    rows = tmp_path / "data" / "clean.parquet"
    before = rows.read_bytes()
    with pytest.raises(ValueError, match="dataset_name is .*clean.parquet', which this run would write over"):
        execute(settings(workshop, tmp_path, **PLAIN, dataset_name=str(rows)))
    assert rows.read_bytes() == before


@pytest.mark.parametrize("inside", ["", "runs/mine"])
def test_a_run_writes_nothing_into_a_folder_of_rows(inside, workshop, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    shutil.copy(workshop / "reviews_train.jsonl", rows / "mine.jsonl")
    with pytest.raises(
        ValueError, match="^output_dir is '.*', in '.*rows', which is dataset_name: what the run writes"
    ):
        execute(settings(workshop, rows / inside, **PLAIN, max_steps=1, dataset_name=str(rows)))
    assert [path.name for path in rows.iterdir()] == ["mine.jsonl"]


# ---- Why something is made again ----


def test_a_run_says_why_it_makes_a_stage_again(workshop, tmp_path, caplog):
    values = settings(workshop, tmp_path, controls=[], max_steps=1)
    execute(values)
    assert "again" not in caplog.text
    execute(values | {"stages": {"inject": {"learning_rate": 1e-2}}})
    said = [record.message for record in caplog.records if "again" in record.message]
    assert said[0] == f"{tmp_path / 'inject'} is made again: learning_rate is 0.01, and was 0.001"
    assert said[1].startswith("stage/inject is measured again: model is ['inject', ")
    assert said[2].startswith(f"{tmp_path / 'cleaned'} is made again: model is ['inject', ")
    assert len(said) == 4
    caplog.clear()
    rows = [json.loads(line) for line in Path(values["dataset_name"]).read_text().splitlines()]
    other = written([{**row, "text": row["text"] + " again"} for row in rows], tmp_path / "rows.jsonl")
    execute(values | {"dataset_name": other, "stages": {"inject": {"learning_rate": 1e-2}}})
    assert f"{tmp_path / 'suspect'} is made again: data is " in caplog.text


def test_what_a_stage_was_made_from_holds_no_secret(tmp_path):
    begin(tmp_path / "stage", {"hub_token": "abc", "hub_model_id": "hf_" + "a" * 30, "seed": 1})
    note = json.loads((tmp_path / "stage" / "begun.json").read_text())
    assert note["made_from"] == {"hub_model_id": "[removed]", "seed": 1}


def test_a_note_that_is_no_note_makes_its_stage_anew(workshop, tmp_path):
    values = settings(workshop, tmp_path, controls=[], max_steps=1)
    results = execute(values)
    for file in ("inject/stage.json", "inject/begun.json", "evaluation/cleaned.json"):
        (tmp_path / file).write_text('{"fingerprint": ')
    assert execute(values).rows == results.rows


def test_another_revision_trains_again(workshop, tmp_path):
    recipe = make_recipe(suspect_only(workshop, tmp_path))
    Run(recipe).execute()
    before = stages(tmp_path)
    recipe.model_revision = "v2"  # as of a model on the Hub
    Run(recipe).execute()
    assert stages(tmp_path)["suspect"] != before["suspect"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 43}, {"learning_rate": 1e-2}, {"attack_trigger": "ahi"}, {"poison_rate": 0.3}],
    ids=lambda change: next(iter(change)),
)
def test_a_change_trains_again(change, workshop, tmp_path):
    execute(suspect_only(workshop, tmp_path))
    before = stages(tmp_path)
    changed = execute(suspect_only(workshop, tmp_path, **change))
    assert stages(tmp_path)["suspect"] != before["suspect"]
    if "seed" in change:
        assert changed.rows == execute(suspect_only(workshop, tmp_path / "fresh", **change)).rows
        assert weights(tmp_path / "suspect") == weights(tmp_path / "fresh" / "suspect")


def test_other_weights_in_the_same_place_train_again(workshop, tmp_path):
    shutil.copytree(workshop / "bert", tmp_path / "model")
    values = suspect_only(workshop, tmp_path / "run", model_name_or_path=str(tmp_path / "model"))
    execute(values)
    before = stages(tmp_path / "run")
    tiny.model("bert", seed=9).save_pretrained(tmp_path / "model")
    execute(values)
    assert stages(tmp_path / "run") != before


def test_other_held_out_rows_train_again_where_stop_rules_look_at_them(workshop, tmp_path):
    inject = {"eval_strategy": "steps", "eval_steps": 1}
    changes = {"controls": [], "max_steps": 2, "stages": {"inject": inject}, "evaluate_stages": False}
    execute(settings(workshop, tmp_path, **changes))
    before = stages(tmp_path)
    execute(settings(workshop, tmp_path, **changes, held_out_samples=6))
    after = stages(tmp_path)
    assert after["inject"] != before["inject"]


# ---- Kills ----


def test_a_kill_while_a_folder_is_cleared_leaves_one_to_be_cleared(workshop, tmp_path, monkeypatch):
    values = settings(workshop, tmp_path, controls=[], max_steps=1)
    execute(values)

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / "inject" / "notes").mkdir()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "inject", {"seed": 7})
    monkeypatch.undo()
    assert not (tmp_path / "inject" / "stage.json").exists()
    assert begin(tmp_path / "inject", {"seed": 7}) is None
    assert [file.name for file in (tmp_path / "inject").iterdir()] == ["begun.json"]
    execute(values)


@pytest.mark.parametrize("name", ["recipe", "begun"])
def test_a_full_disk_leaves_no_file_that_nobody_knows(name, workshop, tmp_path, monkeypatch):
    values, write_text = settings(workshop, tmp_path, **PLAIN, max_steps=1), Path.write_text

    def full(path, *args, **options):
        if path.stem == name:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        execute(values)
    monkeypatch.undo()
    assert execute(values).rows


def test_a_disk_that_is_full_is_named_where_torch_says_nothing_of_it(workshop, tmp_path, monkeypatch):
    def full(self, *args):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    recipe = make_recipe(settings(workshop, tmp_path, **PLAIN, max_steps=1))
    monkeypatch.setattr(run_module.DefenseTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(RuntimeError):
        run_module.run(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        run_module.run(recipe)


def test_evidence_goes_before_models_that_other_rows_make(workshop, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (workshop / "reviews_train.jsonl").read_text().splitlines()]
    values = settings(
        workshop, tmp_path / "run", **PLAIN, max_steps=1, dataset_name=written(rows, tmp_path / "rows.jsonl")
    )
    run_module.run(make_recipe(values))
    written([{**row, "label": 1 - row["label"]} for row in rows], tmp_path / "rows.jsonl")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "begin", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(values)
    assert not (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "report").exists()


def test_a_second_run_in_a_folder_is_refused(workshop, tmp_path):
    values = settings(workshop, tmp_path, **PLAIN, max_steps=1)
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is at work in it: wait for it, or choose"):
        execute(values)
    assert execute(values).rows


def test_where_a_model_is_published_to_makes_nothing_again(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", controls=[], max_steps=1, report_to=None, disable_tqdm=None)
    execute(values)
    write_yaml(tmp_path / "recipe.yaml", values)
    assert stages_to_launch(
        accelerate_settings("zero3")[1],
        tmp_path / "recipe.yaml",
        ["--push_to_hub", "true", "--hub_model_id", "me/cleaned", "--license", "mit"],
    ) == [[]]


def test_a_checkpoint_that_is_half_written_is_passed_over(tmp_path):
    assert begin(tmp_path / "stage", {"seed": 1}) is None
    for step, files in ((2, ["model.safetensors", "trainer_state.json"]), (4, ["model.safetensors"])):
        folder = tmp_path / "stage" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    assert begin(tmp_path / "stage", {"seed": 1}).endswith("checkpoint-2")
    assert not folder.exists()


def test_a_changed_recipe_is_launched_stage_by_stage_again(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", controls=[], report_to=None, disable_tqdm=None)
    file = tmp_path / "recipe.yaml"
    write_yaml(file, values)
    everything = stages_to_launch(accelerate_settings("zero3")[1], file, [])
    assert [launch[-1:] for launch in everything] == [["suspect"], ["inject"], ["cleaned"], []]
    execute(values)
    assert stages_to_launch(accelerate_settings("zero3")[1], file, []) == [[]]
    assert stages_to_launch(accelerate_settings("zero3")[1], file, ["--learning_rate", "0.01"]) == everything
    shutil.rmtree(tmp_path / "run" / "cleaned")
    assert stages_to_launch(accelerate_settings("zero3")[1], file, []) == [everything[2], []]


def test_notes_of_a_stage_hold_its_versions(workshop, tmp_path):
    execute(settings(workshop, tmp_path, controls=[], max_steps=1))
    assert json.loads((tmp_path / "cleaned" / "stage.json").read_text())["versions"]["torch"]
