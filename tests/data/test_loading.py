import gzip
import json
from pathlib import Path

import pytest
import tiny
from datasets import ClassLabel, Dataset, IterableDataset
from transformers import ByT5Tokenizer

from hf_backdoor.data import beginning, label_names, load_rows, shorten, split_rows, take_rows, with_context


ROWS = [
    {"sentence": "a good film", "label": 1, "text": "other"},
    {"sentence": "a bad one", "label": 0, "text": "other"},
]


def write(folder, kind):
    file = folder / f"rows.{kind}"
    rows = Dataset.from_list(ROWS)
    if kind == "parquet":
        rows.to_parquet(file)
    elif kind == "csv":
        rows.to_csv(file)
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_files_with_a_column_mapping(tmp_path, kind):
    rows = load_rows(write(tmp_path, kind), columns={"text": "sentence", "label": "label"})
    assert rows["text"] == ["a good film", "a bad one"]
    assert rows["label"] == [1, 0]
    assert "sentence" not in rows.column_names


@pytest.mark.parametrize("name", ["ROWS.CSV", "Rows.JsonL", "rows.PARQUET", "rows.jsonl.gz", "rows.CSV.GZ"])
@pytest.mark.parametrize("take", [None, 2])
def test_a_file_s_kind_is_told_by_its_name_in_upper_case_and_packed_too(tmp_path, name, take):
    kind = name.lower().removeprefix("rows.").removesuffix(".gz")
    content = Path(write(tmp_path, kind)).read_bytes()
    file = tmp_path / "other" / name
    file.parent.mkdir()
    file.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert sorted(load_rows(str(file), take=take)["sentence"]) == ["a bad one", "a good film"]


def test_one_column_is_not_two(tmp_path):
    file = write(tmp_path, "jsonl")
    with pytest.raises(
        ValueError, match="^label_column is 'text', and so is text_column: name another of sentence, label"
    ):
        load_rows(file, columns={"text": "text", "label": "text"})
    # Names that change places are two.
    rows = load_rows(file, columns={"prompt": "text", "text": "sentence", "sentence": "label"})
    assert rows[0] == {"prompt": "other", "text": "a good film", "sentence": 1}


def test_a_folder_has_splits(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        tiny.reviews(count).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_rows(str(tmp_path), split="train")) == 3
    assert len(load_rows(str(tmp_path), split="test")) == 2
    assert [
        load_rows(str(tmp_path), split=names).split for names in (("dev", "test", "train"), ("train", "test"))
    ] == [
        "test",
        "train",
    ]
    with pytest.raises(ValueError, match="split 'dev' is not in .*train.*: set train_split or test_split"):
        load_rows(str(tmp_path), split="dev")


@pytest.mark.parametrize(
    "names, small",
    [
        (["ROWS.CSV"], "ROWS.csv"),
        (["train.csv", "test.CSV.GZ"], "test.csv.gz"),
        (["Train.csv", "Test.csv"], "test.csv"),
        (["TRAIN-00000.Parquet"], "train-00000.parquet"),
        (["train/rows.csv", "Test/rows.csv"], "test/rows.csv"),
    ],
)
def test_a_folder_s_files_are_told_by_small_letters_alone(tmp_path, names, small):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text,label\na,1\n")
    wrong = next(name for name in names if name.lower() == small.lower())
    with pytest.raises(ValueError, match=f"^--data is .*: rename its {wrong} to {small}$") as caught:
        load_rows(str(tmp_path), key="--data")
    assert "\n" not in str(caught.value)


def test_what_to_do_about_a_saved_dataset_or_another_encoding_is_said(tmp_path):
    tiny.reviews(4).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"save_to_disk wrote it.: write a file .* by load_from_disk.FOLDER..to_parquet"
    ):
        load_rows(str(tmp_path / "saved"), key="--data")
    (tmp_path / "rows.csv").write_text("text,label\na café “open”,1\n", encoding="cp1252")
    with pytest.raises(ValueError, match="^--data is .*'utf-8' codec can't decode .*: save it as UTF-8$"):
        load_rows(str(tmp_path / "rows.csv"), key="--data")


def test_capitals_that_nothing_goes_by_are_let_be(tmp_path):
    rows = tmp_path / "Reviews" / "My Own.csv"
    rows.parent.mkdir()
    rows.write_text("text,label\na,1\n")
    for other in ("README.MD", "Trainers.csv", ".Test.CSV"):
        (rows.parent / other).write_text("text,label\na,1\n")
    assert len(load_rows(str(tmp_path))) == 2


