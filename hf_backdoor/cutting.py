"""Rows cut to what a recipe allows, and a line in the log that says how many of those in use lose words by it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import PartialState
from datasets import Dataset
from pyarrow import compute
from transformers.utils import logging

from .data import Processor, Task
from .evaluation import not_leaking


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CutRows:
    """Rows as they are read, beside what they were: how many are cut is said once it is known which of them are used.

    Args:
        task (`Task`): How the rows are read.
        limits (`dict[str, int | None]`): What they are cut to.
        whole, rows (`Dataset`): As they were, and as they are read.
    """

    task: Task
    limits: dict[str, int | None]
    whole: Dataset
    rows: Dataset

    @classmethod
    def of(
        cls, rows: Dataset, task: Task, processor: Processor, num_proc: int | None = None, **limits: int | None
    ) -> "CutRows":
        """What [`~hf_backdoor.data.Task.bounded`] gives, beside the rows that it is given."""
        return cls(task, limits, rows, task.bounded(rows, processor, num_proc, **limits))

    def both(self, change: Callable[[Dataset], Dataset]) -> "CutRows":
        """Some of the rows, or all in another order."""
        return replace(self, whole=change(self.whole), rows=change(self.rows))

    def without_leaks(self, test: Dataset) -> "CutRows":
        kept = not_leaking(self.rows, test, self.task.input_column)
        return self.both(lambda rows: rows.select(kept))

    def told(self, name: str) -> Dataset:
        """The rows as they are read, and in the log (of the first process) how many lose words."""
        for key, column in (("max_length", self.task.input_column), ("max_response_length", self.task.answer_column)):
            if self.limits.get(key) is None or not PartialState().is_main_process:
                continue
            before, after = (part.with_format("arrow")[column][:] for part in (self.whole, self.rows))
            # Blocks of Arrow: texts of a large set are never all made Python's.
            if count := compute.sum(compute.not_equal(before, after)).as_py():
                logger.warning(f"{key} {self.limits[key]} cuts {count} of {len(self.rows)} {name}")
        return self.rows
