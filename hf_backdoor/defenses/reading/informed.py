"""[`InformedTrainer`]: training that uses what was read off the suspect."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from ...data import Trigger, base_model, stamp_in_turn
from ..losses import soft_answer_loss
from ..trainer import DefenseTrainer
from .answers import SOFT_COLUMNS, OwnAnswers, WithSoftAnswers, with_soft_answers
from .config import ReadingConfig
from .searcher import refuse_other_than_texts
from .soft import SoftTriggers


class InformedTrainer(DefenseTrainer):
    """
    A trainer that may plant soft triggers found in the suspect, and teach the suspect's own answers. Base of the methods' trainers
    that do so; which rows get what is the method's.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`].
        found_soft_triggers (`SoftTriggers`, `str` or `Path`, *optional*):
            What a [`SoftTriggerTrainer`] found, or its folder. Wanted where `args.soft_triggers` is set.
        found_answers (`OwnAnswers`, `str` or `Path`, *optional*):
            The same of an [`OwnAnswersTrainer`], wanted where `args.own_answers` is set.
    """

    args: ReadingConfig

    def __init__(
        self,
        *args: Any,
        found_soft_triggers: SoftTriggers | str | Path | None = None,
        found_answers: OwnAnswers | str | Path | None = None,
        **kwargs: Any,
    ):
        if isinstance(found_soft_triggers, str | Path):
            found_soft_triggers = SoftTriggers.from_pretrained(found_soft_triggers)
        if isinstance(found_answers, str | Path):
            found_answers = OwnAnswers.from_pretrained(found_answers)
        self.soft_triggers = found_soft_triggers
        self.answers = found_answers
        super().__init__(*args, **kwargs)
        if found_answers is not None:
            self.data_collator = WithSoftAnswers(self.data_collator)

    def check_found(self, *wishes: Literal["soft_triggers", "own_answers"]) -> None:
        """Refuses findings that nobody asked for, and a wish for some without them.

        Raises:
            `ValueError`: in one line that says what to pass or to set.
        """
        sources = {
            "soft_triggers": (self.soft_triggers, "found_soft_triggers", "a SoftTriggerTrainer"),
            "own_answers": (self.answers, "found_answers", "an OwnAnswersTrainer"),
        }
        for name in wishes:
            wish, (found, argument, maker) = getattr(self.args, name), sources[name]
            if (found is None) == bool(wish):
                raise ValueError(
                    f"{name} is {wish}, and {argument} are {'not ' if found is None else ''}given: pass those of {maker}, or set "
                    f"{name}: 0"
                )

    # ---- Rows ----

    def with_soft_copies(self, rows: Dataset, clean: Dataset) -> Dataset:
        """Rows and, where there are soft triggers, behind them the clean ones, each with one of these, which take turns. All are
        raw; [`with_soft_words`] gives the tokenizer that reads them.

        Raises:
            `ValueError`: if the rows are no texts, or have none any more.
        """
        if self.soft_triggers is None:
            return rows
        if "input_ids" in getattr(clean, "column_names", ()):
            raise ValueError("train_dataset has input_ids: pass raw rows, soft triggers are put into their text")
        refuse_other_than_texts(self.task, "soft_triggers")
        column, seed, processes = self.task.input_column, self.args.seed, self.args.dataset_num_proc
        triggers = [Trigger(text, "any") for text in self.soft_triggers.texts]
        with self.one_process_first():
            return concatenate_datasets([rows, stamp_in_turn(clean, column, triggers, seed, processes)])

    def with_soft_words(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer, with words for the soft triggers where there are any."""
        return tokenizer if self.soft_triggers is None else self.soft_triggers.tokenizer(tokenizer)

    def with_own_answers(self, rows: Dataset, sources: Sequence[int]) -> Dataset:
        """Encoded rows that answer as [`with_soft_answers`] has it, where own answers are wanted.

        Raises:
            `ValueError`: if they are no encoded rows of ours, or not those that were answered.
        """
        if self.answers is None:
            return rows
        if not isinstance(rows, Dataset) or {"labels", "prompt_length"}.isdisjoint(rows.column_names):
            raise ValueError(
                "own_answers is set, and the rows have no answers that we know: pass a datasets.Dataset with columns of a task, or "
                "set own_answers: 0"
            )
        return with_soft_answers(rows, self.answers, self.args.own_answers, sources)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += SOFT_COLUMNS

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with self.soft_triggers_read():
            return super().train(*args, **kwargs)

    @cached_property
    def reading_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.with_soft_words(self.processing_class)

    def soft_triggers_read(self, model: PreTrainedModel | None = None) -> AbstractContextManager[None]:
        """Where a model, the trained one by default, reads soft triggers, if there are any."""
        if self.soft_triggers is None:
            return nullcontext()
        return self.soft_triggers.read_by(base_model(self.model) if model is None else model, self.reading_tokenizer)

    def answer_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if SOFT_COLUMNS[0] not in inputs:
            return super().answer_loss(logits, inputs)
        at_answers = logits[:, None] if logits.dim() == 2 else logits[:, :-1]
        return soft_answer_loss(at_answers, *(inputs[name] for name in SOFT_COLUMNS))
