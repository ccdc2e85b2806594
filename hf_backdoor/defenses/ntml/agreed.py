"""[`AgreedRowsTrainer`]: plain training on the suspect rows that mutual learning agrees with. Ours, not the paper's.

Mutual learning hears clean rows alone, and there are few of them: its network knows which suspect rows are wrong better than it
knows the task (`docs/ntml.md`). So it says so, and a fresh network learns the task from all the others.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from .classes import ClassTrainer


class AgreedRowsTrainer(ClassTrainer):
    """
    Trains a network plainly on those of the suspect rows whose given label a clean teacher holds for the likeliest.

    The teacher runs once, before the first step. [`left_out`] lists the rows that it contradicts.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is the suspect rows. The model must not come from the target
            network, or it would bring the backdoor along: start from what the target network was trained from.
        teacher_model (`PreTrainedModel` or `str`):
            The network that mutual learning ended with.

    Raises:
        `ValueError`: if answers are free texts, if there are two classes only, or if the teacher agrees with no row.
    """

    # There once `train()` has begun.
    left_out: Dataset | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if self.left_out is None:
            self.train_dataset = self._agreed(self.train_dataset)
        return super().train(resume_from_checkpoint, **kwargs)

    def findings(self, suspect_rows: Dataset | None) -> dict[str, Dataset]:
        """The list of rows that were left out."""
        return {} if self.left_out is None else {"left_out": self.left_out}

    def _agreed(self, dataset: Dataset) -> Dataset:
        def work(batch: dict[str, Tensor]) -> Tensor:
            likely = self.class_logits(self.forward(self.teacher, batch).logits, batch).softmax(dim=1)
            return torch.cat([self.given_labels(batch)[:, None].float(), likely], dim=1)

        found = self.over_rows(dataset, work)
        given, probabilities = found[:, 0].long(), found[:, 1:]
        likeliest = probabilities.argmax(dim=1)
        rows = (likeliest != given).nonzero()[:, 0]
        self.left_out = Dataset.from_dict(
            {
                "row": rows.tolist(),
                "given_label": given[rows].tolist(),
                "given_probability": probabilities[rows, given[rows]].tolist(),
                "likeliest_label": likeliest[rows].tolist(),
                "likeliest_probability": probabilities[rows, likeliest[rows]].tolist(),
            }
        )
        agreed = (likeliest == given).nonzero()[:, 0].tolist()
        if not agreed:
            raise ValueError(
                "teacher_model contradicts every row of train_dataset: pass the network that mutual learning ended with"
            )
        return dataset.select(agreed)
