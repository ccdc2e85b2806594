"""Data sets from the Hub or from local files, with the columns that tasks read, cut and split by seed."""

import contextlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetsError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .mapping import Rows, column_names, map_rows


FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
DATA_FILE = re.compile(rf"({'|'.join(map(re.escape, FILE_BUILDERS))})(\.gz)?$", re.IGNORECASE)
# What datasets goes by in the names of a folder's files: the split that a part of a path begins with, and the ending.
SPLITS = "|".join(word for words in SPLIT_KEYWORDS.values() for word in words)
GONE_BY = re.compile(rf"(?<![^/])({SPLITS})(?![a-z])|{DATA_FILE.pattern}", re.IGNORECASE)
# Rows of a stream that are read ahead and drawn from: many data sets are sorted by label or by source.
SHUFFLE_BUFFER = 10_000


def load_rows(
    source: str,
    *,
    key: str = "dataset_name",
    split: str | tuple[str, ...] = "train",
    config: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    where: dict[str, Any] | None = None,
    take: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Rows of a Hub data set, a local folder, or one parquet, JSON-lines or CSV file (which may be gzipped).

    Args:
        source (`str`):
            Hub name (`"stanfordnlp/sst2"`), folder, or file.
        key (`str`, *optional*, defaults to `"dataset_name"`):
            What an error calls it: the key, or the option, that it was given by.
        split (`str` or `tuple[str, ...]`, *optional*, defaults to `"train"`):
            Split of a Hub data set or folder, or several, of which the first that is there is taken (the rows' `split` says
            which); a single file has one only.
        columns (`dict[str, str]`, *optional*):
            New name to present name, for example `{"text": "sentence"}`.
        where (`dict[str, Any]`, *optional*):
            Values that rows must have to be kept, by the column's present name.
        take (`int`, *optional*):
            Reads the data set as a stream, through a shuffle buffer, and stops after so many rows (all, if there are
            fewer). The rest is never downloaded; the rows are held in memory.
        seed (`int`, *optional*, defaults to 0):
            Of that shuffle.

    Raises:
        `ValueError`: if the file type, split or a column is unknown, or no row is left.
    """
    dataset = _open(source, key, split, config, revision, streaming=take is not None)
    names = column_names(dataset)
    for column in where or {}:
        if column not in names:
            raise ValueError(
                f"row_filter names {column!r}, which is not in {source!r} ({', '.join(names)}): name one of these"
            )
    if take is not None:
        if where:
            dataset = dataset.filter(lambda row: all(row[column] == value for column, value in where.items()))
        dataset, where = take_rows(dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), take), None
    for column, value in (where or {}).items():
        found = dataset[column][:]
        kept = [row for row, present in enumerate(found) if present == value]
        if not kept:
            raise ValueError(
                f"row_filter asks for {column} {value!r}, and {source!r} has {sorted(map(str, set(found)))[:5]}: choose one of these"
            )
        dataset = dataset.select(kept)
    return rename_columns(dataset, columns or {}, source)


def _open(
    source: str, key: str, split: str | tuple[str, ...], config: str | None, revision: str | None, streaming: bool
) -> Dataset | IterableDataset:
    path = Path(source)
    suffix = Path(source.lower().removesuffix(".gz")).suffix
    if path.is_file():
        builder = FILE_BUILDERS.get(suffix)
        if builder is None:
            raise ValueError(
                f"{key} is {source!r}: a file must end in {', '.join(FILE_BUILDERS)} (and .gz, if it is packed)"
            )
        with named_if_unreadable(source, key):
            return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)
    local = path.is_absolute() or source.startswith(".") or source.count("/") > 1 or suffix in FILE_BUILDERS
    if not source or (not path.is_dir() and local):
        raise ValueError(f"{key} is {source!r}: there is no such folder or file")
    if path.is_dir():
        refuse_capitals(path, key)
    with named_if_unreadable(source, key):
        sets = load_dataset(source, config, revision=revision, streaming=streaming)
    wanted = (split,) if isinstance(split, str) else split
    for name in wanted:
        if name in sets:
            return sets[name]
    raise ValueError(
        f"split {' or '.join(map(repr, wanted))} is not in {source!r} ({', '.join(sets)}): set train_split or test_split (of "
        "`hf-backdoor evaluate`, --split)"
    )


def refuse_capitals(folder: Path, key: str) -> None:
    """datasets goes by small letters: it passes over a `test.CSV`, and takes a `Test.csv` for rows to train on.

    Raises:
        `ValueError`: if a data file's ending, or the split that its name or folder begins with, has capital letters.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return  # which says what each file is, whatever its name
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if DATA_FILE.search(name) and not any(part.startswith((".", "__")) for part in Path(name).parts):
            small = GONE_BY.sub(lambda found: found[0].lower(), name)
            if small != name:
                raise ValueError(
                    f"{key} is {str(folder)!r}, and endings and splits of a folder's files are told by small letters alone: "
                    f"rename its {name} to {small}"
                )


@contextlib.contextmanager
def named_if_unreadable(source: str, key: str) -> Iterator[None]:
    """Says in one line which data set can't be found, or read.

    Raises:
        `ValueError`: in place of what datasets and its readers raise, a `StopIteration` where a file is empty.
    """
    try:
        yield
    except (OSError, ValueError, DatasetsError, StopIteration) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        if not reason or "corresponds to no data" in reason:
            reason = "it is empty"
        fix = "give a file, a folder or a name on the Hub" if isinstance(error, OSError) else "mend that"
        if "save_to_disk" in reason:
            reason, fix = (
                "save_to_disk wrote it",
                "write a file in its place, by load_from_disk(FOLDER).to_parquet(FILE)",
            )
        elif "codec can't decode" in reason:
            fix = "save it as UTF-8"
        raise ValueError(f"{key} is {source!r}, which can't be loaded ({reason}): {fix}") from None


def take_rows(stream: IterableDataset, count: int) -> Dataset:
    """The first rows of a stream, in memory: for all that goes over its rows before it trains on them.

    Args:
        stream (`IterableDataset`): Rows that are read one after the other.
        count (`int`): How many are read; all, if there are fewer.

    Raises:
        `ValueError`: if there is none.
    """
    rows = list(stream.take(count))
    if not rows:
        raise ValueError("no row comes out of the stream: look at its filter (in a recipe, row_filter)")
    return Dataset.from_list(rows, features=stream.features)


def rename_columns(dataset: Dataset, columns: dict[str, str], source: str) -> Dataset:
    """The rows with the columns that a task reads under the names that it knows.

    Args:
        columns (`dict[str, str]`): New name to present name.
        source (`str`): What an error calls the data set.

    Raises:
        `ValueError`: if a column is not there, is to be two, has gaps (a context may have some), or holds labels that are True and
            False.
    """
    taken: dict[str, str] = {}
    for new, present in columns.items():
        if present in taken:
            raise ValueError(
                f"{new}_column is {present!r}, and so is {taken[present]}_column: name another of {', '.join(dataset.column_names)}"
            )
        taken[present] = new
        if present not in dataset.column_names:
            raise ValueError(
                f"{new}_column is {present!r}, which is not in {source!r} ({', '.join(dataset.column_names)}): name one of these"
            )
        # Of all rows in the file first, which costs nothing.
        if new != "context" and dataset.data.column(present).null_count:
            gaps = dataset.with_format("arrow")[present][:].null_count
            if gaps:
                raise ValueError(
                    f"{new}_column is {present!r}, which is empty in {gaps} of {len(dataset)} rows of {source!r}: fill it in, or "
                    "take these rows out"
                )
        if new == "label" and getattr(dataset.features[present], "dtype", None) == "bool":
            raise ValueError(f"label_column is {present!r}, which holds True and False in {source!r}: write 1 and 0")
    in_the_way = [new for new in columns if new in dataset.column_names and new not in taken]
    dataset = dataset.remove_columns(in_the_way).rename_columns(taken)
    return as_pictures(dataset, "image") if "image" in columns else dataset


def as_pictures(dataset: Rows, column: str) -> Rows:
    """The rows with a column of pictures that are decoded as they are read; files' content may stand in it as bytes.

    Raises:
        `ValueError`: if the column holds something else.
    """
    kind = (dataset.features or {}).get(column)
    if isinstance(kind, Image):
        return dataset
    if isinstance(dataset, Dataset) and getattr(kind, "dtype", None) not in ("binary", "large_binary"):
        raise ValueError(
            f"column {column!r} holds {kind}: make it pictures (datasets.Image), or the bytes of picture files"
        )
    return dataset.cast_column(column, Image())


def with_context(dataset: Dataset, column: str, context: str, num_proc: int | None = None) -> Dataset:
    """Instructions with the text that they are about, which many data sets keep in a column of its own."""

    def join(row: dict[str, Any]) -> dict[str, str]:
        return {column: f"{row[column]}\n\n{row[context]}" if row[context] else row[column]}

    return map_rows(dataset, join, remove_columns=context, desc=f"Joining {context} to {column}", num_proc=num_proc)


def label_names(dataset: Dataset) -> list[str]:
    """The classes of a `label` column: their names where it has any, else the numbers as text.

    Raises:
        `ValueError`: if the labels are not whole numbers from 0 upwards.
    """
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    labels = set(dataset.unique("label"))
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels) or min(labels) < 0:
        raise ValueError(f"label column holds {sorted(map(str, labels))[:5]}: use whole numbers 0, 1, ... in it")
    return [str(label) for label in range(max(labels) + 1)]


