"""What settings make of a run, and which are refused in one line."""

import json
from pathlib import Path

import pytest
import tiny
import yaml
from runs import execute, measured, settings, stages, suspect_only, written
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.rows import prepare_rows
from hf_backdoor.run import main


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


# ---- Refusals ----


def test_a_wrong_argument_of_the_last_stage_is_refused_before_the_first(workshop, tmp_path):
    with pytest.raises(ValueError, match="^arguments of recover: .*adamwx"):
        execute(settings(workshop, tmp_path / "run", stages={"recover": {"optim": "adamwx"}}))
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(
    "arguments", [[], ["--seed", "1"], ["nowhere.yaml"], ["RECIPE", "--sead", "1"], ["RECIPE", "seed"]]
)
def test_the_command_s_errors_are_one_line(arguments, workshop, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(suspect_only(workshop, tmp_path)))
    assert main([str(file) if argument == "RECIPE" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-backdoor: ") and error.count("\n") == 1
