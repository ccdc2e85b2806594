"""[`ClassTrainer`]: K logits a sample, of a classification head or of label words, in texts, images or anything else."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ...data import InstructionFollowing, LabelWords, Task, base_model, class_logits, given_labels, row_lengths
from ..arguments import check_alike, check_vocabulary, labels_of
from ..readout import readout_states
from ..streams import refuse_stream
from ..trainer import DefenseTrainer
from .config import NTMLConfig


def refuse_run(task: Task) -> None:
    """Refuses, before anything is trained, a task that a run of all stages could not do.

    Raises:
        `ValueError`: if answers are free texts, or if there are two classes only.
    """
    refuse_unfit(task, getattr(task, "num_labels", 0))


def refuse_unfit(task: Task | None, num_labels: int) -> None:
    """Refuses what has no second class to learn from.

    Raises:
        `ValueError`: if answers are free texts, or if there are two classes only.
    """
    if isinstance(task, InstructionFollowing):
        raise ValueError(
            "task is instruction_following: a free answer has no second class, which ntml learns from; use label_words "
            "or sequence_classification, or another method, for example locphylax"
        )
    if num_labels < 3:
        raise ValueError(
            f"num_labels is {num_labels}: without its given label a sample is left with one class, so ntml would learn "
            "every label the wrong way round; use rows of three classes or more (AG News has 4), or another method, for "
            "example locphylax"
        )


class ClassTrainer(DefenseTrainer):
    """What all of NT-ML's trainers need: the K logits and the given label of each sample, and passes over all rows.

    Rows may be images or anything else that the model takes: pass features (with `labels`) and a `data_collator`. Any
    model with `logits` and `hidden_states` will do.
    """

    takes_streams = False  # soft labels are computed once for all rows, before the first step

    @classmethod
    def config_class(cls) -> type[NTMLConfig]:
        return NTMLConfig

    def prepare_model(self, model: PreTrainedModel) -> None:
        words = isinstance(self.task, LabelWords)
        refuse_unfit(self.task, self.task.num_labels if words else model.config.num_labels)

    @property
    def num_classes(self) -> int:
        return self.task.num_labels if isinstance(self.task, LabelWords) else base_model(self.model).config.num_labels

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        self.check_network(self.model, teacher, "teacher_model")

    def check_network(self, model: nn.Module, other: nn.Module, argument: str) -> None:
        """Raises `ValueError` for a network that has other answers than the model, or does not know all of its tokens."""
        field = "vocab_size" if isinstance(self.task, LabelWords) else "num_labels"
        check_alike(model, other, argument, [field], "logits are compared one by one: pass two of the same answers")
        check_vocabulary(model, other, argument, self.processing_class)

    @cached_property
    def word_ids(self) -> Tensor | None:
        """[K], first tokens of the label words; nothing where a classification head gives the K logits."""
        if not isinstance(self.task, LabelWords):
            return None
        return torch.tensor(self.task.word_ids(self.processing_class), device=self.args.device)

    def class_logits(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """[B, K] in float32: the head's, or those of the label words at the read-out position."""
        return class_logits(logits, inputs, self.word_ids)

    def given_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B], 0 to K - 1: the label that each row came with."""
        return given_labels(labels_of(inputs), self.word_ids)

    @torch.no_grad()
    def over_rows(self, dataset: Dataset, work: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Goes once over all rows, shared out over processes.

        Args:
            dataset (`Dataset`): Raw or tokenized rows.
            work (`Callable`): A batch to a tensor of as many rows.

        Returns:
            `Tensor`: [N, ...] on the CPU, in the order of the rows, the same on every process.
        """
        refuse_stream(self, "dataset", dataset)
        dataset = self._remove_unused_columns(self.encode_new(dataset))
        order = list(range(len(dataset)))
        if "input_ids" in dataset.column_names:
            lengths = row_lengths(dataset)
            order.sort(key=lambda row: lengths[row])
        processes = self.accelerator.num_processes
        # As many rows for each process: gathering needs it, and what is done twice is thrown away.
        padded = order + order[:1] * (-len(order) % processes)
        share = dataset.select(padded[self.accelerator.process_index :: processes])
        loader = DataLoader(
            share,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        parts = []
        for batch in loader:
            with self.compute_loss_context_manager():
                parts.append(work(self._prepare_inputs(batch)))
        found = self.accelerator.gather(torch.cat(parts))
        found = found.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[: len(order)].cpu()
        return found[torch.tensor(order).argsort()]

    def logits_over_rows(self, network: PreTrainedModel, dataset: Dataset) -> Tensor:
        """[N, K] in float32: a network's class logits of all rows."""

        def work(batch: dict[str, Tensor]) -> Tensor:
            self.given_labels(batch)  # refuses other answers before the first step
            return self.class_logits(self.forward(network, batch).logits, batch)

        return self.over_rows(dataset, work)


def feature_states(outputs: ModelOutput, layers: Sequence[int], inputs: dict[str, Any]) -> list[Tensor]:
    """Features of each layer, [B, D], as [`readout_states`] has them.

    Raises:
        `ValueError`: if the model gives no such hidden state.
    """
    states = []
    for layer in layers:
        hidden = outputs.get("hidden_states")
        if hidden is None or not -len(hidden) <= layer < len(hidden) or hidden[layer] is None:
            raise ValueError(f"feature_layers is {list(layers)}: the model gives no hidden state {layer}")
        states.append(readout_states(hidden[layer], inputs))
    return states
