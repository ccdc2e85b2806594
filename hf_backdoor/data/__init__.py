"""Tasks, triggers, loading and the batch contract: what both sides of the suite build on."""

from .collators import SIDE_COLUMNS, DefenseCollator
from .loading import Splits, label_names, load_rows, shorten, split_rows, with_context
from .tasks import InstructionFollowing, LabelWords, SequenceClassification, Task, infer_task
from .triggers import Trigger, row_rng, stamp


__all__ = [
    "SIDE_COLUMNS",
    "DefenseCollator",
    "InstructionFollowing",
    "LabelWords",
    "SequenceClassification",
    "Splits",
    "Task",
    "Trigger",
    "infer_task",
    "label_names",
    "load_rows",
    "row_rng",
    "shorten",
    "split_rows",
    "stamp",
    "with_context",
]
