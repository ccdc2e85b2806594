"""[`RelabellingTrainer`]: plain training on the suspect rows once those that lie have another label. Ours, not the paper's.

Mutual learning hears clean rows alone, and there are few of them: its network knows which suspect rows are wrong better than it
knows the task (`docs/ntml.md`). So it says so, and a fresh network learns the task from all the rows. That one knows the task better, and
says so in turn: a second fresh network learns from the rows as the first one sees them.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from ...data import Processor
from ...data.mapping import encoded
from .classes import ClassTrainer


# In place of a label.
LEFT_OUT = -1
# How many times the median class's share of denied rows makes a class stand out.
OUTLYING = 2.0


class RelabellingTrainer(ClassTrainer):
    """
    Trains a network plainly on the suspect rows, some of them with another label than they came with.

    Rows that a clean teacher agrees with keep their label. It denies a label that it holds for less likely than
    `args.relabel_below`. Where one class's labels are denied much more often than others', that is the one that an attacker wants:
    its denied rows get the label that the teacher holds for the likeliest, and its rows of which the teacher is not sure are left
    out, since few poisoned rows are enough to bring a backdoor back. Of the other classes, whose doubted rows are hard ones rather
    than poisoned ones, denied rows are left out, and the rest keep their label ([`corrected_labels`]). The teacher runs once, before
    the first step. [`changes`] lists what it changed.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is the suspect rows. The model must not come from the target
            network, or it would bring the backdoor along: start from what the target network was trained from.
        teacher_model (`PreTrainedModel` or `str`):
            The network that says which rows lie: what mutual learning ended with, or what an earlier training of this kind made.

    Raises:
        `ValueError`: if answers are free texts, if there are two classes only, or if rows for a causal LM are tokenized.
    """

    # Which rows have another label or are left out, once `train()` has begun.
    changes: Dataset | None = None

    def prepare_train(self, dataset: Dataset | None, processor: Processor) -> Dataset | None:
        if dataset is not None and encoded(dataset) and "labels" not in dataset.column_names:
            raise ValueError(
                "train_dataset has input_ids: pass raw rows, an answer that has become tokens can't be changed"
            )
        self.rows = dataset
        return super().prepare_train(dataset, processor)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if self.changes is None:
            self.train_dataset = self._relabelled(self.train_dataset)
        return super().train(resume_from_checkpoint, **kwargs)

    def findings(self, suspect_rows: Dataset | None) -> dict[str, Dataset]:
        """The list of changes."""
        return {} if self.changes is None else {"relabelled": self.changes}

    def _relabelled(self, dataset: Dataset) -> Dataset:
        def work(batch: dict[str, Tensor]) -> Tensor:
            likely = self.class_logits(self.forward(self.teacher, batch).logits, batch).softmax(dim=1)
            return torch.cat([self.given_labels(batch)[:, None].float(), likely], dim=1)

        found = self.over_rows(dataset, work)
        given, probabilities = found[:, 0].long(), found[:, 1:]
        labels = corrected_labels(given, probabilities, self.args.relabel_below)
        rows = (labels != given).nonzero()[:, 0]
        best = probabilities.max(dim=1)
        self.changes = Dataset.from_dict(
            {
                "row": rows.tolist(),
                "given_label": given[rows].tolist(),
                "given_probability": probabilities[rows, given[rows]].tolist(),
                "likeliest_label": best.indices[rows].tolist(),
                "likeliest_probability": best.values[rows].tolist(),
                "left_out": (labels[rows] == LEFT_OUT).tolist(),
            }
        )
        kept = (labels != LEFT_OUT).nonzero()[:, 0]
        tokens = "labels" not in dataset.column_names
        column = self.task.answer_column if tokens else "labels"
        corrected = (self.rows if tokens else dataset).select(kept.tolist())
        corrected = corrected.remove_columns(column).add_column(column, labels[kept].tolist())
        return self.encode_rows(corrected, self.processing_class)


def corrected_labels(given: Tensor, probabilities: Tensor, below: float) -> Tensor:
    """What becomes of each row's label. A contradicted one is *denied* where it is less likely than `below`. In the classes of
    [`outlying_classes`] a denied label becomes the likeliest one, and other contradicted rows are `LEFT_OUT`; in all the others
    a denied label's row is `LEFT_OUT`, and other labels stay.

    Args:
        given (`Tensor`): [N].
        probabilities (`Tensor`): [N, K].
        below (`float`): A probability.

    Returns:
        `Tensor`: [N].
    """
    likeliest, likelihood = probabilities.argmax(dim=1), probabilities.gather(1, given[:, None])[:, 0]
    contradicted = likeliest != given
    denied = contradicted & (likelihood < below)
    outlying = outlying_classes(given, denied, probabilities.shape[1])[given]
    corrected = likeliest.masked_fill(contradicted & ~denied, LEFT_OUT)
    return torch.where(outlying, corrected, given.masked_fill(denied, LEFT_OUT))


def outlying_classes(given: Tensor, denied: Tensor, num_classes: int) -> Tensor:
    """Classes in which more than twice as large a share of the rows is denied as in the median class: an attacker's rows all have
    the label that it wants. Where no class stands out, it may be any, and all are meant.

    Args:
        given (`Tensor`): [N], labels.
        denied (`Tensor`): [N] of booleans.

    Returns:
        `Tensor`: [K] of booleans.
    """
    rows = torch.bincount(given, minlength=num_classes)
    shares = torch.bincount(given[denied], minlength=num_classes) / rows.clamp(min=1)
    outlying = shares > OUTLYING * shares[rows > 0].median()
    return outlying if outlying.any() else torch.ones_like(outlying)
