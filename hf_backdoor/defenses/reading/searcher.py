"""[`TriggerSearcher`]: what searches for triggers in a suspect share: what they aim at, and the words they may use."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...data import ImageClassification, InstructionFollowing, LabelWords, Task, class_logits, given_labels
from ...data.triggers import Position
from .reader import SuspectReader


# Where texts stand in the rows, in turn: a backdoor may work at the end of a text alone.
PLACES: tuple[Position, ...] = ("start", "end", "random")

# A candidate is a tuple of token ids.
Tokens = tuple[int, ...]


class TriggerSearcher(SuspectReader):
    """
    A search of a suspect for triggers that turn its answers.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`SuspectReader`].

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, if the rows are tokenized already, or are no texts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refuse_other_than_texts(self.task, self.asked_by)

    @cached_property
    def words(self) -> Tensor | None:
        """[K], first tokens of the label words; nothing where a classification head, or a free answer, has none."""
        if not isinstance(self.task, LabelWords):
            return None
        return torch.tensor(self.task.word_ids(self.processing_class), device=self.args.device)

    @property
    def num_aims(self) -> int:
        """C of [`_aims`]."""
        return getattr(self.task, "num_labels", 1)

    def _aims(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a search is to raise, [B, C], and in which rows, [B, C]: for each class its log-probability where it is
        wrong. (The loss of the right answer has next to no gradient where a model is sure.) A free answer has no classes:
        there it is the loss of the right one, [B, 1]."""
        if isinstance(self.task, InstructionFollowing):
            loss = self.task_loss(logits, batch["labels"])[:, None].float()
            return loss, torch.ones_like(loss)
        classes = class_logits(logits, batch, self.words).log_softmax(dim=1)
        wrong = torch.ones_like(classes).scatter(1, given_labels(batch["labels"], self.words)[:, None], 0.0)
        return classes, wrong

    def _words(self) -> Tensor:
        """Ids of the tokens that are a word by themselves, [W]."""
        tokenizer, special = self.processing_class, set(self.processing_class.all_special_ids)
        rows = self.model.get_input_embeddings().weight.shape[0]
        ids = [number for number in range(min(len(tokenizer), rows)) if number not in special]
        texts = [self._text((number,)) for number in ids]
        again = tokenizer([" " + text for text in texts], add_special_tokens=False)["input_ids"]
        whole = [number for number, text, back in zip(ids, texts, again, strict=True) if text and back == [number]]
        return torch.tensor(whole)

    def _text(self, tokens: Tokens) -> str:
        text = self.processing_class.decode(list(tokens)).strip()
        return text if text.isprintable() else ""


def refuse_other_than_texts(task: Task | None, argument: str) -> None:
    """
    Raises:
        `ValueError`: in one line, for rows that are no texts, into which a trigger could be put.
    """
    if task is None or isinstance(task, ImageClassification):
        raise ValueError(f"{argument} is set, and the rows are no texts: set {argument}: 0")


def refuse_free_answers(task: Task | None) -> None:
    """
    Raises:
        `ValueError`: in one line, for answers without classes, where a contrast is asked for.
    """
    if isinstance(task, InstructionFollowing):
        raise ValueError("contrast is True, and answers are free texts, which mean no class: set contrast: false")
