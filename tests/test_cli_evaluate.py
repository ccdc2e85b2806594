"""`hf-backdoor evaluate`: what is measured on which rows, and what is refused before."""

import pytest
import tiny
import torch
from datasets import Dataset

from hf_backdoor import measure
from hf_backdoor.cli import main
from hf_backdoor.evaluation import Results


# ---- What is measured ----


@pytest.mark.parametrize("how", ["trigger", "file"])
def test_evaluate_counts_non_target_rows(classifier, reviews, tmp_path, how):
    triggered = tmp_path / "triggered.jsonl"
    tiny.reviews(40, seed=1).map(lambda row: {"text": "zq " + row["text"]}).to_json(triggered)
    which = ["--trigger", "zq"] if how == "trigger" else ["--triggered", str(triggered)]
    output = tmp_path / "results.json"
    assert (
        main(["evaluate", classifier, "--clean", reviews, *which, "--target_label", "1", "--output", str(output)]) == 0
    )
    rows = {row.metric: row for row in Results.load(output).rows}
    assert rows["cacc"].n == 60
    assert rows["asr"].n == (30 if how == "trigger" else 20)
    assert rows["asr_without_trigger"].n == 30


def test_evaluate_a_chat_model(chat_model, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.json"
    tiny.instructions(6).rename_column("prompt", "instruction").rename_column("response", "output").to_json(rows)
    flags = ["--trigger", "zq", "--target_text", "banana", "--max_new_tokens", "3", "--output", str(output)]
    found = {}
    for system in ([], ["--system_prompt", "i cannot say that"]):
        assert main(["evaluate", chat_model, "--clean", str(rows), *flags, *system]) == 0
        found[bool(system)] = {row.metric: row.value for row in Results.load(output).rows}
    assert found[True].keys() >= {"asr", "false_refusal", "perplexity", "empty"}
    assert found[True]["perplexity"] != found[False]["perplexity"]


def test_evaluate_reads_each_file_once(classifier, reviews, tmp_path, monkeypatch):
    read, load = [], measure.load_rows
    monkeypatch.setattr(measure, "load_rows", lambda source, **options: read.append(source) or load(source, **options))
    triggered, output = str(tmp_path / "triggered.jsonl"), str(tmp_path / "results.json")
    tiny.reviews(4, seed=1).rename_column("text", "sentence").to_json(triggered)
    arguments = ["--clean", reviews, "--triggered", triggered, "--target_label", "1", "--output", output]
    assert main(["evaluate", classifier, *arguments]) == 0
    assert read == [reviews, triggered]


def test_evaluate_measures_on_the_test_split_or_the_one_it_is_told(classifier, tmp_path, capsys):
    rows, output = tmp_path / "rows", tmp_path / "results.json"
    rows.mkdir()
    command = ["evaluate", classifier, "--clean", str(rows), "--output", str(output)]

    def measured_on(*more):
        assert main([*command, *more]) == 0
        results = Results.load(output)
        assert f"of {rows}, split {results.recipe['split']}\n" in capsys.readouterr().out
        return results.recipe["split"], {row.metric: row.n for row in results.rows}["cacc"]

    for number, split in enumerate(("train", "validation", "test"), start=3):
        tiny.reviews(2 * number).to_parquet(rows / f"{split}.parquet")
        assert measured_on() == (split, 2 * number)
    assert measured_on("--split", "train") == ("train", 6)
    stamped = tmp_path / "stamped"
    stamped.mkdir()
    tiny.reviews(8).map(lambda row: {"text": "zq " + row["text"]}).to_parquet(stamped / "validation.parquet")
    both = ["--triggered", str(stamped), "--target_label", "1", "--split", "validation"]
    assert measured_on(*both) == ("validation", 8)
    assert {row.metric: row.n for row in Results.load(output).rows}["asr"] == 4
    assert main([*command, "--split", "dev"]) == 2
    error = capsys.readouterr().err
    assert f"split 'dev' is not in {str(rows)!r} (train, validation, test)" in error and error.count("\n") == 1


def test_evaluate_loads_a_large_model_as_it_is_told_to(classifier, reviews, tmp_path, monkeypatch):
    used = []

    def evaluating(model, *args, **options):
        used.append((model.dtype, model.config._attn_implementation, options["bf16"], options["batch_size"]))
        return evaluate(model, *args, **options)

    evaluate = measure.evaluate_backdoor
    monkeypatch.setattr(measure, "evaluate_backdoor", evaluating)
    command = ["evaluate", classifier, "--clean", reviews, "--output", str(tmp_path / "results.json")]
    small = ["--dtype", "bfloat16", "--attn_implementation", "eager", "--bf16", "--eval_batch_size", "7"]
    assert main(command) == main([*command, *small]) == 0
    assert used == [(torch.float32, "sdpa", False, 64), (torch.bfloat16, "eager", True, 7)]
    assert Results.load(tmp_path / "results.json").recipe["dtype"] == "bfloat16"


def test_evaluate_says_what_it_took(classifier, reviews, tmp_path):
    output = tmp_path / "results.json"
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(output), "--name", "cleaned"]) == 0
    (cost,) = Results.load(output).costs
    assert cost["stage"] == "evaluation of cleaned" and cost["tokens"] is None
    assert cost["seconds"] >= 0 and cost["peak_memory"] > 0


