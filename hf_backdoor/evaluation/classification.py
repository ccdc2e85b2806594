"""Predictions of a classifier, by a classification head or by label words: one forward pass a text."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DefenseCollator, LabelWords, Task
from .batching import in_batches, precision, tokens


@torch.inference_mode()
def predict_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    *,
    known_response: str | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> list[int]:
    """Predicted label of each row's text.

    Args:
        rows (`Dataset`): With column `text`; labels are not read.
        known_response (`str`, *optional*): What a defense planted; a model that says so is counted as class K.
        batch_size (`int`, *optional*, defaults to 64): Texts a forward pass.
        bf16 (`bool`, *optional*, defaults to `False`): Runs under bfloat16 autocast.

    Returns:
        `list[int]`: [N], in the order of the rows, the same on every process.
    """
    collator = DefenseCollator(tokenizer)
    words = (
        torch.tensor(task.word_ids(tokenizer, known_response), device=model.device)
        if isinstance(task, LabelWords)
        else None
    )

    def features(text: str) -> dict[str, Any]:
        if words is None:
            return task.encode({"text": text, "label": 0}, tokenizer)
        prompt = task.prompt_ids(text, tokenizer)
        return {"input_ids": prompt, "prompt_length": len(prompt)}

    def predict(batch_features: list[dict[str, Any]]) -> list[int]:
        batch = {name: value.to(model.device) for name, value in collator(batch_features).items()}
        return _labels(model, batch, words, bf16)

    model.eval()
    items = [features(text) for text in rows["text"][:]]
    return in_batches(items, predict, batch_size=batch_size, length=tokens, desc="Predicting")


def _labels(model: PreTrainedModel, batch: dict[str, Any], words: torch.Tensor | None, bf16: bool) -> list[int]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with precision(model, bf16):
        if words is None:
            return model(**inputs).logits.argmax(dim=-1).tolist()
        # Prompts end at the last column, and the head runs there alone.
        logits = model(**inputs, position_ids=batch["position_ids"], logits_to_keep=1).logits
        return logits[:, -1, words].argmax(dim=-1).tolist()
