"""The premise of NT-ML, measured: is a poisoned sample's true label the target network's second choice?

Non-target training (https://huggingface.co/papers/2508.05404) teaches what the target network would say if a sample's
given label were not there. That helps where the true label comes first among the rest. Below a rate of about 60% it can't
be expected to; where early epochs do better than the last one, the network is saturated, and an early checkpoint or a
temperature above 1 may help. It takes true labels, so it belongs into benchmarks, not into a defense.
"""

from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data import LabelWords, Processor, Task, base_model, check_raw, class_logits, collator_for, tell_padding


def second_choice_rate(logits: Tensor, given_labels: Sequence[int], true_labels: Sequence[int]) -> float:
    """Share of samples whose true label is the network's first choice once the given label is left out.

    For a sample whose given label the network has learnt, that is its second choice (the "top-2 rate"). For one that it
    has not learnt yet, the true label may still stand first of all, and non-target labels are as good.

    Args:
        logits (`Tensor`): [N, K], of the target network, on poisoned samples.
        given_labels (`Sequence[int]`): [N], what the attacker wrote.
        true_labels (`Sequence[int]`): [N], what stood there before.

    Raises:
        `ValueError`: if there is no sample, or one with its true label (a clean-label attack leaves no second choice).
    """
    given, true = torch.as_tensor(given_labels), torch.as_tensor(true_labels)
    if len(logits) == 0:
        raise ValueError("logits has no rows: pass those of the poisoned training samples")
    if (same := int((given == true).sum())) > 0:
        raise ValueError(
            f"given_labels has {same} samples with their true label: pass the poisoned samples whose label was changed"
        )
    rest = logits.float().cpu().scatter(1, given[:, None], -torch.inf)
    return float((rest.argmax(dim=1) == true).float().mean())


@torch.no_grad()
def label_logits(
    model: PreTrainedModel, processor: Processor, task: Task, rows: Dataset, *, batch_size: int = 64
) -> Tensor:
    """A classifier's K logits of each row: the head's, or the label words' at the read-out position.

    Args:
        rows (`Dataset`): Raw rows of the task, triggers in place.
        batch_size (`int`, *optional*, defaults to 64): Rows a forward pass.

    Returns:
        `Tensor`: [N, K] in float32, on the CPU.

    Raises:
        `ValueError`: if something else than a text stands in a row, or the head reads padding.
    """
    check_raw(rows, task)
    tell_padding(base_model(model), processor)
    words = task.word_ids(processor) if isinstance(task, LabelWords) else None
    collator, features = collator_for(processor), task.encode_rows(rows, processor)
    training = model.training
    model.eval()
    parts = []
    for start in range(0, len(features), batch_size):
        part = [features[row] for row in range(start, min(start + batch_size, len(features)))]
        batch = {name: value.to(model.device) for name, value in collator(part).items()}
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")
        inputs = {name: batch[name] for name in names if name in batch}
        keep = {} if words is None else {"logits_to_keep": batch["labels"].shape[1] + 1}
        parts.append(class_logits(model(**inputs, **keep).logits, batch, words).cpu())
    model.train(training)
    return torch.cat(parts)


class SecondChoiceCallback(TrainerCallback):
    """Measures [`second_choice_rate`] of a network in training after every epoch.

    Args:
        logits (`Callable`): A model to its K logits on the poisoned samples, [N, K]; see [`label_logits`].
        given_labels, true_labels (`Sequence[int]`): As in [`second_choice_rate`].

    Attributes:
        rates (`dict[int, float]`): By epoch, counted from 1.
    """

    def __init__(self, logits: Callable[[nn.Module], Tensor], given_labels: Sequence[int], true_labels: Sequence[int]):
        self.logits = logits
        self.given_labels, self.true_labels = given_labels, true_labels
        self.rates: dict[int, float] = {}

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        rate = second_choice_rate(self.logits(model), self.given_labels, self.true_labels)
        self.rates[round(state.epoch)] = rate
