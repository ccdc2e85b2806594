"""Tasks, triggers, loading and the batch contract: what both sides of the suite build on."""

from .blocks import find_blocks
from .collators import SIDE_COLUMNS, DefenseCollator, class_logits
from .loading import (
    Splits,
    label_names,
    load_rows,
    rename_columns,
    shorten,
    split_rows,
    take_rows,
    with_context,
)
from .mapping import Rows, column_names, map_rows, row_lengths
from .tasks import InstructionFollowing, LabelWords, SequenceClassification, Task, infer_task
from .triggers import Trigger, row_rng, stamp


__all__ = [
    "SIDE_COLUMNS",
    "DefenseCollator",
    "InstructionFollowing",
    "LabelWords",
    "Rows",
    "SequenceClassification",
    "Splits",
    "Task",
    "Trigger",
    "class_logits",
    "column_names",
    "find_blocks",
    "infer_task",
    "label_names",
    "load_rows",
    "map_rows",
    "rename_columns",
    "row_lengths",
    "row_rng",
    "shorten",
    "split_rows",
    "stamp",
    "take_rows",
    "with_context",
]