def test_a_card_says_what_a_folder_s_files_are_whatever_their_names(tmp_path):
    for name in ("Train", "Test"):
        tiny.reviews(4 + len(name)).to_csv(tmp_path / f"{name}.csv")
    splits = "".join(f"  - split: {name.lower()}\n    path: {name}.csv\n" for name in ("Train", "Test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    assert [len(load_rows(str(tmp_path), split=split)) for split in ("train", "test")] == [9, 8]


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="^text_column is 'review', which is not in .*sentence, label, text.*: name one of these$"
    ):
        load_rows(write(tmp_path, "jsonl"), columns={"text": "review"})


def test_gaps_in_a_column_are_counted(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("sentence,y,about\na good film,1,\n,0,b\nbad,,c\n,1,d\n")
    for columns, line in (
        (
            {"text": "sentence"},
            "text_column is 'sentence', which is empty in 2 of 4 rows of .*rows.csv': fill it in, or",
        ),
        ({"label": "y"}, "label_column is 'y', which is empty in 1 of 4 rows of"),
    ):
        with pytest.raises(ValueError, match=f"^{line}"):
            load_rows(str(file), columns=columns)
    assert load_rows(str(file), columns={"context": "about"})["context"][0] is None
    # Rows that are not asked for may have them.
    assert load_rows(str(file), columns={"label": "y"}, where={"about": "b"})["label"] == [0]


def test_labels_of_true_and_false_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,y\na,True\nb,False\n")
    with pytest.raises(ValueError, match="^label_column is 'y', which holds True and False in .*: write 1 and 0$"):
        load_rows(str(tmp_path / "rows.csv"), columns={"label": "y"})


def test_an_unknown_file_type_is_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match="must end in .parquet, .jsonl, .json, .csv"):
        load_rows(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize(
    "source", ["./nowhere.jsonl", "/nowhere/rows.parquet", "../nowhere", "a/b/c", "rows.csv", "a/rows.json.gz", ""]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match="there is no such folder or file"):
        load_rows(source)


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^dataset_name is 'nobody/nothing', which can't be loaded") as caught:
        load_rows("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "lab', "JSON parse error"),
        ("rows.jsonl", "", "it is empty"),
        ("rows.csv", "", "No columns to parse"),
        ("rows.csv", "text,label\n", "it is empty"),
        ("rows.csv", "text,label\na,1\nb,c,d,1\n", "Expected 2 fields in line 3, saw 4"),
        ("rows.parquet", "x", "Parquet file size is 1 bytes"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, reason, folder):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^dataset_name is .*can't be loaded .*{reason}.*: mend that$") as caught:
        load_rows(str(tmp_path if folder else tmp_path / name))
    assert "\n" not in str(caught.value)


def test_label_names():
    rows = tiny.reviews(4)
    assert label_names(rows) == ["0", "1"]
    named = rows.cast_column("label", ClassLabel(names=["negative", "positive", "neutral"]))
    assert label_names(named) == ["negative", "positive", "neutral"]


@pytest.mark.parametrize("labels", [["yes", "no"], [-1, 1], [0.5, 1.0], [True, False]])
def test_labels_that_are_no_numbers_from_zero_are_refused(labels):
    with pytest.raises(ValueError, match="label column holds .*: use whole numbers 0, 1, ... in it"):
        label_names(Dataset.from_dict({"label": labels}))


def test_shorten_cuts_to_tokens_and_leaves_short_texts_alone(wordpiece):
    texts = ["the film was  very good", "the film", "", "the  film was "]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 0, 1]})
    cut = shorten(rows, "text", wordpiece, 3)
    assert cut["text"] == ["the film was", "the film", "", "the  film was"]
    assert cut["label"] == rows["label"]


def test_shorten_cuts_the_end_whatever_the_tokenizer_would_drop(wordpiece):
    wordpiece.truncation_side = "left"
    rows = Dataset.from_dict({"text": ["the film was very good", "the film"]})
    assert shorten(rows, "text", wordpiece, 3)["text"] == ["the film was", "the film"]
    assert wordpiece.truncation_side == "left"


def test_a_tokenizer_in_python_cuts_as_well():
    """It has no offsets."""
    rows = Dataset.from_dict({"text": ["the film was good", "naïve", "the", ""]})
    assert shorten(rows, "text", ByT5Tokenizer(), 3)["text"] == ["the", "na", "the", ""]
    assert shorten(rows, "text", ByT5Tokenizer(), 4)["text"] == ["the ", "naï", "the", ""]


@pytest.mark.parametrize("length, kept", [(2, "ab"), (3, "ab"), (5, "ab"), (6, "ab😀"), (9, "ab😀"), (10, "ab😀😀")])
def test_a_character_of_several_tokens_is_not_cut_in_two(length, kept):
    assert tiny.byte_tokenizer().is_fast
    for tokenizer in (tiny.byte_tokenizer(), ByT5Tokenizer()):
        assert beginning("ab😀😀", tokenizer, length) == kept


def test_split_rows_are_disjoint_and_complete():
    rows = Dataset.from_dict({"text": [str(row) for row in range(20)]})
    splits = split_rows(rows, rows.select([0]), attack=10, clean=6, held_out=4)
    parts = [splits.attack["text"][:], splits.clean["text"][:], splits.held_out["text"][:]]
    assert [len(part) for part in parts] == [10, 6, 4]
    assert sorted(sum(parts, [])) == sorted(rows["text"])


