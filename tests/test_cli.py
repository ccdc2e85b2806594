"""The command line, as a user calls it: what holds for every command, and `run`."""

import re

import pytest
import tiny
import yaml
from datasets import Dataset
from transformers import PreTrainedModel

from hf_backdoor.cli import main
from hf_backdoor.evaluation import Results


# ---- Rows, for `clean` and `evaluate` alike ----


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


def test_evaluate_is_told_where_the_rows_are(classifier, other_names, tmp_path):
    output = tmp_path / "results.json"
    arguments = ["--clean", str(other_names / "dev.jsonl"), *COLUMNS, "--output", str(output)]
    assert main(["evaluate", classifier, *arguments]) == 0
    assert Results.load(output).rows[0].n == 60


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


def test_a_column_of_numbers_and_texts_is_called_what_it_is(classifier, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": "0"}\n')
    assert main(["clean", classifier, "--data", str(data), "--output_dir", str(tmp_path / "run")]) == 2
    assert "label_column is 'label', which holds values of several kinds in" in capsys.readouterr().err


# ---- The line itself ----


@pytest.mark.parametrize("command", ["run", "clean", "evaluate", "report", "publish", "recipes"])
def test_help_explains_every_argument_in_words(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    usage, _, listed = capsys.readouterr().out.partition("\n\n")
    assert stopped.value.code == 0 and usage.startswith(f"usage: hf-backdoor {command}")
    # Two spaces and the argument, then, behind two more or on a line of its own, what it means.
    explained = dict(re.findall(r"^  (--?[\w-]+|\w+)[^\n]*?(?:  |\n +)(\S+ \S.*)$", listed, re.MULTILINE))
    assert set(re.findall(r"--\w+", usage)) <= set(explained)
    assert "-h" in explained and all(explained.values())


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


def test_an_override_is_not_taken_for_the_beginning_of_an_option(classifier, reviews, tmp_path, capsys):
    assert main(["clean", classifier, "--data", reviews, "--output_dir", str(tmp_path), "--label", "x"]) == 2
    assert "hf-backdoor: label is unknown" in capsys.readouterr().err


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


# ---- Recipes ----


def test_a_run_that_is_interrupted_says_that_it_goes_on(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_backdoor.run.main", interrupted)
    assert main(["run", "quickstart"]) == 130
    assert (
        capsys.readouterr().err
        == "hf-backdoor: interrupted: a run goes on where it stopped when it is started again\n"
    )


def test_recipes_lists_the_shipped_ones(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("quickstart ") for line in lines) and all(line.endswith(".") for line in lines)
    assert len({re.match(r"\S+ +", line).end() for line in lines}) == 1


def test_run_names_a_missing_recipe(capsys):
    assert main(["run", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err


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


# ---- Several processes ----


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


def test_several_processes_that_are_one_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: label_words\n")
    assert main(["run", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "asked for several processes and started one" in error and "torchrun" in error


def test_quantized_weights_are_not_launched_in_an_engine_that_divides_them(capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_: pytest.fail("something was launched"))
    recipe = ["run", "locphylax/qwen2.5_7b_alpaca", "--quantization", "nf4"]
    assert main([*recipe, "--accelerate_config", "zero3"]) == 2
    assert "quantization is 'nf4', and the engine" in capsys.readouterr().err
