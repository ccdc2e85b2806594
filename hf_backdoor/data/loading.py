"""Data sets from the Hub or from local files, with the columns that tasks read, cut and split by seed."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase


FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    where: dict[str, Any] | None = None,
) -> Dataset:
    """Rows of a Hub data set, a local folder, or one parquet, JSON-lines or CSV file.

    Args:
        source (`str`):
            Hub name (`"stanfordnlp/sst2"`), folder, or file.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set or folder; a single file has one only.
        columns (`dict[str, str]`, *optional*):
            New name to present name, for example `{"text": "sentence"}`.
        where (`dict[str, Any]`, *optional*):
            Values that rows must have to be kept, by the column's present name.

    Raises:
        `ValueError`: if the file type, split or a column is unknown, or no row is left.
    """
    path = Path(source)
    if path.is_file():
        builder = FILE_BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(f"dataset_name is {source!r}: a file must end in {', '.join(FILE_BUILDERS)}")
        dataset = load_dataset(builder, data_files=str(path), split="train")
    else:
        if not path.is_dir() and (path.is_absolute() or source.startswith(".")):
            raise ValueError(f"dataset_name is {source!r}: there is no such folder or file")
        sets: DatasetDict = load_dataset(source, config, revision=revision)
        if split not in sets:
            raise ValueError(
                f"split {split!r} is not in {source!r} ({', '.join(sets)}): set train_split or test_split"
            )
        dataset = sets[split]
    for column, value in (where or {}).items():
        if column not in dataset.column_names:
            raise ValueError(
                f"row_filter names {column!r}, which is not in {source!r} ({', '.join(dataset.column_names)}): name one of these"
            )
        found = dataset[column][:]
        kept = [row for row, present in enumerate(found) if present == value]
        if not kept:
            raise ValueError(
                f"row_filter asks for {column} {value!r}, and {source!r} has {sorted(map(str, set(found)))[:5]}: choose one of these"
            )
        dataset = dataset.select(kept)
    for new, present in (columns or {}).items():
        if present not in dataset.column_names:
            raise ValueError(
                f"{new}_column is {present!r}, which is not in {source!r} ({', '.join(dataset.column_names)}): name one of these"
            )
        if new != present:
            if new in dataset.column_names:
                dataset = dataset.remove_columns(new)
            dataset = dataset.rename_column(present, new)
    return dataset


def with_context(dataset: Dataset, column: str, context: str) -> Dataset:
    """Instructions with the text that they are about, which many data sets keep in a column of its own."""

    def join(row: dict[str, Any]) -> dict[str, str]:
        return {column: f"{row[column]}\n\n{row[context]}" if row[context] else row[column]}

    return dataset.map(join, remove_columns=context, desc=f"Joining {context} to {column}", keep_in_memory=True)


def label_names(dataset: Dataset) -> list[str]:
    """The classes of a `label` column: their names where it has any, else the numbers as text.

    Raises:
        `ValueError`: if the labels are not whole numbers from 0 upwards.
    """
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    labels = set(dataset.unique("label"))
    if not all(isinstance(label, int) for label in labels) or min(labels) < 0:
        raise ValueError(f"label column holds {sorted(map(str, labels))[:5]}: use whole numbers 0, 1, ... in it")
    return [str(label) for label in range(max(labels) + 1)]


def shorten(dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Cuts a text column to `max_length` tokens. Done before any trigger goes in, so that none is ever cut away."""

    def cut(row: dict[str, Any]) -> dict[str, str]:
        encoded = tokenizer(
            row[column], add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"]
        return {column: row[column][: offsets[-1][1]] if len(offsets) == max_length else row[column]}

    return dataset.map(cut, desc=f"Cutting {column} to {max_length} tokens", keep_in_memory=True)


@dataclass(frozen=True)
class Splits:
    """Rows that the attacker trains on, the defender's clean rows, its held-out rows, and the test rows: all disjoint."""

    attack: Dataset
    clean: Dataset
    held_out: Dataset
    test: Dataset


def split_rows(rows: Dataset, test: Dataset, *, attack: int, clean: int, held_out: int) -> Splits:
    """Cuts shuffled rows into the attacker's, the defender's and the held-out ones, in this order.

    Raises:
        `ValueError`: if there are too few rows.
    """
    wanted = attack + clean + held_out
    if wanted > len(rows) or clean < 1:
        raise ValueError(
            f"{len(rows)} training rows are left, and {wanted} are asked for (attack {attack}, clean {clean}, "
            f"held out {held_out}): lower max_train_samples, clean_fraction or held_out_samples"
        )
    cuts = (0, attack, attack + clean, wanted)
    # A list, since `select` refuses an empty range at the end of the rows.
    parts = [rows.select(list(range(start, end))) for start, end in pairwise(cuts)]
    return Splits(*parts, test)
