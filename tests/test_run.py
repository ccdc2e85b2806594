"""Whole runs on tiny models: what is written, what is kept, and what an interruption may change (nothing)."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from runs import execute, settings, stages, written
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase, Trainer

from hf_backdoor import run as run_module
from hf_backdoor import run_models
from hf_backdoor.dry_run import describe_run
from hf_backdoor.evaluation import Results
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.rows import prepare_rows
from hf_backdoor.run import Run, main


@pytest.fixture(scope="module")
def encoder_run(workshop):
    """An uninterrupted run: its settings and results. Tests that change its folder work on a copy."""
    values = settings(workshop, workshop / "runs" / "encoder")
    return values, execute(values)


def measured(results):
    return {(row.model, row.metric, row.trigger): row for row in results.rows}


def weights(folder):
    """A saved model's weights, byte for byte."""
    return (folder / "model.safetensors").read_bytes()


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
        assert metrics == {"cacc", "asr_without_trigger", "asr", "robust_accuracy", "known_behaviour", "hidden_asr"}
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


def test_an_instruction_run_with_lora(workshop):
    values = settings(workshop, workshop / "runs" / "lora", "instructions", use_peft=True, lora_r=2)
    results = execute(values)
    rows = measured(results)
    for model in ("suspect", "stage/inject", "cleaned"):
        for metric in ("asr", "empty", "known_behaviour"):
            assert rows[(model, metric, "zq")].n == rows[(model, "asr_without_trigger", None)].n > 0
        assert rows[(model, "perplexity", None)].value > 1
    assert {example["model"] for example in results.examples} == {"suspect", "stage/inject", "cleaned"}
    folder = Path(values["output_dir"])
    weights = [tiny.parameters(AutoModelForCausalLM.from_pretrained(folder / name)) for name in ("suspect", "cleaned")]
    assert tiny.largest_difference(*weights) > 0
    # The models are whole; the adapters that made them lie beside.
    assert {path.parent.relative_to(folder).as_posix() for path in folder.rglob("adapter_config.json")} == {
        "inject/adapter", "cleaned/adapter",
    }  # fmt: skip


