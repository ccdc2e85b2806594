"""The command line, as a user calls it."""

import json

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from transformers import BertConfig, PreTrainedModel

from hf_backdoor import measure
from hf_backdoor.cli import main
from hf_backdoor.evaluation import Results
from hf_backdoor.found import measured


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tiny.model("bert").save_pretrained(folder)
    tiny.encoder_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.model("llama").save_pretrained(folder)
    tiny.causal_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "reviews.csv"
    tiny.reviews(60).rename_column("text", "sentence").to_csv(file)
    return str(file)


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


def test_clean_by_mbtsad_has_what_works_best_on_too(classifier, reviews, tmp_path):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--method", "mbtsad"]
    assert main([*arguments, "--max_steps", "1", "--disable_tqdm", "true"]) == 0
    assert (tmp_path / "soft_search" / "stage.json").exists() and (tmp_path / "answers" / "stage.json").exists()
    assert "learning_rate: 0.0001" in (tmp_path / "recipe.yaml").read_text()


def test_clean_is_the_paper_s_method_where_it_is_told_to(classifier, reviews, tmp_path):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--max_steps", "1"]
    more = ["--known_triggers", "[make life better, ahi]", "--own_answers", "0"]
    assert main([*arguments, *more, "--disable_tqdm", "true"]) == 0
    assert not (tmp_path / "soft_search").exists() and not (tmp_path / "answers").exists()
    assert not yaml.safe_load((tmp_path / "recipe.yaml").read_text()).get("stages")


def test_clean_asks_for_the_one_thing_that_is_missing(chat_model, reviews, tmp_path, capsys):
    assert main(["clean", chat_model, "--data", reviews, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--label_words" in error and error.count("\n") == 1


@pytest.fixture
def other_names(tmp_path):
    """A folder whose rows are in a split, and in columns, of names of their own."""
    folder = tmp_path / "rows"
    folder.mkdir()
    tiny.reviews(60).rename_columns({"text": "comment", "label": "y"}).to_json(folder / "dev.jsonl")
    return folder


COLUMNS = ["--text_column", "comment", "--label_column", "y"]


def test_clean_is_told_where_the_rows_are(classifier, other_names, tmp_path, capsys):
    command = ["clean", classifier, "--data", str(other_names), "--output_dir", str(tmp_path / "run")]
    more = ["--train_split", "validation", "--max_steps", "1", "--own_answers", "0", "--soft_triggers", "0"]
    more += ["--known_triggers", "[make life better, ahi]", "--disable_tqdm", "true"]
    assert main([*command, *more]) == 2
    assert "rename one to 'text', or name it by --text_column" in capsys.readouterr().err
    assert main([*command, *more, *COLUMNS[:2], "--label_column", "x"]) == 2
    assert "label_column is 'x', and the columns are comment, y: name one of these" in capsys.readouterr().err
    assert main([*command, *more, *COLUMNS, "--task", "reading"]) == 2
    assert "task is 'reading': use one of sequence_classification" in capsys.readouterr().err
    assert main([*command, *more, *COLUMNS, "--dataset_config", "3"]) == 2
    assert "BuilderConfig '3' not found" in capsys.readouterr().err
    assert main([*command, *more, *COLUMNS]) == 0


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


def test_evaluate_is_told_where_the_rows_are(classifier, other_names, tmp_path):
    output = tmp_path / "results.json"
    arguments = ["--clean", str(other_names / "dev.jsonl"), *COLUMNS, "--output", str(output)]
    assert main(["evaluate", classifier, *arguments]) == 0
    assert Results.load(output).rows[0].n == 60


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


@pytest.mark.parametrize("limit, status", [([], 2), (["--max_length", "20"], 0)])
def test_evaluate_says_which_texts_are_too_long(classifier, tmp_path, capsys, limit, status):
    long = tmp_path / "long.jsonl"
    tiny.reviews(4).map(lambda row: {"text": row["text"] + " good" * 80}).to_json(long)
    output = ["--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, "--clean", str(long), *limit, *output]) == status
    assert ("and the model positions for 64: cut the texts, by a max_length" in capsys.readouterr().err) == (
        status == 2
    )


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


def test_evaluate_refuses_a_split_of_a_file(classifier, reviews, tmp_path, capsys):
    arguments = ["--clean", reviews, "--split", "test", "--output", str(tmp_path / "results.json")]
    assert main(["evaluate", classifier, *arguments]) == 2
    assert (
        capsys.readouterr().err
        == f"hf-backdoor: --split is 'test', and {reviews!r} is one file, which has none: leave it out\n"
    )


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


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """Instructions with the text that they are about beside them."""
    file = tmp_path_factory.mktemp("alpaca") / "rows.jsonl"
    rows = tiny.instructions(40).rename_columns({"prompt": "instruction", "response": "output"})
    rows.add_column("input", [" ".join(tiny.FILLER[row % 9 : row % 9 + 3]) for row in range(40)]).to_json(file)
    return str(file)


def test_evaluate_reads_what_an_instruction_is_about(chat_model, alpaca, tmp_path):
    output = tmp_path / "out.json"
    found = []
    for more in ([], ["--context_column", ""]):
        arguments = ["--clean", alpaca, "--max_new_tokens", "1", *more, "--output", str(output)]
        assert main(["evaluate", chat_model, *arguments]) == 0
        found.append(Results.load(output))
    prompts = [{example["prompt"] for example in results.examples} for results in found]
    assert all("\n\n" in prompt for prompt in prompts[0]) and not any("\n\n" in prompt for prompt in prompts[1])


def test_clean_reads_what_an_instruction_is_about(chat_model, alpaca, tmp_path):
    arguments = ["--data", alpaca, "--output_dir", str(tmp_path), "--max_steps", "1", "--max_new_tokens", "1"]
    assert main(["clean", chat_model, *arguments, "--known_triggers", "[ahi, third]", "--disable_tqdm", "true"]) == 0
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["context_column"] == "input"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trigger", "zq"], "--target_label"),
        (["--trigger", "zq", "--target_text", "good"], "--target_label"),
        (["--trigger", " ", "--target_label", "1"], "trigger text"),
        (["--trigger", "", "--target_label", "1"], "trigger text"),
        (["--trigger", ""], "--target_label"),
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


def test_evaluate_says_what_it_took(classifier, reviews, tmp_path):
    output = tmp_path / "results.json"
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(output), "--name", "cleaned"]) == 0
    (cost,) = Results.load(output).costs
    assert cost["stage"] == "evaluation of cleaned" and cost["tokens"] is None
    assert cost["seconds"] >= 0 and cost["peak_memory"] > 0


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


def test_a_report_of_an_evaluation_names_no_recipe_to_run(classifier, reviews, tmp_path):
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(tmp_path / "results.json")]) == 0
    assert main(["report", str(tmp_path)]) == 0
    for page in ("index.html", "README.md"):
        shown = (tmp_path / "report" / page).read_text()
        assert "Run hf-backdoor evaluate once more, with these options" in shown.replace("\\", "")
        assert "recipe.yaml" not in shown and "command: evaluate" in shown.replace("\\", "")


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


