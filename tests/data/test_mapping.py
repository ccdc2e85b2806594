import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from datasets import Dataset

from hf_backdoor.attacks import Poisoning, poison
from hf_backdoor.data import Trigger, column_names, load_rows, map_rows, row_lengths, shorten, stamp
from hf_backdoor.data.mapping import _digest
from hf_backdoor.defenses.locphylax.planting import plant
from hf_backdoor.defenses.mbtsad import TokenSplit


def on_disk(folder, task, count=12):
    """Rows as a run gets them: out of a file, through datasets' cache."""
    if not (folder / "rows.parquet").exists():
        tiny.setting(task, count)[2].to_parquet(folder / "rows.parquet")
    return load_rows(str(folder / "rows.parquet"))


def every_map(rows, name, num_proc=None):
    """What rows go through, each map by its name."""
    family, task, _ = tiny.setting(name, 2)
    tokenizer, column, trigger = tiny.tokenizer(family), task.input_column, Trigger("zq")
    target = 1 if "label" in rows.column_names else "banana"
    tokenized = task.encode_rows(shorten(rows, column, tokenizer, 5, num_proc), tokenizer, num_proc)
    # What collators and other calls leave behind in a tokenizer must not show in a later hash.
    tokenizer(["a film", "a"], truncation=True, max_length=3, padding=True)
    return {
        "shorten": shorten(rows, column, tokenizer, 5, num_proc),
        "tokenize": tokenized,
        "stamp": stamp(rows, column, trigger, 3, num_proc),
        "split": TokenSplit(min_chars=3).apply(rows, column, 3, num_proc),
        "poison": poison(rows, task, Poisoning(trigger, target, 0.25), 3, num_proc),
        "plant": plant(rows, task, [trigger, Trigger("aha")], "aha", 3, num_proc),
    }


def written(made):
    files = {name: [Path(file["filename"]) for file in rows.cache_files] for name, rows in made.items()}
    return {name: [(file, file.stat().st_mtime_ns) for file in own] for name, own in files.items()}


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_second_call_of_every_map_is_found_in_the_cache(name, tmp_path):
    first = every_map(on_disk(tmp_path, name), name)
    files = written(first)
    assert all(files.values())
    assert written(every_map(on_disk(tmp_path, name), name)) == files


IN_ANOTHER_PROCESS = """
import sys
from transformers import AutoTokenizer
from hf_backdoor.data import LabelWords, Trigger, load_rows, shorten, stamp

def made(file, folder):
    rows, tokenizer = load_rows(file), AutoTokenizer.from_pretrained(folder)
    task = LabelWords(("negative", "positive"), "{text} :")
    stamped = stamp(shorten(rows, "text", tokenizer, 5), "text", Trigger("zq"), 3)
    return task.encode_rows(stamped, tokenizer)._fingerprint

if __name__ == "__main__":
    print(made(*sys.argv[1:]))
"""


def test_another_process_makes_the_same_fingerprints(tmp_path):
    # Order in sets and dictionaries of text depends on the process.
    on_disk(tmp_path, "label_words")
    tiny.causal_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = [str(tmp_path / "rows.parquet"), str(tmp_path / "tokenizer")]
    here: dict = {"__name__": "here"}
    exec(IN_ANOTHER_PROCESS, here)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments]
    there = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here["made"](*arguments)


def test_several_processes_make_the_same_rows(tmp_path):
    rows = on_disk(tmp_path, "instruction_following").shuffle(seed=1)
    shared = every_map(rows, "instruction_following", num_proc=2)
    in_memory = Dataset.from_list(list(rows))
    for name, alone in every_map(in_memory, "instruction_following").items():
        assert list(shared[name]) == list(alone), name
        assert not alone.cache_files


@pytest.mark.parametrize("change", ["seed", "trigger", "max_length", "tokenizer", "template"])
def test_what_a_map_depends_on_is_in_its_fingerprint(change, tmp_path):
    rows, chat, task = on_disk(tmp_path, "label_words"), tiny.causal_tokenizer(), tiny.task("label_words")

    def make(changed):
        if change == "seed":
            return stamp(rows, "text", Trigger("zq"), 1 + changed)
        if change == "trigger":
            return stamp(rows, "text", Trigger("zq", "end" if changed else "start"), 1)
        if change == "max_length":
            return shorten(rows, "text", chat, 2 + changed)
        if change == "tokenizer":
            return task.encode_rows(rows, tiny.encoder_tokenizer() if changed else chat)
        return type(task)(task.words, "{text} :" if changed else "{text} label :").encode_rows(rows, chat)

    assert make(False)._fingerprint == make(False)._fingerprint != make(True)._fingerprint


def test_other_code_is_not_found_under_the_old_fingerprint(tmp_path, monkeypatch):
    rows = on_disk(tmp_path, "label_words")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for text in ("old", "newer"):
        (tmp_path / "some_package.py").write_text(f"def change(row):\n    return {{'text': {text!r}}}\n")
        importlib.invalidate_caches()
        module = importlib.reload(importlib.import_module("some_package"))
        _digest.cache_clear()  # a process reads its own code once
        found.append(set(map_rows(rows, module.change, desc="Changing")["text"]))
    assert found == [{"old"}, {"newer"}]


def test_lengths_are_those_of_the_rows_in_their_order():
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 0, 5, 2)], "other": [0] * 4}).shuffle(seed=2)
    assert row_lengths(rows) == [len(ids) for ids in rows["input_ids"]]
    assert row_lengths(rows.select([])) == []


def test_columns_of_a_stream_that_does_not_know_them():
    stream = tiny.reviews(2).to_iterable_dataset().map(lambda row: {**row, "more": 1})
    assert stream.column_names is None
    assert column_names(stream) == ["text", "label", "more"]
    assert column_names(stream.filter(lambda row: False)) == []