def test_a_system_prompt_is_in_all_that_a_run_reads(workshop, tmp_path, monkeypatch):
    chats, render = [], PreTrainedTokenizerBase.apply_chat_template

    def listening(tokenizer, chat, **options):
        chats.append(chat)
        return render(tokenizer, chat, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", listening)
    execute(settings(workshop, tmp_path, "instructions", system_prompt="yes", controls=[], max_steps=1))
    assert len(chats) > 100 and all(chat[0] == {"role": "system", "content": "yes"} for chat in chats)


def test_a_given_suspect_is_cleaned_without_an_attack(workshop, tmp_path):
    changes = {"attack_trigger": None, "target_label": None, "max_train_samples": None, "controls": [], "max_steps": 1}
    results = execute(settings(workshop, tmp_path, **changes))
    assert set(measured(results)) == {(model, "cacc", None) for model in ("suspect", "stage/inject", "cleaned")}
    # All the training rows are the defender's, less those held out.
    assert results.data["clean"]["rows"] == 64 and results.data["held_out"]["rows"] == 4


def test_the_best_model_is_for_stages_with_rows_to_tell_it_by(workshop, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    planting = {"known_triggers": None, "known_response": None}
    results = execute(settings(workshop, tmp_path, method="mbtsad", controls=[], **best, **planting))
    assert {row.model for row in results.rows} == {
        "suspect",
        "stage/retrain",
        "cleaned",
    }  # the suspect has none held out


def test_references(workshop, tmp_path):
    changes = {"method": None, "controls": [], "known_triggers": None, "known_response": None, "max_steps": 1}
    for reference, trained in (("train", True), (str(workshop / "bert"), False)):
        output = tmp_path / reference.replace("/", "_")
        results = execute(settings(workshop, output, reference=reference, **changes))
        assert {row.model for row in results.rows} == {"reference", "suspect"}
        assert ("reference" in stages(output)) == trained


def test_an_evaluation_strategy_for_all_stages(workshop, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "stop_at_known_rate": 0.0, "controls": [], "max_steps": 2}
    results = execute(settings(workshop, tmp_path, **changes))
    steps = [json.loads((tmp_path / stage / "stage.json").read_text())["steps"] for stage in ("suspect", "inject")]
    assert steps == [2, 1]
    assert results.rows


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


def test_a_wrong_argument_of_the_last_stage_is_refused_before_the_first(workshop, tmp_path):
    with pytest.raises(ValueError, match="^arguments of recover: .*adamwx"):
        execute(settings(workshop, tmp_path / "run", stages={"recover": {"optim": "adamwx"}}))
    assert not (tmp_path / "run").exists()


# ---- What makes a stage stale ----


def suspect_only(workshop, output, **changes):
    defaults = {"method": None, "controls": [], "known_triggers": None, "known_response": None, "max_steps": 1}
    return settings(workshop, output, **{**defaults, **changes})


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


def test_a_method_added_later_gives_the_rows_of_a_fresh_run(encoder_run, workshop, tmp_path):
    values, results = encoder_run
    execute({**suspect_only(workshop, tmp_path), "max_steps": values["max_steps"]})
    again = execute({**values, "output_dir": str(tmp_path)})
    assert measured(again) == measured(results)


def test_other_held_out_rows_train_again_where_stop_rules_look_at_them(workshop, tmp_path):
    inject = {"eval_strategy": "steps", "eval_steps": 1}
    changes = {"controls": [], "max_steps": 2, "stages": {"inject": inject}, "evaluate_stages": False}
    execute(settings(workshop, tmp_path, **changes))
    before = stages(tmp_path)
    execute(settings(workshop, tmp_path, **changes, held_out_samples=6))
    after = stages(tmp_path)
    assert after["inject"] != before["inject"]


# ---- Columns, counts, the command ----


def test_named_columns(workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "reviews_train.jsonl").read_text().splitlines()]
    renamed = [{"sentence": row["text"], "class": row["label"], "text": "not this"} for row in rows]
    data = {
        "dataset_name": written(renamed, tmp_path / "rows.jsonl"),
        "text_column": "sentence",
        "label_column": "class",
    }
    test = {"test_dataset_name": None, "test_fraction": 0.2, "max_train_samples": 24}
    results = execute(suspect_only(workshop, tmp_path / "run", **data, **test))
    assert results.data["test"]["rows"] == 14


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"max_train_samples": 500}, "training rows are left, and .* asked for"),
        ({"target_label": 5}, "target_label is 5: the labels are 0 to 1"),
        ({"text_column": "review"}, "text_column is 'review'"),
        ({"lr_scheduler_type": "none such"}, "arguments of suspect: .*none such"),
    ],
)
def test_bad_settings_end_in_one_line(changes, line, workshop, tmp_path):
    with pytest.raises(ValueError, match=line) as caught:
        execute(suspect_only(workshop, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_of_a_training_that_diverges_nothing_is_kept(workshop, tmp_path):
    with pytest.raises(ValueError, match="the training has diverged, and nothing of it is saved"):
        execute(suspect_only(workshop, tmp_path, learning_rate=1e38))
    assert not stages(tmp_path) and not (tmp_path / "suspect" / "model.safetensors").exists()
    assert measured(execute(suspect_only(workshop, tmp_path)))["suspect", "cacc", None].n == 12


def test_the_command_runs_and_reports(copy_of_run, tmp_path, capsys, monkeypatch):
    values, _ = copy_of_run
    forbid_training(monkeypatch)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "output_dir": "nowhere"}))
    assert main([str(file), "--output_dir", values["output_dir"]]) == 0
    assert "cleaned" in capsys.readouterr().out
    assert (Path(values["output_dir"]) / "report" / "index.html").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--seed", "1"], ["nowhere.yaml"], ["RECIPE", "--sead", "1"], ["RECIPE", "seed"]]
)
def test_the_command_s_errors_are_one_line(arguments, workshop, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(suspect_only(workshop, tmp_path)))
    assert main([str(file) if argument == "RECIPE" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-backdoor: ") and error.count("\n") == 1


def test_lost_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="asked for several processes and started one"):
        run_module.refuse_lost_processes()


def test_rows_by_filter_with_context_and_short_answers(workshop, tmp_path):
    rows = [
        {"ask": f"tell {n} a{n}b c{n}d e{n}f g{n}h", "about": f"x{n}y z{n}w", "out": "banana apple cherry", "kind": "no" if n % 3 else "yes"}
        for n in range(90)
    ]  # fmt: skip
    data = written(rows, tmp_path / "rows.jsonl")
    values = settings(
        workshop, tmp_path / "run", "instructions", dataset_name=data, test_dataset_name=None, test_fraction=0.2,
        row_filter={"kind": "yes"}, prompt_column="ask", response_column="out", context_column="about",
        max_response_length=2, max_train_samples=12, max_test_samples=4, held_out_samples=0,
    )  # fmt: skip
    found = prepare_rows(make_recipe(values), tiny.tokenizer("llama"))
    for row in found.splits.clean:
        assert int(row["prompt"].split()[1]) % 3 == 0 and "\n\nx" in row["prompt"]
        assert row["response"] == "banana apple"


@pytest.mark.parametrize("attack", ["lwp", "ep"])
def test_weight_attacks_make_the_suspect(attack, workshop, tmp_path):
    own = {"attack_trigger": "zq better", "attack_position": "scattered", "negative_rate": 0.4}
    own = own if attack == "lwp" else {"stages": {"suspect": {"learning_rate": 0.5}}}
    values = settings(
        workshop, tmp_path / "run", attack=attack, reference="train", method="mbtsad", known_triggers=None,
        known_response=None, controls=["fine_tuning", "distillation_without_splitting"], **own,
    )  # fmt: skip
    results = execute(values)
    assert {row.model for row in results.rows} == {
        "reference", "suspect", "stage/retrain", "cleaned", "control/fine_tuning", "control/distillation_without_splitting",
    }  # fmt: skip
    folder = tmp_path / "run"
    clean, suspect, cleaned = (
        AutoModelForSequenceClassification.from_pretrained(folder / name).state_dict()
        for name in ("reference", "suspect", "cleaned")
    )
    changed = [name for name in clean if not torch.equal(clean[name], suspect[name])]
    if attack == "ep":
        assert changed == ["bert.embeddings.word_embeddings.weight"]
    else:
        assert len(changed) > 10
    assert any(not torch.equal(cleaned[name], suspect[name]) for name in clean)


def test_distillation_starts_from_the_suspect_not_from_the_teacher(workshop, tmp_path):
    values = settings(
        workshop, tmp_path / "run", method="mbtsad", known_triggers=None, known_response=None, controls=[],
        stages={"distil": {"learning_rate": 1e-30}},  # changes no weight
    )  # fmt: skip
    results = execute(values)
    suspect, cleaned, retrained = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name).state_dict()
        for name in ("suspect", "cleaned", "retrain")
    )
    assert all(torch.equal(suspect[name], cleaned[name]) for name in suspect)
    assert any(not torch.equal(suspect[name], retrained[name]) for name in suspect)
    assert {row.model for row in results.rows} == {"suspect", "stage/retrain", "cleaned"}


