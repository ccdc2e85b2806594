"""`hf-backdoor clean`: a model and a file are enough."""

import json

import pytest
import tiny
import yaml
from transformers import BertConfig

from hf_backdoor.cli import main
from hf_backdoor.defenses.reading import SoftTriggers
from hf_backdoor.evaluation import Results
from hf_backdoor.found import measured


def test_clean_needs_a_model_and_a_file(classifier, reviews, tmp_path, capsys):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--max_steps", "2"]
    assert main([*arguments, "--known_triggers", "[make life better, ahi]", "--disable_tqdm", "true"]) == 0
    results = Results.load(tmp_path / "results.json")
    assert {row.model for row in results.rows} == {"suspect", "stage/inject", "cleaned"}
    assert (tmp_path / "cleaned" / "model.safetensors").exists()
    assert (tmp_path / "report" / "index.html").exists()
    assert "cleaned model" in capsys.readouterr().out
    config = json.loads((tmp_path / "cleaned" / "config.json").read_text())
    assert config.get("num_labels", len(config.get("id2label", "ab"))) == 2
    # What works best is on, though the trainers' default is the paper's method.
    assert (tmp_path / "soft_search" / "stage.json").exists() and (tmp_path / "answers" / "stage.json").exists()
    recovery = {"recover": {"learning_rate": 3e-4, "num_train_epochs": 3}}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["stages"] == recovery


def test_clean_says_what_it_would_do(classifier, reviews, tmp_path, capsys):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert main(arguments) == 0
    described = capsys.readouterr().out
    assert (
        "rows     clean: " in described and "stage    soft_search: " in described and "disk     2 models" in described
    )
    assert not (tmp_path / "run").exists()


def test_clean_takes_a_rate_that_the_model_bears_and_leaves_the_user_s_own_alone(tmp_path):
    def rates(width, method="locphylax", **values):
        BertConfig(hidden_size=width).save_pretrained(tmp_path)
        return measured(method, str(tmp_path), values)

    assert rates(384)["stages.recover.learning_rate"] == 3e-4
    assert rates(768)["stages.recover.learning_rate"] == 2e-4
    assert rates(4096, "mbtsad")["learning_rate"] == 1e-5
    assert "stages.recover.learning_rate" not in rates(384, learning_rate=1e-5)
    assert rates(384, stages={"inject": {"max_steps": 5}}) == rates(384)
    own = rates(384, soft_triggers=3, stages={"recover": {"learning_rate": 1e-5}})
    assert own == {"own_answers": 0.5, "stages.recover.num_train_epochs": 3}
    assert (
        rates(384, own_answers=0) == rates(384, stages={"recover": {"own_answers": 0}}) == rates(384, "robustkd") == {}
    )


def test_clean_of_free_answers_recovers_at_a_higher_rate_too(tmp_path):
    BertConfig(hidden_size=2048).save_pretrained(tmp_path)
    values = {"task": "instruction_following"}
    expected = {"stages.recover.learning_rate": 8e-5, "stages.recover.num_train_epochs": 1}
    assert measured("locphylax", str(tmp_path), values) == expected
    assert "stages.recover.learning_rate" not in measured(
        "locphylax", str(tmp_path), {**values, "learning_rate": 1e-5}
    )
    assert measured("mbtsad", str(tmp_path), values) == {}


def test_clean_by_mbtsad_has_what_works_best_on_too(classifier, reviews, tmp_path):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--method", "mbtsad"]
    assert main([*arguments, "--max_steps", "1", "--disable_tqdm", "true"]) == 0
    assert (tmp_path / "soft_search" / "stage.json").exists() and (tmp_path / "answers" / "stage.json").exists()
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert "learning_rate: 0.0001" in recipe
    assert SoftTriggers.from_pretrained(tmp_path / "soft_search").embeddings.shape[1] == 4


