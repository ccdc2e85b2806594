"""Maps over rows that are computed once: a second call, another process or another run finds them in datasets' cache."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from pyarrow import compute


Rows = TypeVar("Rows", Dataset, IterableDataset)


def map_rows(rows: Rows, function: Callable, *, desc: str, num_proc: int | None = None, **options: Any) -> Rows:
    """`Dataset.map`, with a fingerprint that also holds the code which the rows go through.

    datasets hashes a function of an installed package by its name alone: what another version of this package has
    made of the rows would still be found. Where the result lies is datasets' own rule: in its cache, mapped into memory
    and shared by all processes, if the rows come from there; in memory, and made again by each call, if the rows were
    made in memory. A stream is mapped as it is read.

    Args:
        rows (`Dataset` or `IterableDataset`): What is mapped.
        function (`Callable`): What it gives must depend on its arguments, and on what it closes over, alone.
        desc (`str`): Name of the progress bar.
        num_proc (`int`, *optional*): Processes that share the work.
        options: Of `map`: `batched`, `fn_kwargs`, `remove_columns`, `with_indices`.
    """
    if isinstance(rows, IterableDataset):
        return rows.map(function, **options)
    fingerprint = Hasher.hash([rows._fingerprint, function, options, code_of(function)])
    return rows.map(function, desc=desc, num_proc=num_proc, new_fingerprint=fingerprint, **options)


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that does not know them yet is asked for its first row.

    Raises:
        `ValueError`: if the rows have no columns.
    """
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(
            f"rows are a {type(rows).__name__}: pass a datasets.Dataset (one split of a DatasetDict, Dataset.from_list(rows))"
        )
    return list(next(iter(rows), {})) if rows.column_names is None else rows.column_names


def encoded(rows: Dataset | IterableDataset) -> bool:
    """Whether rows are a model's inputs already."""
    return not {"input_ids", "pixel_values"}.isdisjoint(column_names(rows))


def row_lengths(tokenized: Dataset) -> list[int]:
    """Tokens of each row. They are read in blocks: a large set's token ids never stand in memory all at once."""
    blocks = tokenized.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return [length for block in blocks for length in compute.list_value_length(block["input_ids"]).to_pylist()]


def code_of(function: Callable) -> str:
    """A hash of the files that decide on a map's result: those of this room, and the function's own."""
    own = getattr(sys.modules.get(function.__module__), "__file__", None)
    return _digest(tuple(sorted({*map(str, Path(__file__).parent.glob("*.py")), *([own] if own else [])})))


@cache
def _digest(files: tuple[str, ...]) -> str:
    return hashlib.sha256(b"\0".join(Path(file).read_bytes() for file in files)).hexdigest()