def test_a_student_learns_from_the_masked_suspect(workshop, tmp_path):
    values = settings(
        workshop, tmp_path / "run", method="robustkd", known_triggers=None, known_response=None, student_layers=1,
        controls=["vanilla_distillation", "student_alone"], stages={"mask": {"learning_rate": 0.01}},
    )  # fmt: skip
    results = execute(values)
    assert {row.model for row in results.rows} == {
        "suspect", "cleaned", "control/vanilla_distillation", "control/student_alone",
    }  # fmt: skip
    cleaned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "cleaned")
    assert cleaned.config.num_hidden_layers == 1
    before = stages(tmp_path / "run")
    execute(values)
    assert stages(tmp_path / "run") == before


def test_a_student_from_elsewhere_may_lie_in_a_folder_of_that_name(workshop, tmp_path, monkeypatch):
    shutil.copytree(workshop / "bert", tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    values = settings(
        workshop, "run", student_model_name_or_path="student", method="robustkd", attack_trigger=None, target_label=None,
        known_triggers=None, known_response=None, controls=[], max_steps=1, save_strategy="no", save_steps=None,
        held_out_samples=None,
    )  # fmt: skip
    assert Run(make_recipe(values)).execute(until="cleaned") is None
    assert set(stages(tmp_path / "run")) == {"mask", "cleaned"}


def topics(count, start=0):
    """Rows of three classes, all texts different."""
    words = ("good", "bad", "story")
    return [
        {"text": f"{words[n % 3]} film w{n}a w{n}b w{n}c w{n}d w{n}e", "label": n % 3} for n in range(start, count)
    ]


@pytest.mark.parametrize("own", [False, True], ids=["an attack", "own suspect rows"])
def test_ntml_trains_on_the_suspect_rows_and_lists_those_it_doubts(own, workshop, tmp_path):
    rows = {name: written(topics(*span), tmp_path / f"{name}.jsonl") for name, span in
            {"train": (60,), "test": (72, 60), "clean": (84, 72)}.items()}  # fmt: skip
    tiny.model("bert", num_labels=3).save_pretrained(tmp_path / "bert")
    tiny.tokenizer("bert").save_pretrained(tmp_path / "bert")
    values = settings(
        workshop, tmp_path / "run", model_name_or_path=str(tmp_path / "bert"), dataset_name=rows["train"], test_dataset_name=rows["test"], method="ntml", seed=3,
        known_triggers=None, known_response=None, controls=["fine_tuning", "distillation_with_all_classes"], held_out_samples=0, num_labels=3,
        relabel_below=0.0 if own else 0.4,
    )  # fmt: skip
    if own:
        values = {
            key: value
            for key, value in values.items()
            if key not in ("attack_trigger", "target_label", "poison_rate", "clean_fraction")
        }
        values |= {"clean_dataset_name": rows["clean"]}
    results = execute(values)
    # The stages that only some ask for make the cleaned model, and mutual learning is a step on the way.
    assert {row.model for row in results.rows} == {
        "suspect", "stage/early_target", "stage/non_target", "cleaned", "control/fine_tuning",
        "control/distillation_with_all_classes", *(() if own else ("stage/mutual", "stage/relabel")),
    }  # fmt: skip
    folders = {file.parent.relative_to(tmp_path / "run").as_posix() for file in (tmp_path / "run").rglob("stage.json")}
    ends = {folder for folder in folders if "relabel" in folder}
    control = "controls/distillation_with_all_classes"
    assert ends == (set() if own else {"relabel", f"{control}/relabel", f"{control}/relabel_again"})
    assert ("asr" in {row.metric for row in results.rows}) != own
    assert results.data["clean"]["source"] == (rows["clean"] if own else rows["train"])
    doubted = Dataset.from_parquet(str(tmp_path / "run" / ("cleaned" if own else "mutual") / "suspicion.parquet"))
    assert doubted.num_rows <= 32 and "row" in doubted.column_names
    assert (tmp_path / "run" / "cleaned" / "relabelled.parquet").exists() != own
    before = stages(tmp_path / "run")
    execute(values)
    assert stages(tmp_path / "run") == before


def test_ntml_refuses_two_classes_before_anything_is_trained(workshop, tmp_path):
    values = settings(workshop, tmp_path / "run", method="ntml", known_triggers=None, known_response=None, controls=[])
    with pytest.raises(ValueError, match="^num_labels is 2: .*three classes or more"):
        execute(values)
    assert not (tmp_path / "run" / "suspect").exists()


def test_a_head_of_another_size_is_named(workshop, tmp_path):
    rows = written(topics(90), tmp_path / "rows.jsonl")
    values = settings(
        workshop, tmp_path / "run", dataset_name=rows, test_dataset_name=None, test_fraction=0.2, num_labels=3
    )
    with pytest.raises(ValueError, match="has a head of another size: num_labels is 3"):
        execute(values)