def test_clean_is_the_paper_s_method_where_it_is_told_to(classifier, reviews, tmp_path):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--max_steps", "1"]
    more = ["--known_triggers", "[make life better, ahi]", "--own_answers", "0"]
    assert main([*arguments, *more, "--disable_tqdm", "true"]) == 0
    assert not (tmp_path / "soft_search").exists() and not (tmp_path / "answers").exists()
    assert not yaml.safe_load((tmp_path / "recipe.yaml").read_text()).get("stages")


@pytest.mark.parametrize("beside", ["split", "withheld", "data set", "nothing"])
def test_clean_measures_on_test_rows_where_there_are_any(classifier, tmp_path, beside):
    rows = tmp_path / "rows"
    rows.mkdir()
    tiny.reviews(60).to_json(rows / "train.jsonl")
    test = tiny.reviews(14, seed=1)
    if beside == "withheld":
        test = test.map(lambda row: {"label": -1})
    if beside in ("split", "withheld"):
        test.to_json(rows / "test.jsonl")
    own = str(tmp_path / "other.jsonl")
    test.to_json(own)
    arguments = ["clean", classifier, "--data", str(rows), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    arguments += ["--known_triggers", "[make life better, ahi]", "--own_answers", "0", "--soft_triggers", "0"]
    arguments += ["--disable_tqdm", "true", *(["--test_dataset_name", own] if beside == "data set" else [])]
    assert main(arguments) == 0
    counts = {row.n for row in Results.load(tmp_path / "run" / "results.json").rows if row.metric == "cacc"}
    assert counts == {14 if beside in ("split", "data set") else 12}


# ---- Refusals ----


def test_clean_asks_for_the_one_thing_that_is_missing(chat_model, reviews, tmp_path, capsys):
    assert main(["clean", chat_model, "--data", reviews, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--label_words" in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name"])
def test_clean_is_told_once_what_to_clean_and_by_what(classifier, reviews, tmp_path, capsys, key):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), f"--{key}", "other"]
    assert main(arguments) == 2
    assert f"--{key} is 'other', and " in capsys.readouterr().err


def test_clean_names_a_method_that_is_not_there(classifier, reviews, tmp_path, capsys):
    assert main(["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--method", "magic"]) == 2
    assert "method is 'magic': use one of locphylax" in capsys.readouterr().err


def test_ntml_cleans_no_given_model(classifier, reviews, tmp_path, capsys):
    arguments = [
        "clean",
        str(classifier),
        "--data",
        str(reviews),
        "--output_dir",
        str(tmp_path / "x"),
        "--method",
        "ntml",
    ]
    assert main(arguments) == 2
    assert "which cleans no model but makes one out of suspect rows" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_is_no_folder_to_run_in(name, more, classifier, reviews, tmp_path, capsys):
    (tmp_path / "file").touch()
    run = tmp_path / name
    assert main(["clean", classifier, "--data", reviews, "--output_dir", str(run), *more]) == 2
    line = f"output_dir is {str(run)!r}, and {str(tmp_path / 'file')!r} is a file: choose another output_dir"
    assert capsys.readouterr().err.endswith(f"hf-backdoor: {line}\n")


def test_a_dry_run_refuses_to_write_over_what_no_run_has_made(classifier, reviews, tmp_path, capsys):
    (tmp_path / "cleaned").mkdir()
    (tmp_path / "cleaned" / "thesis.txt").touch()
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--dry_run"]
    assert main(arguments) == 2
    assert "its cleaned was not made by a run, and this one would clear it" in capsys.readouterr().err


def test_clean_rows_without_the_head_s_last_class_are_told_of_num_labels(reviews, tmp_path, capsys):
    three = tiny.saved("bert", tmp_path / "three", num_labels=3)
    arguments = ["clean", three, "--data", reviews, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    arguments += ["--own_answers", "0", "--soft_triggers", "0", "--disable_tqdm", "true"]
    assert main([*arguments, "--known_triggers", "[make life better, ahi]"]) == 2
    assert capsys.readouterr().err.endswith(
        "has a head of another size: num_labels is 2 in the data, and 3 in the model; set num_labels: 3 (--num_labels 3), or "
        "use a model without a classification head\n"
    )
    assert main([*arguments, "--known_triggers", "[make life better, ahi]", "--num_labels", "3"]) == 0