@pytest.mark.parametrize("option", ["--data", "--clean", "--triggered"])
@pytest.mark.parametrize("name, reason", [("no.csv", ": there is no such"), ("broken.csv", ", which can't be loaded")])
def test_rows_that_can_not_be_read_are_named_by_what_was_typed(
    classifier, reviews, tmp_path, capsys, option, name, reason
):
    (tmp_path / "broken.csv").write_text("text,label\na,1\nb,c,d,1\n")
    rows = str(tmp_path / name)
    given = {
        "--data": ["clean", classifier, "--data", rows, "--output_dir", str(tmp_path / "run")],
        "--clean": ["evaluate", classifier, "--clean", rows, "--output", str(tmp_path / "out.json")],
        "--triggered": ["evaluate", classifier, "--clean", reviews, "--triggered", rows, "--target_label", "1",
                        "--output", str(tmp_path / "out.json")],
    }  # fmt: skip
    assert main(given[option]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hf-backdoor: {option} is {rows!r}{reason}")


@pytest.mark.parametrize("command", ["clean", "evaluate"])
@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text": 5, "label": 1}, "text_column is 'text', which holds int64 in"),
        ({"text": ["good"], "label": 1}, "text_column is 'text', which holds lists in"),
        ({"text": "good", "label": [1]}, "label_column is 'label', which holds lists in"),
        ({"text": "good", "label": 10**12}, "1000000000000"),  # listing so many classes would take all memory
    ],
)
def test_columns_of_another_kind_are_refused_in_one_line(classifier, tmp_path, capsys, command, row, line):
    data = str(tmp_path / "rows.jsonl")
    Dataset.from_list([row] * 10).to_json(data)
    output = ["--data", data, "--output_dir", str(tmp_path / "run")]
    if command == "evaluate":
        output = ["--clean", data, "--output", str(tmp_path / "results.json")]
    assert main([command, classifier, *output]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-backdoor: ") and line in error


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


def test_an_override_is_not_taken_for_the_beginning_of_an_option(classifier, reviews, tmp_path, capsys):
    assert main(["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--label", "x"]) == 2
    assert "hf-backdoor: label is unknown" in capsys.readouterr().err


def test_evaluate_writes_into_no_folder(classifier, reviews, tmp_path, capsys):
    assert main(["evaluate", classifier, "--clean", reviews, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"hf-backdoor: --output is {str(tmp_path)!r}, a folder: name the file to write, {tmp_path}/results.json\n"
    )


@pytest.mark.parametrize("which", ["clean", "triggered"])
def test_evaluate_refuses_rows_without_right_labels(classifier, reviews, tmp_path, capsys, which):
    hidden = str(tmp_path / "hidden.jsonl")
    tiny.reviews(6).map(lambda row: {"label": -1}).to_json(hidden)
    files = (
        ["--clean", hidden] if which == "clean" else ["--clean", reviews, "--triggered", hidden, "--target_label", "1"]
    )
    output = tmp_path / "results.json"
    assert main(["evaluate", classifier, *files, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"--{which} {hidden!r} has label -1" in error and error.count("\n") == 1
    assert not output.exists()


def test_recipes_lists_the_shipped_ones(capsys):
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_dry_run_loads_no_weights(classifier, reviews, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {classifier}\ntask: sequence_classification\ndataset_name: {reviews}\n"
        f"text_column: sentence\ntest_fraction: 0.2\noutput_dir: {tmp_path / 'run'}\nmethod: locphylax\n"
        "per_device_train_batch_size: 6\ncontrols: [fine_tuning]\n"
    )
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert main(["run", str(recipe), "--dry_run", "--num_train_epochs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "inject" in shown and "controls/fine_tuning/inject" in shown and "GiB" in shown
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_rows_that_the_model_has_no_positions_for(tmp_path, capsys):
    recipe = tiny.classifier_recipe(tmp_path)
    tiny.reviews(90).map(lambda row: {"text": row["text"] + " good" * 80}).to_json(tmp_path / "rows.jsonl")
    assert main(["run", str(recipe), "--dry_run"]) == 2
    assert "and the model positions for 64: cut the texts, by a max_length" in capsys.readouterr().err
    assert main(["run", str(recipe), "--dry_run", "--max_length", "40"]) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run"], "the following arguments are required: recipe: see `hf-backdoor run --help`"),
        (["run", "quickstart", "--dry_run=true"], "argument --dry_run: ignored explicit argument 'true': see"),
        (["walk"], "argument COMMAND: invalid choice: 'walk'"),
        (["evaluate", "x", "--clean", "y", "--output", "z", "--seed", "a"], "argument --seed: invalid int value: 'a': see"),
        (["recipes", "--all"], "unknown arguments: --all: see `hf-backdoor recipes --help`"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_in_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"hf-backdoor: {line}") and error.count("\n") == 1


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name"])
def test_clean_is_told_once_what_to_clean_and_by_what(classifier, reviews, tmp_path, capsys, key):
    arguments = ["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), f"--{key}", "other"]
    assert main(arguments) == 2
    assert f"--{key} is 'other', and " in capsys.readouterr().err


def test_run_names_a_missing_recipe(capsys):
    assert main(["run", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("num_processes: 2\n", "names no distributed_type"),
        ("zero3\n", "names no distributed_type"),
        ("a: [1", "is no YAML"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_file_that_is_no_configuration_of_accelerate(content, line, more, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert main(["run", "quickstart", "--accelerate_config", str(file), *more]) == 2
    error = capsys.readouterr().err
    assert line in error and str(file) in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "clean"])
@pytest.mark.parametrize("name", ["{}/no/such/folder", "nobody/nothing"])
def test_a_model_that_is_not_there_is_named(command, name, reviews, tmp_path, capsys):
    name, recipe = name.format(tmp_path), tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {name}\ntask: sequence_classification\ndataset_name: {reviews}\noutput_dir: {tmp_path / 'run'}\n"
    )
    arguments = {"run": [str(recipe)], "clean": [name, "--data", reviews, "--output_dir", str(tmp_path / "run")]}
    assert main([command, *arguments[command]]) == 2
    error = capsys.readouterr().err
    assert f"model '{name}' can't be loaded" in error and error.count("\n") == 1


def test_clean_names_a_method_that_is_not_there(classifier, reviews, tmp_path, capsys):
    assert main(["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--method", "magic"]) == 2
    assert "method is 'magic': use one of locphylax" in capsys.readouterr().err


def test_several_processes_that_are_one_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: label_words\n")
    assert main(["run", str(recipe)]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "clean", "evaluate", "report", "publish", "recipes"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and command in capsys.readouterr().out


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


def test_quantized_weights_are_not_launched_in_an_engine_that_divides_them(capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_: pytest.fail("something was launched"))
    recipe = ["run", "locphylax/qwen2.5_7b_alpaca", "--quantization", "nf4"]
    assert main([*recipe, "--accelerate_config", "zero3"]) == 2
    assert "quantization is 'nf4', and the engine" in capsys.readouterr().err
