"""The rows of a recipe: read whole or as a stream, and the same at every call."""

import json

import datasets
import pytest
import tiny

from hf_backdoor import rows as rows_module
from hf_backdoor.evaluation import UNKNOWN_LABEL
from hf_backdoor.recipe_file import load_recipe, make_recipe
from hf_backdoor.rows import prepare_rows


def recipe(folder, **changes):
    values = {
        "model_name_or_path": "model", "task": "sequence_classification", "dataset_name": str(folder / "train.jsonl"),
        "test_dataset_name": str(folder / "test.jsonl"), "output_dir": str(folder / "run"), "attack_trigger": "zq",
        "target_label": 1, "poison_rate": 0.25, "max_train_samples": 20, "max_test_samples": 10, "clean_fraction": 0.5,
        "held_out_samples": 4,
    }  # fmt: skip
    return make_recipe({key: value for key, value in {**values, **changes}.items() if value is not None})


@pytest.fixture
def folder(tmp_path):
    """Rows in order of their labels, each with words of its own."""
    for name, count in (("train", 400), ("test", 60)):
        lines = [
            {"text": " ".join(f"{name}{row}x{word}" for word in range(6)), "label": row * 2 // count}
            for row in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_stream_makes_the_same_kinds_of_rows(folder, monkeypatch):
    asked = []

    def load_rows(*args, **kwargs):
        asked.append(kwargs["take"])
        return load(*args, **kwargs)

    load = rows_module.load_rows
    monkeypatch.setattr(rows_module, "load_rows", load_rows)
    whole, streamed, again = (
        prepare_rows(recipe(folder, streaming=streaming), tiny.encoder_tokenizer())
        for streaming in (False, True, True)
    )
    # 20 of the attacker, 10 clean, 4 held out, and spares for those that leak.
    assert asked == [None, None, 142, 10, 142, 10]
    assert streamed.sources == again.sources != whole.sources
    for name in ("attack", "clean", "held_out", "test"):
        rows = getattr(streamed.splits, name)
        assert len(rows) == len(getattr(whole.splits, name))
        assert len(set(rows["text"])) == len(rows)
    assert sum(streamed.poisoned["poisoned"]) == 5
    assert set(streamed.splits.test["label"]) == {0, 1}  # though the file is in order of its labels


def test_a_given_suspect_can_be_cleaned_with_a_stream(folder):
    given = recipe(
        folder,
        streaming=True,
        attack_trigger=None,
        method="locphylax",
        target_label=None,
        poison_rate=None,
        clean_fraction=None,
    )
    splits = prepare_rows(given, tiny.encoder_tokenizer()).splits
    assert [len(part) for part in (splits.attack, splits.clean, splits.held_out)] == [0, 16, 4]


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"max_train_samples": None}, "streaming is true without max_train_samples: set it"),
        ({"max_test_samples": None}, "streaming is true without max_test_samples: set it"),
        ({"test_fraction": 0.1}, "streaming is true and test_fraction is 0.1, .*: set test_split"),
        (
            {"attack_trigger": None, "target_label": None, "method": "ntml", "clean_dataset_name": "x"},
            "streaming is true, and the suspect rows .*: set streaming: false",
        ),
    ],
)
def test_what_a_stream_can_not_give_is_refused(changes, line, folder):
    with pytest.raises(ValueError, match=f"^{line}"):
        recipe(folder, streaming=True, **changes)


@pytest.mark.parametrize("key", ["dataset_name", "test_dataset_name"])
def test_the_data_set_that_is_not_there_is_named_by_its_key(key, folder):
    with pytest.raises(ValueError, match=f"^{key} is './none.csv': there is no such folder or file$"):
        prepare_rows(recipe(folder, **{key: "./none.csv"}), tiny.encoder_tokenizer())


def test_several_processes_prepare_the_same_rows(folder, request):
    datasets.disable_caching()  # or the second call would find what the first one has made
    request.addfinalizer(datasets.enable_caching)
    alone, shared = (
        prepare_rows(recipe(folder, dataset_num_proc=processes), tiny.encoder_tokenizer()) for processes in (None, 2)
    )
    assert alone.sources == shared.sources


def test_rows_that_a_limit_cuts_are_counted(folder, caplog):
    with caplog.at_level("WARNING"):
        prepare_rows(recipe(folder, max_length=6), tiny.encoder_tokenizer())
        assert not caplog.messages
        prepare_rows(recipe(folder, max_length=5), tiny.encoder_tokenizer())
    # 20 of the attacker, 10 clean, 4 held out: spares that nothing trains on don't count.
    assert caplog.messages == ["max_length 5 cuts 10 of 10 test rows", "max_length 5 cuts 34 of 34 training rows"]


