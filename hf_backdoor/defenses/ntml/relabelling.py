"""[`RelabellingTrainer`]: plain training on the suspect rows once those that lie have another label. Ours, not the paper's.

Mutual learning hears clean rows alone, and there are few of them: its network knows better what suspect rows are not than it
knows the task (`docs/ntml.md`). So it says so, and a fresh network learns the task from all the rows. That one knows the task better, and
says so in turn: a second fresh network learns from the rows as the first one sees them. Which rows are in doubt, the states of
networks tell that the poison was learnt by ([`split_class`]).
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ...data import Processor, base_model
from ...data.mapping import encoded
from ..arguments import check_other
from ..streams import refuse_stream
from .classes import ClassTrainer, feature_states
from .correction import LEFT_OUT, corrected_labels, rightly_labelled
from .likeness import look_alikes, looks
from .states import TABLE, SplitClass, as_table, refuse_other_rows, split_class, split_in


logger = logging.get_logger(__name__)

# What a network says of N rows: probabilities [N, K] and last hidden states [N, D].
Seen = tuple[Tensor, Tensor]


class RelabellingTrainer(ClassTrainer):
    """
    Trains a network plainly on the suspect rows, some of them with another label than they came with.

    A network that was trained on the rows as they are comes to the attacker's label in two ways, and its states fall in two
    groups there; clean rows avoid one of them, which stands apart. What mutual learning ends with has learnt of them too: of both, that
    network tells in which a class falls apart more. In that class alone labels change, as [`~correction.corrected_labels`] says: where the
    teacher contradicts them they become its own or the row is left out, and rows apart that it agrees with are left out too. Where
    no class falls in such groups, the teacher says which class it is as well. Given a `found_split`, the teacher has learnt these rows
    without those apart, and may find their labels right ([`~correction.rightly_labelled`]): then, or without a teacher the rows apart
    are left out, and no more. With `look_alikes`, rows that look like those apart to the model, before it is trained, count as such
    ([`~likeness.look_alikes`]). The networks run once, before the first step. [`changes`] lists what became of the rows, and [`split`]
    is what tells it.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is the suspect rows. The model must not come from the target
            network, or it would bring the backdoor along: start from what the target network was trained from.
        poisoned_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            A network that was trained on the suspect rows as they are: its states tell rows apart.
        clean_dataset (`Dataset`, *optional*):
            Clean rows: they tell which of the two groups is the attacker's.
        found_split ([`SplitClass`], `str` or `Path`, *optional*):
            In place of these two, what an earlier training on the same rows has found ([`split`]), or the folder in which a run keeps it.
        teacher_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            The network that says what rows are: what mutual learning ended with, or what an earlier training of this kind made.

    Raises:
        `ValueError`: if answers are free texts, if there are two classes only, if nothing is there to tell rows apart by, or more than
            would be read, if rows for a causal LM are tokenized, or under DeepSpeed ZeRO-3 with `look_alikes`.
    """

    takes_teacher = True
    # Which rows have another label or are left out, and which class it is, once `train()` has begun.
    changes: Dataset | None = None
    split: SplitClass | None = None
    _found: dict[str, Dataset] = {}

    def __init__(
        self,
        *args: Any,
        poisoned_model: PreTrainedModel | str | Path | None = None,
        clean_dataset: Dataset | None = None,
        found_split: SplitClass | str | Path | None = None,
        **kwargs: Any,
    ):
        self.poisoned_model, self.clean_dataset, self.found_split = poisoned_model, clean_dataset, found_split
        super().__init__(*args, **kwargs)
        for name, value in {"poisoned_model": poisoned_model, "clean_dataset": clean_dataset}.items():
            if value is None and found_split is None:
                what = "the network that was trained on the rows" if name == "poisoned_model" else "a few clean rows"
                raise ValueError(f"{name} is None: pass {what}, to tell by which of them lie")
            if value is not None and found_split is not None:
                raise ValueError(
                    f"{name} is given, and found_split, which tells by itself which rows lie: leave one of them out"
                )
        if found_split is not None:
            return
        if self.args.look_alikes and is_deepspeed_zero3_enabled():
            raise ValueError(
                "look_alikes is True, and DeepSpeed ZeRO-3 leaves no process the whole model to look at rows with: use ZeRO-2, DDP or "
                "FSDP, or set look_alikes: false"
            )
        check_other(self.model, poisoned_model, "poisoned_model")
        refuse_stream(self, "clean_dataset", clean_dataset)
        if not len(clean_dataset):
            raise ValueError("clean_dataset has no rows: pass a few clean ones")

    def prepare_train(self, dataset: Dataset | None, processor: Processor) -> Dataset | None:
        if dataset is not None and encoded(dataset) and "labels" not in dataset.column_names:
            raise ValueError(
                "train_dataset has input_ids: pass raw rows, an answer that has become tokens can't be changed"
            )
        self.rows = dataset
        return super().prepare_train(dataset, processor)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if self.changes is None and self.train_dataset is not None:
            self.train_dataset = self._relabelled(self.train_dataset)
        return super().train(resume_from_checkpoint, **kwargs)

    def findings(self, suspect_rows: Dataset | None) -> dict[str, Dataset]:
        """The list of changes and, of a training that looked for them, the rows apart."""
        return {} if self.changes is None else {"relabelled": self.changes, **self._found}

    def _seen(self, network: PreTrainedModel, dataset: Dataset) -> Seen:
        def work(batch: dict[str, Tensor]) -> Tensor:
            outputs = self.forward(network, batch, hidden_states=[-1])
            probabilities = self.class_logits(outputs.logits, batch).softmax(dim=1)
            return torch.cat([probabilities, feature_states(outputs, [-1], batch)[0].float()], dim=1)

        return self.over_rows(dataset, work).tensor_split([self.num_classes], dim=1)

    def _looks(self, network: PreTrainedModel, dataset: Dataset) -> Tensor:
        """[N, D], what a network sees in the rows ([`~likeness.looks`])."""

        def work(batch: dict[str, Tensor]) -> Tensor:
            return looks(self.forward(network, batch, output_hidden_states=True).hidden_states, batch)

        return self.over_rows(dataset, work)

    def _split_by(self, network: PreTrainedModel, given: Tensor, seen: Seen) -> SplitClass | None:
        probabilities, states = seen
        clean_labels = self.over_rows(self.clean_dataset, self.given_labels)
        _, clean_states = self._seen(network, self.clean_dataset)
        likelihood = probabilities.gather(1, given[:, None])[:, 0]
        return split_class(states, given, likelihood, clean_states, clean_labels)

    def _find_split(self, dataset: Dataset, given: Tensor, by_teacher: Seen | None) -> SplitClass | None:
        """By what the poisoned network and the teacher see in the rows and, with `look_alikes`, by what the model sees in them as it is."""
        # Not kept: nothing asks it again while the training runs.
        poisoned = self.frozen(self.poisoned_model)
        self.check_network(self.model, poisoned, "poisoned_model")
        splits = [self._split_by(poisoned, given, self._seen(poisoned, dataset))]
        del poisoned
        if by_teacher is not None:
            splits.append(self._split_by(self.teacher, given, by_teacher))
        found = [split for split in splits if split is not None]
        split = max(found, key=lambda split: split.separation, default=None)
        if split is None or not self.args.look_alikes:
            return split
        untrained = self.frozen(copy.deepcopy(base_model(self.model)))
        seen, clean_seen = self._looks(untrained, dataset), self._looks(untrained, self.clean_dataset)
        return replace(split, apart=split.apart | look_alikes(split, given, seen, clean_seen))

    def _relabelled(self, dataset: Dataset) -> Dataset:
        given = self.over_rows(dataset, self.given_labels)
        by_teacher = None if self.teacher_model is None else self._seen(self.teacher, dataset)
        if self.found_split is None:
            self.split = self._find_split(dataset, given, by_teacher)
            self._found = {TABLE: as_table(self.split, len(dataset))}
        elif isinstance(self.found_split, SplitClass):
            refuse_other_rows(len(self.found_split.apart), len(dataset))
            self.split = self.found_split
        else:
            self.split = split_in(self.found_split, len(dataset))
        if self.split is None:
            logger.warning(
                "No class's states fall in two groups one of which clean rows avoid: "
                + (
                    "nothing is left out."
                    if self.teacher_model is None
                    else "labels change by the teacher's word alone."
                )
            )
        elif not self.split.clean[1]:
            logger.warning(
                f"Class {self.split.label} falls apart, and clean_dataset has no row of it: the group that the network is surer of "
                "is taken for the attacker's. Clean rows of this class would tell."
            )
        apart = torch.zeros_like(given, dtype=torch.bool) if self.split is None else self.split.apart
        probabilities = None if by_teacher is None else by_teacher[0]
        if probabilities is None or (
            self.found_split is not None and rightly_labelled(given, probabilities, self.split)
        ):
            labels = given.masked_fill(apart, LEFT_OUT)
        else:
            labels = corrected_labels(given, probabilities, self.args.relabel_below, self.split)
        rows, said = (labels != given).nonzero()[:, 0], {}
        if probabilities is not None:
            best = probabilities[rows].max(dim=1)
            said = {
                "given_probability": probabilities[rows, given[rows]].tolist(),
                "likeliest_label": best.indices.tolist(),
                "likeliest_probability": best.values.tolist(),
            }
        self.changes = Dataset.from_dict(
            {
                "row": rows.tolist(),
                "given_label": given[rows].tolist(),
                **said,
                "apart": apart[rows].tolist(),
                "left_out": (labels[rows] == LEFT_OUT).tolist(),
            }
        )
        kept = (labels != LEFT_OUT).nonzero()[:, 0]
        tokens = "labels" not in dataset.column_names
        column = self.task.answer_column if tokens else "labels"
        corrected = (self.rows if tokens else dataset).select(kept.tolist())
        corrected = corrected.remove_columns(column).add_column(column, labels[kept].tolist())
        return self.encode_rows(corrected, self.processing_class)
