"""Tasks, triggers, loading and the batch contract: what both sides of the suite build on."""

from .blocks import base_model, find_blocks
from .collators import SIDE_COLUMNS, DefenseCollator, ImageCollator, class_logits, collator_for, given_labels
from .heads import names_classifier, reads_both_ways, reads_mean, refuse_last_column, refuse_missing
from .image_triggers import ImageTrigger
from .images import ImageClassification, moved, pixels_digest
from .infer import auto_class, infer_task, tell_padding
from .lengths import check_lengths, learned_positions, refuse_longer
from .loading import (
    Splits,
    beginning,
    label_names,
    load_rows,
    rename_columns,
    shorten,
    split_rows,
    take_rows,
    with_context,
)
from .mapping import Rows, column_names, encoded, map_rows, row_lengths
from .raw import check_raw
from .tasks import InstructionFollowing, LabelWords, Processor, SequenceClassification, Task, refuse_other_target
from .triggers import Rewriting, Trigger, row_rng, stamp, stamp_in_turn


__all__ = [
    "SIDE_COLUMNS",
    "DefenseCollator",
    "ImageClassification",
    "ImageCollator",
    "ImageTrigger",
    "InstructionFollowing",
    "LabelWords",
    "Processor",
    "Rewriting",
    "Rows",
    "SequenceClassification",
    "Splits",
    "Task",
    "Trigger",
    "auto_class",
    "check_lengths",
    "check_raw",
    "learned_positions",
    "names_classifier",
    "reads_both_ways",
    "reads_mean",
    "refuse_last_column",
    "refuse_longer",
    "refuse_missing",
    "refuse_other_target",
    "class_logits",
    "given_labels",
    "collator_for",
    "column_names",
    "encoded",
    "base_model",
    "beginning",
    "find_blocks",
    "infer_task",
    "label_names",
    "load_rows",
    "map_rows",
    "moved",
    "pixels_digest",
    "rename_columns",
    "row_lengths",
    "row_rng",
    "shorten",
    "split_rows",
    "stamp",
    "stamp_in_turn",
    "take_rows",
    "tell_padding",
    "with_context",
]