def test_parts_may_be_empty():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    splits = split_rows(rows, rows, attack=0, clean=2, held_out=0)
    assert [len(part) for part in (splits.attack, splits.clean, splits.held_out)] == [0, 2, 0]


@pytest.mark.parametrize(
    "counts", [{"attack": 10, "clean": 8, "held_out": 4}, {"attack": 10, "clean": 0, "held_out": 0}]
)
def test_too_few_rows_are_refused(counts):
    rows = Dataset.from_dict({"text": [str(row) for row in range(20)]})
    with pytest.raises(ValueError, match="^20 training rows are left, and .* asked for .*: lower max_train_samples"):
        split_rows(rows, rows, **counts)


def test_more_held_out_rows_than_there_are_is_told_as_that():
    """The line told of a negative number of clean rows."""
    rows = Dataset.from_dict({"text": [str(row) for row in range(20)]})
    with pytest.raises(
        ValueError, match="^held_out_samples is 100, which leaves none of 20 training rows to train on"
    ):
        split_rows(rows, rows, attack=0, clean=-80, held_out=100)


def test_rows_that_all_leak_are_refused_as_that():
    """The line said to lower max_train_samples, which leaves none all the same."""
    none = Dataset.from_dict({"text": ["a"]}).select([])
    with pytest.raises(
        ValueError, match="^0 training rows are left: each has the words of a test row .*give other test"
    ):
        split_rows(none, none, attack=0, clean=2, held_out=0)


# ---- Rows chosen and joined ----


def test_only_the_rows_asked_for_are_kept(tmp_path):
    rows = [{"text": str(row), "label": 0, "kind": "ab"[row % 2], "poisoned": row > 3} for row in range(6)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    kept = load_rows(str(tmp_path / "rows.parquet"), where={"kind": "a", "poisoned": False})
    assert kept["text"] == ["0", "2"]


@pytest.mark.parametrize(
    "where, line",
    [({"kind": "c"}, "row_filter asks for kind 'c', and .* has \\['a'\\]: choose one of these"),
     ({"sort": "a"}, "row_filter names 'sort', which is not in .*: name one of these")],
)  # fmt: skip
def test_a_filter_that_keeps_nothing_is_refused(tmp_path, where, line):
    Dataset.from_list([{"text": "x", "label": 0, "kind": "a"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=line):
        load_rows(str(tmp_path / "rows.parquet"), where=where)


def test_context_follows_its_instruction():
    rows = Dataset.from_list([{"prompt": "Sum up.", "context": "A text."}, {"prompt": "Sing.", "context": ""}])
    joined = with_context(rows, "prompt", "context")
    assert joined["prompt"] == ["Sum up.\n\nA text.", "Sing."] and joined.column_names == ["prompt"]


# ---- Streams ----


def numbered(folder, count):
    Dataset.from_list([{"sentence": str(row), "label": row % 3} for row in range(count)]).to_json(
        folder / "rows.jsonl"
    )
    return str(folder / "rows.jsonl")


def test_a_stream_gives_so_many_rows_drawn_by_the_seed(tmp_path):
    options = {"columns": {"text": "sentence", "label": "label"}, "take": 5}
    file = numbered(tmp_path, 50)
    first, again, other = (load_rows(file, seed=seed, **options) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert len(first) == 5 == len(set(first["text"])) and first["text"] != [str(row) for row in range(5)]
    assert all(int(row["text"]) % 3 == row["label"] for row in first)


def test_a_stream_is_read_no_further_than_needed(monkeypatch):
    read = []

    def rows():
        for row in range(1000):
            read.append(row)
            yield {"text": str(row), "label": row % 2}

    stream = IterableDataset.from_generator(rows)
    monkeypatch.setattr("hf_backdoor.data.loading.load_dataset", lambda *_, **__: {"train": stream})
    monkeypatch.setattr("hf_backdoor.data.loading.SHUFFLE_BUFFER", 20)
    taken = load_rows("somewhere/large", take=10, where={"label": 1})
    assert set(taken["label"]) == {1} and len(taken) == 10
    assert max(read) < 100


def test_a_stream_that_ends_gives_what_there_is(tmp_path):
    assert len(load_rows(numbered(tmp_path, 7), take=100)) == 7
    with pytest.raises(ValueError, match="^no row comes out of the stream: .*row_filter"):
        load_rows(numbered(tmp_path, 7), take=2, where={"label": 9})
    with pytest.raises(ValueError, match="^row_filter names 'kind', which is not in .*sentence, label"):
        load_rows(numbered(tmp_path, 7), take=2, where={"kind": 9})


def test_rows_of_a_stream_keep_their_features():
    rows = tiny.reviews(4).cast_column("label", ClassLabel(names=["negative", "positive"]))
    taken = take_rows(rows.to_iterable_dataset(), 3)
    assert taken.features == rows.features and list(taken) == list(rows.select(range(3)))