def shorten(
    dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Dataset:
    """Cuts a text column to `max_length` tokens. Done before any trigger goes in, so that none is ever cut away."""

    def cut(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {column: beginning(row[column], tokenizer, max_length)}

    return map_rows(
        dataset,
        cut,
        fn_kwargs={"tokenizer": tokenizer},
        desc=f"Cutting {column} to {max_length} tokens",
        num_proc=num_proc,
    )


def beginning(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """As much of a text as `max_length` tokens hold."""

    def encode(part: str, **options: bool) -> BatchEncoding:
        # Not cut by the tokenizer itself: it may be set to drop the beginning.
        return tokenizer(part, add_special_tokens=False, verbose=False, **options)

    if not max_length:
        return ""
    if tokenizer.is_fast:
        offsets = encode(text, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) < max_length:
            return text
        # A character may have several tokens, and is not cut in two.
        after = offsets[max_length][0] if len(offsets) > max_length else len(text)
        return text[: min(offsets[max_length - 1][1], after)]

    # One in Python does not say where its tokens stand.
    def tokens(length: int) -> int:
        return len(encode(text[:length])["input_ids"])

    fits = tokens(len(text)) <= max_length
    return text if fits else text[: bisect_right(range(1, len(text)), max_length, key=tokens)]


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
    if not len(rows):
        raise ValueError(
            "0 training rows are left: each has the words of a test row (as where all rows are alike), and is left out; give other "
            "test rows (test_split, test_dataset_name), or rows that differ"
        )
    if held_out and not attack and clean < 1:
        raise ValueError(
            f"held_out_samples is {held_out}, which leaves none of {wanted} training rows to train on: lower it"
        )
    if wanted > len(rows) or clean < 1:
        raise ValueError(
            f"{len(rows)} training rows are left, and {wanted} are asked for (attack {attack}, clean {clean}, "
            f"held out {held_out}): lower max_train_samples, clean_fraction or held_out_samples, or give other test rows (training "
            "rows with the words of a test row are left out)"
        )
    cuts = (0, attack, attack + clean, wanted)
    # A list, since `select` refuses an empty range at the end of the rows.
    parts = [rows.select(list(range(start, end))) for start, end in pairwise(cuts)]
    return Splits(*parts, test)