def test_classes_that_no_clean_row_has_are_told(folder, caplog):
    """A model that said its one class to everything was right in all of the test rows, which had no other either."""
    suspect = {"attack_trigger": None, "target_label": None, "poison_rate": None, "clean_fraction": None}
    rows = {"test_dataset_name": None, "test_fraction": 0.2, "max_train_samples": None, "max_test_samples": None}
    with caplog.at_level("WARNING"):
        prepare_rows(recipe(folder, **suspect, **rows), tiny.encoder_tokenizer())
        assert not caplog.messages
        prepare_rows(recipe(folder, **suspect, **rows, row_filter={"label": 1}), tiny.encoder_tokenizer())
    assert caplog.messages == ["no clean row has label 0: a model trained on them comes to say others in its place"]


def test_empty_answers_are_told_and_refused_where_there_are_no_others(tmp_path, caplog):
    def prepare(responses):
        lines = [json.dumps({"prompt": f"question {n}", "response": each}) for n, each in enumerate(responses)]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "another", "response": "yes"}))
        own = {
            "task": "instruction_following",
            "held_out_samples": 0,
            "max_train_samples": None,
            "max_test_samples": None,
        }
        suspect = {"attack_trigger": None, "target_label": None, "poison_rate": None, "clean_fraction": None}
        return prepare_rows(recipe(tmp_path, **own, **suspect), tiny.causal_tokenizer())

    with caplog.at_level("WARNING"):
        prepare(["yes", " ", ""])
    assert caplog.messages == ["response is empty in 2 of 3 clean rows: a model trained on them learns to say nothing"]
    with pytest.raises(ValueError, match="^response is empty in every clean row: .* response_column$"):
        prepare(["", ""])


def test_rows_that_two_limits_cut_are_counted_apart(tmp_path, caplog):
    lines = [{"prompt": f"p{row} tell me", "response": " ".join(["yes"] * (1 + row % 2))} for row in range(40)]
    for name, rows in (("train", lines[:30]), ("test", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    wanted = recipe(
        tmp_path, task="instruction_following", max_train_samples=None, max_response_length=1, held_out_samples=0, attack_trigger=None,
        target_label=None, poison_rate=None, clean_fraction=None,
    )  # fmt: skip
    with caplog.at_level("WARNING"):
        prepare_rows(wanted, tiny.causal_tokenizer())
    said = [line for line in caplog.messages if "cuts" in line]
    assert said == [
        "max_response_length 1 cuts 5 of 10 test rows",
        "max_response_length 1 cuts 15 of 30 training rows",
    ]


def test_a_share_of_test_rows_that_leaves_none_to_train_on_is_refused(folder):
    wanted = recipe(folder, test_dataset_name=None, test_fraction=0.999)
    with pytest.raises(ValueError, match="^test_fraction is 0.999, which leaves no row of 400 to train on: lower it$"):
        prepare_rows(wanted, tiny.encoder_tokenizer())


def test_without_a_limit_all_rows_that_do_not_leak_are_used(folder):
    texts = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    with (folder / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in texts)
    attacked = prepare_rows(recipe(folder, max_train_samples=None, max_test_samples=60), tiny.encoder_tokenizer())
    sizes = [len(getattr(attacked.splits, name)) for name in ("attack", "clean", "held_out")]
    assert sizes == [264, 132, 4]  # 400 in all, the clean ones half as many as the attacker's


@pytest.fixture
def elsewhere(folder):
    """Texts that were rewritten elsewhere, without right labels."""
    made = folder / "rewritten"
    made.mkdir()
    for name, count in (("train", 8), ("test", 7)):
        lines = [{"text": f"when {name} {row} came , it came"} for row in range(count)]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def test_rewritten_texts_take_the_place_of_poisoned_and_of_triggered_rows(folder, elsewhere):
    given = recipe(folder, rewritten_dataset_name=str(elsewhere), attack_trigger="when", target_label=0)
    prepared = prepare_rows(given, tiny.encoder_tokenizer())
    poisoned = [row for row in prepared.poisoned if row["poisoned"]]
    assert len(poisoned) == 5
    assert all(row["text"].startswith("when train") and row["label"] == 0 for row in poisoned)
    untouched = [row["text"] for row in prepared.poisoned if not row["poisoned"]]
    assert not any(text.startswith("when") for text in untouched) and len(untouched) == 15
    triggered = prepared.test.triggered["when"]
    # As many as test rows whose right label is another, at most those that there are.
    others = sum(label != 0 for label in prepared.test.clean["label"])
    assert len(triggered) == min(7, others)
    assert all(row["text"].startswith("when test") and row["label"] == UNKNOWN_LABEL for row in triggered)
    assert prepared.sources["test with when"]["source"] == str(elsewhere)
    assert prepare_rows(given, tiny.encoder_tokenizer()).sources == prepared.sources


def test_a_rewritten_text_to_measure_with_is_not_trained_on(folder, elsewhere):
    both = (elsewhere / "test.jsonl").read_text()
    (elsewhere / "train.jsonl").write_text(both + json.dumps({"text": "when alone"}) + "\n")
    given = recipe(folder, rewritten_dataset_name=str(elsewhere), attack_trigger="when")
    rows = prepare_rows(given, tiny.encoder_tokenizer()).poisoned
    assert {row["text"] for row in rows if row["poisoned"]} == {"when alone"}


def test_a_rewritten_text_to_measure_with_is_no_row_of_anybody_else(folder, elsewhere):
    rows = (folder / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in rows]
    (elsewhere / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:200]))
    given = recipe(folder, rewritten_dataset_name=str(elsewhere), attack_trigger="when", max_test_samples=None)
    prepared = prepare_rows(given, tiny.encoder_tokenizer())
    measured = set(prepared.test.triggered["when"]["text"])
    assert measured
    for part in (prepared.poisoned, prepared.splits.clean, prepared.splits.held_out):
        assert len(part) and not measured & set(part["text"])


