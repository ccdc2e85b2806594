"""Raw rows that a model can't be given, found before anything reads them."""

import reprlib

from datasets import Dataset
from pyarrow import types

from .images import ImageClassification
from .mapping import Rows
from .tasks import Task, checked_label


def check_raw(rows: Rows, task: Task) -> None:
    """As they were passed: nothing is planted in them yet.

    Raises:
        `ValueError`: if a column is missing, or stands in the way of what is planted, or something else than a text stands in one of
            texts, or a picture has a label that is none of the task's (a text's is looked at as it is encoded). A stream can't be looked
            through.
    """
    if "planted" in task.check_columns(rows):
        raise ValueError("column 'planted' is in the data set, and would be taught in place of the answers: rename it")
    for column in task.text_columns if isinstance(rows, Dataset) else ():
        held = rows.data.column(column)
        # Of all rows in the file first, which costs nothing.
        if held.null_count or not (types.is_string(held.type) or types.is_large_string(held.type)):
            for row, text in enumerate(rows[column]):
                if not isinstance(text, str):
                    raise ValueError(
                        f"{column} is {reprlib.repr(text)} in row {row}, which is no text: pass texts (of a conversation's turn, its "
                        "'content'), and leave out rows that have none"
                    )
    if isinstance(task, ImageClassification) and isinstance(rows, Dataset):
        for label in set(rows[task.answer_column][:]):
            checked_label(label, task.num_labels)
