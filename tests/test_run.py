"""A whole run on a tiny encoder: what is written, what is kept, and what an interruption may change (nothing)."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from runs import execute, measured, settings, stages, suspect_only, weights
from transformers import AutoModelForSequenceClassification, Trainer

from hf_backdoor import run_models
from hf_backdoor.dry_run import describe_run
from hf_backdoor.evaluation import Results
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import main


@pytest.fixture(scope="module")
def encoder_run(workshop):
    """An uninterrupted run: its settings and results. Tests that change its folder work on a copy."""
    values = settings(workshop, workshop / "runs" / "encoder")
    return values, execute(values)


# ---- What a run writes ----


def test_an_encoder_run(encoder_run):
    values, results = encoder_run
    folder = Path(values["output_dir"])
    assert set(stages(folder)) == {
        "suspect",
        "inject",
        "cleaned",
        "controls/fine_tuning/inject",
        "controls/fine_tuning/recover",
    }
    assert {row.model for row in results.rows} == {"suspect", "stage/inject", "cleaned", "control/fine_tuning"}
    for model in ("suspect", "cleaned"):
        metrics = {row.metric for row in results.rows if row.model == model}
        assert metrics == {
            "cacc", "asr_without_trigger", "target_recall", "asr", "robust_accuracy", "known_behaviour", "hidden_asr",
        }  # fmt: skip
    assert [cost["stage"] for cost in results.costs if "evaluation" not in cost["stage"]] == [
        "suspect", "stage/inject", "cleaned", "control/fine_tuning (inject)", "control/fine_tuning",
    ]  # fmt: skip
    assert all(cost["tokens"] > 0 for cost in results.costs if "evaluation" not in cost["stage"])


def test_results_are_valid_and_complete(encoder_run):
    values, results = encoder_run
    loaded = Results.load(Path(values["output_dir"]) / "results.json")
    assert loaded == results
    assert loaded.recipe == make_recipe(values).flat()
    assert {"attack", "clean", "held_out", "test", "test with zq"} == set(loaded.data)
    assert [loaded.data[name]["rows"] for name in ("attack", "clean", "held_out", "test")] == [32, 16, 4, 12]
    assert {"python", "torch", "transformers", "hf-backdoor"} <= set(loaded.versions)


def test_the_written_recipe_runs_the_same(encoder_run):
    values, _ = encoder_run
    file = Path(values["output_dir"]) / "recipe.yaml"
    assert make_recipe(yaml.safe_load(file.read_text())) == make_recipe(values)


def test_the_models_can_be_loaded(encoder_run):
    folder = Path(encoder_run[0]["output_dir"])
    for name in ("suspect", "cleaned", "controls/fine_tuning/recover"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        assert model.config.num_labels == 2
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.rglob("*.bin"))


def test_a_dry_run_foretells_what_is_left_on_the_disk(encoder_run, tmp_path, monkeypatch):
    values, _ = encoder_run
    saved = [file.stat().st_size for file in Path(values["output_dir"]).rglob("model.safetensors")]
    line = describe_run(make_recipe(values)).splitlines()[-1]
    assert line.startswith(f"disk     {len(saved)} models, ") and line.endswith(": enough")
    assert float(line.split("models, ")[1].split()[0]) * 2**30 == pytest.approx(sum(saved), rel=0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sum(saved) // 2))
    assert describe_run(make_recipe(values)).endswith(": enough")  # they are there
    assert "NOT ENOUGH" in describe_run(make_recipe({**values, "output_dir": str(tmp_path)})).splitlines()[-1]


def test_controls_train_as_long_as_their_twins(encoder_run):
    folder = Path(encoder_run[0]["output_dir"])
    for stage, twin in (("inject", "inject"), ("recover", "cleaned")):
        notes = [
            json.loads((folder / name / "stage.json").read_text()) for name in (f"controls/fine_tuning/{stage}", twin)
        ]
        assert notes[0]["steps"] == notes[1]["steps"] == 4


# ---- Running again ----


@pytest.fixture
def copy_of_run(encoder_run, tmp_path):
    """Settings of a copy of the finished run, and the results it must give."""
    values, results = encoder_run
    shutil.copytree(values["output_dir"], tmp_path / "copy")
    return {**values, "output_dir": str(tmp_path / "copy")}, results


def forbid_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "training_step", refuse)


def test_running_again_trains_nothing_and_gives_the_same(copy_of_run, monkeypatch):
    values, results = copy_of_run
    before = stages(values["output_dir"])
    forbid_training(monkeypatch)
    again = execute(values)
    assert again.rows == results.rows and again.costs == results.costs and again.data == results.data
    assert stages(values["output_dir"]) == before


def test_the_command_runs_and_reports(copy_of_run, tmp_path, capsys, monkeypatch):
    values, _ = copy_of_run
    forbid_training(monkeypatch)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "output_dir": "nowhere"}))
    assert main([str(file), "--output_dir", values["output_dir"]]) == 0
    assert "cleaned" in capsys.readouterr().out
    assert (Path(values["output_dir"]) / "report" / "index.html").exists()


@pytest.mark.parametrize("stage", ["suspect", "controls/fine_tuning/inject"])
def test_a_lost_stage_is_made_again_alike(stage, copy_of_run, encoder_run):
    values, results = copy_of_run
    before = stages(values["output_dir"])
    (Path(values["output_dir"]) / stage / "stage.json").unlink()
    again = execute(values)
    assert again.rows == results.rows
    assert weights(Path(values["output_dir"]) / stage) == weights(Path(encoder_run[0]["output_dir"]) / stage)
    after = stages(values["output_dir"])
    assert {name for name in after if after[name] != before[name]} == {stage}


def test_a_method_added_later_gives_the_rows_of_a_fresh_run(encoder_run, workshop, tmp_path):
    values, results = encoder_run
    execute({**suspect_only(workshop, tmp_path), "max_steps": values["max_steps"]})
    again = execute({**values, "output_dir": str(tmp_path)})
    assert measured(again) == measured(results)


# ---- Kills ----


class Killed(BaseException):
    pass


# Three stages of four steps, saved after the second and the fourth.
@pytest.mark.parametrize("step", [3, 5, 12], ids=["in suspect", "at the start of inject", "in cleaned"])
def test_a_killed_run_goes_on_to_the_same_results(step, encoder_run, tmp_path, monkeypatch):
    values, results = encoder_run
    values = {**values, "output_dir": str(tmp_path / "killed"), "controls": []}
    made, original = [], Trainer.training_step

    def counted(self, *args, **kwargs):
        made.append(step)
        if len(made) == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    with pytest.raises(Killed):
        execute(values)
    assert not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.setattr(Trainer, "training_step", original)
    again = execute(values)
    assert again.rows == [row for row in results.rows if not row.model.startswith("control")]
    assert weights(tmp_path / "killed" / "cleaned") == weights(Path(encoder_run[0]["output_dir"]) / "cleaned")


def test_a_run_killed_while_training_resumes_at_its_last_checkpoint(encoder_run, tmp_path, monkeypatch):
    values = {**encoder_run[0], "output_dir": str(tmp_path / "killed"), "controls": [], "method": None}
    values = {key: value for key, value in values.items() if value is not None and not key.startswith("known")}
    made, original = [], Trainer.training_step

    def counted(self, *args, **kwargs):
        made.append(self.state.global_step)
        if made == [0, 1, 2, 3]:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    with pytest.raises(Killed):
        execute(values)
    made.clear()
    execute(values)
    assert made == [2, 3]


def test_a_run_killed_after_its_last_checkpoint_makes_no_step_more(encoder_run, tmp_path, monkeypatch):
    values = {**encoder_run[0], "output_dir": str(tmp_path), "controls": [], "lr_scheduler_type": "constant"}
    original = run_models.save_model

    def failing(model, tokenizer, folder):
        if folder.name == "inject":
            raise Killed
        original(model, tokenizer, folder)

    monkeypatch.setattr(run_models, "save_model", failing)
    with pytest.raises(Killed):
        execute(values)
    monkeypatch.setattr(run_models, "save_model", original)
    execute(values)
    assert json.loads((tmp_path / "inject" / "stage.json").read_text())["steps"] == 4
