"""The batch contract: what every trainer and loss of this package may rely on.

| key | shape | for | meaning |
|---|---|---|---|
| `input_ids`, `attention_mask` | [B, T] | all | padded right for a classification head, left for a causal LM |
| `token_type_ids` | [B, T] | encoders that use them | |
| `position_ids` | [B, T] | causal LMs | counted from the first real token, since left padding would shift them |
| `labels` | [B] | classification head | class |
| `labels` | [B, A] | causal LMs | the last A tokens of the sequence, -100 where they are not the answer |
| `readout_position` | [B] | all | index into T of the state that a representation loss reads |
| `trigger_id` | [B] | all | 0 clean, k >= 1 carries the defender's k-th known trigger |

A causal LM's answers end at the last column, so the head runs on A + 1 positions (`logits_to_keep`), never on T.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


SIDE_COLUMNS = ("trigger_id", "readout_position", "prompt_length")


@dataclass
class DefenseCollator:
    """Makes the batch above out of a task's features.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Gives the padding token; the end-of-sequence token stands in where it has none.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        causal = "prompt_length" in features[0]
        batch = self._causal(features) if causal else self._classification(features)
        batch["trigger_id"] = torch.tensor([feature.get("trigger_id", 0) for feature in features])
        return batch

    def _classification(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = [{name: feature[name] for name in names if name in feature} for feature in features]
        batch = dict(self.tokenizer.pad(inputs, padding=True, padding_side="right", return_tensors="pt"))
        batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        batch["readout_position"] = torch.tensor([feature["readout_position"] for feature in features])
        return batch

    def _causal(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(len(feature["input_ids"]) for feature in features)
        answer = max(len(feature["input_ids"]) - feature["prompt_length"] for feature in features)
        input_ids = torch.full((len(features), width), pad)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full((len(features), answer), -100)
        for row, feature in enumerate(features):
            ids = torch.tensor(feature["input_ids"])
            input_ids[row, width - len(ids) :] = ids
            attention_mask[row, width - len(ids) :] = 1
            length = len(ids) - feature["prompt_length"]
            labels[row, answer - length :] = ids[feature["prompt_length"] :]
        lengths = (labels != -100).sum(dim=1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels,
            "readout_position": width - 1 - lengths,
        }