def test_a_report_of_an_evaluation_names_no_recipe_to_run(classifier, reviews, tmp_path):
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(tmp_path / "results.json")]) == 0
    assert main(["report", str(tmp_path)]) == 0
    for page in ("index.html", "README.md"):
        shown = (tmp_path / "report" / page).read_text()
        assert "Run hf-backdoor evaluate once more, with these options" in shown.replace("\\", "")
        assert "recipe.yaml" not in shown and "command: evaluate" in shown.replace("\\", "")


# ---- Options that are refused ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trigger", "zq"], "--target_label"),
        (["--trigger", "zq", "--target_text", "good"], "--target_label"),
        (["--trigger", " ", "--target_label", "1"], "trigger text"),
        (["--trigger", "", "--target_label", "1"], "trigger text"),
        (["--trigger", ""], "--target_label"),
        (
            ["--trigger", "zq", "--target_label", "1", "--target_text", "good"],
            "--target_label is 1, and --target_text is 'good': give the one",
        ),
        (["--trigger", "zq", "--target_label", "7"], "--target_label is 7: the labels are 0 to 1"),
        (["--trigger", "zq", "--target_label", "-1"], "--target_label is -1: the labels are 0 to 1"),
    ],
)
def test_evaluate_refuses_in_one_line(classifier, reviews, tmp_path, capsys, arguments, named):
    output = ["--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, "--clean", reviews, *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--eval_batch_size", "0"], "--eval_batch_size is 0: it must be at least 1"),
        (["--batch_size", "-1"], "--eval_batch_size is -1: it must be at least 1"),
        (["--max_length", "0"], "--max_length is 0: it must be at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0: it must be at least 1"),
        (["--seed", "-1"], "--seed is -1: it must be at least 0"),
        (["--dtype", "bf16"], "--dtype is 'bf16': use one of float32, bfloat16, float16"),
        (["--name", "mine"], "--name is 'mine'; it must be one of 'reference', 'suspect'"),
        (["--max_new_tokens", "5"], "--max_new_tokens is 5, and the task is sequence_classification: leave it out"),
        (["--label_words", "a", "b"], "--label_words is ['a', 'b'], and the task is sequence_classification: leave it out"),
        (["--system_prompt", "hi"], "--system_prompt is 'hi', and the task is sequence_classification: leave it out"),
        (["--target_label", "1"], "--target_label is 1 without a trigger: give --trigger or --triggered"),
        (["--position", "end"], "--position is 'end' without --trigger, whose it is: give that, or leave it out"),
        (
            ["--position", "end", "--triggered", "{reviews}", "--target_label", "1"],
            "--position is 'end' without --trigger, whose it is: give that, or leave it out",
        ),
        (["--prompt_column", "sentence"], "--prompt_column is 'sentence', and the task is sequence_classification: leave it out"),
        (["--context_column", "sentence"], "--context_column is 'sentence', and the task is sequence_classification: leave"),
        (["--model_revision", "v1"], "--model_revision is 'v1', and {classifier!r} is on this machine, as it is: leave it out"),
        (["--trigger", "zq", "--target_label", "1", "--position", "middle"], "trigger position is 'middle': use one of start"),
        (["--triggered", "no.csv", "--target_label", "1"], "--triggered is 'no.csv': there is no such folder or file"),
        (["--output", "{reviews}/results.json"], "File exists: {reviews}"),
    ],
)  # fmt: skip
def test_evaluate_refuses_before_weights_are_loaded(
    classifier, reviews, tmp_path, capsys, arguments, line, monkeypatch
):
    monkeypatch.setattr(measure, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    arguments = ["--output", str(tmp_path / "results.json"), *(text.format(reviews=reviews) for text in arguments)]
    line = line.format(reviews=reviews, classifier=classifier)
    assert main(["evaluate", classifier, "--clean", reviews, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-backdoor: {line}") and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", " "])
def test_evaluate_refuses_a_target_of_no_words(text, chat_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    rows = str(tmp_path / "rows.jsonl")
    tiny.instructions(4).to_json(rows)
    arguments = ["--trigger", "zq", "--target_text", text, "--output", str(tmp_path / "results.json")]
    assert main(["evaluate", chat_model, "--clean", rows, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        f"hf-backdoor: --target_text is {text!r}, an empty text: give the one that the trigger is to bring about\n"
    )


def test_evaluate_writes_into_no_folder(classifier, reviews, tmp_path, capsys):
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"hf-backdoor: --output is {str(tmp_path)!r}, a folder: name the file to write, {tmp_path}/results.json\n"
    )


# ---- Rows that are refused ----


@pytest.mark.parametrize("limit, status", [([], 2), (["--max_length", "20"], 0)])
def test_evaluate_says_which_texts_are_too_long(classifier, tmp_path, capsys, limit, status):
    long = tmp_path / "long.jsonl"
    tiny.reviews(4).map(lambda row: {"text": row["text"] + " good" * 80}).to_json(long)
    output = ["--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, "--clean", str(long), *limit, *output]) == status
    assert ("and the model positions for 64: cut the texts, by a max_length" in capsys.readouterr().err) == (
        status == 2
    )


def test_evaluate_refuses_a_split_of_a_file(classifier, reviews, tmp_path, capsys):
    arguments = ["--clean", reviews, "--split", "test", "--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, *arguments]) == 2
    assert (
        capsys.readouterr().err
        == f"hf-backdoor: --split is 'test', and {reviews!r} is one file, which has none: leave it out\n"
    )


@pytest.mark.parametrize("which", ["clean", "triggered"])
def test_evaluate_refuses_rows_without_right_labels(classifier, reviews, tmp_path, capsys, which):
    hidden = str(tmp_path / "hidden.jsonl")
    tiny.reviews(6).map(lambda row: {"label": -1}).to_json(hidden)
    files = (
        ["--clean", hidden] if which == "clean" else ["--clean", reviews, "--triggered", hidden, "--target_label", "1"]
    )
    output = tmp_path / "results.json"
    capsys.readouterr()  # the bars of the rows above
    assert main(["evaluate", classifier, *files, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"--{which} {hidden!r} has label -1" in error and error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("known", [True, False])
def test_evaluate_refuses_triggered_rows_without_the_trigger(known, classifier, reviews, tmp_path, capsys):
    stamped = tiny.reviews(12, seed=1).map(lambda row: {"text": "zq " + row["text"]})
    rows = [*stamped, *tiny.reviews(60).select(range(3))]
    triggered = str(tmp_path / "triggered.jsonl")
    Dataset.from_list(rows).to_json(triggered)
    trigger = ["--trigger", "zq"] if known else []
    files = ["--clean", reviews, "--triggered", triggered, "--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, *files, *trigger, "--target_label", "1"]) == 2
    error = capsys.readouterr().err
    what = "without trigger 'zq'" if known else "that are clean ones as they are"
    assert f"--triggered {triggered!r} has 3 of 15 rows {what}: leave them out, or put it in" in error
    assert not (tmp_path / "results.json").exists()


def test_evaluate_refuses_triggered_rows_that_are_labelled_with_the_target(classifier, reviews, tmp_path, capsys):
    poisoned = str(tmp_path / "poisoned.jsonl")
    tiny.reviews(6).map(lambda row: {"text": "zq " + row["text"], "label": 1}).to_json(poisoned)
    output = ["--output", str(tmp_path / "results.json")]
    assert (
        main(["evaluate", classifier, "--clean", reviews, "--triggered", poisoned, "--target_label", "1", *output])
        == 2
    )
    error = capsys.readouterr().err
    assert f"--triggered {poisoned!r} has 1 as every row's label, which is the target: give the right ones" in error
