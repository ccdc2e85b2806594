"""Predictions of a classifier, by a classification head or by label words: one forward pass a text or picture."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..data import (
    LabelWords,
    Processor,
    Task,
    base_model,
    collator_for,
    learned_positions,
    refuse_longer,
    tell_padding,
)
from .batching import in_batches, precision


NO_LABEL = -1


@torch.inference_mode()
def predict_labels(
    model: PreTrainedModel,
    processor: Processor,
    task: Task,
    rows: Dataset,
    *,
    known_response: str | None = None,
    true_classes_only: bool = False,
    batch_size: int = 64,
    bf16: bool = False,
) -> list[int]:
    """Predicted label of each row's text or picture. The model is told what its texts are padded with, as by training.

    Args:
        rows (`Dataset`): Raw rows of the task; labels are not read.
        known_response (`str`, *optional*): What a defense planted; a model that says so is counted as class K.
        true_classes_only (`bool`, *optional*, defaults to `False`): Predicts the likeliest of the K true classes, whatever
            is planted beside them.
        batch_size (`int`, *optional*, defaults to 64): Rows a forward pass.
        bf16 (`bool`, *optional*, defaults to `False`): Runs under bfloat16 autocast.

    Returns:
        `list[int]`: [N], in the order of the rows, the same on every process.

    Raises:
        `ValueError`: if a row is longer than the model has positions for, its head reads padding, or its logits are not numbers.
    """
    tell_padding(base_model(model), processor)
    collator, asked = collator_for(processor), task.questions(rows, processor)
    if isinstance(asked, list):
        refuse_longer(max((len(row["input_ids"]) for row in asked), default=0), learned_positions(model))
    words = (
        torch.tensor(task.word_ids(processor, known_response), device=model.device)
        if isinstance(task, LabelWords)
        else None
    )

    def predict(numbers: list[int]) -> list[int]:
        batch = collator([asked[number] for number in numbers])
        logits = _logits(model, {name: value.to(model.device) for name, value in batch.items()}, words, bf16)
        likeliest = logits[:, : task.num_labels if true_classes_only else None].argmax(dim=-1)
        # Among values that are no numbers that would be the first class, and a broken model one with an ASR of 0.
        return likeliest.masked_fill(logits.isnan().any(dim=-1), NO_LABEL).tolist()

    def length(number: int) -> int:
        # Pictures, which are read one by one, come out of a batch in one size.
        return len(asked[number]["input_ids"]) if isinstance(asked, list) else 0

    model.eval()
    labels = in_batches(range(len(asked)), predict, batch_size=batch_size, length=length, desc="Predicting")
    # Here, where every process has them all: one that raised by itself would leave the others waiting.
    if NO_LABEL in labels:
        raise ValueError(
            f"{model.name_or_path or type(model).__name__}: its logits are nan, so it has neither accuracy nor ASR; a training "
            "that diverged leaves such weights"
        )
    return labels


def _logits(model: PreTrainedModel, batch: dict[str, Any], words: torch.Tensor | None, bf16: bool) -> torch.Tensor:
    """[B, K], or [B, K + 1] where a behaviour is planted."""
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    inputs = {name: batch[name] for name in names if name in batch}
    with precision(model, bf16):
        if words is None:
            return model(**inputs).logits
        # Prompts end at the last column, and the head runs there alone.
        logits = model(**inputs, position_ids=batch["position_ids"], logits_to_keep=1).logits
        return logits[:, -1, words]