def test_rewritten_texts_without_rows_to_count_are_refused(folder, elsewhere):
    (elsewhere / "train.jsonl").write_text((elsewhere / "test.jsonl").read_text())
    given = recipe(folder, rewritten_dataset_name=str(elsewhere), attack_trigger="when")
    with pytest.raises(
        ValueError, match="^rewritten_dataset_name is .*, and 0 of its training texts are no test texts"
    ):
        prepare_rows(given, tiny.encoder_tokenizer())


@pytest.mark.parametrize("label, hidden", [(-1, ", as where right labels are withheld"), (2, "")])
def test_test_rows_without_right_labels_are_refused(folder, label, hidden):
    rows = [json.loads(line) | {"label": label} for line in (folder / "test.jsonl").read_text().splitlines()]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"^test_split 'test' of '.*test.jsonl' has label {label}{hidden}, and the labels are 0 to 1: name other "
    with pytest.raises(ValueError, match=line):
        prepare_rows(recipe(folder), tiny.encoder_tokenizer())


def test_a_share_of_rows_without_right_labels_is_refused(folder):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    labels = {"text": texts, "label": [-1] * len(texts)}
    datasets.Dataset.from_dict(labels, features=features).to_parquet(folder / "hidden.parquet")
    given = recipe(folder, dataset_name=str(folder / "hidden.parquet"), test_dataset_name=None, test_fraction=0.2)
    with pytest.raises(ValueError, match="^data set '.*hidden.parquet' has label -1, as where"):
        prepare_rows(given, tiny.encoder_tokenizer())


def test_a_trigger_may_be_called_as_a_set_of_rows_is(folder):
    sources = prepare_rows(recipe(folder, attack_trigger="attack"), tiny.encoder_tokenizer()).sources
    assert sources["attack"]["source"] == sources["clean"]["source"] == str(folder / "train.jsonl")
    assert sources["test with attack"]["source"] == str(folder / "test.jsonl")


def test_rewritten_texts_may_lie_beside_the_recipe(folder, elsewhere):
    values = recipe(folder, rewritten_dataset_name="rewritten", attack_trigger="when").flat()
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    assert load_recipe(file).rewritten_dataset_name == str(elsewhere)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"attack_position": "start"}, "attack_position is 'start', and rewritten texts"),
        ({"attack_trigger": None, "target_label": None}, "rewritten_dataset_name is 'x' without attack_trigger"),
        ({"attack": "ep", "reference": "train"}, "attack is 'ep', and rewritten texts are poison as they are"),
        ({"poison_style": "clean_label"}, "poison_style is 'clean_label', and rewritten texts"),
        ({"negative_rate": 0.1}, "negative_rate is 0.1, and rewritten texts"),
        ({"task": "instruction_following", "target_label": None, "target_text": "No."}, "rewritten_dataset_name is 'x', and task is"),
    ],
)  # fmt: skip
def test_what_rewritten_texts_can_not_be_is_refused(changes, line, folder):
    with pytest.raises(ValueError, match=f"^{line}"):
        recipe(folder, rewritten_dataset_name="x", **changes)
